"""Activations of many prompts, in packed rows behind a shared prefix.

Letters: B batch row, T token, X prompts in a row, P post-instruction tokens, D residual width,
L layers, V vocabulary, I prompts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_refusal import sharding
from jax_refusal.config import BATCH_TOKENS, ROW_TOKENS
from jax_refusal.edits import Edit
from jax_refusal.models.cache import Cache
from jax_refusal.models.decoder import Transformer
from jax_refusal.runtime.batching import Packed, Prompts, pack, place
from jax_refusal.runtime.prefix import shared_prefix
from jax_refusal.runtime.progress import Progress, silent
from jax_refusal.sharding import mesh_of, to_host
from jax_refusal.sites import Capture


@jax.jit
def _last_logits(model, tokens, edit, prefix, last):  # -> [B, X, V]
    return model.unembed(model(tokens, edit, prefix=prefix, query_slots=last).x)


def last_logits(
    model: Transformer,
    prompts: Prompts,
    edit: Edit,  # one row
    *,
    row_tokens: int = ROW_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
) -> np.ndarray:  # [I, V] float32, in the order of the prompts
    """Logits at every prompt's last token under one edit."""
    mesh = mesh_of(model)
    with jax.set_mesh(mesh):
        prefix = shared_prefix(model, prompts, edit)
        out: np.ndarray | None = None
        for batch in pack(
            prompts, row_tokens=row_tokens, batch_tokens=batch_tokens, multiple=mesh.shape["data"]
        ):
            last = sharding.place(batch.slots[..., -1], mesh, "batch", None)
            logits = _last_logits(
                model, place(batch.tokens, mesh), edit, _wide(prefix, batch), last
            )
            logits = to_host(logits)
            if out is None:
                out = np.zeros((len(prompts.ids), logits.shape[-1]), np.float32)
            out[batch.prompt[batch.valid]] = logits[batch.valid]
    assert out is not None
    return out


def _wide(prefix: Cache | None, batch: Packed) -> Cache | None:
    """The one-row prefix in front of every row of the batch."""
    return None if prefix is None else prefix.repeat(batch.prompt.shape[0])


@partial(jax.jit, static_argnames=("score", "sign"))
def mean_pass(model, tokens, edit, prefix, slots, valid, score, score_params, sign):
    """Sum over prompts of the kept activations [P, L, D], how many, and each prompt's score."""
    B, X, P = slots.shape
    asked = slots[..., -1] if score is not None else jnp.zeros((B, 0), jnp.int32)
    capture = Capture(sites=("resid_pre",), slots=slots.reshape(B, X * P))
    out = model(tokens, edit, prefix=prefix, capture=capture, query_slots=asked)
    scores = None
    if score is not None:
        scores = score(model.unembed(out.x), score_params)
        if sign:
            valid &= sign * scores > 0
    kept = out.captured["resid_pre"]
    kept = kept.reshape(*kept.shape[:2], X, P, -1).astype(jnp.float32)
    total = jnp.where(valid[None, ..., None, None], kept, 0).sum((1, 2))  # [L, P, D]
    return total.swapaxes(0, 1), valid.sum(), scores


def mean_activations(
    model: Transformer,
    prompts: Prompts,
    edit: Edit,  # one row
    *,
    score: Callable[[jax.Array, Any], jax.Array] | None = None,
    score_params: Any = None,
    sign: int = 0,
    row_tokens: int = ROW_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress = silent,
    title: str = "collect",
) -> tuple[np.ndarray, np.ndarray | None]:
    """Mean block input at every post-instruction token and layer, in one streaming pass.

    Returns the means [P, L, D] (float64) and, where `score` is given, every prompt's score
    [I], computed from its last-token logits in the same pass. With sign = +1 or -1 only
    prompts whose score has that sign enter the means, which are NaN where none does.

    Sums are float32 within a batch and float64 across batches: memory does not grow with the number
    of prompts, and batch size, padding and packing change the result only in the last digits.
    """
    mesh = mesh_of(model)
    total, count = 0.0, 0
    scores = None if score is None else np.zeros(len(prompts.ids), np.float32)
    with jax.set_mesh(mesh):
        prefix = shared_prefix(model, prompts, edit)
        batches = pack(
            prompts, row_tokens=row_tokens, batch_tokens=batch_tokens, multiple=mesh.shape["data"]
        )
        for batch in progress(batches, title):
            part, number, batch_scores = mean_pass(
                model,
                place(batch.tokens, mesh),
                edit,
                _wide(prefix, batch),
                sharding.place(batch.slots, mesh, "batch", None, None),
                sharding.place(batch.valid, mesh, "batch", None),
                score=score,
                score_params=score_params,
                sign=sign,
            )
            total = total + to_host(part).astype(np.float64)
            count += int(number)
            if scores is not None:
                scores[batch.prompt[batch.valid]] = to_host(batch_scores)[batch.valid]
    with np.errstate(invalid="ignore"):
        return np.asarray(total / np.float64(count)), scores
