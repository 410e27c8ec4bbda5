"""The three scores of many candidates at once: candidates are rows of one compiled forward.

Letters: C candidates in a chunk, M packed rows of the prompts, T token, N prefix tokens, X prompts
in a row, V vocabulary, P post-instruction tokens, L layers, D residual width. Batch rows are C * M,
candidate-major.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_refusal import interventions as iv
from jax_refusal import sharding
from jax_refusal.config import BATCH_TOKENS, ROW_TOKENS
from jax_refusal.models import cache as caches
from jax_refusal.models.cache import Tokens
from jax_refusal.models.transformer import Transformer
from jax_refusal.runtime.batching import Prompts, bucket, pack, place, prefix_tokens
from jax_refusal.runtime.collect import Progress, mesh_of, nowhere, silent
from jax_refusal.study.scores import (
    check_token_ids,
    kl_divergence,
    least_kl_divergence,
    refusal_score,
)

Cells = Sequence[tuple[int, int]]  # (position index 0..P-1, layer)
ROUNDING = 1e-4  # nats, by which a bound stays below what rounding could make of a mean


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The packed prompts of one batch on the mesh, and their shared prefix."""

    tokens: Tokens  # [M, T]
    prefix: Tokens | None  # [1, N]
    last: jax.Array  # [M, X] slot of each prompt's last token
    valid: jax.Array  # [M, X] bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Streams:
    """The unedited residual stream in front of one layer."""

    x: jax.Array  # [M, T, D]
    prefix: jax.Array | None  # [1, N, D]


def _tiled(tree, times: int):
    """Arrays [M, ...] -> [times * M, ...], the whole block again and again."""
    return jax.tree.map(lambda x: jnp.tile(x, (times, *[1] * (x.ndim - 1))), tree)


def _run(
    model: Transformer,
    streams: Streams,  # of C candidates: x [C * M, T, D], prefix [C, N, D]
    rows: Rows,
    edit: iv.Intervention,  # [C] rows
    candidates: int,
    span: tuple[jax.Array, jax.Array] | None = None,
    asked: jax.Array | None = None,  # [C * M, X]
) -> Streams:
    """Prefix first, then the packed rows behind it; where asked, x is [C * M, X, D]."""
    M = rows.tokens.ids.shape[0]
    one = edit.unit.shape[0] == 1
    prefix_x, prefix = None, None
    if rows.prefix is not None:
        assert streams.prefix is not None
        prefix = caches.empty(model.arch, candidates, rows.prefix.ids.shape[1], model.dtype)
        tokens = _tiled(rows.prefix, candidates)
        none = None if asked is None else nowhere(candidates)
        out = model.stream(streams.prefix, tokens, edit, cache=prefix, span=span, asked=none)
        assert out.cache is not None
        prefix_x, prefix = out.x, out.cache.repeat(M)
    wide = edit if one else iv.repeat(edit, M)
    tokens = _tiled(rows.tokens, candidates)
    out = model.stream(streams.x, tokens, wide, prefix=prefix, span=span, asked=asked)
    return Streams(out.x, prefix_x)


def _last_logits(
    model: Transformer,
    streams: Streams,
    rows: Rows,
    edit: iv.Intervention,
    candidates: int,
    span: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:  # [C * M, X, V]
    """Of what `_run` runs, at every prompt's last token."""
    asked = _tiled(rows.last, candidates)
    return model.unembed(_run(model, streams, rows, edit, candidates, span, asked).x)


def _nothing(model: Transformer) -> iv.Intervention:
    return iv.identity(model.arch.layers, model.arch.width)


@jax.jit
def _embedded(model: Transformer, rows: Rows) -> Streams:
    prefix = None if rows.prefix is None else model.embedded(rows.prefix.ids)
    return Streams(model.embedded(rows.tokens.ids), prefix)


@jax.jit
def _next_layer(model: Transformer, streams: Streams, rows: Rows, layer: jax.Array) -> Streams:
    return _run(model, streams, rows, _nothing(model), 1, (layer, layer + 1))


@jax.jit
def _base_logits(model: Transformer, rows: Rows) -> jax.Array:  # [M, X, V]
    return _last_logits(model, _embedded(model, rows), rows, _nothing(model), 1)


def _ablated(model: Transformer, rows: Rows, units: jax.Array) -> jax.Array:
    """Last-token logits [C, M, X, V] with each of `units` [C, D] taken out at every site."""
    C, (M, X) = units.shape[0], rows.last.shape
    gates = jnp.ones((model.arch.layers, len(iv.SITES), C))
    none = jnp.zeros_like
    edit = iv.Intervention(unit=units, vector=none(units), remove=gates, add=none(gates))
    logits = _last_logits(model, _tiled(_embedded(model, rows), C), rows, edit, C)
    return logits.reshape(C, M, X, -1)


@jax.jit
def _least_kl(rows: Rows, base: jax.Array) -> jax.Array:
    """The least that the KL of these prompts can sum up to; base [M, X, V]."""
    return jnp.where(rows.valid, least_kl_divergence(base), 0).sum()


@jax.jit
def _kl(model: Transformer, rows: Rows, units: jax.Array, base: jax.Array) -> jax.Array:
    """[C] sums over the rows' prompts of the KL that ablation makes; base [M, X, V]."""
    divergence = kl_divergence(base[None], _ablated(model, rows, units))
    return jnp.where(rows.valid, divergence, 0).sum((1, 2))


@jax.jit
def _bypass(model: Transformer, rows: Rows, units: jax.Array, token_ids: jax.Array) -> jax.Array:
    """[C] sums over the rows' prompts of the refusal score under ablation."""
    scores = refusal_score(_ablated(model, rows, units), token_ids)
    return jnp.where(rows.valid, scores, 0).sum((1, 2))


@jax.jit
def _induce(
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
    C, (M, X) = vectors.shape[0], rows.last.shape
    dtype = streams.x.dtype
    x = _tiled(streams.x, C).astype(jnp.float32) + jnp.repeat(vectors, M, 0)[:, None]
    prefix = None
    if streams.prefix is not None:
        prefix = (streams.prefix.astype(jnp.float32) + vectors[:, None]).astype(dtype)
    span = (layer, jnp.int32(model.arch.layers))
    started = Streams(x.astype(dtype), prefix)
    logits = _last_logits(model, started, rows, _nothing(model), C, span)
    scores = refusal_score(logits, token_ids).reshape(C, M, X)
    return jnp.where(rows.valid, scores, 0).sum((1, 2))


@jax.jit
def _induce_later(
    model: Transformer,
    streams: Streams,  # in front of an earlier layer, `start`
    rows: Rows,
    vectors: jax.Array,  # [C, D]
    start: jax.Array,
    layer: jax.Array,
    token_ids: jax.Array,
) -> jax.Array:
    """The sums of `_induce` where `layer`, or one behind it, reads keys of layers before it."""
    C, (M, X) = vectors.shape[0], rows.last.shape
    none, shape = jnp.zeros_like(vectors), (model.arch.layers, len(iv.SITES), C)
    here = jnp.arange(model.arch.layers)[:, None] == layer
    here &= (jnp.arange(len(iv.SITES)) == iv.SITES.index("resid_pre"))[None]
    gates = jnp.broadcast_to(here[..., None], shape).astype(jnp.float32)
    edit = iv.Intervention(unit=none, vector=vectors, remove=jnp.zeros(shape), add=gates)
    span = (start, jnp.int32(model.arch.layers))
    logits = _last_logits(model, _tiled(streams, C), rows, edit, C, span)
    scores = refusal_score(logits, token_ids).reshape(C, M, X)
    return jnp.where(rows.valid, scores, 0).sum((1, 2))


class Sweep:
    """Scores candidates on validation prompts: the `Scorer` that selection asks.

    Candidates of one forward are as many as fit `batch_tokens`, for each part of the mesh's data
    axis, with all rows of the prompts.
    """

    def __init__(
        self,
        model: Transformer,
        directions: np.ndarray,  # [P, L, D]
        harmful: Prompts,
        harmless: Prompts,
        token_ids: Sequence[int],
        *,
        row_tokens: int = ROW_TOKENS,
        batch_tokens: int = BATCH_TOKENS,
        progress: Progress = silent,
    ):
        check_token_ids(token_ids, model.arch.vocab)
        self.model, self.directions, self.progress = model, directions, progress
        self.token_ids = jnp.array(token_ids, jnp.int32)
        self.batch_tokens = batch_tokens
        self.mesh = mesh_of(model)
        size = {"row_tokens": row_tokens, "batch_tokens": batch_tokens}
        self.harmful, self.harmful_count = self._rows(harmful, size), len(harmful.ids)
        self.harmless, self.harmless_count = self._rows(harmless, size), len(harmless.ids)
        self.shares = [self._rows(share, size) for share in _shares(harmless)]
        self._bases: dict[int, list[jax.Array]] = {}  # unedited logits of each share
        self._first_sums: dict[tuple[int, int], float] = {}  # of KL over the first share

    def induce(self, cells: Cells) -> list[float]:
        """Mean refusal score on harmless prompts with the candidate added at its layer."""
        scores = dict.fromkeys(cells, 0.0)
        by_layer = {layer: [c for c in cells if c[1] == layer] for layer in {c[1] for c in cells}}
        with jax.set_mesh(self.mesh):
            for rows in self.harmless:
                streams, start = _embedded(self.model, rows), 0
                for layer in self.progress(range(max(by_layer) + 1), "select: induce"):
                    for chunk in self._chunks(by_layer.get(layer, []), rows):
                        vectors = self._stack(chunk)
                        at = (jnp.int32(layer), self.token_ids)
                        if start == layer:
                            sums = _induce(self.model, streams, rows, vectors, *at)
                        else:
                            from_ = jnp.int32(start)
                            sums = _induce_later(self.model, streams, rows, vectors, from_, *at)
                        _add(scores, chunk, sums)
                    # Keys of this layer that later ones read are computed again with each vector.
                    if self.model.arch.first_needed(layer + 1) > start:
                        streams = _next_layer(self.model, streams, rows, jnp.int32(start))
                        start += 1
        return [scores[c] / self.harmless_count for c in cells]

    def kl_at_least(self, cells: Cells) -> list[float]:
        """Lower bounds of `kl`, from the first share of the prompts alone."""
        self._sum_kl(0, [c for c in cells if c not in self._first_sums], self._first_sums)
        with jax.set_mesh(self.mesh):
            others = sum(
                float(_least_kl(*one))
                for share in range(1, len(self.shares))
                for one in zip(self.shares[share], self._base(share), strict=True)
            )
        sums = [self._first_sums[c] for c in cells]
        return [(total + others) / self.harmless_count - ROUNDING for total in sums]

    def kl(self, cells: Cells) -> list[float]:
        """Mean KL on harmless prompts from the model to the model with the candidate ablated."""
        self._sum_kl(0, [c for c in cells if c not in self._first_sums], self._first_sums)
        sums = {c: self._first_sums[c] for c in cells}
        for share in range(1, len(self.shares)):
            self._sum_kl(share, cells, sums)
        return [sums[c] / self.harmless_count for c in cells]

    def _sum_kl(self, share: int, cells: Cells, sums: dict[tuple[int, int], float]) -> None:
        """Adds the KL of one share's prompts."""
        if not cells:
            return
        rows, base = self.shares[share], self._base(share)

        def measure(i: int, rows: Rows, units: jax.Array) -> jax.Array:
            return _kl(self.model, rows, units, base[i])

        found = self._over_units(cells, rows, 1, measure, "select: KL")
        for cell, value in zip(cells, found, strict=True):
            sums[cell] = sums.get(cell, 0.0) + value

    def _base(self, share: int) -> list[jax.Array]:
        if share not in self._bases:
            with jax.set_mesh(self.mesh):
                self._bases[share] = [_base_logits(self.model, rows) for rows in self.shares[share]]
        return self._bases[share]

    def bypass(self, cells: Cells) -> list[float]:
        """Mean refusal score on harmful prompts with the candidate ablated."""

        def measure(i: int, rows: Rows, units: jax.Array) -> jax.Array:
            return _bypass(self.model, rows, units, self.token_ids)

        return self._over_units(cells, self.harmful, self.harmful_count, measure, "select: bypass")

    def _over_units(
        self,
        cells: Cells,
        batches: list[Rows],
        count: int,
        measure: Callable[[int, Rows, jax.Array], jax.Array],
        title: str,
    ) -> list[float]:
        scores = dict.fromkeys(cells, 0.0)
        work = [(i, chunk) for i, rows in enumerate(batches) for chunk in self._chunks(cells, rows)]
        with jax.set_mesh(self.mesh):
            for i, chunk in self.progress(work, title):
                vectors = self._stack(chunk)
                units = vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)
                _add(scores, chunk, measure(i, batches[i], units))
        return [scores[c] / count for c in cells]

    def _chunks(self, cells: Cells, rows: Rows) -> list[list[tuple[int, int]]]:
        """Cells in chunks of one size (of few sizes), the last filled up with its own last cell."""
        if not cells:
            return []
        most = max(1, self.batch_tokens * self.mesh.shape["data"] // rows.tokens.ids.size)
        size = min(most, bucket(-(-len(cells) // -(-len(cells) // most)), least=1))
        chunks = [list(cells[i : i + size]) for i in range(0, len(cells), size)]
        chunks[-1] += [chunks[-1][-1]] * (size - len(chunks[-1]))
        return chunks

    def _stack(self, cells: Cells) -> jax.Array:  # [C, D]
        return jnp.array(np.stack([self.directions[c] for c in cells]), jnp.float32)

    def _rows(self, prompts: Prompts, size: dict[str, int]) -> list[Rows]:
        mesh = self.mesh
        prefix = place(prefix_tokens(prompts, 1), mesh) if prompts.prefix else None
        return [
            Rows(
                tokens=place(batch.tokens, mesh),
                prefix=prefix,
                last=sharding.place(batch.slots[..., -1], mesh, "batch", None),
                valid=sharding.place(batch.valid, mesh, "batch", None),
            )
            for batch in pack(prompts, multiple=mesh.shape["data"], **size)
        ]


def _shares(prompts: Prompts) -> list[Prompts]:
    """An eighth of the prompts, and the rest; of fewer than eight prompts all."""
    ends = [0, len(prompts.ids) // 8, len(prompts.ids)]
    parts = [prompts.ids[a:b] for a, b in itertools.pairwise(ends)]
    return [dataclasses.replace(prompts, ids=ids) for ids in parts if ids]


def _add(scores: dict[tuple[int, int], float], chunk: Cells, sums: jax.Array) -> None:
    """Adds each cell's share once: a chunk may end in copies of its last cell."""
    for cell, value in dict(zip(chunk, np.asarray(sums).tolist(), strict=True)).items():
        scores[cell] += value
