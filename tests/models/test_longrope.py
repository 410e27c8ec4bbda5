"""Longrope beyond the original context, in whole models: a prompt's length says how it is turned.

Letters: B batch row, T token.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import jax_refusal as jr
from jax_refusal.families.registry import architecture
from jax_refusal.runtime import collect
from jax_refusal.runtime.batching import Prompts
from jax_refusal.runtime.generate import ContextError, check_capacity, generate
from tests import tiny
from tests.models.cases import SMALL, fields
from tests.tolerances import INVARIANCE, PARITY, assert_close, largest

ORIGINAL, CONTEXT = 16, 64  # tokens
LENGTHS = (9, ORIGINAL, ORIGINAL + 1, 40)
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [4.0, 6.0, 9.0, 12.0],
    "original_max_position_embeddings": ORIGINAL,
}
LLAMA = {"num_hidden_layers": 2, "max_position_embeddings": CONTEXT, "rope_scaling": LONGROPE}
LAYERS = {"layer_types": ["full_attention", "sliding_attention"]}
CASES: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, **LLAMA},
    "phi3": fields("phi3", **LLAMA, original_max_position_embeddings=ORIGINAL),
    "gemma3_text": fields("gemma3_text", **LLAMA, **LAYERS, head_dim=8),
}
Checkpoint = Callable[..., Path]


def prompts(seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 300, size=n).tolist() for n in LENGTHS]


def padded(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:  # ids, mask [B, T]
    width = max(map(len, rows))
    ids = np.array([[0] * (width - len(row)) + row for row in rows])
    return ids, np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows])


@torch.no_grad()
def alone(hf: Any, row: list[int]) -> np.ndarray:  # [T, V]
    return hf(torch.tensor([row]), use_cache=False).logits[0].numpy()


@pytest.mark.parametrize("family", CASES)
def test_logits(family: str, checkpoint: Checkpoint) -> None:
    """Prompts of one batch are what transformers makes of each of them alone."""
    path = checkpoint(**CASES[family])
    model, hf, rows = jr.load_model(str(path)), tiny.hf_model(path), prompts()
    ours = np.asarray(jr.logits(model, *padded(rows)))
    for row, x in zip(rows, ours, strict=True):
        assert_close(x[len(x) - len(row) :], alone(hf, row), PARITY, f"{len(row)} tokens")
    short, long = alone(hf, rows[-1][:ORIGINAL]), alone(hf, rows[-1])[:ORIGINAL]
    assert largest(short - long) > 1e3 * PARITY * largest(long)  # the parity says something


def test_packed_prompts(checkpoint: Checkpoint) -> None:
    """Means over prompts that share a row, of both kinds, are those of each prompt alone."""
    model, rows = jr.load_model(str(checkpoint(**CASES["llama"]))), prompts()
    edit = jr.identity(model.arch.layers, model.arch.width)

    def means(which: list[list[int]], prefix: int = 0) -> np.ndarray:
        given = Prompts(which, prefix, 2).for_rows_of(max(map(len, which)), model.arch)
        return np.asarray(collect.mean_activations(model, given, edit, batch_tokens=128)[0])

    each = [means([row]) for row in rows]
    assert_close(means(rows), np.mean(each, 0), INVARIANCE)
    begun = [rows[0][:4] + row[4:] for row in rows]  # a start that long prompts do not share
    assert_close(means(begun, 4), np.mean([means([row]) for row in begun], 0), INVARIANCE)


def test_replies(checkpoint: Checkpoint) -> None:
    """Greedy, on either side of the original context, as whole passes would choose; a reply that
    would cross it is refused."""
    path = checkpoint(**CASES["llama"])
    model, hf = jr.load_model(str(path)), tiny.hf_model(path)
    rows, new = [row for row in prompts() if len(row) != ORIGINAL], 5
    edit = jr.identity(model.arch.layers, model.arch.width)
    given = Prompts(rows, 0, 1)
    for row, reply in zip(
        rows, generate(model, given, edit, stop_ids=(), max_new_tokens=new), strict=True
    ):
        text = list(row)
        for token in reply:
            assert token == int(alone(hf, text)[-1].argmax())
            text.append(token)
    for row, most in zip(prompts(), (7, 0), strict=False):
        if most:
            check_capacity(Prompts([row], 0, 1), most, model.arch)
        with pytest.raises(ContextError, match=f"at most {most} new tokens"):
            check_capacity(Prompts([row, rows[-1]], 0, 1), most + 1, model.arch)


def test_beyond_the_context_logits_are_refused(checkpoint: Checkpoint) -> None:
    model = jr.load_model(str(checkpoint(**CASES["llama"])))
    with pytest.raises(ValueError, match=r"65 tokens.*context of 64"):
        jr.logits(model, [[3] * 65])


@pytest.mark.parametrize("name", ["short_factor", "long_factor"])
@pytest.mark.parametrize("wrong", [[1.0] * 3, [1.0] * 3 + [float("nan")], [0.0] * 4, None, 2.0])
def test_factors_that_do_not_fit(name: str, wrong: Any, checkpoint: Checkpoint) -> None:
    config = json.loads((checkpoint(**CASES["llama"]) / "config.json").read_text())
    config["rope_parameters"][name] = wrong
    with pytest.raises(ValueError, match=name):
        architecture(config)
