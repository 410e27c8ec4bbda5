"""Tiny configs of every family, with each switch that it has at work.

A case is what `tiny.write_checkpoint` takes, on top of SMALL; its `PLAIN` twin has the same weights
with the switches off, and other logits.
"""

from typing import Any

T = 24  # tokens, longer than WINDOW and every original context
WINDOW = 5
SMALL = {"hidden_size": 32, "intermediate_size": 48}
CAP = 2.0  # scores and logits have a standard deviation of about this

LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
RAMP = {**YARN, "rope_theta": 300.0, "beta_fast": 1.0, "beta_slow": 0.2, "truncate": False}
SHORT = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [9.0] * 4}
TYPES = ["full_attention", "sliding_attention"] * 2
HYBRID = [*["linear_attention"] * 2, "full_attention", "linear_attention"]
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": WINDOW}
GROWTH = {
    **YARN,
    "rope_theta": 1e4,
    "llama_4_scaling_beta": 0.5,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
}
GEMMA3 = {
    "sliding_window": WINDOW,
    "sliding_window_pattern": 3,
    "query_pre_attn_scalar": 7,
    "rope_local_base_freq": 30.0,
    "rope_scaling": LINEAR,
}

GEMMA4 = {"sliding_window": WINDOW, "final_logit_softcapping": CAP}
GEMMA4_SMALL = {  # the last three layers read the keys of layers 1 and 2
    **GEMMA4,
    "layer_types": [*TYPES[::-1][:2], *["sliding_attention"] * 3, "full_attention"],
    "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 20,
    "vocab_size_per_layer_input": 450,
}
GEMMA4_EXPERTS = {
    "enable_moe_block": True,
    "num_experts": 6,
    "top_k_experts": 3,
    "moe_intermediate_size": 20,
}
WHOLE_ROPE = {"rope_type": "default", "rope_theta": 1e2}
GEMMA4_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
    "full_attention": {**WHOLE_ROPE, "rope_type": "proportional", "partial_rotary_factor": 0.5},
}
KEYS_ARE_VALUES = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}

CASES: dict[str, dict[str, Any]] = {
    "qwen2": {"architecture": "qwen2"},
    "qwen2_tied": {"architecture": "qwen2", "tie_word_embeddings": True},
    "qwen2_window": {"architecture": "qwen2", "max_window_layers": 2, **QWEN_WINDOW},
    "qwen2_yarn": {"architecture": "qwen2", "rope_scaling": YARN},
    "qwen3": {"architecture": "qwen3"},
    "qwen3_tied_bias": {
        "architecture": "qwen3",
        "tie_word_embeddings": True,
        "attention_bias": True,
    },
    "qwen3_types": {"architecture": "qwen3", "layer_types": TYPES, **QWEN_WINDOW},
    "gemma": {"architecture": "gemma"},
    "gemma_untied_bias": {
        "architecture": "gemma",
        "tie_word_embeddings": False,
        "attention_bias": True,
    },
    "gemma2": {
        "architecture": "gemma2",
        "sliding_window": WINDOW,
        "attn_logit_softcapping": CAP,
        "final_logit_softcapping": CAP,
        "query_pre_attn_scalar": 7,
    },
    "gemma2_untied": {"architecture": "gemma2", "tie_word_embeddings": False},
    "gemma3_text": {"architecture": "gemma3_text", **GEMMA3},
    "gemma3_text_cap": {
        "architecture": "gemma3_text",
        "sliding_window": WINDOW,
        "final_logit_softcapping": CAP,
        "tie_word_embeddings": False,
    },
    "gemma3": {"architecture": "gemma3", **GEMMA3},
    "gemma4_text": {
        "architecture": "gemma4_text",
        **GEMMA4,
        **KEYS_ARE_VALUES,
        "rope_parameters": GEMMA4_ROPES,
    },
    "gemma4_text_all_untied": {
        "architecture": "gemma4_text",
        **GEMMA4_SMALL,
        **GEMMA4_EXPERTS,
        **KEYS_ARE_VALUES,
        "use_double_wide_mlp": False,
        "tie_word_embeddings": False,
    },
    "gemma4": {"architecture": "gemma4", **GEMMA4_SMALL},
    "gemma4_unified_text": {"architecture": "gemma4_unified_text", **GEMMA4, **KEYS_ARE_VALUES},
    "phi3": {"architecture": "phi3"},
    "phi3_partial_window": {
        "architecture": "phi3",
        "partial_rotary_factor": 0.5,
        "sliding_window": WINDOW,
        "tie_word_embeddings": True,
    },
    "phi3_longrope": {
        "architecture": "phi3",
        "rope_scaling": SHORT,
        "original_max_position_embeddings": T,
    },
    "olmo2": {"architecture": "olmo2"},
    "olmo2_bias": {"architecture": "olmo2", "attention_bias": True},
    "smollm3": {"architecture": "smollm3", "no_rope_layer_interval": 2},
    "smollm3_window_bias": {
        "architecture": "smollm3",
        "no_rope_layers": [1, 0, 0, 1],
        "tie_word_embeddings": False,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "olmo3": {"architecture": "olmo3", "sliding_window": WINDOW},
    "olmo3_yarn_bias": {
        "architecture": "olmo3",
        "num_hidden_layers": 5,
        "sliding_window": WINDOW,
        "attention_bias": True,
        "rope_scaling": YARN,
    },
    "ministral3": {"architecture": "ministral3", "rope_parameters": GROWTH},
    "ministral3_window_tied": {
        "architecture": "ministral3",
        "rope_parameters": GROWTH,
        "sliding_window": WINDOW,
        "tie_word_embeddings": True,
    },
    "mixtral": {"architecture": "mixtral"},
    "mixtral_window": {"architecture": "mixtral", "sliding_window": WINDOW},
    "gpt_oss": {
        "architecture": "gpt_oss",
        "num_experts_per_tok": 3,
        "rope_parameters": RAMP,
        "sliding_window": WINDOW,
        "swiglu_limit": 0.8,
    },
    "gpt_oss_types_no_bias": {
        "architecture": "gpt_oss",
        "attention_bias": False,
        "layer_types": TYPES,
        "sliding_window": WINDOW,
        "tie_word_embeddings": True,
    },
    "qwen3_moe": {"architecture": "qwen3_moe", "norm_topk_prob": True},
    "qwen3_moe_shares_bias": {
        "architecture": "qwen3_moe",
        "norm_topk_prob": False,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "olmoe": {"architecture": "olmoe"},
    "olmoe_shares_bias": {"architecture": "olmoe", "norm_topk_prob": True, "attention_bias": True},
    "exaone4": {"architecture": "exaone4", "sliding_window": WINDOW, "sliding_window_pattern": 3},
    "exaone4_full": {
        "architecture": "exaone4",
        "sliding_window": None,
        "layer_types": ["full_attention"] * 4,
        "tie_word_embeddings": True,
    },
    "seed_oss": {"architecture": "seed_oss"},
    "seed_oss_bias": {
        "architecture": "seed_oss",
        "attention_bias": False,
        "attention_out_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "qwen3_next": {"architecture": "qwen3_next"},
    "qwen3_next_plain_layers": {
        "architecture": "qwen3_next",
        "norm_topk_prob": False,
        "mlp_only_layers": [0],
        "decoder_sparse_step": 2,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "qwen3_5_text": {"architecture": "qwen3_5_text"},
    "qwen3_5_moe_text": {"architecture": "qwen3_5_moe_text", "tie_word_embeddings": True},
    "qwen3_5": {"architecture": "qwen3_5", "layer_types": HYBRID},
    "granite": {"architecture": "granite", "attention_bias": True, "mlp_bias": True},
    "granitemoe": {"architecture": "granitemoe", "tie_word_embeddings": True},
    "granitemoeshared": {"architecture": "granitemoeshared"},
    "granitemoehybrid": {"architecture": "granitemoehybrid", "tie_word_embeddings": True},
    "granitemoehybrid_plain_rope": {
        "architecture": "granitemoehybrid",
        "num_local_experts": 0,
        "position_embedding_type": "rope",
        "mamba_conv_bias": False,
        "mamba_n_groups": 1,
    },
}

# Case -> fields that turn its switches off, each by itself; the weights stay the same.
PLAIN: dict[str, list[dict[str, Any]]] = {
    "qwen2_window": [{"use_sliding_window": False}, {"max_window_layers": 0}],
    "qwen2_yarn": [{"rope_scaling": None}, {"rope_scaling": LINEAR}],
    "qwen3_types": [{"layer_types": None, "use_sliding_window": False}],
    "gemma2": [
        {"sliding_window": T},
        {"layer_types": TYPES},
        {"attn_logit_softcapping": None},
        {"final_logit_softcapping": None},
        {"query_pre_attn_scalar": 24},
    ],
    "gemma3_text": [
        {"sliding_window": T},
        {"sliding_window_pattern": 2},
        {"rope_scaling": None},
        {"rope_local_base_freq": 10000.0},
        {"query_pre_attn_scalar": 24},
    ],
    "gemma3_text_cap": [{"final_logit_softcapping": None}],
    "gemma4_text": [
        {"sliding_window": T},
        {"final_logit_softcapping": None},
        {"rope_parameters": {**GEMMA4_ROPES, "full_attention": WHOLE_ROPE}},
        {"rope_parameters": None},
    ],
    "gemma4_text_all_untied": [{"sliding_window": T}, {"top_k_experts": 2}],
    "phi3_partial_window": [{"partial_rotary_factor": 1.0}, {"sliding_window": None}],
    "phi3_longrope": [{"rope_scaling": None}, {"max_position_embeddings": T}],
    "smollm3": [{"no_rope_layer_interval": 3}, {"no_rope_layers": [1] * 4}],
    "smollm3_window_bias": [{"use_sliding_window": False}],
    "olmo3": [{"sliding_window": T}, {"layer_types": TYPES}],
    "olmo3_yarn_bias": [{"rope_scaling": None}],
    "ministral3": [
        {"rope_parameters": {**GROWTH, "llama_4_scaling_beta": 0.0}},
        {"rope_parameters": {**GROWTH, "mscale": 0.5}},
        {"rope_parameters": {**GROWTH, "factor": 1.0}},
    ],
    "mixtral": [{"num_experts_per_tok": 1}],
    "mixtral_window": [{"sliding_window": None}],
    "gpt_oss": [
        {"sliding_window": T},
        {"layer_types": TYPES},
        {"num_experts_per_tok": 2},
        {"rope_parameters": {**RAMP, "truncate": True}},
        {"rope_parameters": {**RAMP, "factor": 1.0}},
        {"swiglu_limit": 7.0},
    ],
    "qwen3_moe": [{"norm_topk_prob": False}, {"num_experts_per_tok": 2}],
    "olmoe": [{"norm_topk_prob": True}, {"num_experts_per_tok": 2}],
    "exaone4": [{"sliding_window": T}, {"layer_types": TYPES}],
    "qwen3_next": [{"norm_topk_prob": False}, {"partial_rotary_factor": 0.5}],
    "granite": [
        {"embedding_multiplier": 1.0},
        {"attention_multiplier": 0.35},
        {"residual_multiplier": 1.0},
        {"logits_scaling": 1.0},
    ],
    "granitemoehybrid_plain_rope": [{"position_embedding_type": None}],
}
WINDOWS = [
    "qwen2_window",
    "gemma2",
    "gemma3_text",
    "phi3_partial_window",
    "smollm3_window_bias",
    "olmo3_yarn_bias",
    "ministral3_window_tied",
    "gpt_oss",
    "gemma4_text_all_untied",
]


def fields(name: str, **changed: Any) -> dict[str, Any]:
    return {**SMALL, **CASES[name], **changed}
