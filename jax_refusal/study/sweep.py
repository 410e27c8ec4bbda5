"""The three scores of many candidates, in chunks that fit one forward (see `passes`).

Letters: C candidates in a chunk, V vocabulary, P post-instruction tokens, L layers, D residual
width.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_refusal import sharding
from jax_refusal.config import BATCH_TOKENS, ROW_TOKENS
from jax_refusal.models.decoder import Transformer
from jax_refusal.runtime.batching import Prompts, bucket, pack, place, prefix_tokens
from jax_refusal.runtime.progress import Progress, silent
from jax_refusal.sharding import mesh_of, to_host
from jax_refusal.study import passes
from jax_refusal.study.passes import Rows
from jax_refusal.study.scores import check_token_ids

Candidates = Sequence[tuple[int, int]]  # (position index 0..P-1, layer)
ROUNDING = 1e-4  # nats, by which a bound stays below what rounding could make of a mean


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

    def induce(self, candidates: Candidates) -> list[float]:
        """Mean refusal score on harmless prompts with the candidate added at its layer."""
        scores = dict.fromkeys(candidates, 0.0)
        by_layer = {
            layer: [c for c in candidates if c[1] == layer] for layer in {c[1] for c in candidates}
        }
        with jax.set_mesh(self.mesh):
            for rows in self.harmless:
                streams, start = passes.embedded(self.model, rows), 0
                for layer in self.progress(range(max(by_layer) + 1), "select: induce"):
                    for chunk in self._chunks(by_layer.get(layer, []), rows):
                        vectors = self._stack(chunk)
                        at = (jnp.int32(layer), self.token_ids)
                        if start == layer:
                            sums = passes.induce(self.model, streams, rows, vectors, *at)
                        else:
                            from_ = jnp.int32(start)
                            sums = passes.induce_later(
                                self.model, streams, rows, vectors, from_, *at
                            )
                        _add(scores, chunk, sums)
                    # Keys of this layer that later ones read are computed again with each vector.
                    if self.model.arch.first_needed(layer + 1) > start:
                        streams = passes.next_layer(self.model, streams, rows, jnp.int32(start))
                        start += 1
        return [scores[c] / self.harmless_count for c in candidates]

    def kl_at_least(self, candidates: Candidates) -> list[float]:
        """Lower bounds of `kl`, from the first share of the prompts alone."""
        self._sum_kl(0, [c for c in candidates if c not in self._first_sums], self._first_sums)
        with jax.set_mesh(self.mesh):
            others = sum(
                float(passes.least_kl(*one))
                for share in range(1, len(self.shares))
                for one in zip(self.shares[share], self._base(share), strict=True)
            )
        sums = [self._first_sums[c] for c in candidates]
        return [(total + others) / self.harmless_count - ROUNDING for total in sums]

    def kl(self, candidates: Candidates) -> list[float]:
        """Mean KL on harmless prompts from the model to the model with the candidate ablated."""
        self._sum_kl(0, [c for c in candidates if c not in self._first_sums], self._first_sums)
        sums = {c: self._first_sums[c] for c in candidates}
        for share in range(1, len(self.shares)):
            self._sum_kl(share, candidates, sums)
        return [sums[c] / self.harmless_count for c in candidates]

    def _sum_kl(
        self, share: int, candidates: Candidates, sums: dict[tuple[int, int], float]
    ) -> None:
        """Adds the KL of one share's prompts."""
        if not candidates:
            return
        rows, base = self.shares[share], self._base(share)

        def measure(i: int, rows: Rows, units: jax.Array) -> jax.Array:
            return passes.kl(self.model, rows, units, base[i])

        found = self._over_units(candidates, rows, 1, measure, "select: KL")
        for candidate, value in zip(candidates, found, strict=True):
            sums[candidate] = sums.get(candidate, 0.0) + value

    def _base(self, share: int) -> list[jax.Array]:
        if share not in self._bases:
            with jax.set_mesh(self.mesh):
                self._bases[share] = [
                    passes.base_logits(self.model, rows) for rows in self.shares[share]
                ]
        return self._bases[share]

    def bypass(self, candidates: Candidates) -> list[float]:
        """Mean refusal score on harmful prompts with the candidate ablated."""

        def measure(i: int, rows: Rows, units: jax.Array) -> jax.Array:
            return passes.bypass(self.model, rows, units, self.token_ids)

        return self._over_units(
            candidates, self.harmful, self.harmful_count, measure, "select: bypass"
        )

    def _over_units(
        self,
        candidates: Candidates,
        batches: list[Rows],
        count: int,
        measure: Callable[[int, Rows, jax.Array], jax.Array],
        title: str,
    ) -> list[float]:
        scores = dict.fromkeys(candidates, 0.0)
        work = [
            (i, chunk) for i, rows in enumerate(batches) for chunk in self._chunks(candidates, rows)
        ]
        with jax.set_mesh(self.mesh):
            for i, chunk in self.progress(work, title):
                vectors = self._stack(chunk)
                units = vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)
                _add(scores, chunk, measure(i, batches[i], units))
        return [scores[c] / count for c in candidates]

    def _chunks(self, candidates: Candidates, rows: Rows) -> list[list[tuple[int, int]]]:
        """Chunks of one size (of few sizes), the last filled up with its own last candidate."""
        if not candidates:
            return []
        most = max(1, self.batch_tokens * self.mesh.shape["data"] // rows.tokens.ids.size)
        size = min(most, bucket(-(-len(candidates) // -(-len(candidates) // most)), least=1))
        chunks = [list(candidates[i : i + size]) for i in range(0, len(candidates), size)]
        chunks[-1] += [chunks[-1][-1]] * (size - len(chunks[-1]))
        return chunks

    def _stack(self, candidates: Candidates) -> jax.Array:  # [C, D]
        return jnp.array(np.stack([self.directions[c] for c in candidates]), jnp.float32)

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


def _add(scores: dict[tuple[int, int], float], chunk: Candidates, sums: jax.Array) -> None:
    """Adds each candidate's share once: a chunk may end in copies of its last candidate."""
    for candidate, value in dict(zip(chunk, to_host(sums).tolist(), strict=True)).items():
        scores[candidate] += value
