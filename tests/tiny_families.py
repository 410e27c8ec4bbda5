"""Which classes of transformers make the tiny models of tests/tiny.py, and with which fields."""

from typing import Any

PAD = {"pad_token_id": 0}  # where the family's own is beyond the tiny vocabulary
GEMMA4 = {
    "head_dim": 8,
    "global_head_dim": 16,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 6,
    "hidden_size_per_layer_input": 0,
    "rope_theta": None,
    "tie_word_embeddings": True,
}
GEMMA4_VISION = {
    "vision_config": {
        "model_type": "gemma4_vision",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "patch_size": 4,
        "position_embedding_size": 8,
    },
}
DELTA = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "full_attention_interval": 2,
    "rms_norm_eps": 1e-2,  # what a first token reads of so narrow a state may be nearly nothing
}
SHARED_EXPERT = {
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 28,
}
QWEN_VISION = {
    "vision_config": {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
    },
}
GRANITE = {
    "embedding_multiplier": 6.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.7,
    "logits_scaling": 3.0,
    **PAD,
}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 12,
    "mamba_expand": 2,
    "layer_types": [*["linear_attention"] * 2, "full_attention"] * 2,
    "num_hidden_layers": 6,
    "shared_intermediate_size": 28,
}
# Family -> its class in transformers, and fields that differ from those of `write_checkpoint`.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "mistral": ("MistralForCausalLM", {"sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 24}),
    "gemma": ("GemmaForCausalLM", {"head_dim": 24, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2ForCausalLM", {"head_dim": 24, "tie_word_embeddings": True}),
    "gemma3_text": ("Gemma3ForCausalLM", {"head_dim": 24, "tie_word_embeddings": True}),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {
            "head_dim": 24,
            "tie_word_embeddings": True,
            "mm_tokens_per_image": 1,
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
        },
    ),
    "gemma4_text": ("Gemma4ForCausalLM", GEMMA4),
    "gemma4": ("Gemma4ForConditionalGeneration", {**GEMMA4, **GEMMA4_VISION}),
    "gemma4_unified_text": ("Gemma4UnifiedForCausalLM", GEMMA4),
    "phi3": ("Phi3ForCausalLM", PAD),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "smollm3": ("SmolLM3ForCausalLM", PAD),
    "olmo3": ("Olmo3ForCausalLM", {"rope_theta": 500000.0}),
    "ministral3": ("Ministral3ForCausalLM", {"head_dim": 24, **PAD}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 6}),
    "gpt_oss": ("GptOssForCausalLM", {"head_dim": 24, "num_local_experts": 6, **PAD}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {"head_dim": 24, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20},
    ),
    "olmoe": ("OlmoeForCausalLM", {"num_experts": 6, "num_experts_per_tok": 3, **PAD}),
    "exaone4": ("Exaone4ForCausalLM", {}),
    "seed_oss": ("SeedOssForCausalLM", {"head_dim": 24, **PAD}),
    "qwen3_next": ("Qwen3NextForCausalLM", {**DELTA, **SHARED_EXPERT}),
    "qwen3_5_text": ("Qwen3_5ForCausalLM", DELTA),
    "qwen3_5_moe_text": ("Qwen3_5MoeForCausalLM", {**DELTA, **SHARED_EXPERT}),
    "qwen3_5": ("Qwen3_5ForConditionalGeneration", {**DELTA, **QWEN_VISION}),
    "granite": ("GraniteForCausalLM", GRANITE),
    "granitemoe": ("GraniteMoeForCausalLM", {**GRANITE, "num_local_experts": 6}),
    "granitemoeshared": (
        "GraniteMoeSharedForCausalLM",
        {**GRANITE, "num_local_experts": 6, "shared_intermediate_size": 28},
    ),
    "granitemoehybrid": ("GraniteMoeHybridForCausalLM", {**GRANITE, **MAMBA}),
}
# Multimodal: the fields that are not the text model's.
INSIDE = {
    "gemma3": ("vision_config", "mm_tokens_per_image", "tie_word_embeddings"),
    "gemma4": ("vision_config", "tie_word_embeddings"),
    "qwen3_5": ("vision_config", "tie_word_embeddings"),
}
