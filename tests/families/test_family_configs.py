"""Config files as the hub has them, read into switches; and what is not computed, refused by name.

The files here are shortened to the fields that say something about the forward pass, with the
values of the published models.
"""

import dataclasses
import math
from typing import Any

import pytest

from jax_refusal.families import registry
from jax_refusal.families.registry import REFUSED, architecture
from jax_refusal.models.spec import (
    Architecture,
    Attention,
    DeltaNet,
    Mamba2,
    Mlp,
    Moe,
    UnsupportedModel,
    phases,
)


def windows(arch: Architecture) -> tuple[int, ...]:  # [L]
    return tuple(spec.mixer.window for spec in arch.specs)


def ropes(arch: Architecture) -> tuple[int, ...]:  # [L]
    return tuple(spec.mixer.rope for spec in arch.specs)


def first(arch: Architecture) -> tuple[Attention, Mlp | Moe]:
    """The first layer's attention and MLP."""
    ((site, branch),) = arch.specs[0].branches
    assert site == "mlp_out" and isinstance(branch, Mlp | Moe)
    return arch.specs[0].mixer, branch


GEMMA2_9B = {
    "model_type": "gemma2",
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_attention_heads": 16,
    "num_hidden_layers": 42,
    "num_key_value_heads": 8,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "sliding_window_size": 4096,
    "vocab_size": 256000,
}
GEMMA3_27B = {
    "model_type": "gemma3",
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "image_token_index": 262144,
    "mm_tokens_per_image": 256,
    "text_config": {
        "model_type": "gemma3_text",
        "head_dim": 128,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_attention_heads": 32,
        "num_hidden_layers": 62,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 168,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152},
}
PHI4_MINI = {
    "model_type": "phi3",
    "attention_bias": False,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "embd_pdrop": 0.0,
    "full_attn_mod": 1,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "interpolation_factor": 1,
    "lm_head_bias": False,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 24,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 0.75,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "long_factor": [1.0] * 47 + [32.0],
        "short_factor": [1.0] * 48,
        "type": "longrope",
    },
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": True,
    "vocab_size": 200064,
}
SMOLLM3_3B = {
    "model_type": "smollm3",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "layer_types": ["full_attention"] * 36,
    "max_position_embeddings": 65536,
    "max_window_layers": 28,
    "mlp_bias": False,
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 4,
    "pretraining_tp": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 128256,
}
QWEN25_7B = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
GEMMA_2B = {
    "model_type": "gemma",
    "attention_bias": False,
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_activation": None,
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "vocab_size": 256000,
}
OLMO2_7B = {
    "model_type": "olmo2",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
    "vocab_size": 100352,
}


OLMO3_7B = {
    **OLMO2_7B,
    "model_type": "olmo3",
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8,
    "max_position_embeddings": 65536,
    "rope_scaling": {
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "yarn",
    },
    "sliding_window": 4096,
}
MINISTRAL3_3B = {
    "model_type": "mistral3",
    "image_token_index": 10,
    "multimodal_projector_bias": False,
    "projector_hidden_act": "gelu",
    "spatial_merge_size": 2,
    "text_config": {
        "model_type": "ministral3",
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "intermediate_size": 9216,
        "max_position_embeddings": 262144,
        "num_attention_heads": 32,
        "num_hidden_layers": 26,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 16.0,
            "llama_4_scaling_beta": 0.1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 16384,
            "rope_theta": 1000000.0,
            "rope_type": "yarn",
            "type": "yarn",
        },
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": 131072,
    },
    "vision_config": {"model_type": "pixtral"},
    "vision_feature_layer": -1,
}
QWEN3_NEXT_80B = {
    "model_type": "qwen3_next",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GRANITE4_H_TINY = {
    "model_type": "granitemoehybrid",
    "attention_bias": False,
    "attention_multiplier": 0.0078125,
    "embedding_multiplier": 12,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "init_method": "mup",
    "intermediate_size": 512,
    "layer_types": ["attention" if i % 10 == 5 else "mamba" for i in range(40)],
    "logits_scaling": 6,
    "mamba_chunk_size": 256,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_n_heads": 48,
    "mamba_proj_bias": False,
    "max_position_embeddings": 131072,
    "normalization_function": "rmsnorm",
    "num_attention_heads": 12,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 40,
    "num_key_value_heads": 4,
    "num_local_experts": 64,
    "position_embedding_type": "nope",
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000,
    "shared_intermediate_size": 1024,
    "tie_word_embeddings": True,
    "vocab_size": 100352,
}
MIXTRAL_8X7B = {
    "model_type": "mixtral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
GPT_OSS_20B = {
    "model_type": "gpt_oss",
    "attention_bias": True,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "quantization_config": {
        "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}


def test_gpt_oss() -> None:
    arch = architecture(GPT_OSS_20B)
    attention, experts = first(arch)
    assert (
        windows(arch) == (128, 0) * 12
        and attention.sinks
        and experts
        == Moe(
            experts=32,
            experts_per_token=4,
            width=2880,
            activation="quick_gelu",
            bias=True,
            swiglu_limit=7.0,
        )
    )
    assert attention.qkv_bias and attention.out_bias and not arch.tied_head
    (rope,) = arch.ropes
    assert (rope.kind, rope.base, rope.factor, rope.truncate) == ("yarn", 150000, 32, False)
    silent = ("layer_types", "rope_scaling", "rope_theta", "attention_bias", "swiglu_limit")
    assert architecture({k: v for k, v in GPT_OSS_20B.items() if k not in silent}) == arch


def test_olmo3() -> None:
    arch = architecture(OLMO3_7B)
    assert windows(arch) == (4096, 4096, 4096, 0) * 8 and ropes(arch) == (1, 1, 1, 0) * 8
    full, local = arch.ropes
    assert (full.kind, full.base, local.kind, local.base) == ("yarn", 5e5, "default", 5e5)
    assert full.attention_factor == 1.2079441541679836


def test_ministral3() -> None:
    arch = architecture(MINISTRAL3_3B)
    assert arch.wrapped and arch.tied_head and not any(windows(arch))
    assert (arch.query_scale, arch.query_period) == (0.1, 16384)
    assert arch.ropes[0].attention_factor == 1.0  # mscale over mscale_all_dim


def test_mixtral() -> None:
    arch = architecture(MIXTRAL_8X7B)
    assert first(arch)[1] == Moe(experts=8, experts_per_token=2, width=14336)


def test_qwen3_next() -> None:
    arch = architecture(QWEN3_NEXT_80B)
    linear, full = arch.specs[0].mixer, arch.specs[3].mixer
    assert linear == DeltaNet(heads=32, key_heads=16, key_width=128, value_width=128, taps=4)
    assert isinstance(full, Attention) and full.gate and full.rotary_width == 64
    assert [(phase.repeats, len(phase.slots)) for phase in phases(arch)] == [(12, 4)]
    ((_, experts),) = arch.specs[0].branches
    assert isinstance(experts, Moe) and experts.shared_gate and experts.shared_width == 512


def test_granite4() -> None:
    arch = architecture(GRANITE4_H_TINY)
    state, full = arch.specs[0], arch.specs[5]
    assert state.mixer == Mamba2(heads=48, key_heads=1, key_width=128, value_width=64, taps=4)
    assert isinstance(full.mixer, Attention) and full.mixer.score_scale == 1 / 128
    assert full.write_scale == 0.22 and arch.logit_divisor == 6
    assert arch.ropes[0].kind == "none"


@pytest.mark.parametrize(
    ("config", "changed", "words"),
    [
        (QWEN3_NEXT_80B, {"layer_types": ["mamba"] * 48}, "layer_types=.*48 of .*linear_attention"),
        (GRANITE4_H_TINY, {"layer_types": ["mamba"]}, "layer_types=.*40 of .*full_attention"),
        (GRANITE4_H_TINY, {"mamba_d_head": 32}, "mamba_d_head=32 are not the 3072 channels"),
        (GRANITE4_H_TINY, {"mamba_proj_bias": True}, "mamba_proj_bias=True"),
        (GRANITE4_H_TINY, {"time_step_limit": [0.0, 0.1]}, "time_step_limit=.*0.1"),
        (GRANITE4_H_TINY, {"position_embedding_type": "alibi"}, "position_embedding_type='alibi'"),
    ],
)
def test_hybrids_that_differ_are_refused(
    config: dict[str, Any], changed: dict[str, Any], words: str
) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        architecture({**config, **changed})


def test_gemma() -> None:
    arch = architecture(GEMMA_2B)
    attention, mlp = first(arch)
    assert arch.tied_head and arch.norm == "one_plus" and mlp.activation == "gelu_tanh"
    assert (attention.head_width, attention.kv_heads) == (256, 1)
    assert arch.embed_scale == math.sqrt(2048)


def test_gemma2() -> None:
    arch = architecture(GEMMA2_9B)
    attention, _ = first(arch)
    assert windows(arch) == (4096, 0) * 21
    assert (attention.score_cap, arch.logit_cap, attention.score_scale) == (50.0, 30.0, 1 / 16)
    assert arch.specs[0].pre_norm and arch.specs[0].post_norm and arch.tied_head


def test_gemma3_with_what_its_file_leaves_out() -> None:
    arch = architecture(GEMMA3_27B)
    assert arch.wrapped and arch.vocab == 262208 and arch.context == 131072
    assert windows(arch) == ((1024,) * 5 + (0,)) * 10 + (1024,) * 2
    attention, _ = first(arch)
    assert attention.score_scale == 168**-0.5 and attention.score_cap == arch.logit_cap == 0.0
    full, local = arch.ropes
    assert (full.base, full.kind, full.factor) == (1e6, "linear", 8.0)
    assert (local.base, local.kind) == (1e4, "default")
    assert ropes(arch) == ((1,) * 5 + (0,)) * 10 + (1,) * 2


def test_phi4_mini() -> None:
    """Its prompts stay on one side of the original context, whatever the reply."""
    arch = architecture(PHI4_MINI)
    attention, _ = first(arch)
    assert attention.rotary_width == 96 and attention.head_width == 128 and arch.context == 131072
    assert (arch.room(4096), arch.room(4097), arch.prefix_reusable_until) == (4096, 131072, 4096)
    (rope,) = arch.ropes
    assert rope.attention_factor == math.sqrt(1 + math.log(32) / math.log(4096))


def test_smollm3() -> None:
    arch = architecture(SMOLLM3_3B)
    assert not any(windows(arch)) and ropes(arch) == (0, 0, 0, 1) * 9 and arch.tied_head
    assert [(rope.base, rope.kind) for rope in arch.ropes] == [(5e6, "default"), (5e6, "none")]


def test_qwen25() -> None:
    arch = architecture(QWEN25_7B)
    attention, _ = first(arch)
    assert attention.qkv_bias and not attention.out_bias and not any(windows(arch))
    window = architecture({**QWEN25_7B, "use_sliding_window": True, "max_window_layers": 21})
    assert windows(window) == (0,) * 21 + (131072,) * 7


def test_olmo2() -> None:
    arch = architecture(OLMO2_7B)
    (spec,) = set(arch.specs)
    assert not spec.pre_norm and spec.post_norm and spec.mixer.qk_norm == "projection"


def inside(**changed: Any) -> dict[str, Any]:
    return {**GEMMA3_27B, "text_config": {**GEMMA3_27B["text_config"], **changed}}


REFUSALS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "field": ({**QWEN25_7B, "qk_clip": 1.0}, ["unknown field qk_clip=1.0"]),
    "text field": (inside(cap=3), ["unknown field cap=3"]),
    "outer field": ({**GEMMA3_27B, "audio_config": {}}, ["unknown field audio_config={}"]),
    "text model": (
        inside(model_type="gemma4_text"),
        ["'gemma4_text' (supported: ['gemma3_text'])"],
    ),
    "no text model": (
        {k: v for k, v in GEMMA3_27B.items() if k != "text_config"},
        ["text_config is of model_type None"],
    ),
    "activation": ({**GEMMA2_9B, "hidden_activation": "relu"}, ["hidden_activation='relu'"]),
    "bidirectional": (
        {**GEMMA2_9B, "use_bidirectional_attention": True},
        ["use_bidirectional_attention=True"],
    ),
    "score cap": (inside(attn_logit_softcapping=50.0), ["attn_logit_softcapping=50.0"]),
    "layer types": (
        {**QWEN25_7B, "layer_types": ["chunked_attention"] * 28},
        ["layer_types=['chunked_attention'", "28 of ['full_attention', 'sliding_attention']"],
    ),
    "number of layer types": (
        {**QWEN25_7B, "layer_types": ["full_attention"] * 3},
        ["layer_types=", "28 of"],
    ),
    "window off": (
        {**QWEN25_7B, "layer_types": ["sliding_attention"] * 28},
        ["sliding_window=None", "use_sliding_window=False"],
    ),
    "no rope": (
        {**SMOLLM3_3B, "no_rope_layers": [1, 0]},
        ["no_rope_layers=[1, 0] is shorter than the 36 layers"],
    ),
    "partial rope": (
        {**OLMO2_7B, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        ["partial_rotary_factor=0.5"],
    ),
    "default rope with a factor": (
        {**OLMO2_7B, "rope_scaling": {"rope_type": "default", "factor": 2.0}},
        ["rope type 'default': unknown fields ['factor']"],
    ),
    "two ropes": (
        {**OLMO2_7B, "rope_scaling": {"factor": 2.0}, "rope_parameters": {"factor": 3.0}},
        ["rope_parameters={'factor': 3.0} and rope_scaling={'factor': 2.0} differ"],
    ),
    "part of a rope": (
        inside(rope_scaling=None, rope_parameters={"full_attention": {}, "other": {}}),
        ["rope_parameters={'full_attention': {}, 'other': {}} has other parts"],
    ),
    "key/value heads": (
        {k: v for k, v in GEMMA2_9B.items() if k != "num_key_value_heads"},
        ["missing field num_key_value_heads"],
    ),
    "growth of queries": (
        {**MINISTRAL3_3B["text_config"], "rope_parameters": {"rope_type": "default"}},
        ["llama_4_scaling_beta=None", "original_max_position_embeddings=None"],
    ),
    "another base": ({**OLMO3_7B, "rope_theta": 10000}, ["rope_theta=10000 (supported: [500000])"]),
    "activation of experts": ({**GPT_OSS_20B, "swiglu_alpha": 1.0}, ["swiglu_alpha=1.0"]),
    "no clamp": (
        {**GPT_OSS_20B, "swiglu_limit": None},
        ["swiglu_limit=None (supported: a finite number above 0)"],
    ),
    "two numbers of experts": (
        {**GPT_OSS_20B, "experts_per_token": 8},
        ["experts_per_token=8 is not 4"],
    ),
    "another quantisation": (
        {**GPT_OSS_20B, "quantization_config": {"quant_method": "gptq", "bits": 4}},
        ["quantization_config={'quant_method': 'gptq', 'bits': 4}", "quant_method='mxfp4'"],
    ),
    "more about the quantisation": (
        {**GPT_OSS_20B, "quantization_config": {"quant_method": "mxfp4", "block_size": 16}},
        ["'block_size': 16", "no other field than modules_to_not_convert"],
    ),
    "bias of the head": ({**PHI4_MINI, "lm_head_bias": True}, ["lm_head_bias=True"]),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_not_computed_is_refused_by_name(name: str) -> None:
    config, words = REFUSALS[name]
    with pytest.raises(UnsupportedModel) as error:
        architecture(config)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("name", REFUSED)
def test_hybrids_are_refused_with_what_they_would_take(name: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"{name}.*state.*key/value cache"):
        architecture({"model_type": name})


def test_a_family_from_outside_may_compute_what_is_refused(monkeypatch) -> None:
    name = next(iter(REFUSED))
    monkeypatch.setattr(registry, "FAMILIES", dict(registry.FAMILIES))
    registry.register(dataclasses.replace(registry.FAMILIES["llama"], model_type=name))
    llama = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 9}
    llama |= {"num_hidden_layers": 1, "max_position_embeddings": 9, "rms_norm_eps": 1e-6}
    assert architecture({**llama, "model_type": name}).family == name
