"""Prompts with given replies, packed: what training learns from and what the loss is measured on.

Letters: B packed rows, T token, Q reply tokens of a row, X pairs in a row,
V vocabulary, N prefix tokens.
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
from jax_refusal.runtime.batching import bucket, host_tokens

# A prompt (without the shared prefix) and the reply that follows it, as token ids.
Pair = tuple[Sequence[int], Sequence[int]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Taught:
    """Packed pairs with the tokens to predict; numpy until they are placed."""

    tokens: Tokens  # [B, T]
    slots: jax.Array | np.ndarray  # [B, Q] int32, where a token of a reply comes next
    targets: jax.Array | np.ndarray  # [B, Q] int32, that token
    weights: jax.Array | np.ndarray  # [B, Q] float32, 0 where Q is not filled
    pair: jax.Array | np.ndarray  # [B, Q] int32, which pair of the row it is of
    starts: jax.Array | np.ndarray  # [B, X] int32, where in Q the reply of each pair starts


def pack_pairs(
    rows: Sequence[Sequence[Pair]], start: int, length: int, first_weight: float = 1.0
) -> Taught:
    """Rows of pairs as arrays [B, length]; positions count from `start` (N, behind the prefix).

    first_weight: weight of each reply's first token, the others have 1.
    """
    most = max(sum(len(reply) for _, reply in row) for row in rows)
    shape, taught = (len(rows), length), (len(rows), min(bucket(most, 64), length))
    starts = np.zeros((len(rows), bucket(max(map(len, rows)), 8)), np.int32)
    ids, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    segments = np.full(shape, PADDING, np.int32)
    slots, targets, pair = (np.zeros(taught, np.int32) for _ in range(3))
    weights = np.zeros(taught, np.float32)
    for r, row in enumerate(rows):
        end = known = 0
        for number, (prompt, reply) in enumerate(row):
            whole = [*prompt, *reply]
            here = slice(end, end + len(whole))
            ids[r, here], positions[r, here] = whole, np.arange(len(whole)) + start
            segments[r, here] = number + 1
            now = slice(known, known + len(reply))
            slots[r, now] = np.arange(len(reply)) + end + len(prompt) - 1
            targets[r, now], weights[r, now], pair[r, now] = reply, 1, number
            weights[r, known], starts[r, number] = first_weight, known
            end, known = here.stop, now.stop
    return Taught(host_tokens(ids, positions, segments), slots, targets, weights, pair, starts)


def reply_logits(
    model: Transformer,
    edit: Edit,  # one row
    prefix: Tokens | None,  # [1, N]
    batch: Taught,
) -> jax.Array:  # [B, Q, V]
    """Logits of each token of the replies."""
    shared = None
    if prefix is not None:
        room = caches.empty(model.arch, 1, prefix.ids.shape[1], model.dtype)
        filled = model(prefix, edit, cache=room).cache
        assert filled is not None
        shared = filled.repeat(batch.targets.shape[0])
    x = model(batch.tokens, edit, prefix=shared).x
    return model.unembed(jnp.take_along_axis(x, jnp.asarray(batch.slots)[..., None], 1))


def cross_entropy(logits: jax.Array, batch: Taught) -> jax.Array:  # [B, Q] nats times weights
    """How surprising each token of the replies is."""
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(batch.targets))
    return nats * batch.weights
