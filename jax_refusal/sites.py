"""What a pass over the layers returns of their inside, as a value.

Letters: B batch row, T token, P slots of a row, N groups of slots, D width of what is captured, M
directions.

Sites are those of the residual stream (`edits.SITES`) and those inside a layer:

    z        [B, T, H, K]  what each head found, before the output projection
    pattern  [B, T, H, C]  how much each query attends to each slot of its context
    keys, values  [B, T, G, K]  as attention sees them: keys are normed and turned
    hidden   [B, T, F]     what the MLP's output projection reads; nothing of experts

A captured pattern makes attention compute it where a kernel would keep it to itself.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jax_refusal.edits import SITES

INSIDE = ("z", "pattern", "keys", "values", "hidden")


def at_slots(x: jax.Array, slots: jax.Array) -> jax.Array:
    """x [B, T, ...] at slots [B, P] -> [B, P, ...]."""
    return jnp.take_along_axis(x, slots.reshape(*slots.shape, *[1] * (x.ndim - 2)), 1)


def _kind(name: str) -> Any:
    """A field that tells classes of one structure apart. jaxlib compares structures by their static
    fields and not by the class: a jitted function would run, by chance, the program of another."""
    return dataclasses.field(default=name, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sum:
    """Sums by group, float32: [B, P, ...] -> [N, ...]. One row of `weights` says what one slot
    counts in each group; a mean is the sum by the number of slots."""

    weights: jax.Array  # [B, P, N]
    kind: str = _kind("sum")

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.where(self.weights.any(-1).reshape(*x.shape[:2], *[1] * (x.ndim - 2)), x, 0)
        return jnp.tensordot(self.weights, _wide(x), ((0, 1), (0, 1)), precision="highest")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outer:
    """Sums of outer products by group, float32: [B, P, ..., D] -> [N, ..., D, D]."""

    weights: jax.Array  # [B, P, N]
    kind: str = _kind("outer")

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.where(self.weights.any(-1).reshape(*x.shape[:2], *[1] * (x.ndim - 2)), x, 0)
        x = _wide(x)
        return jnp.einsum("bpn,bp...d,bp...e->n...de", self.weights, x, x, precision="highest")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Project:
    """Coordinates along directions, float32: [B, P, ..., D] -> [B, P, ..., M]."""

    directions: jax.Array  # [M, D]
    kind: str = _kind("project")

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.einsum("bp...d,md->bp...m", _wide(x), self.directions, precision="highest")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Capture:
    """Which sites, at which slots, reduced how: what arrived there, before its edit.

    It is reduced in the layer where it is found, so that no more than a layer's activations exist
    beside what is returned. Raises ValueError for an unknown site.
    """

    sites: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})
    slots: jax.Array | None = None  # [B, P] in the row; None is every token
    reduce: Sum | Outer | Project | None = None  # None: as they are

    def __post_init__(self) -> None:
        if unknown := [site for site in self.sites if site not in SITES + INSIDE]:
            raise ValueError(f"Unknown sites {unknown}; allowed are {[*SITES, *INSIDE]}.")

    def take(self, x: jax.Array) -> jax.Array:  # [B, T, ...]
        x = x if self.slots is None else at_slots(x, self.slots)
        return x if self.reduce is None else self.reduce(x)


NOTHING = Capture()


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)
