"""What a decoder remembers of the tokens before, and the batch that is run against it.

Letters: B batch row, T token, C context slot, L layers, G key/value heads, K head width, N prefix
tokens. Segments say which tokens may see each other: 0 is padding, SHARED is seen by every segment
of its row, any other number is one prompt. A token sees the slots of its own segment (and the
shared ones) whose position is not after its own; where in the row a token lies says nothing to
attention. Recurrent mixers know one state a row: to them tokens come in order, prompts one after
the other and behind what is shared, and a cache's row has one prompt.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_refusal.edits import INSTRUCTION, MARKED
from jax_refusal.models import spec
from jax_refusal.models.spec import Architecture
from jax_refusal.sharding import constrain

PADDING, SHARED = 0, -1

# What mixers remember, by name: the logical axes of one layer's array. Keys lie with their slots
# last: so a product with queries needs no transposed copy of them.
SLOTS = "slots"
AXES: dict[str, tuple[str, ...]] = {
    "k": ("batch", "kv_heads", "head_width", SLOTS),
    "v": ("batch", "kv_heads", SLOTS, "head_width"),
    "state": ("batch", "state_heads", "key_width", "value_width"),
    # What went into the convolutions at the last tokens.
    "q_tail": ("batch", "tail", "key_heads", "key_width"),
    "k_tail": ("batch", "tail", "key_heads", "key_width"),
    "v_tail": ("batch", "tail", "state_heads", "value_width"),
}
DTYPES = {"state": jnp.float32}  # of what is not kept in the model's
# One slot's arrays, stacked on its layers; those of one layer; none, of layers that read others'.
Entry = dict[str, jax.Array]


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
    """The mixers' memory of the tokens seen so far, with room for more."""

    # By slot of the model (see `spec.slots`): arrays stacked on its layers, or one entry a layer.
    entries: tuple[Entry | tuple[Entry, ...], ...]
    positions: jax.Array  # [B, C]
    segments: jax.Array  # [B, C], PADDING where nothing is stored
    length: jax.Array  # int32 scalar: the slot that the next token goes to

    def stack(self, slot: int) -> Entry:
        """What all layers of a slot remember, in a stacked cache."""
        entry = self.entries[slot]
        assert isinstance(entry, dict)
        return entry

    def repeat(self, times: int) -> "Cache":
        """Every row `times` times in succession."""
        return self._rows(lambda x, axis: jnp.repeat(x, times, axis))

    def take(self, rows: jax.Array) -> "Cache":
        """The rows at the given indices [B]."""
        return self._rows(lambda x, axis: jnp.take(x, rows, axis))

    def _rows(self, change: Callable[[jax.Array, int], jax.Array]) -> "Cache":
        """Of a stacked cache: change(array, axis of its rows)."""
        return dataclasses.replace(
            self,
            entries=jax.tree.map(lambda x: change(x, 1), self.entries),
            positions=change(self.positions, 0),
            segments=change(self.segments, 0),
        )

    def put(self, rows: jax.Array, other: "Cache") -> "Cache":
        """Rows of another, stacked cache at the given rows of this one (outside of it: nowhere),
        from the first slot on; what those rows remembered is gone, were it NaN."""

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            more = [(0, a - b) for a, b in zip(old.shape[1:], new.shape[1:], strict=True)]
            return old.at[rows].set(jnp.pad(new, [(0, 0), *more]), mode="drop")

        def entry(old: Entry | tuple[Entry, ...], new: Entry | tuple[Entry, ...]):
            if isinstance(old, tuple):
                return tuple(
                    jax.tree.map(put, *pair) for pair in zip(old, _apart(new), strict=True)
                )
            return jax.tree.map(jax.vmap(put), old, new)

        pairs = zip(self.entries, other.entries, strict=True)
        return dataclasses.replace(
            self,
            entries=tuple(entry(*pair) for pair in pairs),
            positions=put(self.positions, other.positions),
            segments=put(self.segments, other.segments),
        )

    def grow(self, slots: int) -> "Cache":
        """Room for `slots` more tokens, in a stacked cache."""

        def wider(x: jax.Array, axis: int) -> jax.Array:
            return jnp.pad(x, [(0, slots * (i == axis)) for i in range(x.ndim)])

        def entry(old: Entry | tuple[Entry, ...]) -> Entry:
            assert isinstance(old, dict)
            return {
                name: wider(x, 1 + AXES[name].index(SLOTS)) if SLOTS in AXES[name] else x
                for name, x in old.items()
            }

        return dataclasses.replace(
            self,
            entries=tuple(map(entry, self.entries)),
            positions=wider(self.positions, 1),
            segments=wider(self.segments, 1),
        )

    def placed(self) -> "Cache":
        """Pinned to where `sharding` puts it, inside jit: programs hand it on as they got it."""
        return self.each(constrain)

    def each(self, change: Callable[..., Any]) -> "Cache":
        """change(array, *its logical axes) of every array but the length."""

        def changed(entry: Entry, *stack: str) -> Entry:
            return {name: change(x, *stack, *AXES[name]) for name, x in entry.items()}

        return dataclasses.replace(
            self,
            entries=tuple(
                tuple(map(changed, entry)) if isinstance(entry, tuple) else changed(entry, "layers")
                for entry in self.entries
            ),
            positions=change(self.positions, "batch", None),
            segments=change(self.segments, "batch", None),
        )

    def unrolled(self) -> "Cache":
        """One entry a layer: an unrolled loop over layers then reads each without copying it."""
        return dataclasses.replace(self, entries=tuple(_apart(each) for each in self.entries))

    def note(self, tokens: Tokens) -> "Cache":
        """Records which tokens are about to be written at `length`."""
        at = (0, self.length)
        update = jax.lax.dynamic_update_slice
        return dataclasses.replace(
            self,
            positions=update(self.positions, tokens.positions, at),
            segments=update(self.segments, tokens.segments, at),
            length=self.length + tokens.ids.shape[1],
        )


def _apart(entry: Entry | tuple[Entry, ...]) -> tuple[Entry, ...]:
    """The entries of single layers out of a stack; none where nothing is remembered."""
    assert isinstance(entry, dict)
    layers = zip(*entry.values(), strict=True)
    return tuple(dict(zip(entry, layer, strict=True)) for layer in layers)


def put_back(old: Entry | tuple[Entry, ...], index: Any, new: Entry) -> Entry | tuple[Entry, ...]:
    """What a slot remembers, when one of its layers remembers something new: a stack is whole
    already, of single entries it is the one at `index`."""
    return (*old[:index], new, *old[index + 1 :]) if isinstance(old, tuple) else new


def empty(arch: Architecture, rows: int, slots: int, dtype: jnp.dtype) -> Cache:
    """Room for `slots` tokens in each of `rows` rows, and nothing remembered."""

    def entry(slot: spec.Slot) -> Entry:
        mixer = slot.spec.mixer
        sizes = {**mixer.sizes, "batch": rows, SLOTS: slots}
        shapes = {name: [sizes[axis] for axis in AXES[name]] for name in mixer.remembers}
        stack = len(slot.layers)
        return {
            name: jnp.zeros((stack, *shape), DTYPES.get(name, dtype))
            for name, shape in shapes.items()
        }

    return Cache(
        entries=tuple(map(entry, spec.slots(arch))),
        positions=jnp.zeros((rows, slots), jnp.int32),
        segments=jnp.full((rows, slots), PADDING, jnp.int32),
        length=jnp.int32(0),
    ).placed()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """One layer's place in a cache, and what the prefix holds for it."""

    entry: Entry  # {} where nothing is remembered
    index: jax.Array | int | None  # of the layer in a stacked entry; None: the entry is its own
    past: Entry  # of the prefix, {} without one
    start: jax.Array  # the slot that the first of the tokens goes to

    def extend(self, **new: jax.Array) -> tuple["Memory", Entry]:
        """Puts what mixers know of tokens behind that of the tokens before; returns all of it."""
        entry, whole = dict(self.entry), dict(new)
        for name in [name for name in new if name in entry]:  # in one order in every process
            at = [self.start if axis == SLOTS else 0 for axis in AXES[name]]
            if self.index is None:
                entry[name] = whole[name] = jax.lax.dynamic_update_slice(entry[name], new[name], at)
            else:  # into the stack and out again: jit does the first in place
                part = new[name][None]
                entry[name] = jax.lax.dynamic_update_slice(entry[name], part, (self.index, *at))
                whole[name] = entry[name][self.index]
        return dataclasses.replace(self, entry=entry), self._behind_past(whole)

    def read(self) -> Entry:
        """All of the context, as another layer remembered it."""
        return self._behind_past(self._own())

    def before(self) -> Entry:
        """What was remembered of the tokens before by name, {} where there were none: the cache's,
        or the prefix's where the cache is still empty."""
        own, past = self._own(), self.past
        if not own or not past:
            return own or past
        first = self.start == 0
        return {name: jnp.where(first, past[name], x) for name, x in own.items()}

    def replace(self, **new: jax.Array) -> "Memory":
        """Puts what is remembered now in place of what was, where anything is remembered."""
        if not self.entry:
            return self
        entry = {name: x.astype(self.entry[name].dtype) for name, x in new.items()}
        if self.index is not None:
            entry = {name: self.entry[name].at[self.index].set(x) for name, x in entry.items()}
        return dataclasses.replace(self, entry=entry)

    def _own(self) -> Entry:
        if self.index is None:
            return self.entry
        return {name: x[self.index] for name, x in self.entry.items()}

    def _behind_past(self, whole: Entry) -> Entry:
        joined = {
            name: jnp.concatenate([past, whole[name]], AXES[name].index(SLOTS))
            for name, past in self.past.items()
        }
        return whole | joined


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
