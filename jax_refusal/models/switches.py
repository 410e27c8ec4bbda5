"""From the fields of a config to the switches of the decoder, for what families say differently.

Each function takes a `config.json` with the family's defaults filled in, and returns fields of
`Architecture`; UnsupportedModel names what is not computed.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from jax_refusal.models.architecture import Rope, UnsupportedModel
from jax_refusal.models.rope import read_rope

Config = Mapping[str, Any]
Switches = dict[str, Any]  # fields of `Architecture`


def nothing(config: Config) -> Switches:
    return {}


def every_layer(config: Config) -> Switches:
    """One sliding window for all layers."""
    return {"windows": (config.get("sliding_window") or 0,) * config["num_hidden_layers"]}


def some_layers(config: Config, usual: Callable[[int], bool]) -> Switches:
    """Sliding windows where `layer_types` says so, or where the family usually has them."""
    layers, window = config["num_hidden_layers"], config.get("sliding_window") or 0
    names = ("full_attention", "sliding_attention")
    types = config.get("layer_types") or [names[usual(i)] for i in range(layers)]
    if len(types) != layers or not set(types) <= set(names):
        raise UnsupportedModel(
            f"layer_types={types!r} is not supported: {layers} of {list(names)} are needed."
        )
    if names[1] in types and not window:
        raise UnsupportedModel(
            f"layer_types has sliding layers and sliding_window={config.get('sliding_window')!r}, "
            f"use_sliding_window={config.get('use_sliding_window')!r} give them no length."
        )
    return {"windows": tuple(window if t == names[1] else 0 for t in types)}


def last_layers(config: Config) -> Switches:
    """Qwen2 and Qwen3: a switch, and windows from layer `max_window_layers` on."""
    if not config.get("use_sliding_window"):
        config = {**config, "sliding_window": None}
    first = config["max_window_layers"] if config["sliding_window"] else math.inf
    return some_layers(config, lambda i: i >= first)


def gemma(config: Config) -> Switches:
    return {"embed_scale": math.sqrt(config["hidden_size"])}


def gemma2(config: Config) -> Switches:
    return {
        **gemma(config),
        **some_layers(config, lambda i: i % 2 == 0),
        "score_scale": config["query_pre_attn_scalar"] ** -0.5,
        "score_cap": config.get("attn_logit_softcapping") or 0.0,
        "logit_cap": config.get("final_logit_softcapping") or 0.0,
    }


def gemma3(config: Config) -> Switches:
    """Layers with a window have a rotary base of their own; a scaling is for the others."""
    pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    windows = some_layers(config, lambda i: (i + 1) % pattern != 0)
    local = config.get("rope_local_base_freq") or 10000.0
    return {**gemma2(config), **windows, **two_ropes(config, windows, 1e6, local)}


def two_ropes(config: Config, windows: Switches, base: float, local: float) -> Switches:
    scaling = rope_settings(config)
    if not set(scaling) & {"full_attention", "sliding_attention"}:
        scaling = {"full_attention": scaling}
    if set(scaling) - {"full_attention", "sliding_attention"}:
        raise UnsupportedModel(f"rope_parameters has unknown parts {sorted(scaling)}.")
    base, context = config.get("rope_theta") or base, config["max_position_embeddings"]
    return {
        "ropes": (
            read_rope(scaling.get("full_attention") or {}, base, context),
            read_rope(scaling.get("sliding_attention") or {}, local, context),
        ),
        "rope_of_layer": tuple(int(window > 0) for window in windows["windows"]),
    }


def phi3(config: Config) -> Switches:
    """Some channels of a head are not turned; longrope is exact up to the original context."""
    scaling = rope_settings(config)
    share = scaling.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0
    context, original = (
        config["max_position_embeddings"],
        config["original_max_position_embeddings"],
    )
    if (scaling.get("rope_type") or scaling.get("type") or "default") != "default":
        scaling["original_max_position_embeddings"] = original
    names = {"su": "longrope", "yarn": "longrope"}  # what earlier files call it
    rope = read_rope(scaling, config.get("rope_theta") or 10000.0, context, names)
    head_width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    # Beyond the original context longrope turns by other frequencies, from the first token on.
    exact = min(context, original) if rope.kind == "longrope" else context
    return {
        **every_layer(config),
        "ropes": (rope,),
        "rotary_width": int(head_width * share),
        "context": exact,
    }


def smollm3(config: Config) -> Switches:
    """Every fourth layer does without rotary embedding, or those that `no_rope_layers` says."""
    layers, every = config["num_hidden_layers"], config["no_rope_layer_interval"]
    turned = config.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(layers)]
    if len(turned) < layers:
        raise UnsupportedModel(f"no_rope_layers={turned!r} is shorter than the {layers} layers.")
    if not config.get("use_sliding_window"):
        config = {**config, "sliding_window": None}
    windows = some_layers(config, lambda i: bool(config["sliding_window"]) and not turned[i])
    rope = one_rope(config, 2e6)
    return {
        **windows,
        "ropes": (rope, Rope(base=rope.base, kind="none")),
        "rope_of_layer": tuple(int(not on) for on in turned[:layers]),
    }


def rope_settings(config: Config) -> dict[str, Any]:
    """The rope settings: transformers 5 writes all into rope_parameters, earlier two fields."""
    new, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    if new and old and new != old:
        raise UnsupportedModel(f"rope_parameters={new!r} and rope_scaling={old!r} differ.")
    return dict(new or old)


def one_rope(config: Config, default_base: float) -> Rope:
    scaling = rope_settings(config)
    share = scaling.pop("partial_rotary_factor", None)
    if share not in (None, 1.0):
        raise UnsupportedModel(f"partial_rotary_factor={share!r} (supported here: [1.0]).")
    base = config.get("rope_theta") or default_base
    return read_rope(scaling, base, config["max_position_embeddings"])


def qwen(config: Config) -> Switches:
    """Qwen-1: two halves make the MLP's width, and two switches act beyond `seq_length` tokens.

    Log-n attention makes queries longer there, by their position. Dynamic NTK takes the rotary base
    from the length of a row's prompt when it is read, and keeps it for the reply, as the published
    code does. (That code counts the padding in front of a prompt as positions for log-n attention.
    Here a prompt is what it is alone, whatever it shares a batch with.) Up to `seq_length` neither
    acts, and where the context ends there neither is computed.
    """
    heads, channels = config["num_attention_heads"], config["kv_channels"]
    if heads * channels != config["hidden_size"]:
        raise UnsupportedModel(
            f"kv_channels={channels!r} x {heads} heads is not hidden_size={config['hidden_size']}."
        )
    context, trained = config["max_position_embeddings"], config["seq_length"]
    own: Switches = {}
    if config.get("use_logn_attn", True) and context > trained:
        own["query_log"] = trained
    if config.get("use_dynamic_ntk", True) and context > trained:
        rope = one_rope(config, 1e4)
        if rope.kind != "default":
            raise UnsupportedModel(f"rope type {rope.kind!r} cannot be had with use_dynamic_ntk.")
        factor = context / trained
        own["ropes"] = (
            Rope(rope.base, kind="prompt_ntk", factor=factor, original_context=trained),
        )
    return {
        **own,
        "head_width": channels,
        "score_scale": channels**-0.5,
        "mlp_width": config["intermediate_size"] // 2,
    }


def olmo3(config: Config) -> Switches:
    """Three layers of four have a window; the scaling of rotary embeddings is for the others."""
    windows = some_layers(config, lambda i: (i + 1) % 4 != 0)
    return {**windows, **two_ropes(config, windows, 5e5, 5e5)}


def ministral3(config: Config) -> Switches:
    """Queries grow with the logarithm of how often the original context has passed."""
    settings = rope_settings(config)
    growth = settings.pop("llama_4_scaling_beta", None)
    settings.pop("max_position_embeddings", None)
    period = settings.get("original_max_position_embeddings")
    if growth is None or period is None:
        raise UnsupportedModel(
            f"rope_parameters={settings!r} lacks llama_4_scaling_beta or "
            "original_max_position_embeddings."
        )
    base, context = config.get("rope_theta") or 1e6, config["max_position_embeddings"]
    return {
        **every_layer(config),
        "ropes": (read_rope(settings, base, context),),
        "query_growth": growth,
        "query_period": period,
    }


def mixtral(config: Config) -> Switches:
    return {
        **every_layer(config),
        "experts": config["num_local_experts"],
        "experts_per_token": config["num_experts_per_tok"],
    }


def qwen3_moe(config: Config) -> Switches:
    """Every layer routed, with a width of its own for experts."""
    if not config.get("use_sliding_window"):
        config = {**config, "sliding_window": None}
    return {
        **every_layer(config),
        "experts": config["num_experts"],
        "experts_per_token": config["num_experts_per_tok"],
        "shares_add_up": bool(config["norm_topk_prob"]),
        "mlp_width": config["moe_intermediate_size"],
    }


def gpt_oss(config: Config) -> Switches:
    """Every other layer has a window, from the first on; every layer is routed."""
    problems = []
    packed = config.get("quantization_config") or {"quant_method": "mxfp4"}
    unknown = sorted(set(packed) - {"quant_method", "modules_to_not_convert"})
    if packed.get("quant_method") != "mxfp4" or unknown:
        problems.append(
            f"quantization_config={packed!r} (supported: quant_method='mxfp4', with no other field "
            "than modules_to_not_convert)"
        )
    count, limit = config["num_experts_per_tok"], config["swiglu_limit"]
    if config.get("experts_per_token", count) != count:
        problems.append(f"experts_per_token={config['experts_per_token']!r} is not {count}")
    if not limit or limit < 0:
        problems.append(f"swiglu_limit={limit!r} (supported: above 0)")
    if problems:
        raise UnsupportedModel("This gpt_oss config cannot be run: " + "; ".join(problems) + ".")
    yarn = {"rope_type": "yarn", "factor": 32.0, "truncate": False}  # where the file is silent
    scaling = rope_settings(config) or {**yarn, "original_max_position_embeddings": 4096}
    base = config.get("rope_theta") or 150000.0
    return {
        **some_layers(config, lambda i: i % 2 == 0),
        "ropes": (read_rope(scaling, base, config["max_position_embeddings"]),),
        "experts": config["num_local_experts"],
        "experts_per_token": count,
        "expert_bias": True,
        "swiglu_limit": limit,
        "sinks": True,
    }
