"""gpt-oss: attention sinks, and clamped experts with biases, which may lie in MXFP4."""

from jax_refusal.families.common import (
    attention,
    decoder,
    experts,
    layers,
    one_rope,
    some_layers,
    stored,
)
from jax_refusal.families.fields import Given
from jax_refusal.families.registry import Config, Family, register
from jax_refusal.messages import shown
from jax_refusal.models.spec import Architecture, Naming, UnsupportedModel


def read(config: Config) -> Architecture:
    """Every other layer has a window, from the first on; every layer is routed."""
    _check(config)
    if config.get("rope_parameters") is None and not config.get("rope_scaling"):
        yarn = {"rope_type": "yarn", "factor": 32.0, "truncate": False}
        yarn["original_max_position_embeddings"] = 4096
        config = Given({**config, "rope_scaling": yarn})
    branch = experts(
        config,
        "num_local_experts",
        activation="quick_gelu",
        bias=True,
        swiglu_limit=config["swiglu_limit"],
    )
    windows = some_layers(config, lambda i: i % 2 == 0)
    specs = layers(config, attention(config, sinks=True), branch, windows=windows)
    return decoder(config, specs, (one_rope(config, 150000.0),), norm="scale_in_float32")


def _check(config: Config) -> None:
    problems = []
    packed = config.get("quantization_config") or {"quant_method": "mxfp4"}
    unknown = sorted(set(packed) - {"quant_method", "modules_to_not_convert"})
    if packed.get("quant_method") != "mxfp4" or unknown:
        problems.append(
            f"quantization_config={shown(packed)} (supported: quant_method='mxfp4', with no other "
            "field than modules_to_not_convert)"
        )
    count = config["num_experts_per_tok"]
    if config.get("experts_per_token", count) != count:
        problems.append(f"experts_per_token={config['experts_per_token']!r} is not {count}")
    if problems:
        raise UnsupportedModel("This gpt_oss config cannot be run: " + "; ".join(problems) + ".")


# Experts lie [in, out], as they multiply; a gate and its up are neighbours.
NAMING = Naming(
    tensors=stored(
        router="mlp.router.weight",
        expert_gate="mlp.experts.gate_up_proj: experts embed (expert_mlp |)",
        expert_up="mlp.experts.gate_up_proj: experts embed (expert_mlp |)",
        expert_gate_bias="mlp.experts.gate_up_proj_bias: experts (expert_mlp |)",
        expert_up_bias="mlp.experts.gate_up_proj_bias: experts (expert_mlp |)",
        expert_down="mlp.experts.down_proj: experts expert_mlp embed",
    )
)

register(
    Family(
        model_type="gpt_oss",
        read=read,
        fields="""attention_bias sliding_window? layer_types? num_local_experts num_experts_per_tok
            experts_per_token initial_context_length swiglu_alpha swiglu_limit
            quantization_config?""",
        required="num_key_value_heads head_dim num_local_experts num_experts_per_tok",
        defaults={"attention_bias": True, "sliding_window": 128, "swiglu_limit": 7.0},
        fixed={"swiglu_alpha": (1.702,)},
        namings=(NAMING,),
    )
)
