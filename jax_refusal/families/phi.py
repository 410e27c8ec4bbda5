"""Phi-3 and Phi-4-mini."""

from jax_refusal.families.common import attention, decoder, every_layer, layers, mlp, stored
from jax_refusal.families.registry import Config, Family, register
from jax_refusal.families.rope_fields import read_rope, rope_settings
from jax_refusal.models.spec import Architecture, Naming


def read(config: Config) -> Architecture:
    """Some channels of a head are not turned; longrope is exact up to the original context."""
    scaling = rope_settings(config)
    share = scaling.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0
    context, original = (
        config["max_position_embeddings"],
        config["original_max_position_embeddings"],
    )
    if (scaling.get("rope_type") or scaling.get("type") or "default") != "default":
        scaling["original_max_position_embeddings"] = original
    names = {"su": "longrope", "yarn": "longrope"}  # what earlier files call it
    rope = read_rope(scaling, config.get("rope_theta") or 10000.0, context, names)
    head_width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    # Beyond the original context longrope turns by other frequencies, from the first token on.
    exact = min(context, original) if rope.kind == "longrope" else context
    mixer = attention(config, rotary_width=int(head_width * share))
    specs = layers(config, mixer, mlp(config), windows=every_layer(config))
    return decoder(config, specs, (rope,), context=exact)


register(
    Family(
        model_type="phi3",
        read=read,
        fields="""original_max_position_embeddings partial_rotary_factor sliding_window
            resid_pdrop embd_pdrop attention_bias mlp_bias lm_head_bias interpolation_factor
            full_attn_mod""",
        defaults={"original_max_position_embeddings": 4096},
        fixed={
            "attention_bias": (False,),
            "mlp_bias": (False,),
            "lm_head_bias": (False,),
            "interpolation_factor": (1,),
            "full_attn_mod": (1,),
        },
        namings=(
            Naming(
                tensors=stored(
                    **dict.fromkeys("qkv", "self_attn.qkv_proj.weight"),
                    gate="mlp.gate_up_proj.weight",
                    up="mlp.gate_up_proj.weight",
                )
            ),
        ),
    )
)
