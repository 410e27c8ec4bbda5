"""Seed-OSS: as Llama, with biases of attention's inputs and outputs apart."""

from jax_refusal.families.common import attention, decoder, layers, mlp, one_rope
from jax_refusal.families.registry import Config, Family, register
from jax_refusal.models.spec import Architecture


def read(config: Config) -> Architecture:
    mixer = attention(config, out_bias=bool(config["attention_out_bias"]))
    return decoder(config, layers(config, mixer, mlp(config)), (one_rope(config),))


register(
    Family(
        model_type="seed_oss",
        read=read,
        fields="""attention_bias attention_out_bias mlp_bias pretraining_tp num_key_value_heads?
            head_dim?""",
        required="num_key_value_heads head_dim",
        defaults={"attention_bias": True, "attention_out_bias": False},
        has_mlp_bias_field=True,
    )
)
