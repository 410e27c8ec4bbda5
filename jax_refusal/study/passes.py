"""The compiled passes that score many candidates at once: candidates are rows of one forward.

Letters: C candidates, Y packed rows of the prompts, T token, N prefix tokens, X prompts in a row, V
vocabulary, D residual width. Batch rows are C * Y, candidate-major.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from jax_refusal.edits import Edit, ablations, additions, apply, identity, num_rows, repeat
from jax_refusal.models import cache as caches
from jax_refusal.models.cache import Tokens
from jax_refusal.models.decoder import Transformer
from jax_refusal.models.drivers import SCAN, Scan
from jax_refusal.study.scores import kl_divergence, least_kl_divergence, refusal_score


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The packed prompts of one batch on the mesh, and their shared prefix."""

    tokens: Tokens  # [Y, T]
    prefix: Tokens | None  # [1, N]
    last: jax.Array  # [Y, X] slot of each prompt's last token
    valid: jax.Array  # [Y, X] bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Streams:
    """The unedited residual stream in front of one layer."""

    x: jax.Array  # [Y, T, D]
    prefix: jax.Array | None  # [1, N, D]


def _tiled(tree, times: int):
    """Arrays [Y, ...] -> [times * Y, ...], the whole block again and again."""
    return jax.tree.map(lambda x: jnp.tile(x, (times, *[1] * (x.ndim - 1))), tree)


def _run(
    model: Transformer,
    streams: Streams,  # of C candidates: x [C * Y, T, D], prefix [C, N, D]
    rows: Rows,
    edit: Edit,  # one row, or C
    candidates: int,
    drive: Scan = SCAN,
    query_slots: jax.Array | None = None,  # [C * Y, X]
) -> Streams:
    """Prefix first, then the packed rows behind it; with query_slots, x is [C * Y, X, D]."""
    Y = rows.tokens.ids.shape[0]
    prefix_x, prefix = None, None
    if rows.prefix is not None:
        assert streams.prefix is not None
        prefix = caches.empty(model.arch, candidates, rows.prefix.ids.shape[1], model.dtype)
        tokens = _tiled(rows.prefix, candidates)
        out = model.stream(streams.prefix, tokens, edit, cache=prefix, drive=drive)
        assert out.cache is not None
        prefix_x, prefix = out.x, out.cache.repeat(Y)
    wide = edit if num_rows(edit) == 1 else repeat(edit, Y)
    tokens = _tiled(rows.tokens, candidates)
    out = model.stream(streams.x, tokens, wide, prefix=prefix, drive=drive, query_slots=query_slots)
    return Streams(out.x, prefix_x)


def _last_logits(
    model: Transformer,
    streams: Streams,
    rows: Rows,
    edit: Edit,
    candidates: int,
    drive: Scan = SCAN,
) -> jax.Array:  # [C, Y, X, V]
    """Of what `_run` runs, at every prompt's last token."""
    last = _tiled(rows.last, candidates)
    logits = model.unembed(_run(model, streams, rows, edit, candidates, drive, last).x)
    return logits.reshape(candidates, *rows.last.shape, -1)


def _sums(rows: Rows, scores: jax.Array) -> jax.Array:  # [C, Y, X] -> [C]
    """Over the rows' prompts."""
    return jnp.where(rows.valid, scores, 0).sum((1, 2))


def _nothing(model: Transformer) -> Edit:
    return identity(model.arch.layers, model.arch.width)


@jax.jit
def embedded(model: Transformer, rows: Rows) -> Streams:
    """What enters the first layer."""
    prefix = None if rows.prefix is None else model.embedded(rows.prefix.ids)
    return Streams(model.embedded(rows.tokens.ids), prefix)


@jax.jit
def next_layer(model: Transformer, streams: Streams, rows: Rows, layer: jax.Array) -> Streams:
    """What leaves `layer`, unedited, of the streams that enter it."""
    return _run(model, streams, rows, _nothing(model), 1, Scan((layer, layer + 1)))


@jax.jit
def base_logits(model: Transformer, rows: Rows) -> jax.Array:  # [Y, X, V]
    """Unedited, at every prompt's last token."""
    return _last_logits(model, embedded(model, rows), rows, _nothing(model), 1)[0]


def _ablated(model: Transformer, rows: Rows, units: jax.Array) -> jax.Array:
    """Last-token logits [C, Y, X, V] with each of `units` [C, D] taken out at every site."""
    C = units.shape[0]
    edit = ablations(units, model.arch.layers)
    return _last_logits(model, _tiled(embedded(model, rows), C), rows, edit, C)


@jax.jit
def least_kl(rows: Rows, base: jax.Array) -> jax.Array:
    """The least that the KL of these prompts can sum up to; base [Y, X, V]."""
    return jnp.where(rows.valid, least_kl_divergence(base), 0).sum()


@jax.jit
def kl(model: Transformer, rows: Rows, units: jax.Array, base: jax.Array) -> jax.Array:
    """[C] sums over the rows' prompts of the KL that ablation makes; base [Y, X, V]."""
    return _sums(rows, kl_divergence(base[None], _ablated(model, rows, units)))


@jax.jit
def bypass(model: Transformer, rows: Rows, units: jax.Array, token_ids: jax.Array) -> jax.Array:
    """[C] sums over the rows' prompts of the refusal score under ablation."""
    return _sums(rows, refusal_score(_ablated(model, rows, units), token_ids))


@jax.jit
def induce(
    model: Transformer,
    streams: Streams,  # in front of `layer`
    rows: Rows,
    vectors: jax.Array,  # [C, D]
    layer: jax.Array,
    token_ids: jax.Array,
) -> jax.Array:
    """[C] sums over the rows' prompts of the refusal score with each vector added at `layer`.

    Earlier layers see no edit, so the pass starts at the stream that enters `layer`: what an edit
    adds in front of a block is what enters it.
    """
    C, L = vectors.shape[0], model.arch.layers
    edit, started = additions(vectors, L, layer), _tiled(streams, C)
    added = partial(apply, num_layers=L, layer=layer, site="resid_pre")
    x = added(repeat(edit, rows.last.shape[0]), started.x)
    prefix = None if started.prefix is None else added(edit, started.prefix)
    drive = Scan((layer, jnp.int32(L)))
    logits = _last_logits(model, Streams(x, prefix), rows, _nothing(model), C, drive)
    return _sums(rows, refusal_score(logits, token_ids))


@jax.jit
def induce_later(
    model: Transformer,
    streams: Streams,  # in front of an earlier layer, `start`
    rows: Rows,
    vectors: jax.Array,  # [C, D]
    start: jax.Array,
    layer: jax.Array,
    token_ids: jax.Array,
) -> jax.Array:
    """The sums of `induce` where `layer`, or one behind it, reads keys of layers before it."""
    C = vectors.shape[0]
    edit = additions(vectors, model.arch.layers, layer)
    drive = Scan((start, jnp.int32(model.arch.layers)))
    logits = _last_logits(model, _tiled(streams, C), rows, edit, C, drive)
    return _sums(rows, refusal_score(logits, token_ids))
