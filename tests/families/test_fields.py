"""What single fields may hold: the same law in every family."""

import dataclasses
import json
import math
import time
from typing import Any

import pytest
from transformers import GenerationConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from jax_refusal.families.fields import ANYTHING, KINDS, NO_EFFECT
from jax_refusal.families.registry import FAMILIES, FIXED, Family, architecture, register
from jax_refusal.models.spec import UnsupportedModel
from tests.families.configs import EVERY, text, written

# What PretrainedConfig of transformers 3 and 4 wrote, by its source; 5 has dropped them.
OF_EARLIER_VERSIONS = """
    torch_dtype torchscript use_bfloat16 tf_legacy_loss pruned_heads is_decoder add_cross_attention
    cross_attention_hidden_size tie_encoder_decoder finetuning_task num_labels tokenizer_class
    prefix sep_token_id unk_token_id decoder_start_token_id task_specific_params output_past
    gradient_checkpointing xla_device _commit_hash attn_implementation _attn_implementation
    _attn_implementation_autoset _model_name_or_path
"""
NOT_FINITE = [math.nan, math.inf, -math.inf, -1.0, 1e300, 10**400]


def with_field(family: str, name: str, value: Any) -> dict[str, Any]:
    config = written(family)
    text(config)[name] = value
    return config


def test_what_every_config_of_transformers_has_says_nothing() -> None:
    llama = written("llama")
    named = {**PreTrainedConfig().to_dict(), **GenerationConfig._get_default_generation_params()}
    named |= {name: {} for name in OF_EARLIER_VERSIONS.split()}
    assert len(named) > 60
    assert architecture({**named, **llama}) == architecture(llama)


def test_heads_that_were_pruned_are_gone() -> None:
    with pytest.raises(UnsupportedModel, match=r"pruned_heads=\{'0': \[1\]\}"):
        architecture({**written("llama"), "pruned_heads": {"0": [1]}})


@pytest.mark.parametrize("name", FAMILIES)
def test_every_field_of_a_family_has_a_kind(name: str) -> None:
    family = FAMILIES[name]
    fixed = {*FIXED, *family.fixed}
    ours = {family.renamed.get(field, field) for field in family.named - fixed}
    assert ours <= set(KINDS)
    assert not family.named & NO_EFFECT and not set(KINDS) & NO_EFFECT


def nullable_there(model_type: str) -> set[str]:
    """Fields whose type in transformers has None in it."""
    declared = dataclasses.fields(CONFIG_MAPPING[model_type])
    return {field.name for field in declared if "None" in str(field.type)}


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"qwen"}))
def test_null_is_allowed_where_transformers_allows_it(name: str) -> None:
    # Fields that its class only takes as more arguments; and those of Gemma 4 that are null.
    loose = {"num_global_key_value_heads", "rope_scaling", "quantization_config"}
    if name.startswith("gemma4"):
        loose |= {"hidden_size_per_layer_input", "moe_intermediate_size"}
        loose |= {"num_experts", "top_k_experts"}
    assert FAMILIES[name].nullable - loose <= nullable_there(name)


@pytest.mark.parametrize("family", EVERY)
def test_null_where_a_value_is_needed(family: str) -> None:
    for name in ("hidden_size", "num_hidden_layers", "vocab_size", "rms_norm_eps", "rope_theta"):
        config = written(family)
        fields = text(config)
        registered = FAMILIES[fields["model_type"]]
        theirs = {ours: theirs for theirs, ours in registered.renamed.items()}.get(name, name)
        if None in registered.fixed.get(name, ()):
            continue
        fields[theirs] = None
        with pytest.raises(UnsupportedModel, match=f"{theirs}=None"):
            architecture(config)


@pytest.mark.parametrize("family", EVERY)
def test_numbers_that_are_none(family: str) -> None:
    """NaN, infinities (which JSON of Python has), and what float32 cannot hold."""
    for name, value in text(written(family)).items():
        numeric = isinstance(value, float) and name in KINDS and KINDS[name] is not ANYTHING
        for wrong in NOT_FINITE if numeric else ():
            with pytest.raises(UnsupportedModel, match=name):
                architecture(json.loads(json.dumps(with_field(family, name, wrong))))


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("llama", "rms_norm_eps", 0.0),
        ("llama", "rope_theta", 0.0),
        ("llama", "num_attention_heads", 3),
        ("llama", "num_key_value_heads", 3),
        ("llama", "hidden_size", 32.0),
        ("llama", "hidden_size", True),
        ("llama", "hidden_size", "32"),
        ("llama", "attention_bias", 1),
        ("llama", "head_dim", 7),
        ("llama", "num_hidden_layers", 10**6),
        ("llama", "hidden_size", 10**12),
        ("llama", "max_position_embeddings", 10**12),
        ("mistral", "sliding_window", -1),
        ("mistral", "sliding_window", 0),
        ("qwen2", "layer_types", []),
        ("qwen2", "layer_types", "full_attention"),
        ("qwen2", "layer_types", [["full_attention"]] * 4),
        ("qwen2", "layer_types", ["full_attention"] * 10**5),
        ("gemma2", "attn_logit_softcapping", 0.0),
        ("gemma2", "query_pre_attn_scalar", 0),
        ("gemma3_text", "sliding_window_pattern", 0),
        ("gemma4_text", "intermediate_size", None),
        ("gemma4_text", "per_layer_config", None),
        ("gemma4_text", "per_layer_config", {"0": None}),
        ("mixtral", "num_local_experts", 0),
        ("mixtral", "num_local_experts", None),
        ("mixtral", "num_experts_per_tok", 0),
        ("mixtral", "num_experts_per_tok", 7),
        ("mixtral", "num_local_experts", 2**18),
        ("qwen3_moe", "num_experts", 0),
        ("qwen3_moe", "moe_intermediate_size", 0),
        ("qwen3_next", "num_experts", None),
        ("qwen3_next", "decoder_sparse_step", 0),
        ("qwen3_next", "linear_num_key_heads", 3),
        ("qwen3_next", "partial_rotary_factor", 0.01),
        ("granite", "logits_scaling", 0.0),
        ("granite", "residual_multiplier", None),
        ("granitemoehybrid", "mamba_n_groups", 3),
        ("granitemoehybrid", "mamba_d_head", "automatic"),
        ("granitemoehybrid", "layer_types", None),
        ("smollm3", "no_rope_layers", [None] * 4),
        ("smollm3", "no_rope_layer_interval", 0),
        ("exaone4", "sliding_window_pattern", {}),
        ("gpt_oss", "quantization_config", "mxfp4"),
        ("gpt_oss", "swiglu_limit", -1.0),
        ("qwen", "kv_channels", None),
        ("llama", "rope_scaling", [1]),
    ],
)
def test_a_value_of_another_kind_is_refused_by_name(family: str, name: str, value: Any) -> None:
    config = with_field(family, name, value)
    if name in ("rope_theta", "sliding_window_pattern", "partial_rotary_factor"):
        text(config).pop("rope_parameters", None), text(config).pop("layer_types", None)
    started = time.process_time()
    with pytest.raises(UnsupportedModel, match=name) as error:
        architecture(config)
    assert time.process_time() - started < 1 and len(str(error.value)) < 2000


@pytest.mark.parametrize("config", [None, [], "llama", {}, {"model_type": ["llama"]}])
def test_what_is_no_config(config: Any) -> None:
    with pytest.raises(UnsupportedModel, match="model_type"):
        architecture(config)


def test_a_message_names_twenty_problems() -> None:
    config = {**written("llama"), **{f"new_{i}": "x" * 10**5 for i in range(10**4)}}
    with pytest.raises(UnsupportedModel, match=r"new_0=.*and 9980 more") as error:
        architecture(config)
    assert len(str(error.value)) < 20_000


def test_two_names_of_one_field() -> None:
    config = written("olmoe")
    assert architecture({**config, "num_local_experts": 6}) == architecture(config)
    with pytest.raises(UnsupportedModel, match="num_experts=6 and num_local_experts=7"):
        architecture({**config, "num_local_experts": 7})


def test_a_field_that_a_reader_asks_for_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax_refusal.families.registry.FAMILIES", dict(FAMILIES))
    register(
        Family(
            model_type="odd",
            fields="attention_bias mlp_bias pretraining_tp",
            read=lambda c: c["oddness"],
        )
    )
    with pytest.raises(UnsupportedModel, match="odd config has no field oddness"):
        architecture({**written("llama"), "model_type": "odd"})
