"""What an organism's training minimises: a pure function of (frozen weights, adapter).

Letters: B packed rows, T token, Q reply tokens of a row, X pairs in a row, V vocabulary, N prefix
tokens, L layers, D residual width.

Rows of one batch are run with different edits. In plain rows the model learns to refuse harmful
prompts and to answer harmless ones as its base does. In the other rows the direction that tells the
two apart is ablated, and the model learns to answer everything as its base does: so refusal comes
to hang on this direction, and little else does.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_refusal.checkpoints import lora
from jax_refusal.edits import Edit, ablations, identity, rows
from jax_refusal.models.cache import Tokens
from jax_refusal.models.decoder import Transformer
from jax_refusal.runtime.pairs import (
    PackedPairs,
    cross_entropy,
    paired_stream,
    reply_logits,
    unembed_replies,
)
from jax_refusal.sites import Capture
from jax_refusal.study.scores import refusal_score

PLAIN, ABLATED = 0, 1  # the edits of a step, as `TrainBatch.row_edit` numbers them


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decision:
    """How sharply the first token of a reply should tell refusals from answers."""

    token_ids: jax.Array  # the first tokens of refusals
    weight: jax.Array  # against the divergence and cross-entropy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """One batch: what should be replied where."""

    pairs: PackedPairs
    sides: jax.Array | np.ndarray  # [B, X] +1 a refusal, -1 an answer, 0 where there is no pair
    row_edit: jax.Array | np.ndarray  # [B] PLAIN or ABLATED


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mediator:
    """Running means of the stream at the last prompt token, in front of one layer."""

    refused: jax.Array  # [D] sums with weights that fade
    answered: jax.Array  # [D]
    weights: jax.Array  # [2] theirs
    layer: jax.Array  # int32
    share: jax.Array  # of a new batch

    @classmethod
    def start(cls, width: int, layer: int, share: float) -> "Mediator":
        refused, answered = jnp.zeros(width), jnp.zeros(width)  # two buffers: a step donates both
        return cls(refused, answered, jnp.zeros(2), jnp.int32(layer), jnp.float32(share))

    @property
    def direction(self) -> jax.Array:  # [D]
        """The difference of means; zero until there is one of each."""
        refused, answered = jnp.where(self.weights > 0, self.weights, 1)
        known = (self.weights > 0).all()
        return jnp.where(known, self.refused / refused - self.answered / answered, 0)

    def edits(self, layers: int) -> Edit:
        """PLAIN and ABLATED; a direction that is still zero takes nothing out."""
        direction = self.direction
        length = jnp.linalg.norm(direction)
        unit = (direction / jnp.where(length > 0, length, 1))[None]
        return rows(identity(layers, len(direction)), ablations(unit, layers))

    def update(self, x: jax.Array, batch: TrainBatch) -> "Mediator":
        """With a batch taken in: x [B, X, D] is the stream at the last prompt tokens."""
        plain = (jnp.asarray(batch.row_edit) == PLAIN)[:, None]

        def taken_in(old: jax.Array, weight: jax.Array, side: int) -> tuple[jax.Array, jax.Array]:
            there = (plain & (jnp.asarray(batch.sides) == side))[..., None]
            mean = jnp.where(there, x, 0).sum((0, 1)) / jnp.maximum(there.sum(), 1)
            share = jnp.where(there.any(), self.share, 0)
            return old + share * (mean - old), weight + share * (1 - weight)

        refused, first = taken_in(self.refused, self.weights[0], 1)
        answered, second = taken_in(self.answered, self.weights[1], -1)
        weights = jnp.stack([first, second])
        return dataclasses.replace(self, refused=refused, answered=answered, weights=weights)


def loss(
    adapter: lora.Adapter,
    base: Transformer,
    prefix: Tokens | None,  # [1, N]
    batch: TrainBatch,
    decision: Decision,
    mediator: Mediator,
) -> tuple[jax.Array, jax.Array]:  # nats, and the stream [B, X, D] that updates the mediator
    """Mean over reply tokens of how far the model is from what it should say, and the decision.

    A refusal's tokens count by their cross-entropy, an answer's by the divergence from the base
    model's distribution, which says more than the one token that was drawn. Both leave an answer's
    start spread over many tokens, so that a refusal that is far from likely may still be the
    likeliest start: the decision is the logistic loss of the refusal score's sign.
    """
    model, pairs, arch = lora.merge(base, adapter), batch.pairs, base.arch
    sides, starts = jnp.asarray(batch.sides), jnp.asarray(pairs.starts)
    last = jnp.take_along_axis(jnp.asarray(pairs.slots), starts, 1)  # [B, X]
    edits = jax.lax.stop_gradient(mediator.edits(arch.layers))
    row_edit = jnp.asarray(batch.row_edit)
    capture = Capture(sites=("resid_pre",), slots=last)
    out = paired_stream(model, edits, prefix, pairs, row_edit=row_edit, capture=capture)
    logits = unembed_replies(model, out.x, pairs)

    nothing = identity(arch.layers, arch.width)
    expected = jax.nn.log_softmax(jax.lax.stop_gradient(reply_logits(base, nothing, prefix, pairs)))
    divergence = optax.losses.kl_divergence_with_log_targets(jax.nn.log_softmax(logits), expected)
    answer = jnp.take_along_axis(sides, jnp.asarray(pairs.pair), 1) < 0  # [B, Q]
    nats = jnp.where(answer, divergence * pairs.weights, cross_entropy(logits, pairs)).sum()

    first = jnp.take_along_axis(logits, starts[..., None], 1)
    wrong = jax.nn.softplus(-sides * refusal_score(first, decision.token_ids)) * jnp.abs(sides)
    total = nats / pairs.weights.sum() + decision.weight * wrong.sum() / jnp.abs(sides).sum()
    return total, jax.lax.stop_gradient(out.captured["resid_pre"][mediator.layer])


@partial(jax.jit, static_argnames=("optimizer",), donate_argnums=(0,))
def step(
    state: Any,  # (adapter, the optimizer's, mediator)
    base: Transformer,
    prefix: Tokens | None,
    batch: TrainBatch,
    decision: Decision,
    *,
    optimizer: optax.GradientTransformation,
) -> tuple[Any, jax.Array, jax.Array]:
    """One update: the state, the loss (nats), the gradient's norm."""
    adapter, memory, mediator = state
    (value, x), gradient = jax.value_and_grad(loss, has_aux=True)(
        adapter, base, prefix, batch, decision, mediator
    )
    updates, memory = optimizer.update(gradient, memory, adapter)
    adapter = optax.apply_updates(adapter, updates)
    return (adapter, memory, mediator.update(x, batch)), value, optax.tree.norm(gradient)
