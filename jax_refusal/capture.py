"""What a pass over the layers returns of their inside, as a value.

Letters: B batch row, T token, P slots per row, D residual width, M directions.
"""

import dataclasses

import jax
import jax.numpy as jnp


def at_slots(x: jax.Array, slots: jax.Array) -> jax.Array:
    """x [B, T, ...] at slots [B, P] -> [B, P, ...]."""
    return jnp.take_along_axis(x, slots.reshape(*slots.shape, *[1] * (x.ndim - 2)), 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Capture:
    """Which sites, at which tokens; what arrived there, before its edit."""

    sites: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})
    slots: jax.Array | None = None  # [B, P] in the row; None is every token

    def take(self, x: jax.Array) -> jax.Array:  # [B, T, ...] -> [B, P, ...]
        return x if self.slots is None else at_slots(x, self.slots)


NOTHING = Capture()
