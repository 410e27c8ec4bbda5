"""Activations inside the layers, of many prompts: packed, behind their shared prefix, reduced while
the model runs.

Letters: B batch row, T token, X prompts in a row, P tokens of a prompt that are captured, N groups
of them that are summed, L layers, D width of what is captured, M directions.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_refusal import sharding
from jax_refusal.config import BATCH_TOKENS, ROW_TOKENS
from jax_refusal.edits import Edit
from jax_refusal.models.cache import Cache, Tokens
from jax_refusal.models.decoder import Transformer
from jax_refusal.runtime.batching import Packed, Prompts, pack, place
from jax_refusal.runtime.prefix import shared_prefix
from jax_refusal.runtime.progress import Progress, silent
from jax_refusal.sharding import mesh_of, to_host
from jax_refusal.sites import Capture, Outer, Project, Sum

REDUCTIONS = ("none", "mean", "outer", "project")


@jax.jit
def _captured(
    model: Transformer, tokens: Tokens, edit: Edit, prefix: Cache | None, capture: Capture
) -> dict[str, Any]:
    none = jnp.zeros((tokens.ids.shape[0], 0), jnp.int32)  # the stream itself is asked for nowhere
    return model(tokens, edit, prefix=prefix, capture=capture, query_slots=none).captured


def capture(
    model: Transformer,
    prompts: Prompts,
    edit: Edit,  # one row
    sites: Sequence[str],
    *,
    every_token: bool = False,
    reduce: str = "none",
    directions: np.ndarray | None = None,  # [M, D] of what is captured, for "project"
    row_tokens: int = ROW_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress = silent,
    title: str = "capture",
) -> dict[str, Any]:
    """What arrives at each site at the last P tokens of every prompt (`prompts.positions`), or at
    every token that the prompts do not share.

    Site -> by what `reduce` says, of all layers that have the site:
    "none": of each prompt [P, L, ...] float32, stacked where all have as many tokens.
    "project": the same, [P, L, ..., M], on directions.
    "mean": over prompts [P, L, ...] float64; of every token over all of them, with P = 1.
    "outer": the same of outer products, [P, L, ..., D, D].
    Where layers differ in shape each is a list of such arrays, one for each layer, without L. A
    pattern's context is the prompt's own tokens, so it cannot be averaged.

    Sums are float32 within a batch and float64 across batches. Raises ValueError for what cannot
    be reduced so.
    """
    _check(sites, reduce, directions)
    mesh, sums, counts = mesh_of(model), {}, np.zeros(1)
    each: dict[str, list[Any]] = {site: [None] * len(prompts.ids) for site in sites}
    with jax.set_mesh(mesh):
        prefix = shared_prefix(model, prompts, edit)
        size = {"row_tokens": row_tokens, "batch_tokens": batch_tokens}
        for batch in progress(pack(prompts, multiple=mesh.shape["data"], **size), title):
            asked, counted = _asked(batch, tuple(sites), every_token, reduce, directions, mesh)
            tokens, wide = place(batch.tokens, mesh), prefix and prefix.repeat(len(batch.prompt))
            found = to_host(_captured(model, tokens, edit, wide, asked))
            counts = counts + counted
            for site, values in found.items():
                if reduce in ("mean", "outer"):
                    wider = jax.tree.map(np.float64, values)
                    old = sums.get(site)
                    sums[site] = wider if old is None else jax.tree.map(np.add, old, wider)
                else:
                    _hand_out(each[site], site, values, batch, prompts, every_token)
    if reduce in ("mean", "outer"):
        return {site: _means(total, counts) for site, total in sums.items()}
    return {site: _joined(each[site]) for site in sites if each[site][0] is not None}


def _check(sites: Sequence[str], reduce: str, directions: np.ndarray | None) -> None:
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce={reduce!r}; allowed are {list(REDUCTIONS)}.")
    if (directions is not None) != (reduce == "project"):
        raise ValueError(
            f"reduce={reduce!r} and directions {'are' if directions is not None else 'are not'} "
            "given: reduce='project' needs directions [M, D], and nothing else takes them."
        )
    if "pattern" in sites and reduce != "none":
        raise ValueError(
            "The attention pattern of a prompt lies over its own tokens, so that patterns of "
            "several prompts cannot be reduced. Take them with reduce='none'."
        )


def _asked(
    batch: Packed,
    sites: tuple[str, ...],
    every_token: bool,
    reduce: str,
    directions: np.ndarray | None,
    mesh: jax.sharding.Mesh,
) -> tuple[Capture, Any]:
    """What the batch is asked for, and how many tokens are in each group [N]."""
    B, X, P = batch.slots.shape
    if every_token:
        slots, weights = None, (np.asarray(batch.tokens.segments) > 0)[..., None]  # [B, T, 1]
    else:
        slots = sharding.place(batch.slots.reshape(B, X * P), mesh, "batch", None)
        weights = np.einsum("bx,pn->bxpn", batch.valid, np.eye(P)).reshape(B, X * P, P)
    counted = weights.sum((0, 1), dtype=np.float64)
    if reduce == "project":
        return Capture(
            sites=sites, slots=slots, reduce=Project(jnp.asarray(directions, jnp.float32))
        ), counted
    if reduce == "none":
        return Capture(sites=sites, slots=slots), counted
    placed = sharding.place(weights.astype(np.float32), mesh, "batch", None, None)
    reduction = Sum(placed) if reduce == "mean" else Outer(placed)
    return Capture(sites=sites, slots=slots, reduce=reduction), counted


def _means(total: Any, counts: np.ndarray) -> Any:
    """Sums [L, N, ...] by their tokens -> [N, L, ...]; of layers apart a list of [N, ...]."""

    def mean(x: np.ndarray, axis: int) -> np.ndarray:
        return x / counts.reshape([-1 if i == axis else 1 for i in range(x.ndim)])

    if isinstance(total, tuple):
        return [mean(layer, 0) for layer in total]
    return mean(total, 1).swapaxes(0, 1)


def _places(batch: Packed) -> Iterator[tuple[int, int, int]]:
    """Row, place in it and number of every prompt."""
    for row, x in zip(*np.nonzero(batch.valid), strict=True):
        yield int(row), int(x), int(batch.prompt[row, x])


def _hand_out(
    found: list[Any],  # by prompt
    site: str,
    values: Any,  # [L, B, P of all prompts of a row, ...]; of layers apart a tuple without L
    batch: Packed,
    prompts: Prompts,
    every_token: bool,
) -> None:
    """Puts each prompt's own, [P, L, ...], into `found`."""
    apart = isinstance(values, tuple)
    layers = [x[None] for x in values] if apart else [values]
    P, segments = batch.slots.shape[2], np.asarray(batch.tokens.segments)
    for row, x, number in _places(batch):
        tokens = np.flatnonzero(segments[row] == x + 1)
        mine = tokens if every_token else np.arange(x * P, (x + 1) * P)
        own = [layer[:, row, mine].swapaxes(0, 1).astype(np.float32) for layer in layers]
        if site == "pattern":
            context = [*range(prompts.prefix), *(prompts.prefix + tokens)]
            own = [layer[..., context] for layer in own]
        found[number] = [layer[:, 0] for layer in own] if apart else own[0]


def _joined(each: list[Any]) -> Any:
    """Prompts of one shape stacked; where layers stand apart, for each of them."""
    if isinstance(each[0], list):
        return [_joined(list(layer)) for layer in zip(*each, strict=True)]
    same = len({x.shape for x in each}) == 1
    return np.stack(each) if same else each
