"""Damaged adapters: matrices that are finite and fit the model, or one error of the library."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load, save

from jax_refusal.checkpoints import lora, lora_config
from jax_refusal.checkpoints.loading import read_checkpoint
from jax_refusal.checkpoints.sources import SourceError, locate
from jax_refusal.checkpoints.tensors import ConversionError
from jax_refusal.models.leaves import leaves
from jax_refusal.models.spec import Architecture
from tests.fuzz.damage import altered, any_value, as_json, campaign, damaged

ERRORS = (lora.AdapterError, ConversionError, SourceError)
FIELDS = [*lora_config.CHECKS, *lora_config.REFUSED, *lora_config.WITHOUT_EFFECT, "new", ""]
# In the names of tensors: what is another module, another spelling, or nothing.
RENAMED = [("layers.", "layers.9"), ("model.", ""), ("lora_A", "lora_B"), ("weight", "bias")]
RENAMED += [("q_proj", "lm_head"), (".model.", ".language_model.model."), ("A", "é")]


@pytest.fixture(scope="module")
def arch(tiny_dir: Path) -> Architecture:
    return read_checkpoint(locate(str(tiny_dir)))[0]


def test_adapters(arch: Architecture, tmp_path: Path) -> None:
    whole = lora.initial(arch, ("q_proj", "down_proj"), 2, 4.0, jax.random.key(0))
    files = lora.files(whole, arch, "base", "float32")

    def check(rng: np.random.Generator) -> None:
        config, weights = json.loads(files[lora.CONFIG]), files[lora.WEIGHTS]
        if rng.random() < 0.4:
            config = altered(rng, config)
        if rng.random() < 0.3:
            config[FIELDS[rng.integers(len(FIELDS))]] = any_value(rng, [config])
        text = as_json(rng, config)
        (tmp_path / lora.CONFIG).write_bytes(damaged(rng, text) if rng.random() < 0.1 else text)
        if rng.random() < 0.3:
            weights = save(other_tensors(rng, load(weights)))
        if rng.random() < 0.15:
            weights = damaged(rng, weights, range(1200))
        (tmp_path / lora.WEIGHTS).write_bytes(weights)
        found = lora.read(str(tmp_path), arch)
        assert np.isfinite(found.scale) and found.a.keys() == found.b.keys()
        for path in found.a:
            assert np.isfinite(found.a[path]).all() and np.isfinite(found.b[path]).all()
            assert len(found.a[path]) == len(leaves(arch)[path].layers)

    campaign(check, ERRORS)


def other_tensors(
    rng: np.random.Generator, tensors: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """With some of them lost, renamed, cut, or holding other numbers."""
    for _ in range(rng.integers(1, 4)):
        name = str(rng.choice(list(tensors)))
        values = tensors.pop(name)
        match rng.integers(6):
            case 0:
                tensors[name.replace(*RENAMED[rng.integers(len(RENAMED))])] = values
            case 1:
                tensors[name] = np.ascontiguousarray(values[..., : rng.integers(4)])
            case 2:
                tensors[name] = values.astype(rng.choice(["float16", "int8", "float64"]))
            case 3:
                tensors[name] = np.full_like(values, rng.choice([np.nan, np.inf, 3e38, 0]))
            case 4:
                tensors[name] = values.ravel()
            case _ if not tensors:
                tensors[name] = values
    return tensors
