"""Gemma 1, 2 and 3."""

import dataclasses
import math
from typing import Any

from jax_refusal.families.common import (
    FOUR_NORMS,
    attention,
    decoder,
    layers,
    mlp,
    one_rope,
    some_layers,
    two_ropes,
)
from jax_refusal.families.registry import Config, Family, Gguf, Wrapper, register
from jax_refusal.messages import shown
from jax_refusal.models.spec import Architecture, Attention, Naming, UnsupportedModel

GELU = {
    "hidden_act": ("gelu_pytorch_tanh",),
    "hidden_activation": ("gelu_pytorch_tanh", None),
}


def read_gemma(config: Config) -> Architecture:
    specs = layers(config, attention(config), mlp(config, activation="gelu_tanh"))
    return decoder(config, specs, (one_rope(config),), **_whole(config))


def read_gemma2(config: Config) -> Architecture:
    windows = some_layers(config, lambda i: i % 2 == 0)
    branch = mlp(config, activation="gelu_tanh")
    specs = layers(config, _capped(config), branch, windows=windows, post_norm=True)
    return decoder(config, specs, (one_rope(config),), **_whole(config))


def read_gemma3(config: Config) -> Architecture:
    """Layers with a window have a rotary base of their own; a scaling is for the others."""
    pattern = config["sliding_window_pattern"]
    if not isinstance(pattern, int) or not pattern:
        raise UnsupportedModel(f"sliding_window_pattern={shown(pattern)} (supported: above 0).")
    windows = some_layers(config, lambda i: (i + 1) % pattern != 0)
    ropes = two_ropes(config, 1e6, 1e4)
    specs = layers(
        config,
        _capped(config, qk_norm="head"),
        mlp(config, activation="gelu_tanh"),
        windows=windows,
        ropes=[int(window > 0) for window in windows],
        post_norm=True,
    )
    return decoder(config, specs, ropes, **_whole(config))


def _capped(config: Config, **own: Any) -> Attention:
    return attention(
        config,
        score_scale=config["query_pre_attn_scalar"] ** -0.5,
        score_cap=config.get("attn_logit_softcapping") or 0.0,
        **own,
    )


def _whole(config: Config) -> dict[str, Any]:
    return {
        "norm": "one_plus",
        "embed_scale": math.sqrt(config["hidden_size"]),
        "logit_cap": config.get("final_logit_softcapping") or 0.0,
    }


# llama.cpp knows the 27B models of Gemma 2 and 3 by their number of layers: no file says how scores
# are scaled.
GGUF = Gguf(
    architecture="gemma",
    constants={"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"},
    norms_plus_one=True,
)
WINDOW = {"sliding_window": "attention.sliding_window"}

GEMMA2 = Family(
    model_type="gemma2",
    read=read_gemma2,
    fields="""attention_bias hidden_activation query_pre_attn_scalar sliding_window? layer_types?
        attn_logit_softcapping? final_logit_softcapping? use_bidirectional_attention
        sliding_window_size""",  # the last repeats sliding_window in some files
    required="num_key_value_heads head_dim",
    defaults={
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    fixed=GELU,
    namings=(Naming(tensors=FOUR_NORMS),),
    gguf=dataclasses.replace(
        GGUF,
        architecture="gemma2",
        fields={
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
            **WINDOW,
        },
        wide_layers=46,
    ),
)
register(
    Family(
        model_type="gemma",
        read=read_gemma,
        fields="attention_bias hidden_activation use_bidirectional_attention",
        required="num_key_value_heads head_dim",
        defaults={"tie_word_embeddings": True},
        fixed={**GELU, "hidden_act": ("gelu", "gelu_pytorch_tanh")},  # both mean tanh
        gguf=GGUF,
    )
)
register(GEMMA2)
register(
    dataclasses.replace(
        GEMMA2,
        model_type="gemma3_text",
        read=read_gemma3,
        fields=GEMMA2.fields
        + " rope_local_base_freq sliding_window_pattern _sliding_window_pattern",
        # The files of the multimodal models leave out what the library has as a default.
        defaults={
            "vocab_size": 262208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
        },
        # The library reads a cap on scores for this family and then does not apply it.
        fixed={**GELU, "attn_logit_softcapping": (None,)},
        export_class="Gemma3ForCausalLM",
        gguf=dataclasses.replace(
            GGUF,
            architecture="gemma3",
            fields={**WINDOW, "rope_local_base_freq": "rope.freq_base_swa"},
            rope_base=1e6,
            wide_layers=62,
        ),
    )
)
register(
    Wrapper(
        model_type="gemma3",
        fields="mm_tokens_per_image boi_token_index eoi_token_index image_token_index",
        inner=("gemma3_text",),
        modalities="vision_tower multi_modal_projector",
    )
)
