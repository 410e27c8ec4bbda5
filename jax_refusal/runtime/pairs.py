"""Prompts with given replies, packed: what training learns from and what the loss is measured on.

Letters: B packed rows, T token, Q reply tokens of a row, X pairs in a row, V vocabulary, D residual
width, N prefix tokens, P post-instruction tokens, R edits.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_refusal.edits import INSTRUCTION, POST_INSTRUCTION, REPLY, Edit, num_rows, take
from jax_refusal.models import cache as caches
from jax_refusal.models.cache import PADDING, Tokens
from jax_refusal.models.decoder import Output, Transformer
from jax_refusal.runtime.batching import Prompts, bucket, host_tokens
from jax_refusal.sites import NOTHING, Capture

# A prompt (without the shared prefix) and the reply that follows it, as token ids.
Pair = tuple[Sequence[int], Sequence[int]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedPairs:
    """Packed pairs with the tokens to predict; numpy until they are placed."""

    tokens: Tokens  # [B, T]
    slots: jax.Array | np.ndarray  # [B, Q] int32, where a token of a reply comes next
    targets: jax.Array | np.ndarray  # [B, Q] int32, that token
    weights: jax.Array | np.ndarray  # [B, Q] float32, 0 where Q is not filled
    pair: jax.Array | np.ndarray  # [B, Q] int32, which pair of the row it is of
    starts: jax.Array | np.ndarray  # [B, X] int32, where in Q the reply of each pair starts


def pack_pairs(
    rows: Sequence[Sequence[Pair]],
    prompts: Prompts,  # that those of the pairs are of: N and P are its numbers
    length: int,
    first_weight: float = 1.0,  # of each reply's first token; the others have 1
) -> PackedPairs:
    """Rows of pairs as arrays [B, length]; positions count from N, behind the prefix."""
    most = max(sum(len(reply) for _, reply in row) for row in rows)
    shape, replies = (len(rows), length), (len(rows), min(bucket(most, 64), length))
    starts = np.zeros((len(rows), bucket(max(map(len, rows)), 8)), np.int32)
    ids, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    segments, kinds = np.full(shape, PADDING, np.int32), np.full(shape, INSTRUCTION, np.int32)
    slots, targets, pair = (np.zeros(replies, np.int32) for _ in range(3))
    weights = np.zeros(replies, np.float32)
    for r, row in enumerate(rows):
        end = known = 0
        for number, (prompt, reply) in enumerate(row):
            whole = [*prompt, *reply]
            here = slice(end, end + len(whole))
            ids[r, here], positions[r, here] = whole, np.arange(len(whole)) + prompts.prefix
            segments[r, here] = number + 1
            replied = end + len(prompt)
            kinds[r, max(end, replied - prompts.positions) : replied] = POST_INSTRUCTION
            kinds[r, replied : here.stop] = REPLY
            now = slice(known, known + len(reply))
            slots[r, now] = np.arange(len(reply)) + replied - 1
            targets[r, now], weights[r, now], pair[r, now] = reply, 1, number
            weights[r, known], starts[r, number] = first_weight, known
            end, known = here.stop, now.stop
    tokens = host_tokens(ids, positions, segments, kinds)
    return PackedPairs(tokens, slots, targets, weights, pair, starts)


def paired_stream(
    model: Transformer,
    edit: Edit,  # R rows
    prefix: Tokens | None,  # [1, N]
    pairs: PackedPairs,
    *,
    row_edit: jax.Array | None = None,  # [B] which of the R edits a row is run with; None: R is 1
    capture: Capture = NOTHING,
) -> Output:
    """The model on packed pairs, behind their shared prefix, which is run once for each edit."""
    row_edit = jnp.zeros(pairs.tokens.ids.shape[0], jnp.int32) if row_edit is None else row_edit
    shared = None
    if prefix is not None:
        edits = num_rows(edit)
        tokens = jax.tree.map(lambda x: jnp.tile(x, (edits, 1)), prefix)
        cache = caches.empty(model.arch, edits, prefix.ids.shape[1], model.dtype)
        cache = model(tokens, edit, cache=cache).cache
        assert cache is not None
        shared = cache.take(row_edit)
    return model(pairs.tokens, take(edit, row_edit), prefix=shared, capture=capture)


def unembed_replies(model: Transformer, x: jax.Array, pairs: PackedPairs) -> jax.Array:
    """Logits [B, Q, V] of each token of the replies; x [B, T, D] is the stream they come from."""
    return model.unembed(jnp.take_along_axis(x, jnp.asarray(pairs.slots)[..., None], 1))


def reply_logits(
    model: Transformer,
    edit: Edit,  # one row
    prefix: Tokens | None,  # [1, N]
    pairs: PackedPairs,
) -> jax.Array:  # [B, Q, V]
    """Logits of each token of the replies."""
    return unembed_replies(model, paired_stream(model, edit, prefix, pairs).x, pairs)


def cross_entropy(logits: jax.Array, pairs: PackedPairs) -> jax.Array:  # [B, Q] nats times weights
    """How surprising each token of the replies is."""
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(pairs.targets))
    return nats * pairs.weights
