"""Config files of Gemma 4 as the hub has them, shortened; and what is not computed, refused."""

import math
from typing import Any

import pytest

from jax_refusal.models.families import UnsupportedModel, architecture

FULL, SLIDING = "full_attention", "sliding_attention"
ROPES = {
    FULL: {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
    SLIDING: {"rope_theta": 10000.0, "rope_type": "default"},
}
COMMON = {
    "attention_bias": False,
    "enable_moe_block": False,
    "final_logit_softcapping": 30.0,
    "global_head_dim": 512,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 262144,
    "model_type": "gemma4_text",
    "num_kv_shared_layers": 0,
    "rms_norm_eps": 1e-06,
    "rope_parameters": ROPES,
    "sliding_window": 1024,
    "tie_word_embeddings": True,
    "use_bidirectional_attention": "vision",
    "use_double_wide_mlp": False,
    "vocab_size": 262144,
    "vocab_size_per_layer_input": 262144,
}
DENSE_31B = {
    "model_type": "gemma4",
    "audio_config": None,
    "boi_token_id": 255999,
    "image_token_id": 258880,
    "vision_soft_tokens_per_image": 280,
    "tie_word_embeddings": True,
    "vision_config": {"model_type": "gemma4_vision"},
    "text_config": {
        **COMMON,
        "attention_k_eq_v": True,
        "hidden_size": 5376,
        "hidden_size_per_layer_input": 0,
        "intermediate_size": 21504,
        "layer_types": ([SLIDING] * 5 + [FULL]) * 10,
        "num_attention_heads": 32,
        "num_global_key_value_heads": 4,
        "num_hidden_layers": 60,
        "num_key_value_heads": 16,
    },
}
UNIFIED_12B = {
    **DENSE_31B,
    "model_type": "gemma4_unified",
    "text_config": {
        **DENSE_31B["text_config"],
        "model_type": "gemma4_unified_text",
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "layer_types": ([SLIDING] * 5 + [FULL]) * 8,
        "num_attention_heads": 16,
        "num_global_key_value_heads": 1,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
    },
}
E2B = {
    **COMMON,
    "attention_k_eq_v": False,
    "hidden_size": 1536,
    "hidden_size_per_layer_input": 256,
    "intermediate_size": 6144,
    "layer_types": ([SLIDING] * 4 + [FULL]) * 7,
    "max_position_embeddings": 131072,
    "num_attention_heads": 8,
    "num_global_key_value_heads": None,
    "num_hidden_layers": 35,
    "num_key_value_heads": 1,
    "num_kv_shared_layers": 20,
    "sliding_window": 512,
    "use_double_wide_mlp": True,
}
MOE_26B = {
    **COMMON,
    "attention_k_eq_v": True,
    "enable_moe_block": True,
    "hidden_size": 2816,
    "hidden_size_per_layer_input": None,
    "intermediate_size": 2112,
    "moe_intermediate_size": 704,
    "num_attention_heads": 16,
    "num_experts": 128,
    "num_global_key_value_heads": 2,
    "num_hidden_layers": 30,
    "num_key_value_heads": 8,
    "top_k_experts": 8,
}


def test_31b() -> None:
    arch = architecture(DENSE_31B)
    assert arch.wrapped and arch.tied_head and arch.keys_are_values and arch.layer_scale
    assert arch.windows == ((1024,) * 5 + (0,)) * 10
    assert (arch.head_width, arch.kv_heads) == (256, 16)
    assert (arch.global_head_width, arch.global_kv_heads, arch.cache_heads) == (512, 4, 16)
    assert (arch.score_scale, arch.logit_cap, arch.embed_scale) == (1.0, 30.0, math.sqrt(5376))
    assert arch.kv_of_layer == () and not arch.experts and not arch.per_layer_width
    local, full = arch.ropes
    assert (local.kind, local.base) == ("default", 1e4)
    assert (full.kind, full.base, full.share) == ("proportional", 1e6, 0.25)


def test_12b() -> None:
    arch = architecture(UNIFIED_12B)
    assert (arch.family, arch.layers, arch.global_kv_heads) == ("gemma4_unified_text", 48, 1)
    bare = {k: v for k, v in UNIFIED_12B["text_config"].items() if "per_layer" not in k}
    assert architecture(bare).per_layer_width == 0


def test_e2b() -> None:
    arch = architecture(E2B)
    assert (arch.mlp_width, arch.wide_mlp, arch.cache_layers) == (6144, 12288, 15)
    assert arch.kv_of_layer == (*range(15), *((13,) * 4 + (14,)) * 4)
    assert (arch.per_layer_width, arch.per_layer_vocab) == (256, 262144)
    assert (arch.global_head_width, arch.global_kv_heads, arch.cache_heads) == (512, 1, 2)
    assert not arch.keys_are_values


def test_26b() -> None:
    arch = architecture(MOE_26B)
    assert (arch.experts, arch.experts_per_token) == (128, 8)
    assert (arch.mlp_width, arch.expert_width) == (2112, 704)
    assert arch.windows == ((1024,) * 5 + (0,)) * 5  # every sixth, where the file is silent


def test_the_last_layer_sees_everything() -> None:
    """As the library has it, whatever layer_types says."""
    arch = architecture({**MOE_26B, "layer_types": [SLIDING] * 30})
    assert arch.windows == (1024,) * 29 + (0,)


def test_heads_as_transformers_5_writes_them() -> None:
    known = {k: v for k, v in E2B.items() if "global" not in k}
    wide = {str(i): {"head_dim": 512} for i in range(4, 35, 5)}
    assert architecture({**known, "per_layer_config": wide}) == architecture(E2B)


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "bias": ({"attention_bias": True}, "attention_bias=True"),
    "both ways": ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention='all'"),
    "activation": ({"hidden_activation": "silu"}, "hidden_activation='silu'"),
    "field": ({"qk_clip": 1.0}, "unknown field qk_clip=1.0"),
    "old rope": ({"rope_theta": 1e4}, r"rope_theta=10000.0 \(supported: \[None\]\)"),
    "one rope": ({"rope_parameters": ROPES[FULL]}, "rope_parameters=.*are not of"),
    "no windows": ({"layer_types": [FULL] * 35}, "layer_types=.*alone"),
    "kinds": ({"layer_types": ["chunked_attention"] * 35}, "layer_types=.*not supported"),
    "width": ({"global_head_dim": 384}, "global_head_dim=384 is no multiple of head_dim=256"),
    "no width": ({"global_head_dim": None}, "global_head_dim=None is no multiple"),
    "all shared": ({"num_kv_shared_layers": 35}, "num_kv_shared_layers=35: the first 0 layers"),
    "one kind": ({"num_kv_shared_layers": 33}, "num_kv_shared_layers=33: the first 2 layers"),
    "a layer": (
        {"per_layer_config": {"4": {"head_dim": 512}}},
        "per_layer_config=.*one head_dim and one",
    ),
    "a window": (
        {"per_layer_config": {str(i): {"sliding_window": 9} for i in range(4, 35, 5)}},
        "per_layer_config=.*no other difference",
    ),
    "experts": ({"enable_moe_block": True}, "enable_moe_block=True and .*num_experts"),
    "vocabulary": ({"vocab_size_per_layer_input": 9}, "vocab_size_per_layer_input=9 is less"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_not_computed_is_refused_by_name(name: str) -> None:
    changed, words = REFUSALS[name]
    with pytest.raises(UnsupportedModel, match=words):
        architecture({**E2B, **changed})


def test_no_inputs_for_each_layer_in_a_unified_model() -> None:
    text = {**UNIFIED_12B["text_config"], "hidden_size_per_layer_input": 256}
    with pytest.raises(UnsupportedModel, match="hidden_size_per_layer_input=256"):
        architecture({**UNIFIED_12B, "text_config": text})
