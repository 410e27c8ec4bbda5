"""Gemma 4's text models: layers of two kinds of heads, keys that later layers share, an input of
their own for layers, experts beside an MLP.

Letters: L layers, G key/value heads, K head width, F MLP width.
"""

import math
from collections.abc import Mapping
from typing import Any

from jax_refusal.families.common import (
    FOUR_NORMS,
    FULL,
    SLIDING,
    attention,
    decoder,
    divides,
    experts,
    mlp,
    some_layers,
    stored,
    two_ropes,
)
from jax_refusal.families.fields import Given, ill_typed
from jax_refusal.families.registry import Config, Family, Wrapper, register
from jax_refusal.messages import shown
from jax_refusal.models.spec import (
    Architecture,
    Attention,
    Branch,
    GatedInput,
    LayerSpec,
    MlpAndMoe,
    Moe,
    Naming,
    Rope,
    TokenInput,
    UnsupportedModel,
)

LOCAL_ROPE, FULL_ROPE = 0, 1  # the order of the model's ropes


def read(config: Config) -> Architecture:
    windows = _windows(config)
    sources = _kv_sources(config, windows)
    mixers = _mixers(config, windows, sources)
    specs = tuple(
        LayerSpec(
            mixer=mixer,
            branches=_branches(config, source is not None),
            post_norm=True,
            scale=True,
        )
        for mixer, source in zip(mixers, sources, strict=True)
    )
    return decoder(
        config,
        specs,
        _ropes(config),
        norm="scale_in_float32",
        embed_scale=math.sqrt(config["hidden_size"]),
        logit_cap=config.get("final_logit_softcapping") or 0.0,
        token_input=_token_input(config),
    )


def _windows(config: Config) -> tuple[int, ...]:  # [L]
    """Every sixth layer sees everything, or those that `layer_types` says; the last one always."""
    return (*some_layers(config, lambda i: (i + 1) % 6 != 0)[:-1], 0)


def _kv_sources(config: Config, windows: tuple[int, ...]) -> tuple[int | None, ...]:  # [L]
    """The last layers attend to the keys and values of the last layer of their kind before them."""
    count, layers = config.get("num_kv_shared_layers", 0), len(windows)
    own = range(layers - count)
    last = {bool(windows[i]): i for i in own}
    needed = {bool(window) for window in windows[len(own) :]}
    if not 0 <= count < layers or not needed <= set(last):
        kinds = [SLIDING if window else FULL for window in sorted(needed, reverse=True)]
        raise UnsupportedModel(
            f"num_kv_shared_layers={count!r}: the first {max(0, layers - count)} layers have to "
            f"hold one of each of {kinds}, whose keys the others read."
        )
    return (*[None] * len(own), *(last[bool(w)] for w in windows[len(own) :]))


def _mixers(
    config: Config, windows: tuple[int, ...], sources: tuple[int | None, ...]
) -> list[Attention]:
    found = []
    heads = zip(_heads(config, windows), windows, sources, strict=True)
    for (width, kv_heads), window, source in heads:
        found.append(
            attention(
                config,
                head_width=width,
                kv_heads=kv_heads,
                score_scale=1.0,
                window=window,
                rope=LOCAL_ROPE if window else FULL_ROPE,
                qk_norm="head",
                value_norm=True,
                keys_are_values=bool(config.get("attention_k_eq_v")) and not window,
                kv_source=source,
            )
        )
    return found


def _heads(config: Config, windows: tuple[int, ...]) -> list[tuple[int, int]]:  # [L] of (K, G)
    """As the hub's files say it by kind, or as transformers 5 writes it by layer."""
    queries = config["num_attention_heads"]
    given = config.get("per_layer_config")
    if given is not None:  # files may have 04 for 4
        config = Given({**config, "per_layer_config": _by_layer(given, len(windows))})
    found = []
    for layer, window in enumerate(windows):
        (width_field, width), (heads_field, heads) = _said_of_heads(config, layer, window)
        said = {"head_dim": width, "num_key_value_heads": heads}
        fields = {"head_dim": width_field, "num_key_value_heads": heads_field}
        if problems := ill_typed(said, called=fields):
            raise UnsupportedModel("; ".join(problems) + ".")
        divides(heads, queries, heads_field, "num_attention_heads")
        found.append((width, heads))
    return found


def _said_of_heads(config: Config, layer: int, window: int) -> list[tuple[str, Any]]:
    """K and G of one layer, each with the field that says it."""
    width, heads = "head_dim", "num_key_value_heads"
    given = config.get("per_layer_config")
    if given is not None:  # only what differs from the usual is written
        own = given.get(str(layer), {})
        return [
            (f"per_layer_config.{layer}.{name}", own[name]) if name in own else (name, config[name])
            for name in (width, heads)
        ]
    if not window:
        width = "global_head_dim"
        if config.get("attention_k_eq_v") and config.get("num_global_key_value_heads"):
            heads = "num_global_key_value_heads"
    return [(width, config[width]), (heads, config[heads])]


def _by_layer(given: Mapping[str, Any], layers: int) -> dict[str, Mapping[str, Any]]:
    usual = {"head_dim", "num_key_value_heads"}
    found = {name.lstrip("0") or "0": own for name, own in given.items()}
    known = all(isinstance(own, Mapping) and set(own) <= usual for own in found.values())
    if not set(found) <= set(map(str, range(layers))) or not known or len(found) < len(given):
        raise UnsupportedModel(
            f"per_layer_config={shown(given)}: supported are the numbers of layers, "
            f"0..{layers - 1}, and for each of them {sorted(usual)}."
        )
    return found


def _branches(config: Config, shares_kv: bool) -> tuple[tuple[str, Branch], ...]:
    """An MLP, wider in layers that share keys if so said, or with experts beside it."""
    wide = shares_kv and config.get("use_double_wide_mlp")
    width = config["intermediate_size"] * (2 if wide else 1)
    branch: Branch = mlp(config, width=width, activation="gelu_tanh")
    if config.get("enable_moe_block"):
        branch = MlpAndMoe(mlp=branch, moe=_experts(config))
    own = config["hidden_size_per_layer_input"]
    if not own:
        return (("mlp_out", branch),)
    gated = GatedInput(width=own, activation="gelu_tanh")
    return (("mlp_out", branch), ("per_layer_out", gated))


def _experts(config: Config) -> Moe:
    names = ("num_experts", "top_k_experts", "moe_intermediate_size")
    missing = [name for name in names if not config.get(name)]
    if missing:
        raise UnsupportedModel(f"enable_moe_block=True and {missing} are not given.")
    count, each, width = names
    return experts(config, count, each=each, width=width, activation="gelu_tanh")


def _ropes(config: Config) -> tuple[Rope, Rope]:
    settings = config.get("rope_parameters")
    if settings is None:
        settings = DEFAULTS["rope_parameters"]
    parts = settings.values()
    based = all(isinstance(part, Mapping) and "rope_theta" in part for part in parts)
    if set(settings) != {FULL, SLIDING} or not based:
        raise UnsupportedModel(
            f"rope_parameters={shown(settings)} are not of {[FULL, SLIDING]}, each with rope_theta."
        )
    full, local = two_ropes(Given({**config, "rope_parameters": settings}), 1e6, 1e4)
    return local, full


def _token_input(config: Config) -> TokenInput | None:
    width, vocab = config["hidden_size_per_layer_input"], config["vocab_size_per_layer_input"]
    if not width:
        return None
    if not vocab or vocab < config["vocab_size"]:
        raise UnsupportedModel(
            f"vocab_size_per_layer_input={vocab!r} is less than vocab_size={config['vocab_size']}: "
            "some tokens would have no input for each layer."
        )
    return TokenInput(width=width, vocab=vocab)


def unread(arch: Architecture, name: str) -> bool:
    """Files hold keys and values of layers that read another layer's too, and nothing uses them."""
    start, _, rest = name.partition("model.layers.")
    number, _, tensor = rest.partition(".")
    if start or not number.isdecimal() or int(number) >= arch.layers:
        return False
    shared = arch.specs[int(number)].mixer.kv_source is not None
    return shared and tensor in UNUSED_BY_SHARING


UNUSED_BY_SHARING = {f"self_attn.{n}.weight" for n in ("k_proj", "v_proj", "k_norm", "v_norm")}

# What the library has where a file says nothing.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 262144,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "global_head_dim": 512,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "sliding_window": 512,
    "tie_word_embeddings": True,
    "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 262144,
    "rope_parameters": {
        SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    },
}
# The text model of `gemma4_unified` (12B) has neither experts nor inputs for each layer, whatever
# its file says of them.
UNIFIED_DEFAULTS = {
    **DEFAULTS,
    "max_position_embeddings": 262144,
    "sliding_window": 1024,
    "hidden_size_per_layer_input": 0,
}
FIXED = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False, None),
    # "vision": only tokens of an image see each other both ways.
    "use_bidirectional_attention": (False, None, "vision"),
    # The library takes no notice of them; all is in rope_parameters.
    "rope_theta": (None,),
    "rope_scaling": (None,),
}
UNIFIED_FIXED = {
    **FIXED,
    "hidden_size_per_layer_input": (0, None),
    "enable_moe_block": (False, None),
}
NAMING = Naming(
    tensors=FOUR_NORMS
    + stored(
        router="router.proj.weight",
        expert_gate="experts.gate_up_proj: experts expert_mlp embed",
        expert_up="experts.gate_up_proj: experts expert_mlp embed",
        expert_down="experts.down_proj: experts embed expert_mlp",
    )
)


def family(model_type: str, defaults: Config, fixed: Mapping[str, tuple], name: str) -> Family:
    return Family(
        model_type=model_type,
        read=read,
        fields="""attention_bias hidden_activation sliding_window layer_types?
            final_logit_softcapping? use_bidirectional_attention attention_k_eq_v
            num_kv_shared_layers use_double_wide_mlp enable_moe_block num_experts? top_k_experts?
            moe_intermediate_size? hidden_size_per_layer_input? vocab_size_per_layer_input
            global_head_dim num_global_key_value_heads? per_layer_config""",
        defaults=defaults,
        fixed=fixed,
        namings=(NAMING,),
        unread=unread,
        export_class=name,
    )


register(family("gemma4_text", DEFAULTS, FIXED, "Gemma4ForCausalLM"))
register(family("gemma4_unified_text", UNIFIED_DEFAULTS, UNIFIED_FIXED, "Gemma4UnifiedForCausalLM"))
for outer, inner in (("gemma4", "gemma4_text"), ("gemma4_unified", "gemma4_unified_text")):
    register(
        Wrapper(
            model_type=outer,
            fields="""audio_config boi_token_id eoi_token_id image_token_id video_token_id
                boa_token_id eoa_token_id eoa_token_index audio_token_id
                vision_soft_tokens_per_image""",
            inner=(inner,),
            modalities="vision_tower audio_tower embed_vision embed_audio vision_embedder",
        )
    )
