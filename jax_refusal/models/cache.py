"""Key/value memory of a decoder, and the batch that is run against it.

Letters: B batch row, T token, C context slot, L layers, G key/value heads, K head width, N prefix
tokens. Segments say which tokens may see each other: 0 is padding, SHARED is seen by every segment
of its row, any other number is one prompt. A token sees the slots of its own segment (and the
shared ones) whose position is not after its own; where in the row a token lies says nothing.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_refusal.edits import INSTRUCTION, MARKED
from jax_refusal.models.architecture import Architecture
from jax_refusal.sharding import constrain

PADDING, SHARED = 0, -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """Rows of tokens; one row may hold one prompt or several packed ones."""

    ids: jax.Array  # [B, T] int32
    positions: jax.Array  # [B, T] int32, position of the token in its own prompt
    segments: jax.Array  # [B, T] int32
    # [B, T] int32, how long the prompt of each token is, where a family asks (see `lengths`): given
    # in decoding, where the prompt is in the cache; None counts what this pass holds.
    lengths: jax.Array | None = None
    # [B, T] int32, what each token is (`edits.INSTRUCTION` and so on), where an edit asks.
    kinds: jax.Array | None = None

    @classmethod
    def padded(
        cls,
        ids: jax.Array,
        mask: jax.Array | np.ndarray | None = None,  # [B, T] true at real tokens; None is all
        marked: jax.Array | np.ndarray | None = None,  # [B, T] true at the tokens of kind MARKED
    ) -> "Tokens":
        """One prompt a row, padded anywhere."""
        mask = jnp.ones(ids.shape, bool) if mask is None else jnp.asarray(mask).astype(bool)
        positions, kinds = jnp.maximum(jnp.cumsum(mask, -1) - 1, 0), None
        if marked is not None:
            kinds = jnp.where(jnp.asarray(marked).astype(bool), MARKED, INSTRUCTION)
        return cls(ids=ids, positions=positions, segments=mask.astype(jnp.int32), kinds=kinds)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """Keys and values of the tokens seen so far, with room for more.

    Keys lie with their slots last: so a product with queries needs no transposed copy of them.
    """

    k: jax.Array | tuple[jax.Array, ...]  # [L, B, G, K, C], or L times [B, G, K, C]
    v: jax.Array | tuple[jax.Array, ...]  # [L, B, G, C, K], or L times [B, G, C, K]
    # L are the layers with keys of their own; where heads are of two widths, see `kinds`.
    positions: jax.Array  # [B, C]
    segments: jax.Array  # [B, C], PADDING where nothing is stored
    length: jax.Array  # int32 scalar: the slot that the next token goes to

    def repeat(self, times: int) -> "Cache":
        """Every row `times` times in succession."""
        return dataclasses.replace(
            self,
            k=jnp.repeat(jnp.asarray(self.k), times, 1),
            v=jnp.repeat(jnp.asarray(self.v), times, 1),
            positions=jnp.repeat(self.positions, times, 0),
            segments=jnp.repeat(self.segments, times, 0),
        )

    def take(self, rows: jax.Array) -> "Cache":
        """The rows at the given indices [B]."""
        return dataclasses.replace(
            self,
            k=jnp.asarray(self.k)[:, rows],
            v=jnp.asarray(self.v)[:, rows],
            positions=self.positions[rows],
            segments=self.segments[rows],
        )

    def put(self, rows: jax.Array, other: "Cache") -> "Cache":
        """Rows of another cache [G] at the given places [G] of this one (outside of it: nowhere),
        from the first slot on; what those rows remembered is gone, were it NaN."""
        more = self.positions.shape[1] - other.positions.shape[1]

        def layer(old: jax.Array, new: jax.Array, axis: int) -> jax.Array:
            wide = jnp.pad(new, [(0, more * (i == axis)) for i in range(new.ndim)])
            return old.at[rows].set(wide, mode="drop")

        def every(old: Any, new: Any, axis: int) -> Any:
            if isinstance(old, tuple):
                return tuple(layer(*pair, axis) for pair in zip(old, new, strict=True))
            return jax.vmap(partial(layer, axis=axis))(old, new)

        return dataclasses.replace(
            self,
            k=every(self.k, other.k, 3),
            v=every(self.v, other.v, 2),
            positions=layer(self.positions, other.positions, 1),
            segments=layer(self.segments, other.segments, 1),
        )

    def grow(self, slots: int) -> "Cache":
        """Room for `slots` more tokens."""
        old, none, more = [(0, 0)] * 3, (0, 0), (0, slots)
        return dataclasses.replace(
            self,
            k=jnp.pad(jnp.asarray(self.k), [*old, none, more]),
            v=jnp.pad(jnp.asarray(self.v), [*old, more, none]),
            positions=jnp.pad(self.positions, [(0, 0), (0, slots)]),
            segments=jnp.pad(self.segments, [(0, 0), (0, slots)]),
        )

    def placed(self) -> "Cache":
        """Pinned to where `sharding` puts it, inside jit: programs hand it on as they got it."""

        def pinned(x: Any, *axes: str | None) -> Any:
            if isinstance(x, tuple):
                return tuple(constrain(layer, *axes) for layer in x)
            return constrain(x, "layers", *axes)

        heads = ("batch", "kv_heads")
        return dataclasses.replace(
            self,
            k=pinned(self.k, *heads, "head_width", None),
            v=pinned(self.v, *heads, None, "head_width"),
            positions=constrain(self.positions, "batch", None),
            segments=constrain(self.segments, "batch", None),
        )

    def unrolled(self) -> "Cache":
        """One array a layer: an unrolled loop over layers then reads each without copying it."""
        return dataclasses.replace(self, k=tuple(self.k), v=tuple(self.v))

    def note(self, tokens: Tokens) -> "Cache":
        """Records whose keys and values are about to be written at `length`."""
        at = (0, self.length)
        update = jax.lax.dynamic_update_slice
        return dataclasses.replace(
            self,
            positions=update(self.positions, tokens.positions, at),
            segments=update(self.segments, tokens.segments, at),
            length=self.length + tokens.ids.shape[1],
        )


def empty(arch: Architecture, rows: int, slots: int, dtype: jnp.dtype) -> Cache:
    shape = (arch.cache_layers, rows, arch.cache_heads)
    return Cache(
        k=jnp.zeros((*shape, arch.head_width, slots), dtype),
        v=jnp.zeros((*shape, slots, arch.head_width), dtype),
        positions=jnp.zeros((rows, slots), jnp.int32),
        segments=jnp.full((rows, slots), PADDING, jnp.int32),
        length=jnp.int32(0),
    ).placed()


def write(
    store: jax.Array | tuple[jax.Array, ...],  # Cache.k or Cache.v
    layer: jax.Array | int,
    new: jax.Array,  # [B, G, K, T] or [B, G, T, K]
    slot: jax.Array,
    axis: int,  # of a layer's slots: 3 of keys, 2 of values
    keep: jax.Array | bool = False,  # what lies there stays: static where the layer is
) -> tuple[jax.Array | tuple[jax.Array, ...], jax.Array]:
    """Puts tokens into one layer's slots, in place where jit can; also returns that layer."""
    start = [slot if i == axis else 0 for i in range(4)]
    if isinstance(store, tuple):
        assert isinstance(layer, int)
        if keep:
            return store, store[layer]
        own = jax.lax.dynamic_update_slice(store[layer], new, start)
        return (*store[:layer], own, *store[layer + 1 :]), own
    if keep is not False:
        old = jax.lax.dynamic_slice(store, (layer, *start), (1, *new.shape))[0]
        new = jnp.where(keep, old, new)
    store = jax.lax.dynamic_update_slice(store, new[None], (layer, *start))
    return store, store[layer]


def lengths(tokens: Tokens) -> jax.Array:  # [B, T] int32
    """How long the prompt of each token is: as given, or up to its last one in this pass."""
    if tokens.lengths is not None:
        return tokens.lengths
    same = tokens.segments[:, :, None] == tokens.segments[:, None, :]
    return jnp.where(same, tokens.positions[:, None, :], -1).max(-1) + 1


def visible(
    tokens: Tokens,
    positions: jax.Array,  # [B, C]
    segments: jax.Array,  # [B, C]
) -> tuple[jax.Array, jax.Array]:  # allowed [B, T, C] bool, distance [B, T, C] tokens
    """Which context slots each token may attend to, and how far back they lie."""
    distance = tokens.positions[:, :, None] - positions[:, None, :]
    same = tokens.segments[:, :, None] == segments[:, None, :]
    allowed = (same | (segments == SHARED)[:, None, :]) & (segments != PADDING)[:, None, :]
    return allowed & (distance >= 0), distance
