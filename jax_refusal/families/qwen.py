"""Qwen 2, 2.5 and 3, dense and as a mixture of experts."""

import dataclasses
import math

from jax_refusal.families.common import (
    attention,
    decoder,
    every_layer,
    experts,
    layers,
    mlp,
    one_rope,
    some_layers,
    stored,
    switched,
)
from jax_refusal.families.registry import Config, Family, Gguf, register
from jax_refusal.models.spec import Architecture, Naming

# As transformers 5 holds experts in memory, and stores them if told to.
FUSED_EXPERTS = Naming(
    tensors=stored(
        router="mlp.gate.weight",
        expert_gate="mlp.experts.gate_up_proj: experts expert_mlp embed",
        expert_up="mlp.experts.gate_up_proj: experts expert_mlp embed",
        expert_down="mlp.experts.down_proj: experts embed expert_mlp",
    )
)


def read_qwen2(config: Config) -> Architecture:
    specs = layers(config, attention(config, qkv_bias=True), mlp(config), windows=windows(config))
    return decoder(config, specs, (one_rope(config),))


def read_qwen3(config: Config) -> Architecture:
    mixer = attention(config, qk_norm="head")
    specs = layers(config, mixer, mlp(config), windows=windows(config))
    return decoder(config, specs, (one_rope(config),))


def read_qwen3_moe(config: Config) -> Architecture:
    """Every layer routed, with a width of its own for experts."""
    branch = experts(
        config,
        "num_experts",
        width="moe_intermediate_size",
        norm_topk_prob=bool(config["norm_topk_prob"]),
    )
    own = every_layer(switched(config))
    specs = layers(config, attention(config, qk_norm="head"), branch, windows=own)
    return decoder(config, specs, (one_rope(config),))


def windows(config: Config) -> tuple[int, ...]:  # [L] tokens
    """A switch, and windows from layer `max_window_layers` on."""
    config = switched(config)
    first = config["max_window_layers"] if config["sliding_window"] else math.inf
    return some_layers(config, lambda i: i >= first)


QWEN2 = Family(
    model_type="qwen2",
    read=read_qwen2,
    fields="""use_sliding_window sliding_window? max_window_layers layer_types? use_mrope
        num_key_value_heads?""",
    required="num_key_value_heads",
    defaults={"max_window_layers": 28},
    gguf=Gguf(architecture="qwen2"),
)
register(QWEN2)
register(
    dataclasses.replace(
        QWEN2,
        model_type="qwen3",
        read=read_qwen3,
        fields=QWEN2.fields + " attention_bias",
        required="num_key_value_heads head_dim",
        gguf=Gguf(architecture="qwen3"),
    )
)
register(
    Family(
        model_type="qwen3_moe",
        read=read_qwen3_moe,
        fields="""attention_bias use_sliding_window sliding_window? max_window_layers num_experts
            num_experts_per_tok moe_intermediate_size norm_topk_prob decoder_sparse_step
            mlp_only_layers""",
        required="num_key_value_heads head_dim num_experts num_experts_per_tok norm_topk_prob "
        "moe_intermediate_size",
        renamed={"num_local_experts": "num_experts"},  # as transformers 5 has it
        # The library gives the window to every layer whatever max_window_layers says: no file has
        # it on.
        fixed={
            "decoder_sparse_step": (1,),
            "mlp_only_layers": ([], None),
            "use_sliding_window": (False,),
        },
        namings=(Naming(), FUSED_EXPERTS),
    )
)
