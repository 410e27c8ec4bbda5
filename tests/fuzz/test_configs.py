"""Law: a config file is read as transformers reads it, or refused in one error that says why.

FUZZ_CASES says how many changed configs are read (the slow test compares the logits of a hundredth
of them), FUZZ_SEED which ones. A failure names its case: `case(number)` is that config.
"""

import json
import os
import resource
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import jax_refusal as jr
from jax_refusal.checkpoints import hf as checkpoints
from jax_refusal.families.registry import architecture
from jax_refusal.models import leaves, spec
from jax_refusal.models.spec import Architecture
from tests import tiny
from tests.fuzz import configs
from tests.tolerances import PARITY, assert_close

COUNT = int(os.environ.get("FUZZ_CASES", "1000"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
SECONDS, MEGABYTES = 2.0, 500  # of one config, and of all together
TOKENS, LARGE = 40, 2 * 10**6  # longer than every original context; parameters


def case(number: int) -> dict[str, Any]:
    return configs.changed(configs.generator(SEED, number))


def read(config: Any, number: int) -> Architecture | None:
    """What becomes of a config under the law; None where it is refused."""
    started, arch = time.process_time(), None
    try:
        arch = architecture(config)
        checkpoints.expected(arch)
    except ValueError as error:
        assert type(error).__module__.startswith("jax_refusal."), f"{number}: {error!r}"
        assert 10 < len(str(error)) < 20_000, number
    except Exception as error:
        raise AssertionError(f"case {number}: {error!r}") from error
    assert time.process_time() - started < SECONDS, number
    for each in (checkpoints.expected, checkpoints.groups, leaves.leaves, spec.phases, spec.slots):
        each.cache_clear()
    return arch


def megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def test_changed_configs_are_read_or_refused() -> None:
    configs.bases()
    before = megabytes()
    accepted = sum(read(case(number), number) is not None for number in range(COUNT))
    assert megabytes() - before < MEGABYTES
    assert 0.05 < accepted / COUNT < 0.6


def compare(config: dict[str, Any], arch: Architecture, folder: Path, number: int) -> bool:
    """Whether transformers runs it too; if so, both give the same logits."""
    written = json.dumps(config)
    (folder / "config.json").write_text(written)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            there = AutoConfig.from_pretrained(folder)
            model = AutoModelForCausalLM.from_config(there, attn_implementation="eager").eval()
            tiny._randomise(model, number, 1.0)  # rounding grows with it
            model.save_pretrained(folder)
            (folder / "config.json").write_text(written)
            shape = (2, min(TOKENS, arch.context))
            ids = np.random.default_rng(number).integers(arch.vocab, size=shape)
            with torch.no_grad():
                theirs = model(torch.tensor(ids), use_cache=False).logits.numpy()
        except Exception as error:  # of any kind
            print(f"case {number}: transformers refuses: {error!r:.300}")
            return False
    ours = jr.logits(jr.load_model(str(folder)), ids)
    assert_close(ours, theirs, PARITY, f"case {number}, {folder}")
    return True


def small(arch: Architecture) -> bool:
    return sum(int(np.prod(shape)) for shape in checkpoints.expected(arch).values()) < LARGE


def test_sound_configs_are_computed(tmp_path: Path) -> None:
    compared = [_sound(number, tmp_path) for number in range(max(3, COUNT // 1000))]
    assert all(compared)


def _sound(number: int, folder: Path) -> bool:
    config = configs.sound(configs.generator(SEED, number))
    arch = architecture(config)
    folder = folder / str(number)
    folder.mkdir()
    if arch.family == "qwen":
        return True
    return compare(config, arch, folder, number)


@pytest.mark.slow
@pytest.mark.timeout(36000)
def test_changed_configs_that_are_read_are_computed(tmp_path: Path) -> None:
    compared = number = 0
    while compared < COUNT // 100:
        number += 1
        config = case(number)
        arch = read(config, number)
        if arch is not None and arch.family != "qwen" and small(arch):
            folder = tmp_path / str(number)
            folder.mkdir()
            compared += compare(config, arch, folder, number)
