"""Llama 2 and 3, and what is made like it: Yi, SmolLM2."""

from jax_refusal.families.common import attention, decoder, layers, mlp, one_rope
from jax_refusal.families.registry import Config, Family, Gguf, register
from jax_refusal.models.spec import Architecture


def read(config: Config) -> Architecture:
    specs = layers(config, attention(config), mlp(config))
    return decoder(config, specs, (one_rope(config),))


register(
    Family(
        model_type="llama",
        read=read,
        fields="""attention_bias mlp_bias pretraining_tp rope_interleaved num_key_value_heads?
            head_dim?""",
        export_class="LlamaForCausalLM",
        has_mlp_bias_field=True,
        gguf=Gguf(architecture="llama", interleaved=True, bias_field="attention_bias"),
    )
)
