"""The whole configuration of a run, as typed dataclasses; a file in configs/ returns one.

A field says beside its default what it may be: `fields` holds every value against that.
"""

import dataclasses
import difflib
import functools
import os
import re
import traceback
import typing
from collections.abc import Callable, Iterator
from typing import Any

from jax_refusal.fields import (
    INT32,
    MANY,
    SEEDS,
    ConfigError,
    check_values,
    choice,
    declared,
    number,
)

# Short rows attend to little that is not their own. With 4096 tokens at once the activations leave
# a CPU's caches, a sixth slower; an accelerator that is not busy with 2048 may be given more.
ROW_TOKENS, BATCH_TOKENS = 64, 2048
DISCOVERY_TOKENS = 24  # of replies that say whether a model refuses


@dataclasses.dataclass
class ModelConfig:
    source: str = ""  # hub id, directory, .gguf file, or package:DIST/FILE.gguf
    adapter: str = ""  # PEFT LoRA directory merged into the weights; empty is none
    dtype: str = choice("float32", "bfloat16")
    template: str = ""  # a named chat template (data/templates.py); empty is the tokenizer's own
    system: str | None = None  # text of the system turn; None leaves it to the template
    ignore_config_fields: tuple[str, ...] = ()  # config.json fields you vouch for


@dataclasses.dataclass
class MeshConfig:
    # Devices that share out rows (-1 is all that are left), and those that share out weights.
    data: int = number(1, 1, MANY, also=(-1,), how=True)
    model: int = number(1, 1, MANY, how=True)


@dataclasses.dataclass
class DataConfig:
    source: str = choice("builtin", "paper")
    harmful: str = ""  # own FILE.json, .jsonl, .csv or .txt (docs/prompts.md); overrides source
    harmless: str = ""
    n_train: int = number(128, 1, MANY)  # instructions of each kind
    n_val: int = number(32, 1, MANY)
    n_test: int = number(100, 1, MANY)
    seed: int | None = number(42, 0, SEEDS)  # None takes the files in order
    filter: bool = True  # keep harmful with refusal score > 0 and harmless with < 0
    # A local copy of the published sets, or hub:OWNER/NAME@REVISION; empty fetches them.
    paper_dir: str = ""
    # Which published set the harmful test prompts are from.
    paper_test: str = choice("jailbreakbench", "harmbench_test", "strongreject")


@dataclasses.dataclass
class RefusalConfig:
    # First tokens of a refusal; empty leaves them to source.
    token_ids: tuple[int, ...] = number((), -INT32, INT32)
    # From the model's own replies, or those of model.template.
    source: str = choice("discovered", "paper")
    # Length of the replies that discovery reads.
    discovery_tokens: int = number(DISCOVERY_TOKENS, 1, MANY)


@dataclasses.dataclass
class SelectionConfig:
    kl_threshold: float = number(0.1, 0)  # nats
    induce_threshold: float = number(0.0)  # nats (log odds)
    # Share of the layers, from the top, that is not considered.
    prune_layers: float = number(0.2, 0, 1, below=True)
    fallback: str = choice("error", "least_bad")  # when no candidate passes
    full_grid: bool = False  # score every candidate on every criterion


@dataclasses.dataclass
class GenerateConfig:
    max_new_tokens: int = number(512, 1, MANY)
    batch_size: int = number(64, 1, MANY, how=True)
    temperature: float = number(0.0, 1e-6, also=(0,))  # 0 is greedy
    seed: int = number(0, 0, SEEDS)


@dataclasses.dataclass
class EvalsConfig:
    judges: tuple[str, ...] = ("substring",)  # of the replies; the first one's rates are the table


@dataclasses.dataclass
class ComputeConfig:
    row_tokens: int = number(ROW_TOKENS, 16, MANY, how=True)  # most of a packed row
    # In one forward pass, for each part of the mesh's data axis.
    batch_tokens: int = number(BATCH_TOKENS, 16, MANY, how=True)


@dataclasses.dataclass
class RunConfig:
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    refusal: RefusalConfig = dataclasses.field(default_factory=RefusalConfig)
    selection: SelectionConfig = dataclasses.field(default_factory=SelectionConfig)
    generate: GenerateConfig = dataclasses.field(default_factory=GenerateConfig)
    evals: EvalsConfig = dataclasses.field(default_factory=EvalsConfig)
    compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)


def identity(config: Any) -> dict[str, Any]:
    """The fields that say what is computed: two runs that agree in them have the same results."""
    keep = {}
    for section in dataclasses.fields(config):
        value = getattr(config, section.name)
        if dataclasses.is_dataclass(value):
            keep |= {f"{section.name}.{k}": v for k, v in identity(value).items()}
        elif section.metadata.get("identity", True):
            keep[section.name] = list(value) if isinstance(value, tuple) else value
    return keep


def from_identity(fields: dict[str, Any]) -> RunConfig:
    """The RunConfig with these dotted fields (as `identity` gives them), the others at default.

    Raises ConfigError for a field that does not exist.
    """
    config = RunConfig()
    unknown = sorted(fields.keys() - declared(RunConfig).keys())
    if unknown:
        raise ConfigError(f"{unknown[:20]}: a RunConfig has no such fields.")
    for name, value in fields.items():
        section, field = name.split(".")
        setattr(getattr(config, section), field, tuple(value) if isinstance(value, list) else value)
    return config


def validate(config: RunConfig) -> RunConfig:
    """Raises ConfigError with every value that is not allowed; returns the config."""
    check_kind(config, RunConfig)
    problems = check_values(config)
    if not config.model.source:
        problems.append("model.source is empty (a hub id, directory or .gguf file)")
    if config.refusal.source == "paper" and not config.model.template:
        problems.append(
            'refusal.source="paper" takes the tokens of model.template, which is empty (name one, '
            "or name the tokens in refusal.token_ids)"
        )
    if bool(config.data.harmful) != bool(config.data.harmless):
        problems.append("data.harmful and data.harmless go together: both or neither")
    if problems:
        raise ConfigError("The config cannot be run: " + "; ".join(problems) + ".")
    return config


def check_kind(config: Any, schema: type) -> None:
    """Raises ConfigError for a config file of another entry point."""
    try:
        fits = hasattr(config, "model") and isinstance(config, schema)
    except OSError as error:  # ml_collections keeps one that the file raised for whoever looks
        raise ConfigError(f"--config: {error}.") from error
    if not fits:
        raise ConfigError(
            f"--config: get_config() returns a {type(config).__name__} and this command needs a "
            f"{schema.__name__}. See the other files in configs/."
        )


# On the command line


# --config.a.b=c, -config.a.b c, --noconfig.a.b
OVERRIDE = re.compile(r"--?(no)?config\.([^=]*)(=?)(.*)", re.DOTALL)


def parsed(
    parse: Callable[[list[str]], list[str]],  # absl's FLAGS
    arguments: list[str],
    schema: type = RunConfig,
) -> list[str]:
    """What `parse` returns of the checked arguments. Raises ConfigError for what is wrong in the
    config file or with its overrides, with the line of the file, and for arguments that are no
    flags; absl's own errors of other flags stay."""
    from absl import flags

    try:
        rest = parse(check_overrides(arguments, schema))
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        file = next(_config_files(arguments), "")
        place, cause = _place(error, file)
        other = isinstance(error, flags.Error) and not str(error).startswith("flag --config=")
        if not file or (not place and (other or isinstance(error, SystemExit))):
            raise
        text = f"--config={file}{place}: {type(cause).__name__}: {_line(str(cause))}"
        raise ConfigError(text) from error
    if rest[1:]:
        raise ConfigError(f"{_line(str(rest[1:]))} are no flags: a flag is --name=value.")
    return rest


def _line(text: str, most: int = 400) -> str:
    """A text of whatever length as a short one of one line."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]}..."


def _config_files(arguments: list[str]) -> Iterator[str]:
    """The files of --config, without what stands behind a colon, which goes to get_config."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, equals, value = argument.partition("=")
        if flag in ("--config", "-config"):
            yield (value if equals else following).partition(":")[0]


def _place(error: BaseException, file: str) -> tuple[str, BaseException]:
    """Where in the file something went wrong, and what; nowhere, and the first cause, if that is
    not in the file. Errors of get_config come wrapped in those of the flag."""
    own, seen = os.path.abspath(file), error
    while True:
        frames = traceback.extract_tb(seen.__traceback__)
        lines = [frame.lineno for frame in frames if os.path.abspath(frame.filename) == own]
        if isinstance(seen, SyntaxError) and os.path.abspath(seen.filename or "") == own:
            lines.append(seen.lineno)
        if lines:
            return f", line {lines[-1]}", seen
        cause = seen.__cause__ or seen.__context__
        if cause is None:
            return "", seen
        seen = cause


def check_overrides(arguments: list[str], config_class: type = RunConfig) -> list[str]:
    """Refuses a config file or a field of `--config.a.b=c` that does not exist, naming what does.

    Returns the arguments without `--config.a.b=None` of optional fields: see `empty_optional`.
    """
    for file in _config_files(arguments):
        if not os.path.isfile(file):
            raise ConfigError(
                f"--config={_line(file)}: there is no such file. Give a Python file with a "
                f"get_config() that returns a {config_class.__name__}, like those in configs/."
            )
    kinds, rest = declared(config_class), []
    for argument in arguments:
        found = OVERRIDE.fullmatch(argument)
        if found and (name := found[2]) not in kinds:
            near = difflib.get_close_matches(name, sorted(kinds), n=3) or sorted(kinds)
            raise ConfigError(
                f"--config.{_line(name)}: there is no such field. Did you mean {', '.join(near)}? "
                f"The fields are in {config_class.__module__.replace('.', '/')}.py."
            )
        if not found or not _is_none(found, config_class):
            rest.append(argument)
    return rest


def _is_none(override: re.Match[str], schema: type) -> bool:
    _, name, equals, value = override.groups()
    optional = type(None) in typing.get_args(declared(schema)[name][0])
    return optional and bool(equals) and value == "None"


def empty_optional(config: Any, arguments: list[str]) -> Any:
    """Sets the fields of `--config.a.b=None` to None, in place: flags have no word for it."""
    overrides = filter(None, map(OVERRIDE.fullmatch, arguments))
    last = {override[2]: override for override in overrides}  # of each field the last one counts
    for name, override in last.items():
        if name in declared(type(config)) and _is_none(override, type(config)):
            *sections, field = name.split(".")
            setattr(functools.reduce(getattr, sections, config), field, None)
    return config
