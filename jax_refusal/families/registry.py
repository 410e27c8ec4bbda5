"""Model families by `model_type`, and a checkpoint's config read strictly by its family.

A field of `config.json` that a family does not know is an error that names it: a model that is
nearly known is refused, never run approximately.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jax_refusal.families.fields import NO_EFFECT, Given, ill_typed
from jax_refusal.messages import listed, shown
from jax_refusal.models.spec import Architecture, Naming, UnsupportedModel

Config = Mapping[str, Any]  # a `config.json`, with the family's defaults filled in


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gguf:
    """How llama.cpp's files of a family differ from Hugging Face's, beside the tensors' names."""

    architecture: str  # as the file's metadata says it
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of config.json -> key
    constants: Config = dataclasses.field(default_factory=dict)  # what no file says
    bias_field: str = ""  # field of config.json that says whether there are attention biases
    interleaved: bool = False  # the two rotary halves of each head, in queries and keys
    norms_plus_one: bool = False  # the weights of norms are the gain, not its distance from 1
    rope_base: float = 10000.0  # where the file says none
    wide_layers: int = 0  # with so many layers, scores are scaled by D / H and not by K


def nothing_unread(arch: Architecture, name: str) -> bool:
    return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What a `model_type` may say in its config, what that makes of the decoder, and its files."""

    model_type: str
    read: Callable[[Config], Architecture]
    fields: str = ""  # beyond COMMON; one with ? may be null, which says nothing
    required: str = ""  # beyond REQUIRED
    defaults: Config = dataclasses.field(default_factory=dict)  # where the file says nothing
    fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)  # beyond FIXED
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)  # to names of COMMON
    namings: tuple[Naming, ...] = (Naming(),)  # how files name tensors, the first unless they say
    unread: Callable[[Architecture, str], bool] = nothing_unread  # tensors that nothing reads
    export_class: str = ""  # where a source has no class of its own to name
    has_mlp_bias_field: bool = False  # so that a bias baked into the weights can be stored
    gguf: Gguf | None = None

    @property
    def named(self) -> frozenset[str]:
        """The fields that its config may say, beyond those without effect."""
        return COMMON | {name.removesuffix("?") for name in self.fields.split()} | set(self.renamed)

    @property
    def nullable(self) -> frozenset[str]:
        own = {name.removesuffix("?") for name in self.fields.split() if name.endswith("?")}
        return frozenset({"rope_scaling", "rope_parameters", *own})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wrapper:
    """A multimodal `model_type` around a text model."""

    model_type: str
    fields: str  # its own, of which none acts on text
    inner: tuple[str, ...]  # what may lie inside
    modalities: str  # the modules of the others, beside the text model


COMMON = frozenset(
    """
    hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size
    vocab_size max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters
    hidden_act tie_word_embeddings pruned_heads
    """.split()
)
REQUIRED = (
    "hidden_size num_hidden_layers num_attention_heads intermediate_size vocab_size "
    "max_position_embeddings rms_norm_eps"
)

# Fields whose other values would change the numbers: only these are computed here.
FIXED: dict[str, tuple[Any, ...]] = {
    "pretraining_tp": (1, None),
    "pruned_heads": ({}, None),
    "rope_interleaved": (False, None),
    "hidden_act": ("silu",),
    "use_bidirectional_attention": (False, None),
    "use_mrope": (False, None),
}


FAMILIES: dict[str, Family] = {}
WRAPPERS: dict[str, Wrapper] = {}
REFUSED: dict[str, str] = {}  # known and not computed: `model_type` -> why
# Fields of how the weights lie in their files, which checkpoints.quantised reads or refuses.
QUANTISATION = frozenset({"quantization_config", "compression_config"})


def register(entry: Family | Wrapper) -> None:
    """Makes a `model_type` known. Raises ValueError where it is already."""
    name = entry.model_type
    if name in FAMILIES or name in WRAPPERS:
        raise ValueError(f"model_type={name!r} is registered already; a family has one file.")
    if isinstance(entry, Wrapper):
        WRAPPERS[name] = entry
    else:
        FAMILIES[name] = entry


def other_modalities() -> set[str]:
    """What the modules are called that lie beside a text model, in any wrapper: an adapter of one
    may be put on its text model alone."""
    return {name for wrapper in WRAPPERS.values() for name in wrapper.modalities.split()}


def family_of(arch: Architecture) -> Family:
    return FAMILIES[arch.family]


def architecture(config: Config, ignore: tuple[str, ...] = ()) -> Architecture:
    """Reads a Hugging Face `config.json`.

    ignore: fields the caller vouches for (`model.ignore_config_fields`).
    Raises UnsupportedModel with every problem found, not just the first.
    """
    if not isinstance(config, Mapping) or not isinstance(config.get("model_type"), str):
        raise UnsupportedModel(
            f"This config has no name of a family in model_type: {shown(config)}."
        )
    wrapped = config["model_type"] in WRAPPERS
    if wrapped:
        config = _inside(config, ignore)
    name = config["model_type"]
    if name in REFUSED and name not in FAMILIES:  # one from outside may compute it
        raise UnsupportedModel(f"model_type={name!r} is not supported: it {REFUSED[name]}.")
    if name not in FAMILIES:
        raise UnsupportedModel(
            f"model_type={shown(name)} is not supported; supported are "
            f"{sorted(FAMILIES.keys() | WRAPPERS.keys())}."
        )
    family = FAMILIES[name]
    if problems := _problems(config, family, ignore):
        raise _refusal(name, problems)
    given = {family.renamed.get(field, field): value for field, value in config.items()}
    read = family.read(Given({**family.defaults, **given, "model_type": name}))
    return dataclasses.replace(read, naming=family.namings[0], wrapped=wrapped)


def _problems(config: Config, family: Family, ignore: tuple[str, ...]) -> list[str]:
    """All that is wrong with single fields."""
    problems = _unknown(config, family.named | NO_EFFECT | set(ignore))
    fixed = FIXED | dict(family.fixed)
    for field, allowed in fixed.items():
        if field in config and field not in ignore and config[field] not in allowed:
            problems.append(f"{field}={shown(config[field])} (supported: {list(allowed)})")
    called: dict[str, str] = {}  # name here -> in the file
    for field in config:
        other = called.setdefault(family.renamed.get(field, field), field)
        if other != field and config[other] != config[field]:
            problems.append(f"{other}={shown(config[other])} and {field}={shown(config[field])}")
    typed = {name: field for name, field in called.items() if field in family.named - set(fixed)}
    values = {name: config[field] for name, field in typed.items()}
    problems += ill_typed(values, family.nullable, typed)
    theirs = {ours: theirs for theirs, ours in family.renamed.items()}
    required = [*REQUIRED.split(), *family.required.split()]
    given = {*called, *family.defaults}
    return problems + [f"missing field {theirs.get(f, f)}" for f in required if f not in given]


def _refusal(name: str, problems: list[str]) -> UnsupportedModel:
    return UnsupportedModel(f"This {name} config cannot be run: {listed(problems)}.")


def _inside(config: Config, ignore: tuple[str, ...]) -> Config:
    """The text model's part of a multimodal config."""
    wrapper = WRAPPERS[config["model_type"]]
    own = {"text_config", "vision_config", "tie_word_embeddings", *wrapper.fields.split()}
    problems = _unknown(config, own | NO_EFFECT | set(ignore))
    text = config.get("text_config")
    if not isinstance(text, Mapping) or text.get("model_type") not in wrapper.inner:
        found = text.get("model_type") if isinstance(text, Mapping) else text
        allowed = list(wrapper.inner)
        problems.append(f"text_config is of model_type {shown(found)} (supported: {allowed})")
    if problems:
        raise _refusal(wrapper.model_type, problems)
    assert isinstance(text, Mapping)
    tied = {k: config[k] for k in ("tie_word_embeddings",) if k in config}
    return {**text, **tied}


def _unknown(config: Config, known: frozenset[str] | set[str]) -> list[str]:
    known = known | QUANTISATION
    return [
        f"unknown field {field[:100]}={shown(config[field])} (if it does not change the forward "
        "pass, name it in model.ignore_config_fields, or launch.convert --ignore_config_fields)"
        for field in sorted(set(config) - known)
    ]
