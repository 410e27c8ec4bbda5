"""The one decoder: a stack of blocks in one scan, whose residual stream takes edits.

Letters: B batch row, T token, C context slot, D residual width, L layers, H query heads, G
key/value heads, K head width, F MLP width, V vocabulary, P kept positions, Q tokens asked for,
N prefix tokens, R edit rows (1 or B).
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_refusal.edits import Edit
from jax_refusal.models import declaration, gemma4, kinds, layers
from jax_refusal.models.architecture import Architecture
from jax_refusal.models.block import Block
from jax_refusal.models.cache import Cache, Tokens, empty, lengths, visible, write
from jax_refusal.sharding import constrain, unstacked


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What a pass over the blocks leaves behind."""

    # [B, T, D] the residual stream after the last layer, not yet normed; [B, Q, D] where asked
    x: jax.Array
    kept: dict[str, jax.Array]  # site -> [L, B, P, D], what arrived there before its edit
    cache: Cache | None


def at_slots(x: jax.Array, slots: jax.Array) -> jax.Array:
    """x [B, T, ...] at slots [B, Q] -> [B, Q, ...]."""
    return jnp.take_along_axis(x, slots.reshape(*slots.shape, *[1] * (x.ndim - 2)), 1)


class Transformer(nnx.Module):
    """A decoder-only chat model. A pytree: pass it to plain jax.jit, scan, vmap and grad."""

    stacks: kinds.Stacks  # where layers are of several shapes
    per_layer_embed: nnx.Param  # where layers have inputs of their own
    per_layer_context: nnx.Param
    per_layer_norm: nnx.Param

    def __init__(self, arch: Architecture, leaves: Mapping[str, Any]):
        """leaves: path -> array, exactly the paths of `declaration.axes(arch)`."""
        expected = declaration.axes(arch)
        if set(leaves) != set(expected):
            raise ValueError(f"Leaves differ: {sorted(set(leaves) ^ set(expected))}.")
        prefix = "blocks."
        block = {p.removeprefix(prefix): x for p, x in leaves.items() if p.startswith(prefix)}
        self.arch = arch
        self.embed = nnx.Param(leaves["embed"])
        self.final_norm = nnx.Param(leaves["final_norm"])
        self.head = None if arch.tied_head else nnx.Param(leaves["head"])
        self.blocks = Block(arch, block)
        if arch.global_head_width:
            self.stacks = kinds.Stacks({path: leaves[path] for path in kinds.axes(arch)})
        for name in gemma4.top_axes(arch):
            setattr(self, name, nnx.Param(leaves[name]))

    @property
    def dtype(self) -> jnp.dtype:
        return self.embed[...].dtype

    def leaves(self) -> dict[str, jax.Array]:
        """Path -> array; `Transformer(arch, leaves)` builds the same model again."""
        found = {}
        for path in declaration.axes(self.arch):
            group, _, name = path.rpartition(".")
            if group in ("", "blocks"):
                found[path] = getattr(self.blocks if group else self, name)[...]
            else:
                found[path] = self.stacks.get(path)
        return found

    def unrolled(self) -> tuple[Block, ...]:
        """The L blocks one by one, for few rows. A loop that runs them many times reads each
        layer's weights where they lie; a scan copies a layer out of the stack each time, which a
        CPU feels when a step has few rows."""
        parts = {
            path.removeprefix("blocks."): unstacked(leaf)
            for path, leaf in self.leaves().items()
            if path.startswith("blocks.")
        }
        blocks = tuple(
            Block(self.arch, {name: part[i] for name, part in parts.items()}, few_rows=True)
            for i in range(self.arch.layers)
        )
        if self.arch.global_head_width:
            for block, own in zip(blocks, kinds.by_layers(self.arch, self.stacks), strict=True):
                block.stacks = own
        return blocks

    def __call__(self, tokens: Tokens, edit: Edit, **options: Any) -> Output:
        """Runs tokens through all layers; options as in `stream`."""
        return self.stream(self.embedded(tokens.ids), tokens, edit, **options)

    def embedded(self, ids: jax.Array) -> jax.Array:  # [B, T] -> [B, T, D]
        x = self.embed[...][ids]
        if self.arch.embed_scale != 1.0:
            # Rounded to the model's dtype before it multiplies, as Hugging Face does.
            x = x * jnp.asarray(self.arch.embed_scale, x.dtype)
        return constrain(x, "batch", None, "embed")

    def angles(self, positions: jax.Array, counted: jax.Array | None = None) -> Any:
        """Cosines and sines of every rotary embedding in use, each [ropes, B, T, 1, W / 2]; or one
        by one [B, T, 1, W / 2], local and global, where they are of different widths."""
        if self.arch.global_head_width:
            widths = (self.arch.head_width, self.arch.global_head_width)
            pairs = zip(self.arch.ropes, widths, strict=True)
            return tuple(layers.rope_angles(positions, rope, width) for rope, width in pairs)
        width = self.arch.rotary_width or self.arch.head_width
        each = [layers.rope_angles(positions, rope, width, counted) for rope in self.arch.ropes]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *each)

    def stream(
        self,
        x: jax.Array,  # [B, T, D]
        tokens: Tokens,
        edit: Edit,
        *,
        keep: jax.Array | None = None,  # [B, P] slots in the row whose activations are returned
        sites: tuple[str, ...] = ("resid_pre",),
        asked: jax.Array | None = None,  # [B, Q] slots whose stream is returned; None is all
        prefix: Cache | None = None,  # read only: N tokens in front of every row
        cache: Cache | None = None,  # read and written: the tokens before, and these
        # First layer to run, first not to run; with `asked` the latter is L.
        span: tuple[jax.Array, jax.Array] | None = None,
        blocks: tuple[Block, ...] | None = None,  # from `unrolled`: no scan, and nothing is kept
    ) -> Output:
        """The blocks, from a residual stream to a residual stream.

        Every path goes through here: collection, packed scoring, prefill, decode, training.
        `span` starts at a saved stream or stops early; the layers outside it leave stream and cache
        as they are, and keep nothing; so it has to start at `arch.first_needed(layer)` for all
        that runs to find the keys that it reads. With `asked` the last layer always runs, and has
        queries and an MLP for those tokens alone.
        """
        if keep is not None and (span is not None or blocks is not None):
            raise ValueError("keep cannot be combined with span or blocks.")
        if asked is not None and (blocks is not None or set(sites) != {"resid_pre"}):
            raise ValueError("asked cannot be combined with blocks or with sites inside a layer.")
        arch = self.arch
        by_length = any(rope.kind == "prompt_ntk" for rope in arch.ropes)
        angles = self.angles(tokens.positions, lengths(tokens) if by_length else None)
        context_positions, context_segments = tokens.positions, tokens.segments
        memory, start = cache, jnp.int32(0)
        if cache is not None:
            start = cache.length
            cache = memory = cache.note(tokens)
            context_positions, context_segments = cache.positions, cache.segments
        if prefix is not None:
            context_positions = jnp.concatenate([prefix.positions, context_positions], 1)
            context_segments = jnp.concatenate([prefix.segments, context_segments], 1)
        allowed, distance = visible(tokens, context_positions, context_segments)
        if memory is None and arch.kv_of_layer:  # later layers read what earlier ones remember
            memory = empty(arch, x.shape[0], x.shape[1], x.dtype)

        def layer(carry, scanned, pick=lambda x: x):
            x, k_cache, v_cache = carry
            index, block, window, rope, edit_layer, prefix_kv, own_input = scanned
            source, shared, kept = index, False, {}
            if arch.kv_of_layer:
                source = kinds.by_layer(arch.kv_of_layer, index)
                shared = source != index
                prefix_kv = None if prefix is None else (prefix.k[source], prefix.v[source])

            def at(site, x):
                if keep is not None and site in sites:
                    kept[site] = at_slots(x, keep)
                kinds = tokens.kinds
                if kinds is not None and site != "resid_pre":
                    kinds = pick(kinds)
                return constrain(edit.at_site(edit_layer, site, x, kinds), "batch", None, "embed")

            def remember(k, v):
                nonlocal k_cache, v_cache
                if memory is not None:
                    k_cache, k = write(k_cache, source, k, start, 3, shared)
                    v_cache, v = write(v_cache, source, v, start, 2, shared)
                if prefix_kv is not None:
                    k = jnp.concatenate([prefix_kv[0], k], 3)
                    v = jnp.concatenate([prefix_kv[1], v], 2)
                return k, v

            def look(q, k, v):
                if growth is not None:
                    q = q * pick(growth).astype(q.dtype)
                near = allowed if window is None else allowed & (distance < window)
                sinks = block.sinks[...] if arch.sinks else None
                return layers.dot_product_attention(
                    q, k, v, pick(near), arch.score_scale, arch.score_cap, sinks
                )

            if arch.global_head_width:
                where = (arch, self.stacks if blocks is None else block.stacks, index)
                attention = partial(kinds.attention, *where, angles, remember, look, pick)
            else:
                own = jax.tree.map(lambda a: a[0 if rope is None else rope], angles)
                attend = lambda q, k, v: look(q, *remember(k, v))  # noqa: E731
                attention = partial(block.attention, angles=own, attend=attend, pick=pick)
            mlp = partial(kinds.mlp, *where) if arch.wide_mlp else block.mlp
            x = block(x, at, attention, mlp, own_input, pick)
            return (x, k_cache, v_cache), kept

        def layer_in_span(carry, scanned):
            assert span is not None
            inside = (span[0] <= scanned[0]) & (scanned[0] < span[1])
            return jax.lax.cond(inside, layer, lambda carry, _: (carry, {}), carry, scanned)

        growth = None
        if arch.query_growth:
            growth = layers.query_growth(tokens.positions, arch.query_growth, arch.query_period)
        if arch.query_log:
            growth = layers.query_log(tokens.positions, arch.query_log)
        windows = ropes = None
        if arch.windows:
            longest = jnp.iinfo(jnp.int32).max
            windows = jnp.array([w or longest for w in arch.windows], jnp.int32)
        if arch.rope_of_layer:
            ropes = jnp.array(arch.rope_of_layer, jnp.int32)
        scanned = (
            windows,
            ropes,
            edit.scanned(arch.layers),
            None if prefix is None or arch.kv_of_layer else (prefix.k, prefix.v),
            gemma4.per_layer_inputs(self, tokens.ids) if arch.per_layer_width else None,
        )
        carry = (x, None, None) if memory is None else (x, memory.k, memory.v)
        body = layer if span is None else layer_in_span
        if blocks is not None:
            for index, block in enumerate(blocks):
                own = jax.tree.map(lambda a, i=index: a[i], scanned)
                carry, _ = body(carry, (index, block, *own))
            kept = {}
        elif asked is None:
            carry, kept = jax.lax.scan(
                body, carry, (jnp.arange(arch.layers), self.blocks, *scanned)
            )
        else:
            whole, last = (self.blocks, *scanned), arch.layers - 1

            def numbered(index):  # a slice of all layers but one would be a copy of the weights
                return index, *jax.tree.map(lambda a: a[index], whole)

            def step(carry, index):
                return body(carry, numbered(index))

            carry, kept = jax.lax.scan(step, carry, jnp.arange(last))
            carry, of_last = layer(carry, numbered(last), partial(at_slots, slots=asked))
            kept = {site: jnp.concatenate([kept[site], of_last[site][None]]) for site in kept}
        x, k_cache, v_cache = carry
        if cache is not None:
            cache = dataclasses.replace(cache, k=k_cache, v=v_cache)
        return Output(x, kept, cache)

    def unembed(self, x: jax.Array) -> jax.Array:  # [B, Q, D] -> logits [B, Q, V], float32
        """Final norm and head, at the positions that were asked for."""
        with jax.named_scope("unembed"):
            arch = self.arch
            x = layers.rms_norm(x, self.final_norm[...], arch.norm_epsilon, arch.norm)
            kernel = (self.embed if self.head is None else self.head)[...]
            few = x.shape[0] * x.shape[1] <= 32  # of more, this is slower here
            logits = layers.linear(x, kernel, few_rows=few)
            logits = layers.soft_cap(logits.astype(jnp.float32), arch.logit_cap)
            return constrain(logits, "batch", None, "vocab")
