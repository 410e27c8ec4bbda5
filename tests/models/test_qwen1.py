"""Qwen-1, which transformers lacks: a Qwen2 of the same shape is the oracle, its weights renamed.

Qwen-1 is Qwen2 without grouped queries and tied heads, under other names: one tensor for queries,
keys and values, and `w2` the half of the MLP that is activated.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import jax_refusal as jr
from jax_refusal.models import convert
from jax_refusal.models.families import UnsupportedModel, architecture
from tests import tiny
from tests.models.cases import SMALL, T
from tests.models.test_families import everything, hf_everything, random_ids, stored
from tests.tolerances import PARITY, assert_close

# Qwen-1.8B-Chat's config.json, but for the sizes.
CONFIG = {
    "architectures": ["QWenLMHeadModel"],
    "attn_dropout_prob": 0.0,
    "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"},
    "bf16": False,
    "emb_dropout_prob": 0.0,
    "fp16": False,
    "fp32": False,
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 2 * 48,
    "kv_channels": 8,
    "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 512,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "onnx_safe": None,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": T,
    "softmax_in_fp32": False,
    "tie_word_embeddings": False,
    "tokenizer_class": "QWenTokenizer",
    "transformers_version": "4.32.0",
    "use_cache": True,
    "use_cache_kernel": False,
    "use_cache_quantization": False,
    "use_dynamic_ntk": True,
    "use_flash_attn": "auto",
    "use_logn_attn": True,
}


@pytest.fixture(scope="module")
def oracle(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint(architecture="qwen2", num_key_value_heads=4, rms_norm_eps=1e-6, **SMALL)


@pytest.fixture
def qwen1(oracle: Path, tmp_path: Path) -> Path:
    tensors = stored(oracle)
    renamed = {
        "transformer.wte.weight": tensors["model.embed_tokens.weight"],
        "transformer.ln_f.weight": tensors["model.norm.weight"],
        "lm_head.weight": tensors["lm_head.weight"],
    }
    for layer in range(4):
        old, new = f"model.layers.{layer}.", f"transformer.h.{layer}."
        attn = f"{old}self_attn."
        for kind in ("weight", "bias"):
            renamed[f"{new}attn.c_attn.{kind}"] = np.concatenate(
                [tensors[f"{attn}{name}_proj.{kind}"] for name in "qkv"]
            )
        renamed |= {
            f"{new}attn.c_proj.weight": tensors[f"{attn}o_proj.weight"],
            f"{new}ln_1.weight": tensors[f"{old}input_layernorm.weight"],
            f"{new}ln_2.weight": tensors[f"{old}post_attention_layernorm.weight"],
            f"{new}mlp.w1.weight": tensors[f"{old}mlp.up_proj.weight"],
            f"{new}mlp.w2.weight": tensors[f"{old}mlp.gate_proj.weight"],
            f"{new}mlp.c_proj.weight": tensors[f"{old}mlp.down_proj.weight"],
        }
    save_file(renamed, tmp_path / "model.safetensors")
    vocab = len(tensors["model.embed_tokens.weight"])
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": vocab}))
    return tmp_path


def test_logits_and_residual_stream(qwen1: Path, oracle: Path) -> None:
    model = jr.load_model(str(qwen1))
    ids = random_ids(model.arch.vocab)
    ours, kept = everything(model, ids)
    theirs, sites = hf_everything(tiny.hf_model(oracle), ids)
    assert_close(ours, theirs, PARITY, "logits")
    for site, values in kept.items():
        assert_close(values, sites[site], PARITY, site)


def test_there_and_back(qwen1: Path) -> None:
    model = jr.load_model(str(qwen1))
    theirs = stored(qwen1)
    for name, values in convert.to_hugging_face(model):
        np.testing.assert_array_equal(values, theirs.pop(name), err_msg=name, strict=True)
    assert not theirs


def test_prompts_longer_than_in_training_are_refused(qwen1: Path) -> None:
    """Log-n attention and dynamic NTK act there; without both switches the limit is another."""
    model = jr.load_model(str(qwen1))
    with pytest.raises(ValueError, match=f"{T + 1} tokens exceeds the model's context of {T}"):
        jr.logits(model, [[3] * (T + 1)])
    plain = {**CONFIG, "vocab_size": 9, "use_dynamic_ntk": False, "use_logn_attn": False}
    assert architecture(plain).context == 512


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"no_bias": False}, "no_bias=False"),
        ({"rotary_pct": 0.25}, "rotary_pct=0.25"),
        ({"kv_channels": 16}, "kv_channels=16 x 4 heads is not hidden_size=32"),
        ({"use_cache_quantization": True}, "use_cache_quantization=True"),
        ({"vision_tower": {}}, "unknown field vision_tower"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        architecture({**CONFIG, "vocab_size": 9, **changed})


def test_a_missing_field_is_named_as_the_file_names_it() -> None:
    config = {k: v for k, v in CONFIG.items() if k not in ("layer_norm_epsilon", "seq_length")}
    with pytest.raises(UnsupportedModel) as error:
        architecture({**config, "vocab_size": 9})
    assert "missing field layer_norm_epsilon" in str(error.value)
    assert "missing field seq_length" in str(error.value)


def test_a_fused_tensor_is_checked_as_a_whole(qwen1: Path) -> None:
    tensors = stored(qwen1)
    name = "transformer.h.2.attn.c_attn.weight"
    tensors[name] = tensors[name][:-1].copy()
    del tensors["transformer.h.1.attn.c_attn.bias"]
    save_file(tensors, qwen1 / "model.safetensors")
    with pytest.raises(convert.ConversionError) as error:
        jr.load_model(str(qwen1))
    text = str(error.value)
    assert f"{name} has shape (95, 32), not (96, 32)" in text
    assert text.count("missing transformer.h.1.attn.c_attn.bias (96,)") == 1
