"""What differs between model families, as a table; and a checkpoint's config read strictly by it.

A field of `config.json` that this table does not know is an error that names it: a model that is
nearly known is refused, never run approximately.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jax_refusal.models import gemma4_config, switches
from jax_refusal.models.architecture import Architecture, UnsupportedModel
from jax_refusal.models.refused import REFUSED
from jax_refusal.models.switches import Config, Switches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A row: what a `model_type` may say in its config, and what that makes of the decoder."""

    fields: str = ""  # beyond COMMON
    required: str = ""  # beyond REQUIRED
    defaults: Config = dataclasses.field(default_factory=dict)  # where the file says nothing
    fixed: Config = dataclasses.field(default_factory=dict)  # beyond FIXED, or in its place
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)  # to names of COMMON
    static: Switches = dataclasses.field(default_factory=dict)
    read: Callable[[Config], Switches] = switches.nothing  # static too, but said by the config
    naming: str = "llama"
    rope_base: float = 10000.0


COMMON = frozenset(
    """
    hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size
    vocab_size max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters
    hidden_act tie_word_embeddings
    """.split()
)
REQUIRED = (
    "hidden_size num_hidden_layers num_attention_heads intermediate_size vocab_size "
    "max_position_embeddings rms_norm_eps"
)

# Fields that say nothing about the forward pass at inference.
NO_EFFECT = frozenset(
    """
    model_type architectures torch_dtype dtype transformers_version use_cache initializer_range
    bos_token_id eos_token_id pad_token_id attention_dropout _name_or_path _attn_implementation
    attn_implementation transformers.js_config is_llama_config output_attentions
    output_hidden_states return_dict unsloth_version unsloth_fixed keys_to_ignore_at_inference
    problem_type id2label label2id chunk_size_feed_forward is_encoder_decoder cache_implementation
    auto_map tokenizer_class
    """.split()
)

# Fields whose other values would change the numbers: only these are computed here.
FIXED: dict[str, tuple[Any, ...]] = {
    "pretraining_tp": (1, None),
    "rope_interleaved": (False, None),
    "hidden_act": ("silu",),
    "use_bidirectional_attention": (False, None),
    "use_mrope": (False, None),
}

GELU = {
    "hidden_act": ("gelu_pytorch_tanh",),
    "hidden_activation": ("gelu_pytorch_tanh", None),
}


QWEN = Family(
    fields="use_sliding_window sliding_window max_window_layers layer_types use_mrope",
    required="num_key_value_heads",
    defaults={"max_window_layers": 28},
    static={"qkv_bias": True},
    read=switches.last_layers,
)
GEMMA_STATIC = {"norm": "one_plus", "activation": "gelu_tanh"}
GEMMA2 = Family(
    fields="""attention_bias hidden_activation query_pre_attn_scalar sliding_window layer_types
        attn_logit_softcapping final_logit_softcapping use_bidirectional_attention
        sliding_window_size""",  # the last repeats sliding_window in some files
    required="num_key_value_heads head_dim",
    defaults={
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    fixed=GELU,
    static={**GEMMA_STATIC, "post_norm": True},
    read=switches.gemma2,
    naming="gemma2",
)
OLMO_STATIC = {
    "norm": "scale_in_float32",
    "pre_norm": False,
    "post_norm": True,
    "qk_norm": "projection",
}

# The table, by `model_type`.
FAMILIES: dict[str, Family] = {
    "llama": Family(fields="attention_bias mlp_bias pretraining_tp rope_interleaved"),
    "mistral": Family(
        fields="sliding_window", required="num_key_value_heads", read=switches.every_layer
    ),
    # Qwen-1, whose config and weights are named as nobody else's.
    "qwen": Family(
        fields="""seq_length kv_channels no_bias rotary_pct scale_attn_weights use_dynamic_ntk
            use_logn_attn use_cache_quantization use_cache_kernel softmax_in_fp32 onnx_safe
            use_flash_attn bf16 fp16 fp32 attn_dropout_prob emb_dropout_prob""",
        required="seq_length kv_channels no_bias rotary_pct scale_attn_weights",
        renamed={"layer_norm_epsilon": "rms_norm_eps", "rotary_emb_base": "rope_theta"},
        fixed={
            "no_bias": (True,),
            "rotary_pct": (1.0,),
            "scale_attn_weights": (True,),
            "use_cache_quantization": (False, None),
        },
        static={"qkv_bias": True},
        read=switches.qwen,
        naming="qwen",
    ),
    "qwen2": QWEN,
    "qwen3": dataclasses.replace(
        QWEN,
        fields=QWEN.fields + " attention_bias",
        required="num_key_value_heads head_dim",
        static={"qk_norm": "head"},
    ),
    "gemma": Family(
        fields="attention_bias hidden_activation use_bidirectional_attention",
        required="num_key_value_heads head_dim",
        defaults={"tie_word_embeddings": True},
        fixed={**GELU, "hidden_act": ("gelu", "gelu_pytorch_tanh")},  # both mean tanh
        static=GEMMA_STATIC,
        read=switches.gemma,
    ),
    "gemma2": GEMMA2,
    "gemma3_text": dataclasses.replace(
        GEMMA2,
        fields=GEMMA2.fields
        + " rope_local_base_freq sliding_window_pattern _sliding_window_pattern",
        # The files of the multimodal models leave out what the library has as a default.
        defaults={
            "vocab_size": 262208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
        },
        # The library reads a cap on scores for this family and then does not apply it.
        fixed={**GELU, "attn_logit_softcapping": (None,)},
        static={**GEMMA2.static, "qk_norm": "head"},
        read=switches.gemma3,
        naming="gemma2",
    ),
    "gemma4_text": Family(**gemma4_config.TEXT),
    "gemma4_unified_text": Family(**gemma4_config.UNIFIED),
    "phi3": Family(
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
        read=switches.phi3,
        naming="phi3",
    ),
    "olmo2": Family(
        fields="attention_bias",
        static=OLMO_STATIC,
        naming="olmo2",
    ),
    "smollm3": Family(
        fields="""attention_bias mlp_bias no_rope_layers no_rope_layer_interval layer_types
            use_sliding_window sliding_window max_window_layers pretraining_tp""",
        required="num_key_value_heads",
        defaults={"tie_word_embeddings": True, "no_rope_layer_interval": 4},
        fixed={"pretraining_tp": (1, 2, None)},  # the library takes no notice here
        read=switches.smollm3,
        rope_base=2e6,
    ),
    "olmo3": Family(
        fields="attention_bias sliding_window layer_types",
        required="num_key_value_heads",
        defaults={"sliding_window": 4096},
        # Of another base the library keeps only one half; files of today have this one.
        fixed={"rope_theta": (500000,)},
        static=OLMO_STATIC,
        read=switches.olmo3,
        naming="olmo2",
    ),
    "ministral3": Family(
        fields="sliding_window", required="num_key_value_heads head_dim", read=switches.ministral3
    ),
    "mixtral": Family(
        fields="""sliding_window num_local_experts num_experts_per_tok output_router_logits
            router_aux_loss_coef router_jitter_noise""",
        required="num_key_value_heads num_local_experts num_experts_per_tok",
        read=switches.mixtral,
        naming="mixtral",
        rope_base=1e6,
    ),
    "qwen3_moe": Family(
        fields="""attention_bias use_sliding_window sliding_window max_window_layers num_experts
            num_experts_per_tok moe_intermediate_size norm_topk_prob
            decoder_sparse_step mlp_only_layers output_router_logits router_aux_loss_coef""",
        required="num_key_value_heads head_dim num_experts num_experts_per_tok norm_topk_prob "
        "moe_intermediate_size",
        renamed={"num_local_experts": "num_experts"},  # as transformers 5 has it
        # Layers with one MLP among layers with experts are of two shapes. The library gives the
        # window to every layer whatever max_window_layers says: no file has it on.
        fixed={
            "decoder_sparse_step": (1,),
            "mlp_only_layers": ([], None),
            "use_sliding_window": (False,),
        },
        static={"qk_norm": "head"},
        read=switches.qwen3_moe,
        naming="qwen3_moe",
    ),
    "gpt_oss": Family(
        fields="""attention_bias sliding_window layer_types num_local_experts num_experts_per_tok
            experts_per_token initial_context_length output_router_logits router_aux_loss_coef
            swiglu_alpha swiglu_limit quantization_config""",
        required="num_key_value_heads head_dim num_local_experts num_experts_per_tok",
        defaults={"attention_bias": True, "sliding_window": 128, "swiglu_limit": 7.0},
        fixed={"swiglu_alpha": (1.702,)},
        static={"norm": "scale_in_float32", "activation": "quick_gelu"},
        read=switches.gpt_oss,
        naming="gpt_oss",
    ),
}

# Multimodal `model_type` -> its own fields, of which none acts on text, and what may lie inside.
WRAPPERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "gemma3": (
        "mm_tokens_per_image boi_token_index eoi_token_index image_token_index",
        ("gemma3_text",),
    ),
    "gemma4": (gemma4_config.WRAPPER, ("gemma4_text",)),
    "gemma4_unified": (gemma4_config.WRAPPER, ("gemma4_unified_text",)),
    "mistral3": (
        "image_token_index multimodal_projector_bias projector_hidden_act spatial_merge_size "
        "vision_feature_layer",
        ("mistral", "ministral3"),
    ),
}


def architecture(config: Config, ignore: tuple[str, ...] = ()) -> Architecture:
    """Reads a Hugging Face `config.json`.

    ignore: fields the caller vouches for (`model.ignore_config_fields`).
    Raises UnsupportedModel with every problem found, not just the first.
    """
    wrapper = config.get("model_type") if config.get("model_type") in WRAPPERS else None
    if wrapper:
        config = _inside(config, ignore)
    name = config.get("model_type")
    if name in REFUSED:
        raise UnsupportedModel(f"model_type={name!r} is not supported: it {REFUSED[name]}.")
    if name not in FAMILIES:
        raise UnsupportedModel(
            f"model_type={name!r} is not supported; supported are "
            f"{sorted(FAMILIES.keys() | WRAPPERS.keys())}."
        )
    family = FAMILIES[name]
    known = COMMON | NO_EFFECT | set(family.fields.split()) | set(family.renamed) | set(ignore)
    problems = _unknown(config, known)
    for field, allowed in (FIXED | dict(family.fixed)).items():
        if field in config and field not in ignore and config[field] not in allowed:
            problems.append(f"{field}={config[field]!r} (supported: {list(allowed)})")
    given = {family.renamed.get(field, field): value for field, value in config.items()}
    given = {**family.defaults, **given}
    names = {ours: theirs for theirs, ours in family.renamed.items()}
    required = [*REQUIRED.split(), *family.required.split()]
    problems += [f"missing field {names.get(f, f)}" for f in required if f not in given]
    if problems:
        raise UnsupportedModel(f"This {name} config cannot be run: " + "; ".join(problems) + ".")
    own = family.static | family.read(given)
    if "ropes" not in own:
        own["ropes"] = (switches.one_rope(given, family.rope_base),)
    values = _plain(name, family, given) | own
    for field in ("windows", "rope_of_layer"):  # all alike needs no data
        if not any(values.get(field, ())):
            values[field] = ()
    return Architecture(**values, wrapped=bool(wrapper))


def _inside(config: Config, ignore: tuple[str, ...]) -> Config:
    """The text model's part of a multimodal config."""
    wrapper = config["model_type"]
    fields, inner = WRAPPERS[wrapper]
    own = {"text_config", "vision_config", "tie_word_embeddings", *fields.split()}
    problems = _unknown(config, own | NO_EFFECT | set(ignore))
    text = config.get("text_config")
    if not isinstance(text, Mapping) or text.get("model_type") not in inner:
        found = text.get("model_type") if isinstance(text, Mapping) else text
        problems.append(f"text_config is of model_type {found!r} (supported: {list(inner)})")
    if problems:
        raise UnsupportedModel(f"This {wrapper} config cannot be run: " + "; ".join(problems) + ".")
    assert isinstance(text, Mapping)
    tied = {k: config[k] for k in ("tie_word_embeddings",) if k in config}
    return {**text, **tied}


def _unknown(config: Config, known: frozenset[str] | set[str]) -> list[str]:
    return [
        f"unknown field {field}={config[field]!r} (if it does not change the forward pass, "
        f"name it in model.ignore_config_fields)"
        for field in sorted(set(config) - known)
    ]


def _plain(name: str, family: Family, config: Config) -> Switches:
    """What every family says in the same way."""
    heads = config["num_attention_heads"]
    head_width = config.get("head_dim") or config["hidden_size"] // heads
    attention_bias = bool(config.get("attention_bias", False))
    return {
        "family": name,
        "naming": family.naming,
        "vocab": config["vocab_size"],
        "width": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_width": head_width,
        "mlp_width": config["intermediate_size"],
        "context": config["max_position_embeddings"],
        "norm_epsilon": config["rms_norm_eps"],
        "score_scale": head_width**-0.5,
        "tied_head": bool(config.get("tie_word_embeddings", False)),
        "qkv_bias": attention_bias,
        "out_bias": attention_bias,
        "mlp_bias": bool(config.get("mlp_bias", False)),
    }
