"""What the config readers of families share: from fields to specs.

Each function takes a `config.json` with the family's defaults filled in; UnsupportedModel names
what is not computed. Letters: L layers.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax_refusal.families.fields import ALL_EXPERTS, Given
from jax_refusal.families.registry import Config
from jax_refusal.families.rope_fields import read_rope, rope_settings
from jax_refusal.messages import shown
from jax_refusal.models.spec import (
    Architecture,
    Attention,
    Branch,
    LayerSpec,
    Mlp,
    Moe,
    Rope,
    Stored,
    UnsupportedModel,
)

FULL, SLIDING = "full_attention", "sliding_attention"


def attention(config: Config, **own: Any) -> Attention:
    """What every family says of attention in the same way; `own` is what it says differently."""
    heads, stream = config["num_attention_heads"], config["hidden_size"]
    kv_heads = own.pop("kv_heads", None) or config.get("num_key_value_heads") or heads
    width = own.pop("head_width", None) or config.get("head_dim")
    if width is None:
        divides(heads, stream, "num_attention_heads", "hidden_size (there is no head_dim)")
        width = stream // heads
    divides(kv_heads, heads, "num_key_value_heads", "num_attention_heads")
    bias = bool(config.get("attention_bias", False))
    usual = {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_width": width,
        "score_scale": width**-0.5,
        "qkv_bias": bias,
        "out_bias": bias,
    }
    return Attention(**{**usual, **own})


def divides(part: int, whole: int, name: str, of: str) -> None:
    if whole % part:
        raise UnsupportedModel(f"{name}={part} does not divide {of}={whole}.")


def mlp(config: Config, **own: Any) -> Mlp:
    bias = bool(config.get("mlp_bias", False))
    return Mlp(**{"width": config["intermediate_size"], "bias": bias, **own})


def experts(
    config: Config,
    count: str,  # the field that says how many there are
    *,
    each: str = "num_experts_per_tok",  # that a token goes through
    width: str = "intermediate_size",
    **own: Any,
) -> Moe:
    found = {name: config[name] or 0 for name in (count, each, width)}
    E, J = found[count], found[each]
    if not all(found.values()) or J > E or E * config["num_hidden_layers"] > ALL_EXPERTS:
        raise UnsupportedModel(
            f"{found} of {config['num_hidden_layers']} layers are not experts: a token goes "
            f"through some of them, all are wider than 0, and a model has at most {ALL_EXPERTS}."
        )
    return Moe(**{"experts": E, "experts_per_token": J, "width": found[width], **own})


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
    return Architecture(**{**usual, "specs": specs, "ropes": _used(ropes, specs), **own})


def _used(ropes: tuple[Rope, ...], specs: tuple[LayerSpec, ...]) -> tuple[Rope, ...]:
    """Each fits the heads of the layers that turn by it; one that no layer turns by is nothing."""
    widths: dict[int, set[int]] = {}
    for mixer in (spec.mixer for spec in specs):
        if isinstance(mixer, Attention):
            widths.setdefault(mixer.rope, set()).add(mixer.rotary_width or mixer.head_width)
    for index, each in widths.items():
        _check_width(ropes[index], sorted(each))
    kept = enumerate(ropes)
    return tuple(r if i in widths else Rope(base=r.base, kind="none") for i, r in kept)


def _check_width(rope: Rope, widths: list[int]) -> None:
    width = widths[0]
    if len(widths) > 1 or width % 2 or (rope.kind == "prompt_ntk" and width == 2):
        raise UnsupportedModel(
            f"Rotary embedding of kind {rope.kind!r} turns {widths} channels of heads (by head_dim "
            "and partial_rotary_factor); it has to be one even number for all layers of a kind."
        )
    for name, factors in (("short_factor", rope.short_factor), ("long_factor", rope.long_factor)):
        if rope.kind == "longrope" and len(factors) != width // 2:
            raise UnsupportedModel(
                f"rope type 'longrope': {name} has {len(factors)} numbers for {width // 2} "
                "frequencies."
            )


def turned(rope: Rope, width: int, share: float) -> int:
    """The channels of a head of this width that are turned, where it is a share of them."""
    if not int(width * share) or rope.kind == "proportional":
        raise UnsupportedModel(
            f"partial_rotary_factor={share} of {width} channels by rope type {rope.kind!r} "
            "(supported: one at least, and not by 'proportional')."
        )
    return int(width * share)


def every_layer(config: Config) -> tuple[int, ...]:
    """One sliding window for all layers."""
    return (config.get("sliding_window") or 0,) * config["num_hidden_layers"]


def layer_types(
    config: Config,
    usual: Callable[[int], str],  # of a layer, where the file is silent
    names: Mapping[str, str],  # as files call them -> as they are called here
) -> list[str]:
    count, given = config["num_hidden_layers"], config.get("layer_types")
    types = [usual(i) for i in range(count)] if given is None else given
    if len(types) != count or not set(types) <= set(names):
        raise UnsupportedModel(
            f"layer_types={shown(types)} is not supported: {count} of {list(names)} are needed."
        )
    return [names[each] for each in types]


def some_layers(config: Config, usual: Callable[[int], bool]) -> tuple[int, ...]:
    """Sliding windows where `layer_types` says so, or where the family usually has them."""
    window = config.get("sliding_window") or 0
    names = {name: name for name in (FULL, SLIDING)}
    types = layer_types(config, lambda i: SLIDING if usual(i) else FULL, names)
    if SLIDING in types and not window:
        raise UnsupportedModel(
            f"layer_types has sliding layers and sliding_window={config.get('sliding_window')!r}, "
            f"use_sliding_window={config.get('use_sliding_window')!r} give them no length."
        )
    return tuple(window if t == SLIDING else 0 for t in types)


def switched(config: Config) -> Config:
    """Without a window where a switch of its own turns it off."""
    return config if config.get("use_sliding_window") else Given({**config, "sliding_window": None})


def one_rope(config: Config, default_base: float = 10000.0) -> Rope:
    scaling = rope_settings(config, default_base)
    share = scaling.pop("partial_rotary_factor", None)
    if share not in (None, 1.0):
        raise UnsupportedModel(f"partial_rotary_factor={shown(share)} (supported here: [1.0]).")
    return read_rope(scaling, default_base, config["max_position_embeddings"])


def two_ropes(config: Config, base: float, local: float) -> tuple[Rope, Rope]:
    """Of layers that see everything, and of those with a window.

    rope_parameters has a part for each; rope_scaling and rope_theta are of the first alone.
    """
    parts, context = config.get("rope_parameters") or {}, config["max_position_embeddings"]
    if not set(parts) <= {FULL, SLIDING} or not all(
        isinstance(part, Mapping | None) for part in parts.values()
    ):
        raise UnsupportedModel(
            f"rope_parameters={shown(parts)} has other parts than {[FULL, SLIDING]}."
        )
    beside = {FULL: ("rope_theta", "rope_scaling"), SLIDING: ("rope_local_base_freq",)}
    found = []
    for kind, usual in ((FULL, base), (SLIDING, local)):
        given = {name: config[name] for name in beside[kind] if name in config}
        if "rope_local_base_freq" in given:
            given["rope_theta"] = given.pop("rope_local_base_freq")
        settings = rope_settings({**given, "rope_parameters": parts.get(kind)}, usual)
        if settings.get("truncate") is False:  # the library looks for it elsewhere, in vain
            raise UnsupportedModel(
                "truncate=False in a part of rope_parameters (supported: [True])."
            )
        found.append(read_rope(settings, usual, context))
    return found[0], found[1]


def stored(**names: str) -> tuple[tuple[str, Stored], ...]:
    """Leaf name = "tensor" or "tensor: layout", for `Naming.tensors`."""
    parts = {leaf: text.partition(": ") for leaf, text in names.items()}
    return tuple((leaf, Stored(name=n, layout=layout)) for leaf, (n, _, layout) in parts.items())


# With norms of what is read and of what is written, names are what they say.
FOUR_NORMS = stored(mlp_norm="pre_feedforward_layernorm.weight")
