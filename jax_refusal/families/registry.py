"""Model families by `model_type`, and a checkpoint's config read strictly by its family.

A field of `config.json` that a family does not know is an error that names it: a model that is
nearly known is refused, never run approximately.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

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
    fields: str = ""  # beyond COMMON
    required: str = ""  # beyond REQUIRED
    defaults: Config = dataclasses.field(default_factory=dict)  # where the file says nothing
    fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)  # beyond FIXED
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)  # to names of COMMON
    namings: tuple[Naming, ...] = (Naming(),)  # how files name tensors, the first unless they say
    unread: Callable[[Architecture, str], bool] = nothing_unread  # tensors that nothing reads
    export_class: str = ""  # where a source has no class of its own to name
    has_mlp_bias_field: bool = False  # so that a bias baked into the weights can be stored
    gguf: Gguf | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wrapper:
    """A multimodal `model_type` around a text model."""

    model_type: str
    fields: str  # its own, of which none acts on text
    inner: tuple[str, ...]  # what may lie inside


COMMON = frozenset(
    """
    hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size
    vocab_size max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters
    hidden_act tie_word_embeddings
    """.split()
)
REQUIRED = (
    "hidden_size num_hidden_layers num_attention_heads intermediate_size vocab_size "
    "max_position_embeddings rms_norm_eps"
)

# Fields that say nothing about the forward pass at inference.
NO_EFFECT = frozenset(
    """
    model_type architectures torch_dtype dtype transformers_version use_cache initializer_range
    bos_token_id eos_token_id pad_token_id attention_dropout _name_or_path _attn_implementation
    attn_implementation transformers.js_config is_llama_config output_attentions
    output_hidden_states return_dict unsloth_version unsloth_fixed keys_to_ignore_at_inference
    problem_type id2label label2id chunk_size_feed_forward is_encoder_decoder cache_implementation
    auto_map tokenizer_class
    """.split()
)

# Fields whose other values would change the numbers: only these are computed here.
FIXED: dict[str, tuple[Any, ...]] = {
    "pretraining_tp": (1, None),
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


def family_of(arch: Architecture) -> Family:
    return FAMILIES[arch.family]


def architecture(config: Config, ignore: tuple[str, ...] = ()) -> Architecture:
    """Reads a Hugging Face `config.json`.

    ignore: fields the caller vouches for (`model.ignore_config_fields`).
    Raises UnsupportedModel with every problem found, not just the first.
    """
    wrapper = config.get("model_type") if config.get("model_type") in WRAPPERS else None
    if wrapper:
        config = _inside(config, ignore)
    name = config.get("model_type")
    if name in REFUSED and name not in FAMILIES:  # one from outside may compute it
        raise UnsupportedModel(f"model_type={name!r} is not supported: it {REFUSED[name]}.")
    if name not in FAMILIES:
        raise UnsupportedModel(
            f"model_type={name!r} is not supported; supported are "
            f"{sorted(FAMILIES.keys() | WRAPPERS.keys())}."
        )
    family = FAMILIES[name]
    known = COMMON | NO_EFFECT | set(family.fields.split()) | set(family.renamed) | set(ignore)
    problems = _unknown(config, known)
    for field, allowed in (FIXED | dict(family.fixed)).items():
        if field in config and field not in ignore and config[field] not in allowed:
            problems.append(f"{field}={config[field]!r} (supported: {list(allowed)})")
    given = {family.renamed.get(field, field): value for field, value in config.items()}
    given = {**family.defaults, **given}
    names = {ours: theirs for theirs, ours in family.renamed.items()}
    required = [*REQUIRED.split(), *family.required.split()]
    problems += [f"missing field {names.get(f, f)}" for f in required if f not in given]
    if problems:
        raise UnsupportedModel(f"This {name} config cannot be run: " + "; ".join(problems) + ".")
    read = family.read({**given, "model_type": name})
    return dataclasses.replace(read, naming=family.namings[0], wrapped=bool(wrapper))


def _inside(config: Config, ignore: tuple[str, ...]) -> Config:
    """The text model's part of a multimodal config."""
    wrapper = WRAPPERS[config["model_type"]]
    own = {"text_config", "vision_config", "tie_word_embeddings", *wrapper.fields.split()}
    problems = _unknown(config, own | NO_EFFECT | set(ignore))
    text = config.get("text_config")
    if not isinstance(text, Mapping) or text.get("model_type") not in wrapper.inner:
        found = text.get("model_type") if isinstance(text, Mapping) else text
        allowed = list(wrapper.inner)
        problems.append(f"text_config is of model_type {found!r} (supported: {allowed})")
    if problems:
        raise UnsupportedModel(
            f"This {wrapper.model_type} config cannot be run: " + "; ".join(problems) + "."
        )
    assert isinstance(text, Mapping)
    tied = {k: config[k] for k in ("tie_word_embeddings",) if k in config}
    return {**text, **tied}


def _unknown(config: Config, known: frozenset[str] | set[str]) -> list[str]:
    known = known | QUANTISATION
    return [
        f"unknown field {field}={config[field]!r} (if it does not change the forward pass, "
        f"name it in model.ignore_config_fields)"
        for field in sorted(set(config) - known)
    ]
