"""The whole configuration of a run, as typed dataclasses; a file in configs/ returns one."""

import dataclasses
import difflib
import functools
import os
import typing
from collections.abc import Mapping
from typing import Any

# Says how to compute, not what: may differ between the runs that share a workdir.
HOW = {"identity": False}

# Short rows attend to little that is not their own. With 4096 tokens at once the activations leave
# a CPU's caches, a sixth slower; an accelerator that is not busy with 2048 may be given more.
ROW_TOKENS, BATCH_TOKENS = 64, 2048
DISCOVERY_TOKENS = 24  # of replies that say whether a model refuses


@dataclasses.dataclass
class ModelConfig:
    source: str = ""  # hub id, directory, .gguf file, or package:DIST/FILE.gguf
    adapter: str = ""  # PEFT LoRA directory merged into the weights; empty is none
    dtype: str = "float32"  # float32 or bfloat16
    template: str = ""  # a named chat template (data/templates.py); empty is the tokenizer's own
    system: str | None = None  # text of the system turn; None leaves it to the template
    ignore_config_fields: tuple[str, ...] = ()  # config.json fields you vouch for


@dataclasses.dataclass
class MeshConfig:
    data: int = dataclasses.field(default=1, metadata=HOW)  # devices that share out rows; -1 is all
    model: int = dataclasses.field(default=1, metadata=HOW)  # devices that share out weights


@dataclasses.dataclass
class DataConfig:
    source: str = "builtin"  # builtin or paper
    harmful: str = ""  # own FILE.json, .jsonl, .csv or .txt (docs/prompts.md); overrides source
    harmless: str = ""
    n_train: int = 128  # instructions of each kind
    n_val: int = 32
    n_test: int = 100
    seed: int | None = 42  # None takes the files in order
    filter: bool = True  # keep harmful with refusal score > 0 and harmless with < 0
    # A local copy of the published sets, or hub:OWNER/NAME@REVISION; empty fetches them.
    paper_dir: str = ""
    paper_test: str = "jailbreakbench"  # which published set the harmful test prompts are from


@dataclasses.dataclass
class RefusalConfig:
    token_ids: tuple[int, ...] = ()  # first tokens of a refusal; empty leaves them to source
    source: str = "discovered"  # from the model's own replies; or paper: those of model.template
    discovery_tokens: int = DISCOVERY_TOKENS  # length of the replies that discovery reads


@dataclasses.dataclass
class SelectionConfig:
    kl_threshold: float = 0.1  # nats
    induce_threshold: float = 0.0  # nats (log odds)
    prune_layers: float = 0.2  # share of the layers, from the top, that is not considered
    fallback: str = "error"  # error, or least_bad when no candidate passes
    full_grid: bool = False  # score every candidate on every criterion


@dataclasses.dataclass
class GenerateConfig:
    max_new_tokens: int = 512
    batch_size: int = dataclasses.field(default=64, metadata=HOW)
    temperature: float = 0.0  # 0 is greedy
    seed: int = 0


@dataclasses.dataclass
class EvalsConfig:
    judges: tuple[str, ...] = ("substring",)  # of the replies; the first one's rates are the table


@dataclasses.dataclass
class ComputeConfig:
    row_tokens: int = dataclasses.field(default=ROW_TOKENS, metadata=HOW)  # most of a packed row
    # In one forward pass, for each part of the mesh's data axis.
    batch_tokens: int = dataclasses.field(default=BATCH_TOKENS, metadata=HOW)


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


class ConfigError(ValueError):
    """A field that does not exist or a value that is not allowed."""


CHOICES = {
    "model.dtype": ("float32", "bfloat16"),
    "data.source": ("builtin", "paper"),
    "data.paper_test": ("jailbreakbench", "harmbench_test", "strongreject"),
    "selection.fallback": ("error", "least_bad"),
    "refusal.source": ("discovered", "paper"),
}
AT_LEAST = {
    "data.n_train": 1,
    "data.n_val": 1,
    "data.n_test": 1,
    "refusal.discovery_tokens": 1,
    "generate.max_new_tokens": 1,
    "generate.batch_size": 1,
    "generate.temperature": 0,
    "compute.row_tokens": 16,
    "compute.batch_tokens": 16,
    "mesh.model": 1,
    "mesh.data": -1,
}


def flatten(config: Any) -> dict[str, Any]:
    """Dotted field name -> value."""
    flat = {}
    for section in dataclasses.fields(config):
        value = getattr(config, section.name)
        if dataclasses.is_dataclass(value):
            flat |= {f"{section.name}.{k}": v for k, v in flatten(value).items()}
        else:
            flat[section.name] = value
    return flat


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
    """The RunConfig with these dotted fields (as `identity` gives them), the others at default."""
    config = RunConfig()
    for name, value in fields.items():
        section, field = name.split(".")
        setattr(getattr(config, section), field, tuple(value) if isinstance(value, list) else value)
    return config


def check_values(
    config: Any, choices: Mapping[str, tuple[Any, ...]], at_least: Mapping[str, float]
) -> list[str]:
    """What is wrong with single values; ConfigError at once for values of a wrong type.

    choices: dotted field name -> values it may have. at_least: name -> its least value.
    """
    flat = flatten(config)
    wrong = [
        f"{name}={flat[name]!r} ({kind.__name__ if isinstance(kind, type) else kind} is needed)"
        for name, kind in _kinds(config).items()
        if not _fits(flat[name], kind)
    ]
    if wrong:
        raise ConfigError("The config has values of a wrong type: " + "; ".join(wrong) + ".")
    problems = [
        f"{name}={flat[name]!r} (allowed: {', '.join(allowed)})"
        for name, allowed in choices.items()
        if flat[name] not in allowed
    ]
    return problems + [
        f"{name}={flat[name]!r} (at least {least})"
        for name, least in at_least.items()
        if flat[name] < least
    ]


def validate(config: RunConfig) -> RunConfig:
    """Raises ConfigError with every value that is not allowed; returns the config."""
    problems = check_values(config, CHOICES, AT_LEAST)
    if not config.model.source:
        problems.append("model.source is empty (a hub id, directory or .gguf file)")
    if not 0 <= config.selection.prune_layers < 1:
        problems.append(f"selection.prune_layers={config.selection.prune_layers} (0 <= x < 1)")
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
    if not isinstance(config, schema):
        raise ConfigError(
            f"--config: get_config() returns a {type(config).__name__} and this command needs a "
            f"{schema.__name__}. See the other files in configs/."
        )


def check_overrides(arguments: list[str], config_class: type = RunConfig) -> list[str]:
    """Refuses a config file or a field of `--config.a.b=c` that does not exist, naming what does.

    Returns the arguments without `--config.a.b=None` of optional fields: see `empty_optional`.
    """
    kinds = _kinds(config_class())
    rest = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, equals, value = argument.partition("=")
        if flag == "--config":
            file = (value if equals else following).partition(":")[0]
            if not os.path.isfile(file):
                raise ConfigError(
                    f"--config={file}: there is no such file. Give a Python file with a "
                    f"get_config() that returns a {config_class.__name__}, like those in configs/."
                )
        name = flag.removeprefix("--config.")
        if name != flag and name not in kinds:
            near = difflib.get_close_matches(name, sorted(kinds), n=3) or sorted(kinds)
            raise ConfigError(
                f"--config.{name}: there is no such field. Did you mean {', '.join(near)}? "
                f"The fields are in {config_class.__module__.replace('.', '/')}.py."
            )
        if name == flag or value != "None" or type(None) not in typing.get_args(kinds[name]):
            rest.append(argument)
    return rest


def empty_optional(config: Any, arguments: list[str]) -> Any:
    """Sets the fields of `--config.a.b=None` to None, in place: flags have no word for it."""
    optional = [
        name for name, kind in _kinds(config).items() if type(None) in typing.get_args(kind)
    ]
    for name in optional:
        if f"--config.{name}=None" in arguments:
            *sections, field = name.split(".")
            setattr(functools.reduce(getattr, sections, config), field, None)
    return config


def _kinds(config: Any) -> dict[str, Any]:
    """Dotted field name -> annotated type."""
    kinds = {}
    for name, kind in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        inner = _kinds(value) if dataclasses.is_dataclass(value) else {"": kind}
        kinds |= {f"{name}.{k}".rstrip("."): v for k, v in inner.items()}
    return kinds


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated type; an int is a float, and a bool is neither."""
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple | list) and all(_fits(v, parts[0]) for v in value)
    if parts:
        return any(_fits(value, part) for part in parts)
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, int | float if kind is float else kind)
