"""Mistral, Ministral 3 and Mixtral."""

from jax_refusal.families.common import (
    attention,
    decoder,
    every_layer,
    experts,
    layers,
    mlp,
    one_rope,
    stored,
)
from jax_refusal.families.fields import ill_typed
from jax_refusal.families.qwen import FUSED_EXPERTS
from jax_refusal.families.registry import Config, Family, Wrapper, register
from jax_refusal.families.rope_fields import REQUIRED, read_rope, rope_settings
from jax_refusal.messages import shown
from jax_refusal.models.spec import Architecture, Naming, UnsupportedModel


def read_mistral(config: Config) -> Architecture:
    specs = layers(config, attention(config), mlp(config), windows=every_layer(config))
    return decoder(config, specs, (one_rope(config),))


GROWTH = ("llama_4_scaling_beta", "original_max_position_embeddings")


def read_ministral3(config: Config) -> Architecture:
    """Queries grow with the logarithm of how often the original context has passed."""
    settings = rope_settings(config, 10000.0)
    settings.pop("max_position_embeddings", None)
    growth = {name: settings.get(name) for name in GROWTH}
    if problems := ill_typed(growth):
        raise UnsupportedModel(f"rope_parameters={shown(settings)}: " + "; ".join(problems) + ".")
    scale, period = growth.values()
    for name in growth.keys() - REQUIRED.get(settings["rope_type"], {}).keys():
        del settings[name]
    rope = read_rope(settings, 10000.0, config["max_position_embeddings"])
    specs = layers(config, attention(config), mlp(config), windows=every_layer(config))
    return decoder(config, specs, (rope,), query_scale=scale, query_period=period)


def read_mixtral(config: Config) -> Architecture:
    branch = experts(config, "num_local_experts")
    specs = layers(config, attention(config), branch, windows=every_layer(config))
    return decoder(config, specs, (one_rope(config, 1e6),))


EXPERT = "block_sparse_moe.experts.{expert}."

register(
    Family(
        model_type="mistral",
        read=read_mistral,
        fields="sliding_window? head_dim?",
        required="num_key_value_heads",
        export_class="MistralForCausalLM",
    )
)
register(
    Family(
        model_type="ministral3",
        read=read_ministral3,
        fields="sliding_window?",
        required="num_key_value_heads head_dim",
        export_class="Ministral3ForCausalLM",
    )
)
register(
    Family(
        model_type="mixtral",
        read=read_mixtral,
        fields="sliding_window? head_dim? num_local_experts num_experts_per_tok",
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
        modalities="vision_tower multi_modal_projector",
    )
)
