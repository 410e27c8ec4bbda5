"""Granite 3 and 4: multipliers of embedding, scores, writes and logits; experts, one of which may
see every token; and, in Granite 4, Mamba-2 layers among those of attention."""

import dataclasses
import math

from jax_refusal.families.common import (
    FULL,
    attention,
    decoder,
    divides,
    experts,
    layer_types,
    mlp,
    one_rope,
    stored,
)
from jax_refusal.families.qwen3_next import LINEAR
from jax_refusal.families.registry import Config, Family, register
from jax_refusal.messages import shown
from jax_refusal.models.spec import (
    Architecture,
    Branch,
    LayerSpec,
    Mamba2,
    Mixer,
    Naming,
    Rope,
    UnsupportedModel,
)


def read_granite(config: Config) -> Architecture:
    return _read(config, [_attention(config)] * config["num_hidden_layers"], mlp(config))


def read_moe(config: Config) -> Architecture:
    return _read(config, [_attention(config)] * config["num_hidden_layers"], _experts(config))


def read_hybrid(config: Config) -> Architecture:
    names = {"mamba": LINEAR, "attention": FULL}  # as the files of Granite 4 have it
    types = layer_types(config, lambda i: LINEAR, {**names, LINEAR: LINEAR, FULL: FULL})
    mixers: dict[str, Mixer] = {FULL: _attention(config)}
    if LINEAR in types:
        mixers[LINEAR] = _mamba(config)
    if not config["shared_intermediate_size"]:
        raise UnsupportedModel("shared_intermediate_size=0 (supported: above 0).")
    branch: Branch = mlp(config, width=config["shared_intermediate_size"])
    if config["num_local_experts"]:
        branch = _experts(config)
    rope = one_rope(config)
    if config["position_embedding_type"] != "rope":
        rope = Rope(base=rope.base, kind="none")
    return _read(config, [mixers[kind] for kind in types], branch, rope)


def _mamba(config: Config) -> Mamba2:
    heads, inner = config["mamba_n_heads"], config["mamba_expand"] * config["hidden_size"]
    width = config["mamba_d_head"]
    width = inner // heads if width == "auto" else width
    divides(config["mamba_n_groups"], heads, "mamba_n_groups", "mamba_n_heads")
    if not width or width * heads != inner:
        raise UnsupportedModel(
            f"mamba_n_heads={heads} of mamba_d_head={shown(width)} are not the {inner} channels "
            f"that mamba_expand={config['mamba_expand']} makes of hidden_size."
        )
    return Mamba2(
        heads=heads,
        key_heads=config["mamba_n_groups"],
        key_width=config["mamba_d_state"],
        value_width=width,
        taps=config["mamba_d_conv"],
        conv_bias=bool(config["mamba_conv_bias"]),
    )


def _experts(config: Config) -> Branch:
    return experts(
        config, "num_local_experts", shared_width=config.get("shared_intermediate_size") or 0
    )


def _attention(config: Config) -> Mixer:
    return attention(config, score_scale=float(config["attention_multiplier"]))


def _read(
    config: Config, mixers: list[Mixer], branch: Branch, rope: Rope | None = None
) -> Architecture:
    scale = float(config["residual_multiplier"])
    specs = tuple(
        LayerSpec(mixer=mixer, branches=(("mlp_out", branch),), write_scale=scale)
        for mixer in mixers
    )
    return decoder(
        config,
        specs,
        (one_rope(config) if rope is None else rope,),
        embed_scale=float(config["embedding_multiplier"]),
        logit_divisor=float(config["logits_scaling"]),
    )


MULTIPLIERS = "embedding_multiplier attention_multiplier residual_multiplier logits_scaling"
ROUTED = "num_local_experts num_experts_per_tok"
MAMBA = """mamba_n_heads mamba_n_groups mamba_d_state mamba_d_head mamba_d_conv mamba_expand
    mamba_conv_bias"""

SHARED = {
    "gate": "shared_mlp.input_linear.weight",
    "up": "shared_mlp.input_linear.weight",
    "down": "shared_mlp.output_linear.weight",
}
ALWAYS = {f"shared_{name}": file for name, file in SHARED.items()}
HUB = {
    "router": "block_sparse_moe.router.layer.weight",
    "expert_gate": "block_sparse_moe.input_linear.weight: experts expert_mlp embed",
    "expert_up": "block_sparse_moe.input_linear.weight: experts expert_mlp embed",
    "expert_down": "block_sparse_moe.output_linear.weight: experts embed expert_mlp",
}
IN_MEMORY = {  # as transformers 5 has it
    "router": "block_sparse_moe.router.weight",
    "expert_gate": "block_sparse_moe.experts.gate_up_proj: experts expert_mlp embed",
    "expert_up": "block_sparse_moe.experts.gate_up_proj: experts expert_mlp embed",
    "expert_down": "block_sparse_moe.experts.down_proj: experts embed expert_mlp",
}


GRANITE = Family(
    model_type="granite",
    read=read_granite,
    fields=f"{MULTIPLIERS} attention_bias mlp_bias num_key_value_heads?",
    defaults=dict.fromkeys(MULTIPLIERS.split(), 1.0),
)
MOE = dataclasses.replace(
    GRANITE,
    model_type="granitemoe",
    read=read_moe,
    fields=f"{MULTIPLIERS} {ROUTED} attention_bias num_key_value_heads?",
    required=ROUTED,
    namings=(Naming(tensors=stored(**HUB)), Naming(tensors=stored(**IN_MEMORY))),
)
WITH_SHARED = dataclasses.replace(
    MOE,
    model_type="granitemoeshared",
    fields=f"{MOE.fields} shared_intermediate_size",
    namings=(
        Naming(tensors=stored(**HUB, **ALWAYS)),
        Naming(tensors=stored(**IN_MEMORY, **ALWAYS)),
    ),
)
HYBRID = dataclasses.replace(
    WITH_SHARED,
    model_type="granitemoehybrid",
    read=read_hybrid,
    fields=f"""{WITH_SHARED.fields} {MAMBA} layer_types position_embedding_type mamba_chunk_size
        mamba_proj_bias time_step_limit normalization_function init_method""",
    required=f"{ROUTED} shared_intermediate_size layer_types {MAMBA}",
    defaults={**GRANITE.defaults, "position_embedding_type": None},
    fixed={
        "position_embedding_type": ("rope", "nope", None),
        "mamba_proj_bias": (False,),
        "time_step_limit": (None, [0.0, math.inf], [0.0, {"__float__": "Infinity"}]),
        "normalization_function": ("rmsnorm",),
    },
    namings=(
        Naming(tensors=stored(**HUB, **ALWAYS, **SHARED)),
        Naming(tensors=stored(**IN_MEMORY, **ALWAYS, **SHARED)),
    ),
)

for family in (GRANITE, MOE, WITH_SHARED, HYBRID):
    register(family)
