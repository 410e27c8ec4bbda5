"""How the layers of a model are run, apart from what a layer is.

Letters: B batch row, T token, Q token that is asked for, D residual width, L layers.

A driver goes through the layers in order: it hands `step` each layer's own data and the cache
entries, and gathers what is captured. It is a pytree, and may be an argument of jit. The layers of
a phase are scanned repeat by repeat, so that one body is compiled for all of them; or they are run
one by one.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jax_refusal.models.cache import Entry
from jax_refusal.models.context import Index, Weights
from jax_refusal.models.spec import Architecture, Phase, Slot, phases, slots


class LayerData(NamedTuple):
    """What layers of one shape differ in: of one layer, or stacked on all layers of a slot."""

    number: Index  # of the layer in the model
    weights: Weights
    fields: Mapping[str, jax.Array]  # `Slot.varying`
    edit: Any  # of `Edit.scanned`
    inputs: jax.Array | None  # [B, T, W] of the layer's own
    past: Entry  # of the prefix


Captured = dict[str, jax.Array]  # by site
Entries = Mapping[int, Entry | tuple[Entry, ...]]  # by slot; {} where nothing is remembered
# (slot, its layer's data, x, entries, which of the slot's layers, whether the last of the model)
# -> x, the slot's own entry, what was captured
Step = Callable[
    [Slot, LayerData, jax.Array, Entries, Index, bool],
    tuple[jax.Array, Entry | tuple[Entry, ...], Captured],
]
Result = tuple[jax.Array, Entries, dict[int, Captured]]  # captured by slot, stacked on its layers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scan:
    """Repeats of a phase's pattern as one compiled body.

    span: the first layer to run and the first not to run; the layers outside leave stream and cache
    as they are, and zeros as what they capture. So a span has to start at
    `arch.first_needed(layer)` for all that runs to find the keys that it reads. The last layer
    always runs where it is narrowed to the tokens that are asked for.
    """

    span: tuple[jax.Array, jax.Array] | None = None
    few_rows: ClassVar[bool] = False  # see `ops.linear`

    def __call__(
        self,
        arch: Architecture,
        step: Step,
        x: jax.Array,  # [B, T, D]
        entries: Entries,
        data: Mapping[int, LayerData],  # by slot
        narrow: bool,  # the last layer of all, by itself
    ) -> Result:
        every, captured = phases(arch), {}
        for phase in every:
            last = narrow and phase is every[-1]
            x, entries, found = self._phase(phase, step, x, entries, data, last)
            captured |= found
        return x, entries, captured

    def _phase(
        self,
        phase: Phase,
        step: Step,
        x: jax.Array,
        entries: Entries,
        data: Mapping[int, LayerData],
        narrow: bool,
    ) -> Result:
        own = {slot.number: entries[slot.number] for slot in phase.slots}
        stacks = tuple(data[slot.number] for slot in phase.slots)

        def repeat(carry, scanned, last=False):
            (x, own), (index, layers), captured = carry, scanned, []
            for slot, stack in zip(phase.slots, layers or stacks, strict=True):
                whole = not layers

                def fetch(stack=stack, whole=whole):
                    return jax.tree.map(lambda a: a[index], stack) if whole else stack

                ends = last and slot is phase.slots[-1]
                x, own, found = self._layer(step, slot, fetch, x, entries, own, index, ends)
                captured.append(found)
            return (x, own), tuple(captured)

        carry, captured = (x, own), []
        apart = int(narrow or phase.repeats == 1)  # repeats that are no part of the scan
        looped = jnp.arange(phase.repeats - apart)
        # Of some repeats, or of layers that may not run, weights are fetched as they are needed:
        # a slice of the stacks would be a copy.
        layers = None if apart or self.span is not None else stacks
        if len(looped):
            carry, found = jax.lax.scan(repeat, carry, (looped, layers))
            captured.append(found)
        if apart:
            carry, found = repeat(carry, (phase.repeats - 1, None), narrow)
            captured.append(jax.tree.map(lambda a: a[None], found))
        whole = jax.tree.map(lambda *parts: jnp.concatenate(parts), *captured)
        numbers = [slot.number for slot in phase.slots]
        x, own = carry
        return x, {**entries, **own}, dict(zip(numbers, whole, strict=True))

    def _layer(self, step, slot, fetch, x, entries, own, index, last):
        """One layer, where it lies in the span."""

        def run(x, own):
            x, entry, found = step(slot, fetch(), x, {**entries, **own}, index, last)
            return x, {**own, slot.number: entry}, found

        def skip(x, own):
            return x, own, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

        if self.span is None or last:
            return run(x, own)
        shapes = jax.eval_shape(run, x, own)[2]
        number = jnp.array(slot.layers)[index]
        return jax.lax.cond((self.span[0] <= number) & (number < self.span[1]), run, skip, x, own)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unrolled:
    """Layers one by one, for few rows. A loop that runs them many times reads each layer's weights
    where they lie; a scan copies a layer out of its stack each time, which a CPU feels when a step
    has few rows."""

    layers: tuple[Weights, ...]  # [L], from `Transformer.unrolled`
    few_rows: ClassVar[bool] = True

    def __call__(
        self,
        arch: Architecture,
        step: Step,
        x: jax.Array,
        entries: Entries,
        data: Mapping[int, LayerData],
        narrow: bool,
    ) -> Result:
        every = sorted((n, slot, i) for slot in slots(arch) for i, n in enumerate(slot.layers))
        captured: dict[int, list[Captured]] = {slot.number: [] for slot in slots(arch)}
        for number, slot, index in every:
            own = data[slot.number]._replace(weights={})
            own = jax.tree.map(lambda a, i=index: a[i], own)._replace(weights=self.layers[number])
            last = narrow and number == arch.layers - 1
            x, entry, found = step(slot, own, x, entries, index, last)
            entries = {**entries, slot.number: entry}
            captured[slot.number].append(found)
        stacked = {n: jax.tree.map(lambda *a: jnp.stack(a), *each) for n, each in captured.items()}
        return x, entries, stacked


Driver = Scan | Unrolled
SCAN = Scan()


def by_layer(
    arch: Architecture, captured: Mapping[int, Captured]
) -> dict[str, jax.Array | tuple[jax.Array, ...]]:
    """Site -> [L, ...] of all layers that have it, in order; a tuple of them where the shapes of
    layers differ."""
    found: dict[str, list[tuple[Slot, jax.Array]]] = {}
    for slot in slots(arch):
        for site, stack in captured[slot.number].items():
            found.setdefault(site, []).append((slot, stack))
    whole = {}
    for site, stacks in found.items():
        if len(stacks) == 1:
            whole[site] = stacks[0][1]
            continue
        layers = [n for slot, _ in stacks for n in slot.layers]
        order = sorted(range(len(layers)), key=layers.__getitem__)
        if len({stack.shape[1:] for _, stack in stacks}) == 1:
            whole[site] = jnp.concatenate([stack for _, stack in stacks])[jnp.array(order)]
        else:
            every = [one for _, stack in stacks for one in stack]
            whole[site] = tuple(every[i] for i in order)
    return whole
