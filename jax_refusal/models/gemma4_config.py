"""From the config of Gemma 4's text model to the switches of the decoder.

Letters: L layers, G key/value heads, K head width, F MLP width.
"""

from collections.abc import Mapping
from typing import Any

from jax_refusal.models import switches
from jax_refusal.models.architecture import UnsupportedModel
from jax_refusal.models.switches import Config, Switches

FULL, SLIDING = "full_attention", "sliding_attention"

FIELDS = """
    attention_bias hidden_activation sliding_window layer_types final_logit_softcapping
    use_bidirectional_attention attention_k_eq_v num_kv_shared_layers use_double_wide_mlp
    enable_moe_block num_experts top_k_experts moe_intermediate_size hidden_size_per_layer_input
    vocab_size_per_layer_input global_head_dim num_global_key_value_heads per_layer_config
"""
# What the library has where a file says nothing.
DEFAULTS = {
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
FIXED = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False, None),
    # "vision": only tokens of an image see each other both ways.
    "use_bidirectional_attention": (False, None, "vision"),
    # The library takes no notice of them; all is in rope_parameters.
    "rope_theta": (None,),
    "rope_scaling": (None,),
}
# The text model of `gemma4_unified` (12B) has neither experts nor inputs for each layer, whatever
# its file says of them.
UNIFIED_DEFAULTS = {
    **DEFAULTS,
    "max_position_embeddings": 262144,
    "sliding_window": 1024,
    "hidden_size_per_layer_input": 0,
}
UNIFIED_FIXED = {
    **FIXED,
    "hidden_size_per_layer_input": (0, None),
    "enable_moe_block": (False, None),
}
STATIC: Switches = {
    "norm": "scale_in_float32",
    "activation": "gelu_tanh",
    "post_norm": True,
    "layer_scale": True,
    "score_scale": 1.0,
}


def read(config: Config) -> Switches:
    windows = _windows(config)
    sharing = _sharing(config, windows)
    return {
        **switches.gemma(config),
        **_ropes(config, windows),
        **_heads(config, windows),
        **sharing,
        **_experts(config),
        **_per_layer(config),
        "windows": windows,
        "logit_cap": config.get("final_logit_softcapping") or 0.0,
        "keys_are_values": bool(config.get("attention_k_eq_v")),
        "wide_mlp": 2 * config["intermediate_size"]
        if sharing and config.get("use_double_wide_mlp")
        else 0,
    }


def _windows(config: Config) -> tuple[int, ...]:  # [L]
    """Every sixth layer sees everything, or those that `layer_types` says; the last one always."""
    found = list(switches.some_layers(config, lambda i: (i + 1) % 6 != 0)["windows"])
    found[-1] = 0
    if not any(found):
        raise UnsupportedModel(
            f"layer_types={config.get('layer_types')!r}: a model of {FULL!r} layers alone is not "
            f"computed here; some have to be {SLIDING!r}."
        )
    return tuple(found)


def _sharing(config: Config, windows: tuple[int, ...]) -> Switches:
    """The last layers attend to the keys and values of the last layer of their kind before them."""
    count, layers = config.get("num_kv_shared_layers") or 0, len(windows)
    if not count:
        return {}
    own = range(layers - count)
    last = {bool(windows[i]): i for i in own}
    if not 0 < count < layers or set(last) != {False, True}:
        raise UnsupportedModel(
            f"num_kv_shared_layers={count!r}: the first {max(0, layers - count)} layers have to "
            f"hold one of {FULL!r} and one of {SLIDING!r}, whose keys the others read."
        )
    return {"kv_of_layer": (*own, *(last[bool(w)] for w in windows[len(own) :]))}


def _heads(config: Config, windows: tuple[int, ...]) -> Switches:
    """G and K of layers without a window, as the hub's files or as transformers 5 writes them."""
    width, heads = config["head_dim"], config["num_key_value_heads"]
    wide = config["global_head_dim"], heads
    if config.get("attention_k_eq_v"):
        wide = wide[0], config.get("num_global_key_value_heads") or heads
    given = config.get("per_layer_config")
    if given is not None:
        wide = _per_layer_heads(given, windows, {"head_dim": width, "num_key_value_heads": heads})
    if not isinstance(wide[0], int) or wide[0] % width:
        raise UnsupportedModel(
            f"global_head_dim={wide[0]!r} is no multiple of head_dim={width}, which the cache of "
            "keys and values needs here."
        )
    if config["num_attention_heads"] % wide[1]:
        raise UnsupportedModel(
            f"num_global_key_value_heads={wide[1]!r} does not divide "
            f"num_attention_heads={config['num_attention_heads']}."
        )
    return {"global_head_width": wide[0], "global_kv_heads": wide[1]}


def _per_layer_heads(
    given: Mapping[str, Mapping[str, Any]], windows: tuple[int, ...], usual: Mapping[str, int]
) -> tuple[int, int]:
    """Only what differs is written, by layer; here all layers without a window have to agree."""
    every = [{**usual, **given.get(str(i), {})} for i in range(len(windows))]
    wide = every[-1]  # the last layer has no window
    expected = [usual if window else wide for window in windows]
    if (
        every != expected
        or set(wide) != set(usual)
        or not set(given) <= set(map(str, range(len(windows))))
    ):
        raise UnsupportedModel(
            f"per_layer_config={dict(given)!r}: supported are one head_dim and one "
            f"num_key_value_heads for all {FULL!r} layers, and no other difference."
        )
    return wide["head_dim"], wide["num_key_value_heads"]


def _ropes(config: Config, windows: tuple[int, ...]) -> Switches:
    settings = config.get("rope_parameters") or DEFAULTS["rope_parameters"]
    if set(settings) != {FULL, SLIDING}:
        raise UnsupportedModel(f"rope_parameters={settings!r} are not of {[FULL, SLIDING]}.")
    config = {**config, "rope_parameters": settings}
    full, local = switches.two_ropes(config, {"windows": windows}, 1e6, 1e4)["ropes"]
    return {"ropes": (local, full)}  # in the order of `kinds.KINDS`


def _experts(config: Config) -> Switches:
    if not config.get("enable_moe_block"):
        return {}
    names = ("num_experts", "top_k_experts", "moe_intermediate_size")
    missing = [name for name in names if not config.get(name)]
    if missing:
        raise UnsupportedModel(f"enable_moe_block=True and {missing} are not given.")
    experts, count, width = (config[name] for name in names)
    return {"experts": experts, "experts_per_token": count, "expert_width": width}


def _per_layer(config: Config) -> Switches:
    width, vocab = config["hidden_size_per_layer_input"], config["vocab_size_per_layer_input"]
    if not width:
        return {}
    if not vocab or vocab < config["vocab_size"]:
        raise UnsupportedModel(
            f"vocab_size_per_layer_input={vocab!r} is less than vocab_size={config['vocab_size']}: "
            "some tokens would have no input for each layer."
        )
    return {"per_layer_width": width, "per_layer_vocab": vocab}


# Rows of `families.FAMILIES`.
TEXT: dict[str, Any] = {
    "fields": FIELDS,
    "defaults": DEFAULTS,
    "fixed": FIXED,
    "static": STATIC,
    "read": read,
    "naming": "gemma4",
}
UNIFIED: dict[str, Any] = {**TEXT, "defaults": UNIFIED_DEFAULTS, "fixed": UNIFIED_FIXED}
# Fields of the wrappers around it, of which none acts on text.
WRAPPER = """
    audio_config boi_token_id eoi_token_id image_token_id video_token_id boa_token_id eoa_token_id
    eoa_token_index audio_token_id vision_soft_tokens_per_image
"""
