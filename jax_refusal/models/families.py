"""What differs between model families, as a table; and a checkpoint's config read strictly by it.

A field of `config.json` that this table does not know is an error that names it: a model that is
nearly known is refused, never run approximately.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding: base angle, and how long contexts are scaled."""

    base: float
    kind: str = "default"  # default, linear, llama3
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 0  # tokens


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The static shape of a decoder. Hashable: it is part of what jit compiles for."""

    family: str
    vocab: int  # V
    width: int  # D
    layers: int  # L
    heads: int  # H
    kv_heads: int  # G
    head_width: int  # K
    mlp_width: int  # F
    context: int  # tokens, the longest sequence the checkpoint was made for
    norm_epsilon: float
    rope: Rope
    activation: str = "silu"
    tied_head: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    # [L] sliding-window length in tokens, 0 is unlimited; () is all 0.
    windows: tuple[int, ...] = ()


class UnsupportedModel(ValueError):
    """The checkpoint asks for something that this decoder does not compute."""


# `model_type` -> the fields it may carry beyond COMMON.
FAMILIES: dict[str, frozenset[str]] = {
    "llama": frozenset({"attention_bias", "mlp_bias", "pretraining_tp", "rope_interleaved"}),
    "mistral": frozenset({"sliding_window"}),
}

COMMON = frozenset(
    """
    hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size
    vocab_size max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters
    hidden_act tie_word_embeddings
    """.split()
)

# Fields that say nothing about the forward pass at inference.
NO_EFFECT = frozenset(
    """
    model_type architectures torch_dtype dtype transformers_version use_cache initializer_range
    bos_token_id eos_token_id pad_token_id attention_dropout _name_or_path _attn_implementation
    attn_implementation transformers.js_config is_llama_config output_attentions
    output_hidden_states return_dict unsloth_version unsloth_fixed keys_to_ignore_at_inference
    problem_type id2label label2id chunk_size_feed_forward is_encoder_decoder
    """.split()
)

# Fields whose other values would change the numbers: only these are computed here.
FIXED: dict[str, tuple[Any, ...]] = {
    "pretraining_tp": (1, None),
    "rope_interleaved": (False, None),
    "hidden_act": ("silu",),
}


def architecture(config: Mapping[str, Any], ignore: tuple[str, ...] = ()) -> Architecture:
    """Reads a Hugging Face `config.json`.

    ignore: fields the caller vouches for (`model.ignore_config_fields`).
    Raises UnsupportedModel with every problem found, not just the first.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UnsupportedModel(
            f"model_type={family!r} is not supported; supported are {sorted(FAMILIES)}."
        )
    problems = []
    known = COMMON | NO_EFFECT | FAMILIES[family] | set(ignore)
    for field in sorted(set(config) - known):
        problems.append(
            f"unknown field {field}={config[field]!r} (if it does not change the forward pass, "
            f"name it in model.ignore_config_fields)"
        )
    for field, allowed in FIXED.items():
        if field in config and field not in ignore and config[field] not in allowed:
            problems.append(f"{field}={config[field]!r} (supported: {list(allowed)})")
    required = (
        "hidden_size num_hidden_layers num_attention_heads intermediate_size vocab_size "
        "max_position_embeddings rms_norm_eps"
    )
    problems += [f"missing field {name}" for name in required.split() if name not in config]
    if problems:
        raise UnsupportedModel(f"This {family} config cannot be run: " + "; ".join(problems) + ".")

    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    attention_bias = bool(config.get("attention_bias", False))
    window = config.get("sliding_window") or 0
    return Architecture(
        family=family,
        vocab=config["vocab_size"],
        width=config["hidden_size"],
        layers=layers,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_width=config.get("head_dim") or config["hidden_size"] // heads,
        mlp_width=config["intermediate_size"],
        context=config["max_position_embeddings"],
        norm_epsilon=config["rms_norm_eps"],
        rope=_rope(config),
        tied_head=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        windows=(window,) * layers if window else (),
    )


def _rope(config: Mapping[str, Any]) -> Rope:
    # transformers 5 writes all of it into rope_parameters; earlier files have two fields.
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    base = scaling.pop("rope_theta", None) or config.get("rope_theta", 10000.0)
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    fields = {
        "default": {},
        "linear": {"factor": "factor"},
        "llama3": {
            "factor": "factor",
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
            "original_max_position_embeddings": "original_context",
        },
    }
    if kind not in fields:
        raise UnsupportedModel(
            f"rope type {kind!r} is not supported; supported are {sorted(fields)}."
        )
    unknown, missing = set(scaling) - set(fields[kind]), set(fields[kind]) - set(scaling)
    if kind != "default" and (unknown or missing):
        raise UnsupportedModel(
            f"rope type {kind!r}: unknown fields {sorted(unknown)}, missing {sorted(missing)}."
        )
    values = {ours: scaling[theirs] for theirs, ours in fields[kind].items()}
    return Rope(base=float(base), kind=kind, **values)
