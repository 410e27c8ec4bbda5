"""Qwen3-Next and the text models of Qwen3.5: three layers of linear attention (gated delta rule) to
one of gated softmax attention, with an MLP or with experts of which one sees every token."""

import dataclasses

from jax_refusal.families.common import (
    FULL,
    attention,
    decoder,
    divides,
    experts,
    layer_types,
    mlp,
    stored,
    turned,
)
from jax_refusal.families.qwen import FUSED_EXPERTS
from jax_refusal.families.registry import Config, Family, Wrapper, register
from jax_refusal.families.rope_fields import read_rope, rope_settings
from jax_refusal.models.spec import (
    Architecture,
    Branch,
    DeltaNet,
    LayerSpec,
    Naming,
    UnsupportedModel,
)

LINEAR = "linear_attention"


def read(config: Config) -> Architecture:
    scaling = rope_settings(config, 10000.0)
    for name in ("mrope_section", "mrope_interleaved"):  # of text all three positions are one
        scaling.pop(name, None)
    share = scaling.pop("partial_rotary_factor", 0.25)
    rope = read_rope(scaling, 10000.0, config["max_position_embeddings"])
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    divides(keys, values, "linear_num_key_heads", "linear_num_value_heads")
    mixers = {
        FULL: attention(
            config, qk_norm="head", gate=True, rotary_width=turned(rope, config["head_dim"], share)
        ),
        LINEAR: DeltaNet(
            heads=values,
            key_heads=keys,
            key_width=config["linear_key_head_dim"],
            value_width=config["linear_value_head_dim"],
            taps=config["linear_conv_kernel_dim"],
        ),
    }
    every = config["full_attention_interval"]
    names = {name: name for name in (LINEAR, FULL)}
    types = layer_types(config, lambda i: LINEAR if (i + 1) % every else FULL, names)
    specs = tuple(
        LayerSpec(mixer=mixers[kind], branches=(("mlp_out", branch(config, i)),))
        for i, kind in enumerate(types)
    )
    return decoder(config, specs, (rope,), norm="one_plus")


def branch(config: Config, layer: int) -> Branch:
    """Experts, unless the config says that this layer has a plain MLP, or knows no experts."""
    plain = layer in (config.get("mlp_only_layers") or [])
    if plain or not config.get("num_experts") or (layer + 1) % config["decoder_sparse_step"]:
        return mlp(config)
    if not config["shared_expert_intermediate_size"]:
        raise UnsupportedModel("shared_expert_intermediate_size=0 (supported: above 0).")
    return experts(
        config,
        "num_experts",
        width="moe_intermediate_size",
        norm_topk_prob=bool(config["norm_topk_prob"]),
        shared_width=config["shared_expert_intermediate_size"],
        shared_gate=True,
    )


def unread(arch: Architecture, name: str) -> bool:
    """The layers that predict more than the next token."""
    return name.startswith("mtp.")


DELTA = """linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim linear_num_key_heads
    linear_num_value_heads"""
EXPERTS = "num_experts num_experts_per_tok moe_intermediate_size shared_expert_intermediate_size"
USUAL = {"full_attention_interval": 4, "decoder_sparse_step": 1}

NEXT = Family(
    model_type="qwen3_next",
    read=read,
    fields=f"""{DELTA} {EXPERTS} attention_bias layer_types? full_attention_interval
        partial_rotary_factor decoder_sparse_step mlp_only_layers? norm_topk_prob
        use_sliding_window""",
    required=f"num_key_value_heads head_dim norm_topk_prob {DELTA} {EXPERTS}",
    defaults=USUAL,
    renamed={"num_local_experts": "num_experts"},  # as transformers 5 may have it
    fixed={"use_sliding_window": (False,)},
    namings=(Naming(), FUSED_EXPERTS),
    unread=unread,
)

# What linear attention reads of the stream lies apart, each with all of its heads.
APART = stored(
    delta_q="linear_attn.in_proj_qkv.weight: (key_heads key_width) embed",
    delta_k="linear_attn.in_proj_qkv.weight: (key_heads key_width) embed",
    delta_v="linear_attn.in_proj_qkv.weight: (key_heads value_heads value_width) embed",
    delta_z="linear_attn.in_proj_z.weight: (key_heads value_heads value_width) embed",
    delta_beta="linear_attn.in_proj_b.weight: (key_heads value_heads) embed",
    delta_decay="linear_attn.in_proj_a.weight: (key_heads value_heads) embed",
)
OWN = """attn_output_gate mamba_ssm_dtype mtp_num_hidden_layers
    mtp_use_dedicated_embeddings mlp_only_layers"""

TEXT = Family(
    model_type="qwen3_5_text",
    read=read,
    fields=f"""{DELTA} {OWN} attention_bias layer_types? full_attention_interval
        partial_rotary_factor""",
    required=f"num_key_value_heads head_dim {DELTA}",
    defaults=USUAL,
    fixed={
        "attn_output_gate": (True,),
        "mamba_ssm_dtype": ("float32",),  # of the state
        "mlp_only_layers": ([], None),
    },
    namings=(Naming(tensors=APART),),
    unread=unread,
    export_class="Qwen3_5ForCausalLM",
)
TEXT_MOE = dataclasses.replace(
    TEXT,
    model_type="qwen3_5_moe_text",
    fields=f"{TEXT.fields} {EXPERTS} norm_topk_prob",
    required=f"{TEXT.required} {EXPERTS}",
    defaults={**USUAL, "norm_topk_prob": True, "intermediate_size": 0},
    fixed={**TEXT.fixed, "norm_topk_prob": (True,)},
    namings=(
        Naming(tensors=APART + FUSED_EXPERTS.tensors),
        Naming(tensors=APART),
    ),
    export_class="Qwen3_5MoeForCausalLM",
)

for family in (NEXT, TEXT, TEXT_MOE):
    register(family)
for name in ("qwen3_5", "qwen3_5_moe"):
    register(
        Wrapper(
            model_type=name,
            fields="image_token_id video_token_id vision_start_token_id vision_end_token_id",
            inner=(f"{name}_text",),
            modalities="visual",
        )
    )
