"""A family from outside the package: one file's worth of it, and nothing else to change.

What CONTRIBUTING shows as a worked example is this, with the names that Meta's own files have.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jax_refusal as jr
from jax_refusal.checkpoints import hf
from jax_refusal.families.common import attention, decoder, layers, mlp, one_rope, stored
from jax_refusal.families.registry import FAMILIES, Config, Family, architecture, register
from jax_refusal.models.spec import Architecture, Naming, UnsupportedModel
from jax_refusal.study.orthogonalize import writers
from tests import tiny
from tests.models.test_parity import hf_logits, random_ids
from tests.tolerances import INVARIANCE, PARITY, assert_close

Checkpoint = Callable[..., Path]


def read(config: Config) -> Architecture:
    specs = layers(config, attention(config), mlp(config))
    return decoder(config, specs, (one_rope(config),))


NAMES = {
    "embed": "tok_embeddings.weight",
    "final_norm": "norm.weight",
    "head": "output.weight",
    "attn_norm": "attention_norm.weight",
    "mlp_norm": "ffn_norm.weight",
    "q": "attention.wq.weight",
    "k": "attention.wk.weight",
    "v": "attention.wv.weight",
    "o": "attention.wo.weight",
    "gate": "feed_forward.w1.weight",
    "up": "feed_forward.w3.weight",
    "down": "feed_forward.w2.weight",
}
TOY = Family(
    model_type="toy",
    read=read,
    fields="flavour attention_bias mlp_bias pretraining_tp",
    required="flavour",
    renamed={"dim": "hidden_size", "n_layers": "num_hidden_layers"},
    fixed={"flavour": ("plain",)},
    namings=(Naming(layer="layers.{layer}.", tensors=stored(**NAMES)),),
)


@pytest.fixture
def toy() -> Iterator[Family]:
    register(TOY)
    yield TOY
    del FAMILIES["toy"]


@pytest.fixture
def folder(toy: Family, checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A Llama checkpoint as this family would have written it."""
    source = checkpoint()
    llama = jr.load_model(str(source)).arch
    ours = {path: leaf.stored.name for path, leaf in hf.leaves(llama).items()}
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "toy", "flavour": "plain"}
    config["dim"], config["n_layers"] = config.pop("hidden_size"), config.pop("num_hidden_layers")
    for file in source.glob("token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = {path: leaf.stored.name for path, leaf in hf.leaves(architecture(config)).items()}
    renamed = {
        ours[path].format(layer=layer): theirs[path].format(layer=layer)
        for path in ours
        for layer in range(llama.layers)
    }
    tensors = load_file(source / "model.safetensors")
    save_file({renamed[name]: x for name, x in tensors.items()}, tmp_path / "model.safetensors")
    return tmp_path


def test_its_checkpoint_is_the_model(folder: Path, checkpoint: Checkpoint) -> None:
    """Logits of Hugging Face's Llama, whose weights these are; and all that a library does."""
    model, chat = jr.load_model(str(folder)), jr.load_chat(str(folder))
    ids = random_ids(model)
    assert_close(jr.logits(model, ids), hf_logits(tiny.hf_model(checkpoint()), ids), PARITY)
    back = dict(hf.to_hugging_face(model))
    for name, values in load_file(folder / "model.safetensors").items():
        np.testing.assert_array_equal(back.pop(name), values, err_msg=name)
    assert not back
    direction = np.random.default_rng(0).normal(size=model.arch.width)
    edit = jr.ablate(direction, model.arch.layers)
    edited = jr.orthogonalize(model, direction)
    assert set(writers(model.arch)) == {"embed", "blocks.0.o", "blocks.0.down"}
    assert_close(jr.logits(edited, ids), jr.logits(model, ids, edit=edit), INVARIANCE)
    assert len(jr.generate(model, chat, ["Write a story."], edit, max_new_tokens=4)) == 1


def test_its_config_is_read_strictly(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for changed, words in [
        ({"norm_type": "layernorm"}, "toy config.*unknown field norm_type='layernorm'"),
        ({"flavour": "sweet"}, r"flavour='sweet' \(supported: \['plain'\]\)"),
    ]:
        with pytest.raises(UnsupportedModel, match=words):
            architecture({**config, **changed})
    for name in ("flavour", "dim"):
        lacking = {field: value for field, value in config.items() if field != name}
        with pytest.raises(UnsupportedModel, match=f"missing field {name}"):
            architecture(lacking)


def test_a_name_that_is_taken(toy: Family) -> None:
    with pytest.raises(ValueError, match="model_type='toy' is registered already"):
        register(toy)
