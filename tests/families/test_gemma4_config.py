"""Config files of Gemma 4 as the hub has them, shortened; and what is not computed, refused."""

import math
from typing import Any

import pytest

from jax_refusal.families.registry import architecture
from jax_refusal.models.spec import (
    Architecture,
    GatedInput,
    Mlp,
    MlpAndMoe,
    Moe,
    TokenInput,
    UnsupportedModel,
    phases,
)

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


def windows(arch: Architecture) -> tuple[int, ...]:  # [L]
    return tuple(spec.mixer.window for spec in arch.specs)


def gelu(width: int) -> Mlp:
    return Mlp(width=width, activation="gelu_tanh")


def test_31b() -> None:
    arch = architecture(DENSE_31B)
    assert arch.wrapped and arch.tied_head and all(spec.scale for spec in arch.specs)
    assert windows(arch) == ((1024,) * 5 + (0,)) * 10
    local, full = arch.specs[0].mixer, arch.specs[5].mixer
    assert (local.head_width, local.kv_heads, local.keys_are_values) == (256, 16, False)
    assert (full.head_width, full.kv_heads, full.keys_are_values) == (512, 4, True)
    assert (full.score_scale, arch.logit_cap, arch.embed_scale) == (1.0, 30.0, math.sqrt(5376))
    assert not arch.shares_kv and arch.token_input is None
    assert {spec.branches for spec in arch.specs} == {(("mlp_out", gelu(21504)),)}
    assert [(len(phase.slots), phase.repeats) for phase in phases(arch)] == [(6, 10)]
    local, full = arch.ropes
    assert (local.kind, local.base) == ("default", 1e4)
    assert (full.kind, full.base, full.share) == ("proportional", 1e6, 0.25)


def test_12b() -> None:
    arch = architecture(UNIFIED_12B)
    assert (arch.family, arch.layers) == ("gemma4_unified_text", 48)
    assert arch.specs[-1].mixer.kv_heads == 1
    bare = {k: v for k, v in UNIFIED_12B["text_config"].items() if "per_layer" not in k}
    assert architecture(bare).token_input is None


def test_e2b() -> None:
    arch = architecture(E2B)
    sources = [spec.mixer.kv_source for spec in arch.specs]
    assert sources == [*[None] * 15, *([13] * 4 + [14]) * 4]
    gated = ("per_layer_out", GatedInput(width=256, activation="gelu_tanh"))
    assert arch.specs[0].branches == (("mlp_out", gelu(6144)), gated)
    assert arch.specs[15].branches == (("mlp_out", gelu(12288)), gated)
    assert arch.token_input == TokenInput(width=256, vocab=262144)
    full = arch.specs[4].mixer
    assert (full.head_width, full.kv_heads, full.keys_are_values) == (512, 1, False)
    assert [(len(phase.slots), phase.repeats) for phase in phases(arch)] == [(5, 3), (5, 4)]


def test_26b() -> None:
    arch = architecture(MOE_26B)
    moe = Moe(experts=128, experts_per_token=8, width=704, activation="gelu_tanh")
    assert arch.specs[0].branches == (("mlp_out", MlpAndMoe(mlp=gelu(2112), moe=moe)),)
    assert windows(arch) == ((1024,) * 5 + (0,)) * 5  # every sixth, where the file is silent


def test_the_last_layer_sees_everything() -> None:
    """As the library has it, whatever layer_types says."""
    arch = architecture({**MOE_26B, "layer_types": [SLIDING] * 30})
    assert windows(arch) == (1024,) * 29 + (0,)


def test_heads_as_transformers_5_writes_them() -> None:
    known = {k: v for k, v in E2B.items() if "global" not in k}
    wide = {f"{i:02}": {"head_dim": 512} for i in range(4, 35, 5)}
    assert architecture({**known, "per_layer_config": wide}) == architecture(E2B)


def test_layers_that_are_all_alike_or_all_different() -> None:
    """What one config can say, specs can."""
    full = architecture({**E2B, "layer_types": [FULL] * 35})
    assert [(len(phase.slots), phase.repeats) for phase in phases(full)] == [(1, 15), (1, 20)]
    odd = architecture({**E2B, "global_head_dim": 384})
    assert odd.specs[4].mixer.head_width == 384
    given = {"3": {"num_key_value_heads": 2}}
    known = {k: v for k, v in E2B.items() if "global" not in k}
    assert architecture({**known, "per_layer_config": given}).specs[3].mixer.kv_heads == 2


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "bias": ({"attention_bias": True}, "attention_bias=True"),
    "both ways": ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention='all'"),
    "activation": ({"hidden_activation": "silu"}, "hidden_activation='silu'"),
    "field": ({"qk_clip": 1.0}, "unknown field qk_clip=1.0"),
    "old rope": ({"rope_theta": 1e4}, r"rope_theta=10000.0 \(supported: \[None\]\)"),
    "one rope": ({"rope_parameters": ROPES[FULL]}, "rope_parameters=.*are not of"),
    "kinds": ({"layer_types": ["chunked_attention"] * 35}, "layer_types=.*not supported"),
    "no width": (
        {"global_head_dim": None},
        r"global_head_dim=None \(supported: a whole number from 1 ",
    ),
    "heads": (
        {"attention_k_eq_v": True, "num_global_key_value_heads": 3},
        "num_global_key_value_heads=3 does not divide num_attention_heads=8",
    ),
    "local heads": ({"num_key_value_heads": 3}, "^num_key_value_heads=3 does not divide"),
    "no local width": ({"head_dim": 0}, r"head_dim=0 \(supported: a whole number from 1 "),
    "nothing wide": (
        {"global_head_dim": 0},
        r"global_head_dim=0 \(supported: a whole number from 1 ",
    ),
    "heads of a layer": (
        {"per_layer_config": {"4": {"num_key_value_heads": 3}}},
        r"per_layer_config\.4\.num_key_value_heads=3 does not divide",
    ),
    "null heads": ({"num_key_value_heads": None}, r"num_key_value_heads=None \(supported"),
    "two widths of a kind": (
        {"per_layer_config": {"3": {"head_dim": 128}}},
        r"turns \[128, 256\] channels of heads",
    ),
    "a layer twice": (
        {"per_layer_config": {"3": {"head_dim": 256}, "03": {"head_dim": 128}}},
        "per_layer_config=",
    ),
    "all shared": ({"num_kv_shared_layers": 35}, "num_kv_shared_layers=35: the first 0 layers"),
    "one kind": ({"num_kv_shared_layers": 33}, "num_kv_shared_layers=33: the first 2 layers"),
    "a layer that is not there": (
        {"per_layer_config": {"35": {"head_dim": 512}}},
        r"per_layer_config=.*numbers of layers, 0\.\.34",
    ),
    "a window": (
        {"per_layer_config": {str(i): {"sliding_window": 9} for i in range(4, 35, 5)}},
        "per_layer_config=.*for each of them .*'head_dim', 'num_key_value_heads'",
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
