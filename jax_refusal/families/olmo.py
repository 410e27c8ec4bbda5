"""OLMo 2 and 3, with norms of what is written alone, and OLMoE, with norms of what is read."""

from jax_refusal.families.common import (
    attention,
    decoder,
    experts,
    layers,
    mlp,
    one_rope,
    some_layers,
    two_ropes,
)
from jax_refusal.families.qwen import FUSED_EXPERTS
from jax_refusal.families.registry import Config, Family, register
from jax_refusal.models.spec import Architecture, Naming


def read_olmo2(config: Config) -> Architecture:
    mixer = attention(config, qk_norm="projection")
    specs = layers(config, mixer, mlp(config), pre_norm=False, post_norm=True)
    return decoder(config, specs, (one_rope(config),), norm="scale_in_float32")


def read_olmo3(config: Config) -> Architecture:
    """Three layers of four have a window; the scaling of rotary embeddings is for the others."""
    windows = some_layers(config, lambda i: (i + 1) % 4 != 0)
    specs = layers(
        config,
        attention(config, qk_norm="projection"),
        mlp(config),
        windows=windows,
        ropes=[int(window > 0) for window in windows],
        pre_norm=False,
        post_norm=True,
    )
    return decoder(config, specs, two_ropes(config, 5e5, 5e5), norm="scale_in_float32")


def read_olmoe(config: Config) -> Architecture:
    branch = experts(config, "num_experts", norm_topk_prob=bool(config["norm_topk_prob"]))
    specs = layers(config, attention(config, qk_norm="projection"), branch)
    return decoder(config, specs, (one_rope(config),))


register(Family(model_type="olmo2", read=read_olmo2, fields="attention_bias num_key_value_heads?"))
register(
    Family(
        model_type="olmo3",
        read=read_olmo3,
        fields="attention_bias sliding_window? layer_types? num_key_value_heads?",
        required="num_key_value_heads",
        defaults={"sliding_window": 4096},
        # Of another base the library keeps only one half; files of today have this one.
        fixed={"rope_theta": (500000,)},
    )
)
register(
    Family(
        model_type="olmoe",
        read=read_olmoe,
        fields="""attention_bias clip_qkv num_experts num_experts_per_tok norm_topk_prob
            num_key_value_heads?""",
        required="num_experts num_experts_per_tok",
        defaults={"norm_topk_prob": False},
        renamed={"num_local_experts": "num_experts"},  # as transformers 5 may have it
        fixed={"clip_qkv": (None,)},
        namings=(Naming(), FUSED_EXPERTS),
    )
)
