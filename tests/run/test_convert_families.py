"""Models that leave, of families whose files differ from Llama's: transformers loads them."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import jax_refusal as jr
from jax_refusal.run.convert import Request, convert
from tests import oracle, tiny
from tests.models.cases import GROWTH, fields
from tests.tolerances import PARITY, assert_close, largest

IDS = np.random.default_rng(1).integers(3, 400, size=(2, 20))
VECTOR = 3 * np.random.default_rng(0).normal(size=32).astype(np.float32)  # [D]
Checkpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def direction(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("direction") / "direction.safetensors"
    save_file({"direction": VECTOR}, path)
    return path


def converted(source: Path, out: Path, direction: Path | None = None, **options: Any) -> Path:
    if direction:
        options |= {"edit": "orthogonalize", "direction": str(direction)}
    options = {"to": "hf", **options}
    return convert(Request(source=str(source), out=str(out), **options), log=lambda message: None)


@torch.no_grad()
def hf_logits(model: Any) -> np.ndarray:
    return model(input_ids=torch.tensor(IDS)).logits.numpy()


def wrapped(kind: str, checkpoint: Checkpoint, folder: Path) -> Path:
    """A multimodal checkpoint with weights for what it holds beside the text model."""
    if kind != "mistral3":
        return checkpoint(**fields(kind))
    text = checkpoint(**fields("ministral3", rope_parameters=GROWTH))
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.Mistral3Config(
        text_config=json.loads((text / "config.json").read_text()),
        vision_config={"model_type": "pixtral", **vision},
        tie_word_embeddings=False,
    )
    whole = transformers.Mistral3ForConditionalGeneration(config).eval()
    inner = tiny.hf_model(text)
    whole.model.language_model.load_state_dict(inner.model.state_dict())
    whole.lm_head.load_state_dict(inner.lm_head.state_dict())
    tiny.write_tokenizer(folder)
    whole.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("kind", ["gemma3", "gemma4", "mistral3", "qwen3_5"])
@pytest.mark.parametrize("edit", ["none", "orthogonalize"])
def test_the_text_model_of_a_multimodal_checkpoint(
    kind: str, edit: str, checkpoint: Checkpoint, direction: Path, tmp_path: Path
) -> None:
    source = wrapped(kind, checkpoint, tmp_path / "source")
    post_norm = kind.startswith("gemma")
    out = converted(
        source,
        tmp_path / "out",
        direction if edit != "none" else None,
        approximate=post_norm and edit != "none",
    )
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == {"mistral3": "ministral3"}.get(kind, f"{kind}_text")
    assert config["tie_word_embeddings"] == (post_norm and edit == "none")
    theirs = tiny.hf_model(out)
    assert config["architectures"] == [type(theirs).__name__]
    assert type(theirs).__name__.endswith("ForCausalLM")

    if edit == "none":
        (name,) = json.loads((source / "config.json").read_text())["architectures"]
        whole = getattr(transformers, name).from_pretrained(
            str(source), attn_implementation="eager"
        )
        expected = hf_logits(whole.eval())
    elif post_norm:  # where the edit is an approximation: it is the same one
        model = jr.load_model(str(source))
        expected = jr.logits(jr.orthogonalize(model, VECTOR, approximate=True), IDS)
    else:
        model = jr.load_model(str(source))
        expected = jr.logits(model, IDS, edit=jr.ablate(VECTOR, model.arch.layers))
    assert_close(hf_logits(theirs), expected, PARITY)
    assert_close(jr.logits(jr.load_model(str(out)), IDS), expected, PARITY)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "qwen3_next", "granitemoehybrid"])
@pytest.mark.parametrize("edit", ["none", "orthogonalize"])
def test_experts_that_lie_fused(
    name: str, edit: str, checkpoint: Checkpoint, direction: Path, tmp_path: Path
) -> None:
    """As transformers stores them without `save_original_format`."""
    apart, source = checkpoint(**fields(name)), tmp_path / "source"
    tiny.hf_model(apart).save_pretrained(str(source), save_original_format=False)
    tiny.write_tokenizer(source)
    assert any(x.ndim == 3 for x in load_file(source / "model.safetensors").values())
    hf = tiny.hf_model(source)
    with oracle.ablation_hooks(hf, VECTOR if edit == "orthogonalize" else 0 * VECTOR):
        expected = hf_logits(hf)
    used = direction if edit == "orthogonalize" else None
    out = converted(source, tmp_path / "hf", used)
    assert_close(hf_logits(tiny.hf_model(out)), expected, PARITY)
    again = converted(source, tmp_path / "orbax", used, to="orbax")
    assert_close(jr.logits(jr.load_model(str(again)), IDS), expected, PARITY)


@pytest.mark.parametrize("template", [True, False])
def test_an_approximation_is_measured_on_the_card(
    template: bool, checkpoint: Checkpoint, direction: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(checkpoint(**fields("gemma2")), tmp_path / "source"))
    if not template:
        settings = json.loads((source / "tokenizer_config.json").read_text())
        del settings["chat_template"]
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
    out = converted(source, tmp_path / "out", direction, approximate=True)
    text = (out / "README.md").read_text()
    assert "a norm stands between some writes and the stream" in text
    found = re.search(r"on (\d+) tokens of (.+): logits differ by at most (\S+) where", text)
    assert found
    assert float(found[3]) > 0
    if template:
        assert found[2] == "everyday prompts"
        return
    assert found[2] == "pseudo-random text, for want of a chat template"
    model, again = jr.load_model(str(source)), jr.load_model(str(out))
    ids = np.random.default_rng(0).integers(model.arch.vocab, size=(8, 32))
    stream = jr.logits(model, ids, edit=jr.ablate(VECTOR, model.arch.layers))
    assert int(found[1]) == ids.size
    assert found[3] == f"{largest(np.asarray(jr.logits(again, ids)) - stream):.3g}"
