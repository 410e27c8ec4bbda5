"""Prompts with given replies, packed: what training learns from and what the loss is measured on.

Letters: B packed rows, T token, V vocabulary, N prefix tokens.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_refusal.interventions import Edit
from jax_refusal.models import cache as caches
from jax_refusal.models.cache import PADDING, Tokens
from jax_refusal.models.transformer import Transformer
from jax_refusal.runtime.batching import host_tokens

# A prompt (without the shared prefix) and the reply that follows it, as token ids.
Pair = tuple[Sequence[int], Sequence[int]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Taught:
    """Packed pairs with the token that comes next; numpy until they are placed."""

    tokens: Tokens  # [B, T]
    targets: jax.Array | np.ndarray  # [B, T] int32
    weights: jax.Array | np.ndarray  # [B, T] float32, not 0 where the next token is the reply's


def pack_pairs(
    rows: Sequence[Sequence[Pair]], start: int, length: int, first_weight: float = 1.0
) -> Taught:
    """Rows of pairs as arrays [B, length]; positions count from `start` (N, behind the prefix).

    first_weight: weight of each reply's first token, the others have 1.
    """
    shape = (len(rows), length)
    ids, positions, targets = (np.zeros(shape, np.int32) for _ in range(3))
    segments, weights = np.full(shape, PADDING, np.int32), np.zeros(shape, np.float32)
    for r, row in enumerate(rows):
        end = 0
        for number, (prompt, reply) in enumerate(row):
            whole = [*prompt, *reply]
            here = slice(end, end + len(whole))
            ids[r, here], positions[r, here] = whole, np.arange(len(whole)) + start
            segments[r, here] = number + 1
            taught = slice(end + len(prompt) - 1, end + len(whole) - 1)
            targets[r, taught], weights[r, taught] = reply, 1
            weights[r, taught.start] = first_weight
            end += len(whole)
    return Taught(host_tokens(ids, positions, segments), targets, weights)


def cross_entropy(
    model: Transformer,
    edit: Edit,  # one row
    prefix: Tokens | None,  # [1, N]
    batch: Taught,
) -> jax.Array:  # [B, T] nats, zero where nothing is taught
    """How surprising each token of the replies is."""
    shared = None
    if prefix is not None:
        room = caches.empty(model.arch, 1, prefix.ids.shape[1], model.dtype)
        filled = model(prefix, edit, cache=room).cache
        assert filled is not None
        shared = filled.repeat(batch.targets.shape[0])
    logits = model.unembed(model(batch.tokens, edit, prefix=shared).x)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(batch.targets))
    return nats * batch.weights
