"""Activations inside the layers, of many prompts: packed, behind their shared prefix, reduced while
the model runs.

Letters: B batch row, T token, X prompts in a row, P slots of a prompt, N prompts, L layers, M
directions.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_refusal import sharding
from jax_refusal.capture import Capture, Outer, Project, Sum
from jax_refusal.config import BATCH_TOKENS, ROW_TOKENS
from jax_refusal.edits import Edit
from jax_refusal.models.cache import Cache, Tokens
from jax_refusal.models.decoder import Transformer
from jax_refusal.runtime.batching import Packed, Prompts, pack, place
from jax_refusal.runtime.collect import Progress, mesh_of, shared_prefix, silent

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
    reduce: str = "none",
    directions: np.ndarray | None = None,  # [M, D] of what is captured, for "project"
    row_tokens: int = ROW_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress = silent,
    title: str = "capture",
) -> dict[str, Any]:
    """What arrives at each site at the last P tokens of every prompt (`prompts.positions`).

    Site -> array, of all layers that have the site: "none" [N, P, L, ...] float32, "mean" over the
    prompts [P, L, ...] float64, "outer" the mean of outer products [P, L, ..., D, D] float64,
    "project" on directions [N, P, L, ..., M]. Where layers differ in shape a list of such arrays,
    one for each layer, without L. A pattern's context is the prompt's own tokens, so each prompt
    has an array of its own, [P, L, H, tokens], and it cannot be averaged.

    Sums are float32 within a batch and float64 across batches.
    """
    _check(sites, reduce, directions)
    mesh, sums, each = mesh_of(model), {}, {}
    with jax.set_mesh(mesh):
        prefix = shared_prefix(model, prompts, edit)
        size = {"row_tokens": row_tokens, "batch_tokens": batch_tokens}
        batches = pack(prompts, multiple=mesh.shape["data"], **size)
        for batch in progress(batches, title):
            asked = _asked(batch, tuple(sites), reduce, directions, mesh)
            tokens, wide = place(batch.tokens, mesh), prefix and prefix.repeat(len(batch.prompt))
            found = _captured(model, tokens, edit, wide, asked)
            for site, values in jax.tree.map(np.asarray, found).items():
                if reduce in ("mean", "outer"):
                    sums[site] = jax.tree.map(
                        lambda total, new: total + new.astype(np.float64),
                        sums.get(site, jax.tree.map(np.zeros_like, values)),
                        values,
                    )
                else:
                    _take(each.setdefault(site, {}), site, values, batch, prompts)
    means = {site: _mean(total, len(prompts.ids)) for site, total in sums.items()}
    return means | {site: _in_order(found, site) for site, found in each.items()}


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
            "several prompts have no mean. Take them with reduce='none'."
        )


def _asked(
    batch: Packed,
    sites: tuple[str, ...],
    reduce: str,
    directions: np.ndarray | None,
    mesh: jax.sharding.Mesh,
) -> Capture:
    B, X, P = batch.slots.shape
    slots = sharding.place(batch.slots.reshape(B, X * P), mesh, "batch", None)
    if reduce == "project":
        reduction = Project(jnp.asarray(directions, jnp.float32))
    elif reduce == "none":
        reduction = None
    else:
        weights = np.einsum("bx,pn->bxpn", batch.valid, np.eye(P)).reshape(B, X * P, P)
        weights = sharding.place(weights.astype(np.float32), mesh, "batch", None, None)
        reduction = Sum(weights) if reduce == "mean" else Outer(weights)
    return Capture(sites=sites, slots=slots, reduce=reduction)


def _mean(total: Any, count: int) -> Any:
    """[L, P, ...] -> [P, L, ...]; where layers stand apart a list of [P, ...]."""
    if isinstance(total, tuple):
        return [layer / count for layer in total]
    return (total / count).swapaxes(0, 1)


def _take(found: dict[int, Any], site: str, values: Any, batch: Packed, prompts: Prompts) -> None:
    """Puts [L, B, X P, ...] into `found` by prompt, [P, L, ...]."""
    apart = isinstance(values, tuple)
    stack = [np.asarray(x)[None] for x in values] if apart else [values]
    P = batch.slots.shape[2]
    for row, x in zip(*np.nonzero(batch.valid), strict=True):
        number, mine = int(batch.prompt[row, x]), slice(x * P, (x + 1) * P)
        own = [part[:, row, mine].swapaxes(0, 1).astype(np.float32) for part in stack]
        if site == "pattern":
            length = len(prompts.ids[number]) - prompts.prefix
            end = prompts.prefix + int(batch.slots[row, x, -1]) + 1
            context = [*range(prompts.prefix), *range(end - length, end)]
            own = [part[..., context] for part in own]
        found[number] = [part[:, 0] for part in own] if apart else own[0]


def _in_order(found: dict[int, Any], site: str) -> Any:
    every = [found[number] for number in range(len(found))]
    if site == "pattern":
        return every
    if isinstance(every[0], list):
        return [np.stack(layer) for layer in zip(*every, strict=True)]
    return np.stack(every)
