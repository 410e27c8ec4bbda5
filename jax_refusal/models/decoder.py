"""The one decoder: phases of layers, whose residual stream takes edits.

Letters: B batch row, T token, Q token that is asked for, N prefix tokens, D residual width, L
layers, V vocabulary, R edit rows (1 or B).
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_refusal.edits import Edit
from jax_refusal.models import gated_input, ops
from jax_refusal.models.block import block
from jax_refusal.models.cache import Cache, Entry, Memory, Tokens, empty, put_back
from jax_refusal.models.context import Context, Index, Pass, Site, Weights
from jax_refusal.models.drivers import SCAN, Driver, Entries, LayerData, by_layer
from jax_refusal.models.leaves import leaves
from jax_refusal.models.spec import Architecture, Slot, place, slots
from jax_refusal.sharding import constrain, unstacked
from jax_refusal.sites import NOTHING, Capture, at_slots


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What a pass over the layers leaves behind."""

    x: jax.Array  # [B, T or Q, D] the residual stream after the last layer, not yet normed
    # site -> [L, B, P, ...], what arrived there before its edit; see `drivers.by_layer`
    captured: dict[str, Any]
    cache: Cache | None


class Leaves(nnx.Module):
    """Arrays by name: those of a slot's layers, stacked on them, or of the model beside them."""

    embed: nnx.Param

    def __init__(self, arrays: Mapping[str, Any]):
        for name, array in arrays.items():
            setattr(self, name, nnx.Param(array))


class Transformer(nnx.Module):
    """A decoder-only chat model. A pytree: pass it to plain jax.jit, scan, vmap and grad."""

    def __init__(self, arch: Architecture, arrays: Mapping[str, Any]):
        """arrays: path -> array, exactly the paths of `leaves(arch)`."""
        if set(arrays) != set(leaves(arch)):
            raise ValueError(f"Leaves differ: {sorted(set(arrays) ^ set(leaves(arch)))}.")
        groups: dict[str, dict[str, Any]] = {}
        for path, array in arrays.items():
            group, _, name = path.rpartition(".")
            groups.setdefault(group, {})[name] = array
        self.arch = arch
        self.top = Leaves(groups[""])
        self.blocks = nnx.List([Leaves(groups[slot.name]) for slot in slots(arch)])

    @property
    def embed(self) -> nnx.Param:
        return self.top.embed

    @property
    def dtype(self) -> jnp.dtype:
        return self.embed[...].dtype

    def leaves(self) -> dict[str, jax.Array]:
        """Path -> array; `Transformer(arch, leaves)` builds the same model again."""
        groups = {"": self.top} | {s.name: self.blocks[s.number] for s in slots(self.arch)}
        parts = {path: path.rpartition(".") for path in leaves(self.arch)}
        return {path: getattr(groups[group], name)[...] for path, (group, _, name) in parts.items()}

    def weights(self, group: str = "") -> Weights:
        """The leaves of one slot ("blocks.0"), or of the model beside its layers, by name."""
        found = (path.rpartition(".") for path in leaves(self.arch))
        own = self.top if not group else self.blocks[int(group.rpartition(".")[2])]
        return {name: getattr(own, name)[...] for at, _, name in found if at == group}

    def unrolled(self) -> tuple[Weights, ...]:
        """The weights of the L layers one by one: see `drivers.Unrolled`."""
        layers: dict[int, Weights] = {}
        for slot in slots(self.arch):
            parts = {name: unstacked(x) for name, x in self.weights(slot.name).items()}
            for i, layer in enumerate(slot.layers):
                layers[layer] = {name: part[i] for name, part in parts.items()}
        return tuple(layers[layer] for layer in range(self.arch.layers))

    def __call__(self, tokens: Tokens, edit: Edit, **options: Any) -> Output:
        """Runs tokens through all layers; options as in `stream`."""
        return self.stream(self.embedded(tokens.ids), tokens, edit, **options)

    def embedded(self, ids: jax.Array) -> jax.Array:  # [B, T] -> [B, T, D]
        x = self.embed[...][ids]
        if self.arch.embed_scale != 1.0:
            # Rounded to the model's dtype before it multiplies, as Hugging Face does.
            x = x * jnp.asarray(self.arch.embed_scale, x.dtype)
        return constrain(x, "batch", None, "embed")

    def stream(
        self,
        x: jax.Array,  # [B, T, D]
        tokens: Tokens,
        edit: Edit,
        *,
        capture: Capture = NOTHING,
        query_slots: jax.Array | None = None,  # [B, Q] whose stream is returned; None is all
        prefix: Cache | None = None,  # read only: N tokens in front of every row
        cache: Cache | None = None,  # read and written: the tokens before, and these
        drive: Driver = SCAN,
    ) -> Output:
        """The layers, from a residual stream to a residual stream.

        Every path goes through here: collection, packed scoring, prefill, decode, training. With
        `query_slots` the last layer has queries and branches for those tokens alone, unless what
        it writes is captured at others.
        """
        start = jnp.int32(0) if cache is None else cache.length
        cache = None if cache is None else cache.note(tokens)
        shared = Pass.of(self.arch, tokens, cache, prefix, drive.few_rows)
        narrow = query_slots is not None and set(capture.sites) <= {"resid_pre"}
        step = Step(
            shared=shared,
            edit=edit,
            capture=capture,
            prefix=prefix,
            start=start,
            asked=_every if query_slots is None else partial(at_slots, slots=query_slots),
        )
        data = self.layer_data(tokens, edit, prefix)
        memory = _entries(self.arch, cache, x)
        x, memory, captured = drive(self.arch, step, x, memory, data, narrow)
        if cache is not None:
            entries = tuple(memory[slot.number] for slot in slots(self.arch))
            cache = dataclasses.replace(cache, entries=entries)
        if query_slots is not None and not narrow:
            x = at_slots(x, query_slots)
        return Output(x, by_layer(self.arch, captured), cache)

    def layer_data(
        self, tokens: Tokens, edit: Edit, prefix: Cache | None = None
    ) -> dict[int, LayerData]:
        """What each layer has of its own, by slot."""
        arch, inputs = self.arch, None
        if arch.token_input is not None:
            x = self.embedded(tokens.ids)
            inputs = gated_input.inputs(self.weights(), arch, tokens.ids, x)
        edits, found = edit.scanned(arch.layers), {}
        for slot in slots(arch):
            first, *others = slot.layers
            step = others[0] - first if others else 1
            own = partial(_strided, at=slice(first, slot.layers[-1] + 1, step))
            found[slot.number] = LayerData(
                number=jnp.array(slot.layers),
                weights=self.weights(slot.name),
                fields={name: jnp.array(each) for name, each in slot.varying.items()},
                edit=jax.tree.map(own, edits),
                inputs=None if inputs is None else own(inputs),
                past={} if prefix is None else prefix.stack(slot.number),
            )
        return found

    def unembed(self, x: jax.Array) -> jax.Array:  # [B, Q, D] -> logits [B, Q, V], float32
        """Final norm and head, at the positions that were asked for."""
        with jax.named_scope("unembed"):
            arch, p = self.arch, self.weights()
            x = ops.rms_norm(x, p["final_norm"], arch.norm_epsilon, arch.norm)
            few = x.shape[0] * x.shape[1] <= 32  # of more, this is slower here
            logits = ops.linear(x, p.get("head", p["embed"]), few_rows=few)
            if arch.logit_divisor != 1.0:  # rounded to the model's dtype, as Hugging Face does
                logits = logits / arch.logit_divisor
            logits = ops.soft_cap(logits.astype(jnp.float32), arch.logit_cap)
            return constrain(logits, "batch", None, "vocab")


def _strided(x: jax.Array, at: slice) -> jax.Array:
    """Some of the layers of x [L, ...]."""
    return x if len(range(x.shape[0])[at]) == x.shape[0] else x[at]


def _entries(arch: Architecture, cache: Cache | None, x: jax.Array) -> Entries:
    """What layers remember, by slot. Without a cache only what later layers read is kept."""
    if cache is not None:
        return dict(enumerate(cache.entries))
    none: dict[int, Entry] = {slot.number: {} for slot in slots(arch)}
    sources = (spec.mixer.kv_source for spec in arch.specs)
    read = {source for source in sources if source is not None}
    if not read:
        return none
    room = empty(arch, x.shape[0], x.shape[1], x.dtype).entries
    return none | {n: room[n] for n in {place(arch, layer)[0] for layer in read}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """What drivers do with each layer: what it may see of pass and cache, then `block`."""

    shared: Pass
    edit: Edit
    capture: Capture
    prefix: Cache | None
    start: jax.Array  # the slot of the cache that the tokens begin at
    asked: Callable[[jax.Array], jax.Array]  # [B, T, ...] -> [B, Q, ...] in the last layer

    def __call__(
        self,
        slot: Slot,
        data: LayerData,
        x: jax.Array,  # [B, T, D]
        entries: Entries,
        index: Index,  # which of the slot's layers
        last: bool,
    ) -> tuple[jax.Array, Entry | tuple[Entry, ...], dict[str, jax.Array]]:
        pick, kinds = self.asked if last else _every, self.shared.tokens.kinds
        site = Site(edit=self.edit, layer=data.edit, capture=self.capture, kinds=kinds, last=pick)
        ctx = Context(shared=self.shared, fields=data.fields, inputs=data.inputs, last=pick)
        memory = self._memory(slot, data, entries, index)
        x, memory = block(data.weights, slot.spec, x, ctx, site, memory)
        own = entries[slot.number]
        if slot.spec.mixer.kv_source is None:  # else it is another layer's that was read
            own = put_back(own, index, memory.entry)
        return x, own, site.captured

    def _memory(self, slot: Slot, data: LayerData, entries: Entries, index: Index) -> Memory:
        """The layer's place in the cache, or that of the layer whose keys and values it reads."""
        number, at, past = slot.number, index, data.past
        if (source := slot.spec.mixer.kv_source) is not None:
            number, at = place(self.shared.arch, source)
            stack = {} if self.prefix is None else self.prefix.stack(number)
            past = {name: array[at] for name, array in stack.items()}
        entry = entries[number]
        if isinstance(entry, tuple):
            return Memory(entry=entry[at], index=None, past=past, start=self.start)
        return Memory(entry=entry, index=at, past=past, start=self.start)


def _every(x: jax.Array) -> jax.Array:
    return x
