"""Qwen-1, which transformers lacks: a Qwen2 of the same shape is the oracle, its weights renamed.

Qwen-1 is Qwen2 without grouped queries and tied heads, under other names: one tensor for queries,
keys and values, and `w2` the half of the MLP that is activated.
"""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import jax_refusal as jr
from jax_refusal import config as configs
from jax_refusal.checkpoints import hf as convert
from jax_refusal.checkpoints.tensors import ConversionError
from jax_refusal.families.registry import architecture
from jax_refusal.models.spec import UnsupportedModel
from tests import qwen1 as qwen1_files
from tests import runs, tiny
from tests.models.cases import SMALL, T
from tests.models.test_families import everything, hf_everything, random_ids, stored
from tests.qwen1 import AS, CONFIG
from tests.tolerances import PARITY, assert_close


@pytest.fixture(scope="module")
def oracle(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint(architecture="qwen2", num_key_value_heads=4, rms_norm_eps=1e-6, **SMALL)


@pytest.fixture
def qwen1(oracle: Path, tmp_path: Path) -> Path:
    return qwen1_files.write_weights(tmp_path, stored(oracle), seq_length=T)


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


def test_prompts_longer_than_the_context_are_refused(qwen1: Path) -> None:
    with pytest.raises(ValueError, match="513 tokens exceeds the model's context of 512"):
        jr.logits(jr.load_model(str(qwen1)), [[3] * 513])


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
    with pytest.raises(ConversionError) as error:
        jr.load_model(str(qwen1))
    text = str(error.value)
    assert f"{name} has shape (95, 32), not (96, 32)" in text
    assert text.count("missing transformer.h.1.attn.c_attn.bias (96,)") == 1


def test_a_study_of_the_hubs_layout(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """As configs/qwen_1_8b_chat.py has it, with its template and refusal tokens; no code is run."""
    oracle = checkpoint(architecture="qwen2", num_key_value_heads=4, vocab_size=2432, **SMALL)
    folder = qwen1_files.write_tokenizer(tmp_path / "model")
    qwen1_files.write_weights(folder, stored(oracle))
    config = importlib.import_module("configs.qwen_1_8b_chat").get_config()
    fields = configs.identity(config) | runs.SMALL
    fields |= {"model.source": str(folder), "data.source": "builtin", "refusal.token_ids": ()}
    workdir = tmp_path / "run"
    log = runs.run(configs.from_identity(fields), workdir)
    assert runs.stages_run(log) == runs.STAGES
    tokens = json.loads((workdir / "refusal_tokens.json").read_text())["tokens"]
    assert [(token["token_id"], token["text"]) for token in tokens] == [(40, "I"), (AS, "As")]
    assert not (folder / "it ran").exists()


def test_the_four_sizes_differ_in_their_source_alone() -> None:
    """So that the study above is theirs too."""
    found = []
    for size in ("1_8b", "7b", "14b", "72b"):
        config = importlib.import_module(f"configs.qwen_{size}_chat").get_config()
        found.append(configs.identity(config))
        assert found[-1].pop("model.source").startswith("Qwen/Qwen-")
    assert all(fields == found[0] for fields in found)
