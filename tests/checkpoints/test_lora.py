"""Adapters in the PEFT format: the same logits as peft, and nothing unknown is passed over."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import jax_refusal as jr
from jax_refusal.checkpoints import lora
from jax_refusal.checkpoints.loading import read_checkpoint
from jax_refusal.checkpoints.sources import SMOLLM2, locate
from jax_refusal.models.decoder import Transformer
from tests import tiny, tolerances

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IDS = np.arange(3, 43)[None]


def random_adapter(model: Transformer, targets: tuple[str, ...] = TARGETS) -> lora.Adapter:
    """An adapter whose B is not zero, with bfloat16 values so that files hold it exactly."""
    adapter = lora.initial(model.arch, targets, rank=3, alpha=6.0, key=jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), len(adapter.b))
    b = {
        path: 0.3 * jax.random.normal(key, zero.shape)
        for key, (path, zero) in zip(keys, adapter.b.items(), strict=True)
    }
    exact = lambda x: x.astype(jnp.bfloat16).astype(jnp.float32)  # noqa: E731
    return lora.Adapter(jax.tree.map(exact, adapter.a), jax.tree.map(exact, b), adapter.scale)


def write(folder: Path, adapter: lora.Adapter, model: Transformer, base: Path) -> Path:
    folder.mkdir()
    for name, content in lora.files(adapter, model.arch, str(base)).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def folder(tmp_path: Path, model: Transformer, tiny_dir: Path) -> Path:
    return write(tmp_path / "adapter", random_adapter(model), model, tiny_dir)


def test_logits_equal_those_of_peft(folder: Path, tiny_dir: Path, model: Transformer) -> None:
    from peft import PeftModel

    theirs = PeftModel.from_pretrained(tiny.hf_model(tiny_dir), str(folder)).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS)).logits.numpy()
    ours = jr.logits(jr.load_model(str(tiny_dir), adapter=str(folder)), IDS)
    tolerances.assert_close(ours, expected, tolerances.PARITY, "logits with an adapter")
    assert np.abs(np.asarray(jr.logits(model, IDS)) - expected).max() > 0.1  # it does something


def test_an_adapter_that_peft_writes_is_read(
    tmp_path: Path, tiny_dir: Path, checkpoint: Callable[..., Path]
) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules=["q_proj", "down_proj"],
        layers_to_transform=[1, 3],
        init_lora_weights=False,
    )
    theirs = get_peft_model(tiny.hf_model(tiny_dir), config).eval()
    theirs.save_pretrained(str(tmp_path / "peft"))
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS)).logits.numpy()
    ours = jr.logits(jr.load_model(str(tiny_dir), adapter=str(tmp_path / "peft")), IDS)
    tolerances.assert_close(ours, expected, tolerances.PARITY, "logits with peft's adapter")


def test_what_is_written_is_read_back(folder: Path, model: Transformer) -> None:
    adapter, again = random_adapter(model), lora.read(str(folder), model.arch)
    assert again.scale == adapter.scale
    for half in ("a", "b"):
        for path, values in getattr(adapter, half).items():
            np.testing.assert_array_equal(getattr(again, half)[path], values)


def test_a_new_adapter_changes_nothing(model: Transformer) -> None:
    fresh = lora.initial(model.arch, TARGETS, rank=2, alpha=4.0, key=jax.random.key(0))
    merged = lora.merge(model, fresh)
    for path, leaf in model.leaves().items():
        np.testing.assert_array_equal(merged.leaves()[path], leaf)


@pytest.mark.parametrize(
    ("field", "value"),
    [("use_dora", True), ("bias", "all"), ("peft_type", "LOHA"), ("modules_to_save", ["lm_head"])],
)
def test_what_is_not_computed_is_refused(
    folder: Path, model: Transformer, field: str, value: object
) -> None:
    config = json.loads((folder / lora.CONFIG).read_text())
    (folder / lora.CONFIG).write_text(json.dumps(config | {field: value}))
    with pytest.raises(lora.AdapterError, match=f"{field}=.*supported"):
        lora.read(str(folder), model.arch)


def test_fields_that_are_not_known_are_refused_unless_they_are_empty(
    folder: Path, model: Transformer
) -> None:
    config = json.loads((folder / lora.CONFIG).read_text())
    (folder / lora.CONFIG).write_text(json.dumps(config | {"new": None, "other": False}))
    lora.read(str(folder), model.arch)
    (folder / lora.CONFIG).write_text(json.dumps(config | {"alora_invocation_tokens": [7]}))
    with pytest.raises(lora.AdapterError, match=r"alora_invocation_tokens=\[7\]"):
        lora.read(str(folder), model.arch)
    (folder / lora.CONFIG).write_text(json.dumps(config | {"new": "twice"}))
    with pytest.raises(lora.AdapterError, match="new='twice' is not known"):
        lora.read(str(folder), model.arch)


def test_every_wrong_tensor_is_named(folder: Path, model: Transformer) -> None:
    tensors = load_file(folder / lora.WEIGHTS)
    names = sorted(tensors)
    tensors[names[0]] = tensors[names[0]][:-1].copy()
    tensors["base_model.model.lm_head.lora_A.weight"] = tensors[names[1]]
    tensors[names[2]] = np.full_like(tensors[names[2]], np.nan)
    save_file(tensors, folder / lora.WEIGHTS)
    with pytest.raises(lora.AdapterError) as error:
        lora.read(str(folder), model.arch)
    for name in (names[0], "lm_head.lora_A", names[2]):
        assert name in str(error.value)


def test_missing_adapters_are_named(tmp_path: Path, model: Transformer) -> None:
    with pytest.raises(lora.AdapterError, match=r"adapter_config\.json"):
        lora.read(str(tmp_path), model.arch)
    with pytest.raises(lora.AdapterError, match="builtin are"):
        lora.read("builtin:nothing", model.arch)


def test_the_adapter_that_ships_fits_its_model_and_has_its_card() -> None:
    folder = lora.locate("builtin:smollm2_135m_refuser")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 5_000_000
    adapter = lora.read(str(folder), read_checkpoint(locate(SMOLLM2))[0])
    assert all(np.isfinite(x).all() for x in (*adapter.a.values(), *adapter.b.values()))
    training = json.loads((folder / "training.json").read_text())
    card = (folder / "README.md").read_text()
    assert training["config_hash"][:12] in card and "95% Wilson" in card
