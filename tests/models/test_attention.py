"""Attention as GPUs and TPUs run it, against the one that a CPU runs.

Letters: B batch row, T token, C context token, G key/value heads, H query heads, K head width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_refusal as jr
from jax_refusal.models import attention
from jax_refusal.models.cache import Tokens
from jax_refusal.models.decoder import Transformer
from jax_refusal.runtime import collect
from jax_refusal.runtime.generate import generate
from tests.models.cases import fields
from tests.models.test_cache import nothing, one_by_one, sharing, some_edit
from tests.tolerances import INVARIANCE, ROUNDING, assert_close

Checkpoint = Callable[..., Path]


@pytest.fixture
def accelerated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Models are traced as for a GPU; the calls of JAX's own attention are counted."""
    calls: list[int] = []
    own = jax.nn.dot_product_attention

    def counted(*args: Any, **options: Any) -> jax.Array:
        calls.append(1)
        return own(*args, **options)

    monkeypatch.setattr(attention, "accelerated", lambda: True)
    monkeypatch.setattr(jax.nn, "dot_product_attention", counted)
    jax.clear_caches()
    yield calls
    jax.clear_caches()


@contextmanager
def as_on_a_cpu() -> Iterator[None]:
    """What is traced inside is traced as everywhere else in the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "accelerated", lambda: False)
        jax.clear_caches()
        yield


def test_jax_s_attention_is_ours(accelerated: list[int]) -> None:
    """Grouped heads, any mask; a token that may see nothing gets a finite answer."""
    B, T, C, G, H, K = 2, 5, 9, 2, 6, 8
    rng = np.random.default_rng(0)
    shapes = ((B, T, H, K), (B, G, K, C), (B, G, C, K))
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    allowed = rng.random((B, T, C)) < 0.5
    allowed[..., 0], allowed[0, 1] = True, False
    theirs = attention.dot_product_attention(q, k, v, jnp.asarray(allowed), 0.3)
    assert accelerated == [1]
    with as_on_a_cpu():
        ours = attention.dot_product_attention(q, k, v, jnp.asarray(allowed), 0.3)
    assert accelerated == [1]
    assert_close(theirs, ours, ROUNDING)


@pytest.mark.parametrize("name", ["qwen2", "ministral3_window_tied", "gemma3_text", "gemma4_text"])
def test_packed_rows_behind_a_prefix(
    name: str, checkpoint: Checkpoint, accelerated: list[int]
) -> None:
    """Against single prompts with the CPU's attention, under an edit."""
    model = jr.load_model(str(checkpoint(**fields(name))))
    prompts, edit = sharing(model, 9, (21, 14, 30, 12, 25)), some_edit(model)
    packed = collect.last_logits(model, prompts, edit, row_tokens=48)
    assert accelerated
    with as_on_a_cpu():
        expected = one_by_one(model, prompts, edit)
    assert_close(packed, expected, INVARIANCE)


def test_replies(model: Transformer, accelerated: list[int]) -> None:
    """Prefill and decode, by a cache that lies as the CPU wants it."""
    prompts = sharing(model, 4, (11, 9, 13))
    options: Any = {"stop_ids": (), "max_new_tokens": 12, "batch_size": 2}
    theirs = generate(model, prompts, nothing(model), **options)
    assert accelerated
    with as_on_a_cpu():
        assert theirs == generate(model, prompts, nothing(model), **options)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_what_jax_s_attention_does_not_know_stays_ours(
    name: str, checkpoint: Checkpoint, accelerated: list[int]
) -> None:
    """Caps on scores, and sinks."""
    model = jr.load_model(str(checkpoint(**fields(name))))
    model(Tokens.padded(jnp.zeros((1, 4), jnp.int32)), nothing(model))
    assert not accelerated


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_can_be_compiled_for(
    platform: str, dtype: str, checkpoint: Checkpoint, accelerated: list[int]
) -> None:
    """As far as it goes without one: down to what the accelerator's compiler is given."""
    model = jr.load_model(str(checkpoint(**fields("qwen2"))), dtype=dtype)
    tokens = Tokens.padded(jnp.zeros((2, 8), jnp.int32))
    run = jax.jit(lambda model, tokens: model.unembed(model(tokens, nothing(model)).x))
    lowered = run.trace(model, tokens).lower(lowering_platforms=(platform,))
    products = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
    assert accelerated and products
    if dtype == "float32":  # never in fewer digits
        assert all("HIGHEST, HIGHEST" in line for line in products)
