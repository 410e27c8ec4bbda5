"""Mistral, Ministral 3 and Mixtral."""

from jax_refusal.families.common import (
    attention,
    decoder,
    every_layer,
    layers,
    mlp,
    one_rope,
    stored,
)
from jax_refusal.families.qwen import FUSED_EXPERTS
from jax_refusal.families.registry import Config, Family, Wrapper, register
from jax_refusal.families.rope_fields import read_rope, rope_settings
from jax_refusal.models.spec import Architecture, Moe, Naming, UnsupportedModel


def read_mistral(config: Config) -> Architecture:
    specs = layers(config, attention(config), mlp(config), windows=every_layer(config))
    return decoder(config, specs, (one_rope(config),))


def read_ministral3(config: Config) -> Architecture:
    """Queries grow with the logarithm of how often the original context has passed."""
    settings = rope_settings(config)
    scale = settings.pop("llama_4_scaling_beta", None)
    settings.pop("max_position_embeddings", None)
    period = settings.get("original_max_position_embeddings")
    if scale is None or period is None:
        raise UnsupportedModel(
            f"rope_parameters={settings!r} lacks llama_4_scaling_beta or "
            "original_max_position_embeddings."
        )
    base, context = config.get("rope_theta") or 1e6, config["max_position_embeddings"]
    rope = read_rope(settings, base, context)
    specs = layers(config, attention(config), mlp(config), windows=every_layer(config))
    return decoder(config, specs, (rope,), query_scale=scale, query_period=period)


def read_mixtral(config: Config) -> Architecture:
    experts = Moe(
        experts=config["num_local_experts"],
        experts_per_token=config["num_experts_per_tok"],
        width=config["intermediate_size"],
    )
    specs = layers(config, attention(config), experts, windows=every_layer(config))
    return decoder(config, specs, (one_rope(config, 1e6),))


EXPERT = "block_sparse_moe.experts.{expert}."

register(
    Family(
        model_type="mistral",
        read=read_mistral,
        fields="sliding_window",
        required="num_key_value_heads",
        export_class="MistralForCausalLM",
    )
)
register(
    Family(
        model_type="ministral3",
        read=read_ministral3,
        fields="sliding_window",
        required="num_key_value_heads head_dim",
        export_class="Ministral3ForCausalLM",
    )
)
register(
    Family(
        model_type="mixtral",
        read=read_mixtral,
        fields="""sliding_window num_local_experts num_experts_per_tok output_router_logits
            router_aux_loss_coef router_jitter_noise""",
        required="num_key_value_heads num_local_experts num_experts_per_tok",
        namings=(
            Naming(
                tensors=stored(
                    router="block_sparse_moe.gate.weight",
                    expert_gate=EXPERT + "w1.weight",
                    expert_up=EXPERT + "w3.weight",
                    expert_down=EXPERT + "w2.weight",
                )
            ),
            FUSED_EXPERTS,
        ),
    )
)
register(
    Wrapper(
        model_type="mistral3",
        fields="""image_token_index multimodal_projector_bias projector_hidden_act
            spatial_merge_size vision_feature_layer""",
        inner=("mistral", "ministral3"),
    )
)
