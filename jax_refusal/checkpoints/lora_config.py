"""adapter_config.json of a PEFT LoRA: which modules it names, with which rank and scale.

Every field of PEFT's `LoraConfig` is computed (CHECKS), has no effect on the merged weights
(WITHOUT_EFFECT), or is refused by name unless it is empty (REFUSED). Names are matched as PEFT
matches them (its `check_target_module_exists`, `get_pattern_key` and `_inject_parameters`).
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import regex

from jax_refusal.checkpoints.sources import SourceError, read_json
from jax_refusal.messages import listed, shown

LARGEST = 2**31  # of ranks and alphas
PATTERN_LENGTH = 10_000  # characters
SECONDS = 20.0  # for the patterns of one config, which are a stranger's: some never end
ALL = "all-linear"

MERGE = (
    "merge it in PEFT (PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload()), save the "
    "whole model and load that"
)
CONVERT = (
    "convert it in PEFT (save_pretrained(OUT, path_initial_model_for_weight_conversion=INITIAL), "
    "where INITIAL is the adapter as it was saved before training; not where use_rslora meets "
    "rank_pattern or alpha_pattern) and load what that writes"
)
# How training began. These leave the base weights as they are; PEFT takes letters of any case.
SAME_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# These take the first adapter out of the base weights, or quantise them: what was trained belongs
# to a base that is not the published one. How the name begins -> what PEFT offers: it can repeat on
# the published weights only what needs neither chance nor data.
CHANGED_BASE = {
    "pissa_niter_": CONVERT,
    "pissa": f"{CONVERT}; or {MERGE}",
    "olora": f"{CONVERT}; or {MERGE}",
    "corda": CONVERT,
    "lora_ga": CONVERT,
    "loftq": MERGE,
}

# Fields that are not computed unless they are empty, and what to do.
EMPTY = (None, False, [], {})
REFUSED = {
    "bias": MERGE,
    "lora_bias": MERGE,
    "modules_to_save": MERGE,
    "trainable_token_indices": MERGE,
    "layer_replication": MERGE,
    "use_bdlora": MERGE,
    "kasa_config": f"it changes the base weights; {MERGE}",
    "use_qalora": "it is for weights in GPTQ",
    "megatron_config": "it is for Megatron's layers",
    "alora_invocation_tokens": "it acts on some tokens only, which no weights can say",
    "arrow_config": "it chooses among adapters token by token, which no weights can say",
    "monteclora_config": "it draws its weights by chance",
}

# Fields that the merged weights of linear layers do not depend on.
WITHOUT_EFFECT = {
    # whose the adapter is, and how it was made
    *"task_type auto_mapping peft_version base_model_name_or_path revision inference_mode".split(),
    # details of what `init_lora_weights` or a field of REFUSED says
    *"loftq_config eva_config corda_config lora_ga_config qalora_group_size megatron_core".split(),
    # keeps activations for the backward pass in few numbers, and acts on training alone
    "velora_config",
    # PEFT itself takes no notice: of the first in linear layers, of the second in files
    *"fan_in_fan_out runtime_config".split(),
    # for embeddings, whose adapters are refused by the names of their tensors
    "ensure_weight_tying",
}


class AdapterError(ValueError):
    """An adapter that cannot be read or does not fit the model; all reasons together."""


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and value is not True and 0 < value < LARGEST


def _rank(value: Any) -> bool:
    return isinstance(value, int) and _positive(value)


def _layer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _list_of(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(kind, value))


def _table_of(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(kind, value.values()))


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _switch(value: Any) -> bool:
    return isinstance(value, bool)


def _share(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1


def _either(*kinds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: any(kind(value) for kind in kinds)


# Fields that are computed -> what they may be. Those of REQUIRED are in every config that PEFT
# wrote; others may be missing or null.
NAMES = (_either(_text, _list_of(_text)), "a list of names or one regular expression")
CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "peft_type": (lambda value: value == "LORA", "'LORA'"),
    "r": (_rank, "a whole number above 0"),
    "lora_alpha": (_positive, "a finite number above 0"),
    "use_rslora": (_switch, "true or false"),
    "use_dora": (_switch, "true or false"),
    "init_lora_weights": (_either(_switch, _text), "true, false or a name"),
    "target_modules": NAMES,
    "target_parameters": (_list_of(_text), "a list of names"),
    "exclude_modules": NAMES,
    "lora_dropout": (_share, "a number from 0 to 1, which acts on training alone"),
    "layers_to_transform": (_either(_layer, _list_of(_layer)), "numbers of layers, from 0 on"),
    "layers_pattern": (_either(_text, _list_of(_text)), "a name or a list of names"),
    "rank_pattern": (_table_of(_rank), "whole numbers above 0 by module"),
    "alpha_pattern": (_table_of(_positive), "finite numbers above 0 by module"),
}
REQUIRED = ("peft_type", "r", "lora_alpha", "target_modules")


def read(path: Path) -> "Settings":
    """What an adapter_config.json says; AdapterError names every field that is not computed."""
    try:
        config = read_json(path)
    except SourceError:
        raise
    except (ValueError, RecursionError, OSError) as error:  # numbers and nesting beyond Python's
        raise AdapterError(f"{path} cannot be read: {type(error).__name__}, {error}.") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{path} holds {shown(config)}, where an object with fields is needed.")
    if problems := [*_wrong(config), *_refused(config), *_contradictions(config)]:
        raise AdapterError(f"{path} cannot be used: {listed(problems)}.")
    return _settings(config, Patterns(path))


def _wrong(config: Mapping[str, Any]) -> list[str]:
    problems = []
    for field, (allowed, words) in CHECKS.items():
        value = config.get(field)
        chosen = field == "target_modules" and bool(config.get("target_parameters"))
        if value is None and (field not in REQUIRED or chosen):
            continue
        if field not in config:
            problems.append(f"{field} is missing, {words}")
        elif not allowed(value):
            problems.append(f"{field}={shown(value)} is not supported (supported: {words})")
    return problems


def _refused(config: Mapping[str, Any]) -> list[str]:
    problems = []
    for field, value in config.items():
        if field in REFUSED and value not in EMPTY and (field, value) != ("bias", "none"):
            problems.append(f"{field}={shown(value)} is not supported: {REFUSED[field]}")
        elif field not in {*REFUSED, *CHECKS, *WITHOUT_EFFECT} and value:
            problems.append(f"{field}={shown(value)} is not known")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in SAME_BASE:
        kinds = (kind for kind in CHANGED_BASE if start.lower().startswith(kind))
        kind = next(kinds, None)
        why = f"is not known (supported: {list(SAME_BASE)})"
        if kind:
            why = (
                "is not supported: it changed the base weights, so that the adapter does not fit "
                f"the published ones. Do this: {CHANGED_BASE[kind]}"
            )
        problems.append(f"init_lora_weights={shown(start)} {why}")
    return problems


def _contradictions(config: Mapping[str, Any]) -> Iterator[str]:
    """What PEFT refuses as well."""
    layers, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
    expression = isinstance(config.get("target_modules"), str)
    if expression and (layers is not None or pattern is not None):
        yield "layers_to_transform and layers_pattern go with a list of target_modules"
    if pattern and layers is None:
        yield f"layers_pattern={shown(pattern)} goes with layers_to_transform"
    if config.get("use_dora") and config.get("target_parameters"):
        yield "use_dora goes with target_modules, not with target_parameters"


def _settings(config: Mapping[str, Any], patterns: "Patterns") -> "Settings":
    layers, own = config.get("layers_to_transform"), config.get("layers_pattern") or []
    return Settings(
        rank=config["r"],
        alpha=config["lora_alpha"],
        rank_stabilised=bool(config.get("use_rslora")),
        magnitudes=bool(config.get("use_dora")),
        targets=_names(config, "target_modules"),
        parameters=_names(config, "target_parameters"),
        excluded=_names(config, "exclude_modules"),
        layers=(layers,) if isinstance(layers, int) else tuple(layers or ()),
        layers_patterns=(own,) if isinstance(own, str) else tuple(own),
        ranks=config.get("rank_pattern") or {},
        alphas=config.get("alpha_pattern") or {},
        patterns=patterns,
    )


def _names(config: Mapping[str, Any], field: str) -> "Names":
    value = config.get(field) or []
    return Names(field, whole=value) if isinstance(value, str) else Names(field, frozenset(value))


@dataclasses.dataclass(frozen=True)
class Names:
    """Modules or parameters by how their names end, or by one expression for the whole name."""

    field: str
    ends: frozenset[str] = frozenset()
    whole: str = ""

    def hold(self, name: str, patterns: "Patterns") -> bool:
        if self.whole:
            return bool(patterns.match(self.field, self.whole, name, whole=True))
        parts = name.split(".")
        return any(".".join(parts[i:]) in self.ends for i in range(len(parts)))


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a config says of the modules of a model."""

    rank: int
    alpha: float
    rank_stabilised: bool
    magnitudes: bool  # of the rows of the merged weights (DoRA)
    targets: Names
    parameters: Names
    excluded: Names
    layers: tuple[int, ...]  # () is all
    layers_patterns: tuple[str, ...]
    ranks: Mapping[str, int]  # by pattern
    alphas: Mapping[str, float]
    patterns: "Patterns"

    @property
    def leaves_it_open(self) -> bool:
        """Whether it is PEFT that finds out which modules there are."""
        return self.targets.whole.lower() == ALL

    def names(self, module: str) -> bool:
        """Whether a linear layer is adapted."""
        if self.excluded.hold(module, self.patterns):
            return False
        if self.leaves_it_open or module in self.targets.ends:
            return True
        if not self.targets.hold(module, self.patterns):
            return False
        return not self.layers or self._layer(module) in self.layers

    def names_parameter(self, name: str) -> bool:
        """Whether a parameter that is no linear layer's is adapted by itself."""
        return self.parameters.hold(name, self.patterns)

    def rank_of(self, module: str) -> int:
        return self._own("rank_pattern", self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        alpha = self._own("alpha_pattern", self.alphas, module, self.alpha)
        rank = self.rank_of(module)
        return alpha / (rank**0.5 if self.rank_stabilised else rank)

    def _own(self, field: str, table: Mapping[str, Any], module: str, usual: Any) -> Any:
        for name, value in table.items():
            if self.patterns.match(field, rf"(.*\.)?({name})$", module):
                return value
        return usual

    def _layer(self, module: str) -> int | None:
        own = [rf"(?:^|.*?\.){name}\.(?P<layer>\d+)\." for name in self.layers_patterns]
        for pattern in own or [r".*?\.[^.]*\.(?P<layer>\d+)\."]:
            if found := self.patterns.match("layers_pattern", pattern, module):
                return int(found["layer"])
        return None


class Patterns:
    """The regular expressions of a config, matched for SECONDS in all."""

    def __init__(self, path: Path) -> None:
        self.path, self.left = path, SECONDS
        self.compiled: dict[str, Any] = {}

    def match(self, field: str, pattern: str, name: str, whole: bool = False) -> Any:
        start = time.monotonic()
        try:
            if len(pattern) > PATTERN_LENGTH:
                raise regex.error(f"it has {len(pattern)} characters")
            compiled = self.compiled.get(pattern) or regex.compile(pattern)
            self.compiled[pattern] = compiled
            return (compiled.fullmatch if whole else compiled.match)(name, timeout=self.left)
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            why = f"is no regular expression ({error})"
        except TimeoutError:
            why = f"takes more than {SECONDS:.0f} seconds; write the names as a list"
        finally:
            self.left = max(1e-9, self.left - (time.monotonic() - start))
        raise AdapterError(f"{self.path} cannot be used: {shown(pattern)} in {field} {why}.")
