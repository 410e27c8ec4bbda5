"""Phi-3 and Phi-4-mini."""

import dataclasses

from jax_refusal.families.common import (
    attention,
    decoder,
    every_layer,
    layers,
    mlp,
    stored,
    turned,
)
from jax_refusal.families.registry import Config, Family, register
from jax_refusal.families.rope_fields import read_rope, rope_settings
from jax_refusal.messages import shown
from jax_refusal.models.spec import Architecture, Naming, UnsupportedModel


def read(config: Config) -> Architecture:
    """Some channels of a head are not turned; how they are turned, the length of a prompt says."""
    scaling = rope_settings(config, 10000.0)
    share = scaling.pop("partial_rotary_factor", 1.0)
    names = {"su": "longrope", "yarn": "longrope"}  # what earlier files call it
    kind = scaling.get("rope_type", "default")
    if names.get(kind, kind) not in ("default", "longrope"):
        raise UnsupportedModel(
            f"rope type {shown(kind)} is not supported; supported are ['default', 'longrope']."
        )
    if kind != "default":
        original = config["original_max_position_embeddings"]
        scaling["original_max_position_embeddings"] = original
    rope = read_rope(scaling, 10000.0, config["max_position_embeddings"], names)
    mixer = attention(config)
    mixer = dataclasses.replace(mixer, rotary_width=turned(rope, mixer.head_width, share))
    specs = layers(config, mixer, mlp(config), windows=every_layer(config))
    return decoder(config, specs, (rope,))


register(
    Family(
        model_type="phi3",
        read=read,
        fields="""original_max_position_embeddings partial_rotary_factor sliding_window?
            attention_bias mlp_bias lm_head_bias interpolation_factor full_attn_mod
            num_key_value_heads?""",
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
