"""Families as a run uses them: packed behind a shared prefix, and generating, several layers deep.

Letters: B batch row, T token, D residual width.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_refusal as jr
from jax_refusal.models.cache import Tokens
from jax_refusal.runtime import collect
from jax_refusal.runtime.batching import Prompts
from jax_refusal.runtime.generate import generate
from tests import tiny
from tests.models.cases import fields
from tests.models.test_cache import nothing, one_by_one, sharing, some_edit
from tests.tolerances import INVARIANCE, assert_close

Checkpoint = Callable[..., Path]
ALL = "gemma4_text_all_untied"
HYBRIDS = ("qwen3_next", "qwen3_5", "granitemoehybrid")


@pytest.mark.parametrize(
    "name",
    ["gemma3_text", "ministral3_window_tied", "qwen3_moe", "gpt_oss", "gemma4_text", ALL, *HYBRIDS],
)
def test_packed_rows_equal_single_prompts(name: str, checkpoint: Checkpoint) -> None:
    """Two rotary bases, windows, growing queries and routed experts, by positions and not slots."""
    model = jr.load_model(str(checkpoint(**fields(name))))
    prompts, edit = sharing(model, 9, (21, 14, 30, 12, 25)), some_edit(model)
    packed = collect.last_logits(model, prompts, edit, row_tokens=48)
    assert_close(packed, one_by_one(model, prompts, edit), INVARIANCE)


@pytest.mark.parametrize(
    "name", ["gemma2", "gemma3_text", "mixtral", "phi3_partial_window", "gpt_oss", ALL, *HYBRIDS]
)
def test_greedy_replies_are_those_of_hugging_face(name: str, checkpoint: Checkpoint) -> None:
    """Prefill, cache and decode, out of the windows of the prompt; unedited."""
    path = checkpoint(**fields(name))
    model, hf = jr.load_model(str(path)), tiny.hf_model(path)
    prompts = sharing(model, 4, (11, 9, 13))
    prompts = Prompts(prompts.ids, prompts.prefix, positions=1)
    options: Any = {"stop_ids": (), "max_new_tokens": 12, "batch_size": 2}
    ours = generate(model, prompts, nothing(model), **options)  # the last one in a used row
    for ids, reply in zip(prompts.ids, ours, strict=True):
        with torch.no_grad():
            whole = hf.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=12,
                do_sample=False,
                eos_token_id=None,
            )
        assert reply == whole[0, len(ids) :].tolist()


def test_an_edit_acts_where_it_is_added(checkpoint: Checkpoint) -> None:
    """Under post-norms: with every site ablated the residual stream has nothing along it."""
    model = jr.load_model(str(checkpoint(**fields("gemma2"))))
    direction = np.random.default_rng(5).normal(size=model.arch.width)
    edit = jr.ablate(direction, model.arch.layers)
    ids = np.random.default_rng(0).integers(model.arch.vocab, size=(2, 12))
    tokens = Tokens.padded(jnp.asarray(ids, jnp.int32))
    x = np.asarray(model(tokens, edit).x)
    along = x @ (direction / np.linalg.norm(direction))
    assert np.abs(along).max() < 1e-5 * np.abs(x).max()
    unedited = np.asarray(model(tokens, nothing(model)).x) @ direction
    assert np.abs(unedited).max() > 0.1
