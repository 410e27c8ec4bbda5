"""What the fields of a `config.json` may hold: a name means the same in every family.

The bounds are far from any model, so that a damaged or a hostile file is refused by the name of the
field, before anything of such a size is made.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax_refusal.messages import shown
from jax_refusal.models.spec import UnsupportedModel

LAYERS = 1024  # the deepest that are published have about 130, and stacks of them 315
WIDTH = 2**20  # of anything, and of how many there are: the widest have some 50,000
ALL_EXPERTS = 2**17  # of a model: those that are published have up to 25,000
TOKENS = 2**31 - 1  # positions are int32
SMALLEST, LARGEST = 1e-37, 1e37  # numbers are computed with in float32


class Kind(NamedTuple):
    says: str  # what is allowed, in words
    holds: Callable[[Any], bool]


def whole(least: int, most: int = WIDTH) -> Kind:
    def holds(x: Any) -> bool:
        return isinstance(x, int) and not isinstance(x, bool) and least <= x <= most

    return Kind(f"a whole number from {least} to {most}", holds)


def number(says: str, holds: Callable[[float], bool]) -> Kind:
    """A finite number of which something more is true."""

    def finite(x: Any) -> bool:
        real = isinstance(x, int | float) and not isinstance(x, bool)
        return real and -LARGEST <= x <= LARGEST and holds(x)

    return Kind(f"a finite number {says}", finite)


def list_of(each: Kind, says: str) -> Kind:
    return Kind(says, lambda x: isinstance(x, list) and len(x) <= WIDTH and all(map(each.holds, x)))


ABOVE_0 = number("above 0", lambda x: x >= SMALLEST)
FROM_0 = number("from 0 on", lambda x: x >= 0)
ABOVE_1 = number("above 1", lambda x: x > 1)  # yarn divides by its logarithm
SHARE = number("above 0 and up to 1", lambda x: SMALLEST <= x <= 1)
FLAG = Kind("true or false", lambda x: isinstance(x, bool))
TEXT = Kind("a name", lambda x: isinstance(x, str))
OBJECT = Kind("an object", lambda x: isinstance(x, Mapping))
ANYTHING = Kind("anything, since nothing reads it", lambda x: True)
POSITIVE_NUMBERS = list_of(ABOVE_0, "a list of finite numbers above 0")


def either(*kinds: Kind) -> Kind:
    return Kind(
        " or ".join(kind.says for kind in kinds), lambda x: any(kind.holds(x) for kind in kinds)
    )


def _of(kind: Kind, names: str) -> dict[str, Kind]:
    return dict.fromkeys(names.split(), kind)


KINDS: dict[str, Kind] = {
    **_of(whole(1, LAYERS), "num_hidden_layers"),
    **_of(
        whole(1),
        """hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim
        kv_channels global_head_dim num_global_key_value_heads linear_conv_kernel_dim
        linear_key_head_dim linear_value_head_dim linear_num_key_heads
        linear_num_value_heads mamba_n_heads mamba_n_groups mamba_d_state mamba_d_conv
        mamba_expand full_attention_interval no_rope_layer_interval decoder_sparse_step""",
    ),
    # Of these 0 is none of them, in some families.
    **_of(
        whole(0),
        """num_experts num_local_experts num_experts_per_tok experts_per_token top_k_experts
        moe_intermediate_size shared_intermediate_size shared_expert_intermediate_size
        hidden_size_per_layer_input num_kv_shared_layers""",
    ),
    **_of(
        whole(1, TOKENS),
        """vocab_size vocab_size_per_layer_input max_position_embeddings sliding_window
        seq_length""",
    ),
    **_of(
        whole(2, TOKENS), "original_max_position_embeddings"
    ),  # longrope divides by its logarithm
    **_of(whole(0, TOKENS), "max_window_layers"),
    **_of(either(whole(0), TEXT), "sliding_window_pattern mamba_d_head"),
    **_of(
        ABOVE_0,
        """rms_norm_eps query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping
        swiglu_limit embedding_multiplier attention_multiplier residual_multiplier logits_scaling
        factor low_freq_factor high_freq_factor beta_fast beta_slow attention_factor""",
    ),
    **_of(FROM_0, "mscale mscale_all_dim llama_4_scaling_beta"),
    **_of(ABOVE_1, "rope_theta rope_local_base_freq"),
    **_of(SHARE, "partial_rotary_factor"),
    **_of(POSITIVE_NUMBERS, "short_factor long_factor"),
    **_of(
        FLAG,
        """tie_word_embeddings attention_bias attention_out_bias mlp_bias use_sliding_window
        norm_topk_prob mamba_conv_bias attention_k_eq_v use_double_wide_mlp enable_moe_block
        use_dynamic_ntk use_logn_attn truncate""",
    ),
    **_of(TEXT, "rope_type type"),
    **_of(OBJECT, "rope_scaling rope_parameters per_layer_config quantization_config"),
    **_of(list_of(TEXT, "a list of names"), "layer_types"),
    **_of(list_of(either(FLAG, whole(0)), "a list of whole numbers"), "no_rope_layers"),
    **_of(list_of(whole(0), "a list of whole numbers"), "mlp_only_layers"),
    # Said by some files of one family, and read by none.
    **_of(
        ANYTHING,
        """sliding_window_size _sliding_window_pattern initial_context_length mamba_chunk_size
        init_method mtp_num_hidden_layers mtp_use_dedicated_embeddings use_cache_kernel
        softmax_in_fp32 onnx_safe use_flash_attn bf16 fp16 fp32""",
    ),
}

# What every config of transformers has or had, and no text model reads.
OF_ALL_CONFIGS = """
    model_type architectures torch_dtype dtype transformers_version _name_or_path name_or_path
    _model_name_or_path _commit_hash auto_map tokenizer_class base_config_key is_composition
    output_attentions _output_attentions output_hidden_states return_dict use_return_dict
    output_past torchscript use_bfloat16 tf_legacy_loss xla_device chunk_size_feed_forward
    gradient_checkpointing is_encoder_decoder is_decoder add_cross_attention
    cross_attention_hidden_size tie_encoder_decoder tie_last_hidden_states prefix
    task_specific_params finetuning_task problem_type id2label label2id num_labels loss_type
    initializer_range use_cache bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id
    cls_token_id mask_token_id decoder_start_token_id keys_to_ignore_at_inference
    ignore_keys_at_rope_validation attn_implementation _attn_implementation
    _attn_implementation_autoset _attn_implementation_internal experts_implementation
    _experts_implementation _experts_implementation_internal _flash_attn_2_enabled
    base_model_tp_plan base_model_pp_plan base_model_fsdp_plan base_model_ep_plan
    distributed_config tp_plan device_map
"""
# Files of before transformers 4.26 or so say how replies are sampled, too.
OF_GENERATION = """
    max_length max_new_tokens min_length min_new_tokens do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p min_p typical_p epsilon_cutoff
    eta_cutoff repetition_penalty encoder_repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores output_logits
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens num_assistant_tokens
    num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind
    target_lookbehind cache_implementation
"""
OF_TRAINING = """
    attention_dropout hidden_dropout residual_dropout resid_pdrop embd_pdrop attn_dropout_prob
    emb_dropout_prob classifier_dropout output_router_logits router_aux_loss_coef
    router_jitter_noise
"""
OF_OTHER_PROGRAMS = "transformers.js_config is_llama_config unsloth_version unsloth_fixed"
NO_EFFECT = frozenset(
    " ".join([OF_ALL_CONFIGS, OF_GENERATION, OF_TRAINING, OF_OTHER_PROGRAMS]).split()
)


def ill_typed(
    given: Mapping[str, Any],
    nullable: frozenset[str] = frozenset(),  # of these null says that the file does not say it
    called: Mapping[str, str] | None = None,  # in the file, where that is another name
) -> list[str]:
    """What is wrong with each value that is not of its field's kind. A name without a kind may hold
    anything but null, NaN and infinity."""
    problems = []
    for name, value in given.items():
        kind = KINDS.get(name, UNKNOWN)
        if not (value is None and name in nullable) and not kind.holds(value):
            theirs = (called or {}).get(name, name)
            problems.append(f"{theirs}={shown(value)} (supported: {kind.says})")
    return problems


def _known(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


UNKNOWN = Kind("neither null, NaN nor infinity", _known)


class Given(dict[str, Any]):
    """The fields that a reader gets; one that it asks for in vain is named."""

    def __missing__(self, name: str) -> Any:
        raise UnsupportedModel(f"This {self.get('model_type')} config has no field {name}.")
