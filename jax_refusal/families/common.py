"""What the config readers of families share: from fields to specs.

Each function takes a `config.json` with the family's defaults filled in; UnsupportedModel names
what is not computed. Letters: L layers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jax_refusal.families.registry import Config
from jax_refusal.families.rope_fields import read_rope, rope_settings
from jax_refusal.models.spec import (
    Architecture,
    Attention,
    Branch,
    LayerSpec,
    Mlp,
    Rope,
    Stored,
    UnsupportedModel,
)

FULL, SLIDING = "full_attention", "sliding_attention"


def attention(config: Config, **own: Any) -> Attention:
    """What every family says of attention in the same way; `own` is what it says differently."""
    heads = config["num_attention_heads"]
    width = own.pop("head_width", None) or config.get("head_dim") or config["hidden_size"] // heads
    bias = bool(config.get("attention_bias", False))
    usual = {
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_width": width,
        "score_scale": width**-0.5,
        "qkv_bias": bias,
        "out_bias": bias,
    }
    return Attention(**{**usual, **own})


def mlp(config: Config, **own: Any) -> Mlp:
    bias = bool(config.get("mlp_bias", False))
    return Mlp(**{"width": config["intermediate_size"], "bias": bias, **own})


def layers(
    config: Config,
    mixer: Attention,
    branch: Branch,
    *,
    windows: Sequence[int] = (),  # [L] tokens, () is all unlimited
    ropes: Sequence[int] = (),  # [L] indices of the model's, () is all 0
    **own: Any,
) -> tuple[LayerSpec, ...]:
    """Layers of one shape: a mixer and one branch."""
    count = config["num_hidden_layers"]
    return tuple(
        LayerSpec(
            mixer=dataclasses.replace(mixer, window=window, rope=rope),
            branches=(("mlp_out", branch),),
            **own,
        )
        for window, rope in zip(windows or [0] * count, ropes or [0] * count, strict=True)
    )


def decoder(
    config: Config, specs: tuple[LayerSpec, ...], ropes: tuple[Rope, ...], **own: Any
) -> Architecture:
    """What every family says of a whole model in the same way."""
    usual = {
        "family": config["model_type"],
        "vocab": config["vocab_size"],
        "width": config["hidden_size"],
        "context": config["max_position_embeddings"],
        "norm_epsilon": config["rms_norm_eps"],
        "tied_head": bool(config.get("tie_word_embeddings", False)),
    }
    return Architecture(**{**usual, "specs": specs, "ropes": ropes, **own})


def every_layer(config: Config) -> tuple[int, ...]:
    """One sliding window for all layers."""
    return (config.get("sliding_window") or 0,) * config["num_hidden_layers"]


def some_layers(config: Config, usual: Callable[[int], bool]) -> tuple[int, ...]:
    """Sliding windows where `layer_types` says so, or where the family usually has them."""
    count, window = config["num_hidden_layers"], config.get("sliding_window") or 0
    names = (FULL, SLIDING)
    types = config.get("layer_types") or [names[usual(i)] for i in range(count)]
    if len(types) != count or not set(types) <= set(names):
        raise UnsupportedModel(
            f"layer_types={types!r} is not supported: {count} of {list(names)} are needed."
        )
    if SLIDING in types and not window:
        raise UnsupportedModel(
            f"layer_types has sliding layers and sliding_window={config.get('sliding_window')!r}, "
            f"use_sliding_window={config.get('use_sliding_window')!r} give them no length."
        )
    return tuple(window if t == SLIDING else 0 for t in types)


def switched(config: Config) -> Config:
    """Without a window where a switch of its own turns it off."""
    return config if config.get("use_sliding_window") else {**config, "sliding_window": None}


def one_rope(config: Config, default_base: float = 10000.0) -> Rope:
    scaling = rope_settings(config)
    share = scaling.pop("partial_rotary_factor", None)
    if share not in (None, 1.0):
        raise UnsupportedModel(f"partial_rotary_factor={share!r} (supported here: [1.0]).")
    base = config.get("rope_theta") or default_base
    return read_rope(scaling, base, config["max_position_embeddings"])


def two_ropes(config: Config, base: float, local: float) -> tuple[Rope, Rope]:
    """Of layers that see everything, and of those with a window."""
    scaling = rope_settings(config)
    if not set(scaling) & {FULL, SLIDING}:
        scaling = {FULL: scaling}
    if set(scaling) - {FULL, SLIDING}:
        raise UnsupportedModel(f"rope_parameters has unknown parts {sorted(scaling)}.")
    base, context = config.get("rope_theta") or base, config["max_position_embeddings"]
    return (
        read_rope(scaling.get(FULL) or {}, base, context),
        read_rope(scaling.get(SLIDING) or {}, local, context),
    )


def stored(**names: str) -> tuple[tuple[str, Stored], ...]:
    """Leaf name = "tensor" or "tensor: layout", for `Naming.tensors`."""
    parts = {leaf: text.partition(": ") for leaf, text in names.items()}
    return tuple((leaf, Stored(name=n, layout=layout)) for leaf, (n, _, layout) in parts.items())


# With norms of what is read and of what is written, names are what they say.
FOUR_NORMS = stored(mlp_norm="pre_feedforward_layernorm.weight")
