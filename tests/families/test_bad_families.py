"""Checkpoints of every family that are not quite what they say: one error that names it.

What a whole run does with bad input is in tests/test_bad_input.py; config files that are refused
for what is particular to a family are in test_family_configs.py.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jax_refusal as jr
from jax_refusal.checkpoints import hf as convert
from jax_refusal.checkpoints.sources import SourceError
from jax_refusal.checkpoints.tensors import ConversionError, Tensor
from jax_refusal.data.chat import ChatError
from jax_refusal.families.registry import FAMILIES, architecture
from jax_refusal.models.spec import Architecture, UnsupportedModel
from jax_refusal.run.convert import Request
from jax_refusal.run.convert import convert as to_disk
from jax_refusal.sharding import make_mesh
from tests import qwen1, runs
from tests.models.cases import CASES, SMALL, fields

Checkpoint = Callable[..., Path]
# One case of each family that transformers has; and Qwen-1, which it lacks.
ONE_EACH = {case["architecture"]: name for name, case in reversed(CASES.items())}
LLAMA = {"llama": {}, "mistral": {}}
EVERY = [*LLAMA, *ONE_EACH, "qwen"]


def config_of(family: str, checkpoint: Checkpoint) -> dict[str, Any]:
    if family == "qwen":
        return {**qwen1.CONFIG, "vocab_size": 409}
    case = {"architecture": family} if family in LLAMA else fields(ONE_EACH[family])
    return json.loads((checkpoint(**case) / "config.json").read_text())


def changed(config: Mapping[str, Any], **extra: Any) -> dict[str, Any]:
    """With fields of the text model changed, wherever that lies."""
    if "text_config" in config:
        return {**config, "text_config": {**config["text_config"], **extra}}
    return {**config, **extra}


@pytest.mark.parametrize("family", EVERY)
def test_a_config_with_something_new(family: str, checkpoint: Checkpoint) -> None:
    config = config_of(family, checkpoint)
    architecture(config)
    for extra, words in [
        ({"norm_type": "layernorm"}, "unknown field norm_type='layernorm'.*ignore_config_fields"),
        ({"lm_head_multiplier": 0.2}, "unknown field lm_head_multiplier=0.2"),
        ({"hidden_act": "relu2"}, r"hidden_act='relu2' \(supported: \["),
    ]:
        with pytest.raises(UnsupportedModel, match=words):
            architecture(changed(config, **extra))


def test_a_field_that_the_user_vouches_for_is_converted(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder, _ = broken(checkpoint, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "made_on": "a Tuesday"}))
    request = Request(to="orbax", out=str(tmp_path / "out"), source=str(folder))
    with pytest.raises(UnsupportedModel, match=r"made_on.*launch\.convert --ignore_config_fields"):
        to_disk(request, log=lambda _: None)
    vouched = dataclasses.replace(request, ignore_config_fields=("made_on",))
    to_disk(vouched, log=lambda _: None)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["made_on"] == "a Tuesday"


@pytest.mark.parametrize("family", EVERY)
def test_a_rope_that_is_not_known(family: str, checkpoint: Checkpoint) -> None:
    config = config_of(family, checkpoint)
    rope = {"rope_type": "spiral", "factor": 2.0, "rope_theta": 10000.0}
    text = config.get("text_config", config)
    given = text.get("rope_parameters") or {}
    if "full_attention" in given:  # one for each kind of layer
        rope = {**given, "full_attention": rope}
    if family == "ministral3":
        rope |= {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 8}
    # `seq_length` brings Qwen-1's own scaling into it too.
    extra = {"seq_length": 128} if family == "qwen" else {}
    config = changed(config, rope_parameters=rope, rope_scaling=None, **extra)
    with pytest.raises(
        UnsupportedModel, match=r"rope type 'spiral' is not supported; supported are \["
    ):
        architecture(config)


def unread(arch: Architecture) -> dict[str, Tensor]:
    """Tensors of the right names and shapes that nobody may read."""

    def read(_: Any) -> np.ndarray:
        raise AssertionError("a tensor was read before all were checked")

    return {name: Tensor(shape, read) for name, shape in convert.expected(arch).items()}


@pytest.mark.parametrize("family", EVERY)
def test_tensors_that_do_not_fit(family: str, checkpoint: Checkpoint) -> None:
    """One of each kind, all in one error, before anything is read."""
    arch = architecture(config_of(family, checkpoint))
    tensors = unread(arch)
    convert.check(arch, tensors)
    lost, misshapen = [name for name in tensors if ".1." in name][:2]
    del tensors[lost]
    tensors[misshapen] = Tensor((7, 7), tensors[misshapen].read)
    extra = misshapen.replace("weight", "scales")
    tensors[extra] = Tensor((3,), tensors[misshapen].read)
    with pytest.raises(ConversionError, match=r"does not fit its .* config") as error:
        convert.load(arch, tensors, make_mesh(), np.dtype(np.float32))
    for words in (f"missing {lost} (", f"{misshapen} has shape (7, 7), not", f"unused {extra} (3,"):
        assert words in str(error.value)


def broken(checkpoint: Checkpoint, folder: Path, **case: Any) -> tuple[Path, dict[str, np.ndarray]]:
    copy = Path(shutil.copytree(checkpoint(**case), folder / "model"))
    return copy, load_file(copy / "model.safetensors")


def test_a_head_that_is_missing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder, tensors = broken(checkpoint, tmp_path)
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConversionError, match=r"missing lm_head.weight.*tie_word_embeddings=true"):
        jr.load_model(str(folder))


def test_a_tied_head_that_is_another(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder, tensors = broken(checkpoint, tmp_path, tie_word_embeddings=True)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, folder / "model.safetensors")
    jr.load_model(str(folder))  # said twice
    tensors["lm_head.weight"][3, 3] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConversionError, match=r"lm_head.weight differs from the embedding.*tied"):
        jr.load_model(str(folder))


def test_no_embedding(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder, tensors = broken(checkpoint, tmp_path, tie_word_embeddings=True)
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConversionError, match=r"missing model.embed_tokens.weight"):
        jr.load_model(str(folder))


def test_more_rows_than_tokens(checkpoint: Checkpoint) -> None:
    """Vocabularies are padded to round numbers: such a row may win, and decodes to nothing.

    (Qwen-1's is padded too, in the study of test_qwen1.py.)
    """
    folder = checkpoint(vocab_size=448, **SMALL)
    model, chat = jr.load_model(str(folder)), jr.load_chat(str(folder))
    assert len(chat.tokenizer) == 409 and model.arch.vocab == 448
    means = jr.mean_activations(model, chat, ["Hi"])
    assert np.isfinite(means).all()
    assert chat.decode([40, 440, 43]) == chat.decode([40, 43])


def test_fewer_rows_than_tokens(checkpoint: Checkpoint) -> None:
    """The tokenizer of another model: a run of it is in tests/test_bad_input.py."""
    folder = checkpoint(vocab_size=300)
    model, chat = jr.load_model(str(folder)), jr.load_chat(str(folder))
    with pytest.raises(ChatError, match=r"the model has 300 tokens.*that came with the weights"):
        jr.mean_activations(model, chat, ["What is the capital of France?"])


def test_the_tokenizer_of_another_family(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Qwen-1's beside a Llama's weights."""
    folder, _ = broken(checkpoint, tmp_path)
    config = (folder / "config.json").read_text()
    qwen1.write_tokenizer(folder)
    (folder / "config.json").write_text(config)
    with pytest.raises(ChatError, match=r"The tokenizer gives token \d+ and the model has 409"):
        runs.run(runs.small(folder), tmp_path / "run")
    assert not (folder / "it ran").exists()


def test_qwen1_without_its_ranks(tmp_path: Path) -> None:
    folder = qwen1.write_tokenizer(tmp_path / "model")
    (folder / "qwen.tiktoken").unlink()
    with pytest.raises(SourceError, match=r"a program.*never run.*qwen\.tiktoken"):
        jr.load_chat(str(folder))
    assert not (folder / "it ran").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no single turns') }}",
        "{{ messages[1]['content'] }}",
        "{% for turn in messages %}{{ turn['content'] }}",
    ],
)
def test_a_template_that_raises(template: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Before any weight is read, and nothing is written."""
    folder, _ = broken(checkpoint, tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ChatError, match="The chat template failed on"):
        runs.run(runs.small(folder), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("family", ["nemotron_h", "kimi_linear", "falcon_h1"])
def test_a_hybrid_is_refused_before_its_files_are_read(family: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    words = rf"{family}.*linear attention or state-space.*a recurrent state and a short convolution"
    with pytest.raises(UnsupportedModel, match=words):
        jr.load_model(str(tmp_path))
    assert family not in FAMILIES
