"""Qwen3-Next and the text models of Qwen3.5: three layers of linear attention (gated delta rule) to
one of gated softmax attention, with an MLP or with experts of which one sees every token."""

import dataclasses

from jax_refusal.families.common import FULL, attention, decoder, mlp, stored
from jax_refusal.families.qwen import FUSED_EXPERTS
from jax_refusal.families.registry import Config, Family, Wrapper, register
from jax_refusal.families.rope_fields import read_rope, rope_settings
from jax_refusal.models.spec import (
    Architecture,
    Branch,
    DeltaNet,
    LayerSpec,
    Moe,
    Naming,
    UnsupportedModel,
)

LINEAR = "linear_attention"


def read(config: Config) -> Architecture:
    scaling = rope_settings(config)
    for name in ("mrope_section", "mrope_interleaved"):  # of text all three positions are one
        scaling.pop(name, None)
    share = scaling.pop("partial_rotary_factor", None) or config["partial_rotary_factor"]
    base = config.get("rope_theta") or 10000.0
    rope = read_rope(scaling, base, config["max_position_embeddings"])
    width = int(config["head_dim"] * share)
    mixers = {
        FULL: attention(config, qk_norm="head", gate=True, rotary_width=width),
        LINEAR: DeltaNet(
            heads=config["linear_num_value_heads"],
            key_heads=config["linear_num_key_heads"],
            key_width=config["linear_key_head_dim"],
            value_width=config["linear_value_head_dim"],
            taps=config["linear_conv_kernel_dim"],
        ),
    }
    specs = tuple(
        LayerSpec(mixer=mixers[kind], branches=(("mlp_out", branch(config, i)),))
        for i, kind in enumerate(layer_types(config))
    )
    return decoder(config, specs, (rope,), norm="one_plus")


def layer_types(config: Config) -> list[str]:
    """By name, or full attention in every so many-th layer."""
    count, every = config["num_hidden_layers"], config["full_attention_interval"]
    usual = [FULL if (i + 1) % every == 0 else LINEAR for i in range(count)]
    types = config.get("layer_types") or usual
    if len(types) != count or not set(types) <= {FULL, LINEAR}:
        raise UnsupportedModel(
            f"layer_types={types!r} is not supported: {count} of {[LINEAR, FULL]} are needed."
        )
    return list(types)


def branch(config: Config, layer: int) -> Branch:
    """Experts, unless the config says that this layer has a plain MLP, or knows no experts."""
    plain = layer in (config.get("mlp_only_layers") or [])
    if plain or not config.get("num_experts") or (layer + 1) % config["decoder_sparse_step"]:
        return mlp(config)
    return Moe(
        experts=config["num_experts"],
        experts_per_token=config["num_experts_per_tok"],
        width=config["moe_intermediate_size"],
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
USUAL = {"full_attention_interval": 4, "partial_rotary_factor": 0.25, "decoder_sparse_step": 1}

NEXT = Family(
    model_type="qwen3_next",
    read=read,
    fields=f"""{DELTA} {EXPERTS} attention_bias layer_types full_attention_interval
        partial_rotary_factor decoder_sparse_step mlp_only_layers norm_topk_prob
        output_router_logits router_aux_loss_coef use_sliding_window""",
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
    fields=f"""{DELTA} {OWN} attention_bias layer_types full_attention_interval
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
    fields=f"""{TEXT.fields} {EXPERTS} output_router_logits router_aux_loss_coef norm_topk_prob""",
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
        )
    )
