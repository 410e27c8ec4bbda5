"""The one decoder: a stack of blocks in one scan, whose residual stream takes edits.

Letters: B batch row, T token, C context slot, D residual width, L layers, H query heads, G
key/value heads, K head width, F MLP width, V vocabulary, P kept positions, Q unembedded positions,
N prefix tokens, R edit rows (1 or B).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_refusal.interventions import Edit
from jax_refusal.models import experts, layers
from jax_refusal.models.architecture import Architecture
from jax_refusal.models.cache import Cache, Tokens, lengths, visible, write
from jax_refusal.sharding import constrain


def axes(arch: Architecture) -> dict[str, tuple[str, ...]]:
    """Every leaf of the model by its path, with its logical axes: shape and sharding follow."""
    block = {
        "q": ("embed", "heads", "head_width"),
        "k": ("embed", "kv_heads", "head_width"),
        "v": ("embed", "kv_heads", "head_width"),
        "o": ("heads", "head_width", "embed"),
    }
    if arch.experts:
        block |= experts.axes(arch)
    else:
        block |= {"gate": ("embed", "mlp"), "up": ("embed", "mlp"), "down": ("mlp", "embed")}
    if arch.pre_norm:
        block |= {"attn_norm": ("embed",), "mlp_norm": ("embed",)}
    if arch.post_norm:
        block |= {"attn_post_norm": ("embed",), "mlp_post_norm": ("embed",)}
    if arch.qk_norm:
        whole = arch.qk_norm == "projection"
        block |= {
            "q_norm": ("heads", "head_width") if whole else ("head_width",),
            "k_norm": ("kv_heads", "head_width") if whole else ("head_width",),
        }
    if arch.qkv_bias:
        block |= {
            "q_bias": ("heads", "head_width"),
            "k_bias": ("kv_heads", "head_width"),
            "v_bias": ("kv_heads", "head_width"),
        }
    if arch.sinks:
        block |= {"sinks": ("heads",)}
    if arch.out_bias:
        block |= {"o_bias": ("embed",)}
    if arch.mlp_bias:
        block |= {"gate_bias": ("mlp",), "up_bias": ("mlp",), "down_bias": ("embed",)}
    top = {"embed": ("vocab", "embed"), "final_norm": ("embed",)}
    if not arch.tied_head:
        top["head"] = ("embed", "vocab")
    return top | {f"blocks.{name}": ("layers", *a) for name, a in block.items()}


def shape(arch: Architecture, logical: Sequence[str]) -> tuple[int, ...]:
    sizes = {
        "layers": arch.layers,
        "embed": arch.width,
        "heads": arch.heads,
        "kv_heads": arch.kv_heads,
        "head_width": arch.head_width,
        "mlp": arch.mlp_width,
        "experts": arch.experts,
        "vocab": arch.vocab,
    }
    return tuple(sizes[name] for name in logical)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What a pass over the blocks leaves behind."""

    x: jax.Array  # [B, T, D] the residual stream after the last layer, not yet normed
    kept: dict[str, jax.Array]  # site -> [L, B, P, D], what arrived there before its edit
    cache: Cache | None


class Block(nnx.Module):
    """One decoder block; in a model every leaf is stacked on L."""

    q: nnx.Param
    k: nnx.Param
    v: nnx.Param
    o: nnx.Param
    gate: nnx.Param  # one MLP, or experts behind a router
    up: nnx.Param
    down: nnx.Param
    router: nnx.Param
    expert_gate: nnx.Param
    expert_up: nnx.Param
    expert_down: nnx.Param
    attn_norm: nnx.Param  # norms and biases where the family has them
    mlp_norm: nnx.Param
    attn_post_norm: nnx.Param
    mlp_post_norm: nnx.Param
    q_norm: nnx.Param
    k_norm: nnx.Param
    q_bias: nnx.Param
    k_bias: nnx.Param
    v_bias: nnx.Param
    o_bias: nnx.Param
    gate_bias: nnx.Param
    up_bias: nnx.Param
    down_bias: nnx.Param
    router_bias: nnx.Param
    expert_gate_bias: nnx.Param
    expert_up_bias: nnx.Param
    expert_down_bias: nnx.Param
    sinks: nnx.Param

    def __init__(
        self, arch: Architecture, leaves: Mapping[str, jax.Array], outputs_first: bool = False
    ):
        self.arch = arch
        self.outputs_first = outputs_first  # in projections: see `layers.linear`
        for name, value in leaves.items():
            setattr(self, name, nnx.Param(value))

    def __call__(
        self,
        x: jax.Array,  # [B, T, D]
        at: Callable[[str, jax.Array], jax.Array],
        angles: tuple[jax.Array, jax.Array],
        attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    ) -> jax.Array:
        """The residual arithmetic, written once. `at(site, x)` reads and edits the stream."""
        pre, post = self.arch.pre_norm, self.arch.post_norm
        x = at("resid_pre", x)
        out = self.attention(self.normed(x, self.attn_norm) if pre else x, angles, attend)
        x = x + at("attn_out", self.normed(out, self.attn_post_norm) if post else out)
        out = self.mlp(self.normed(x, self.mlp_norm) if pre else x)
        return x + at("mlp_out", self.normed(out, self.mlp_post_norm) if post else out)

    def normed(self, x: jax.Array, scale: nnx.Param) -> jax.Array:
        return layers.rms_norm(x, scale[...], self.arch.norm_epsilon, self.arch.norm)

    def attention(
        self,
        x: jax.Array,  # [B, T, D]
        angles: tuple[jax.Array, jax.Array],
        attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    ) -> jax.Array:  # [B, T, D]
        with jax.named_scope("attention"):
            q, k, v = (self.linear(x, kernel) for kernel in (self.q, self.k, self.v))
            if self.arch.qkv_bias:
                q, k = q + self.q_bias[None, None], k + self.k_bias[None, None]
                v = v + self.v_bias[None, None]
            if self.arch.qk_norm:
                q, k = self.normed(q, self.q_norm), self.normed(k, self.k_norm)
            q = constrain(q, "batch", None, "heads", "head_width")
            k, v = layers.rotate(k, angles).transpose(0, 2, 3, 1), v.swapaxes(1, 2)
            mixed = attend(layers.rotate(q, angles), k, v)
            out = self.linear(mixed, self.o, inputs=2)
            return out + self.o_bias[None, None] if self.arch.out_bias else out

    def mlp(self, x: jax.Array) -> jax.Array:  # [B, T, D] -> [B, T, D]
        with jax.named_scope("mlp"):
            activation = layers.ACTIVATIONS[self.arch.activation]
            if self.arch.experts:
                count, add_up = self.arch.experts_per_token, self.arch.shares_add_up
                router_bias = biases = None
                if self.arch.expert_bias:
                    router_bias, down_bias = self.router_bias[...], self.expert_down_bias[...]
                    biases = (self.expert_gate_bias[...], self.expert_up_bias[...], down_bias)
                chosen = experts.route(x, self.router[...], count, add_up, router_bias)
                kernels = (self.expert_gate[...], self.expert_up[...], self.expert_down[...])
                limit = self.arch.swiglu_limit
                return experts.routed_mlp(x, *chosen, *kernels, activation, biases, limit)
            gate, up = self.linear(x, self.gate), self.linear(x, self.up)
            if self.arch.mlp_bias:
                gate, up = gate + self.gate_bias[None, None], up + self.up_bias[None, None]
            out = self.linear(activation(gate) * up, self.down)
            return out + self.down_bias[None, None] if self.arch.mlp_bias else out

    def linear(self, x: jax.Array, kernel: nnx.Param, inputs: int = 1) -> jax.Array:
        return layers.linear(x, kernel[...], inputs, self.outputs_first)


# The projections of a block, and how many of their axes are inputs.
PROJECTIONS = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}


class Transformer(nnx.Module):
    """A decoder-only chat model. A pytree: pass it to plain jax.jit, scan, vmap and grad."""

    def __init__(self, arch: Architecture, leaves: Mapping[str, Any]):
        """leaves: path -> array, exactly the paths of `axes(arch)`."""
        expected = axes(arch)
        if set(leaves) != set(expected):
            raise ValueError(f"Leaves differ: {sorted(set(leaves) ^ set(expected))}.")
        prefix = "blocks."
        block = {p.removeprefix(prefix): x for p, x in leaves.items() if p.startswith(prefix)}
        self.arch = arch
        self.embed = nnx.Param(leaves["embed"])
        self.final_norm = nnx.Param(leaves["final_norm"])
        self.head = None if arch.tied_head else nnx.Param(leaves["head"])
        self.blocks = Block(arch, block)

    @property
    def dtype(self) -> jnp.dtype:
        return self.embed[...].dtype

    def leaves(self) -> dict[str, jax.Array]:
        """Path -> array; `Transformer(arch, leaves)` builds the same model again."""
        names = axes(self.arch)
        return {
            path: getattr(self.blocks if "." in path else self, path.split(".")[-1])[...]
            for path in names
        }

    def unrolled(self) -> tuple[Block, ...]:
        """The L blocks one by one, outputs of projections first. A loop that runs them many times
        reads each layer's weights where they lie; a scan copies a layer out of the stack each time,
        which a CPU feels when a step has few rows."""
        leaves = {
            path.removeprefix("blocks."): leaf
            for path, leaf in self.leaves().items()
            if path.startswith("blocks.")
        }
        for name, inputs in PROJECTIONS.items():
            if name in leaves:
                axes = tuple(range(1, 1 + inputs))
                leaves[name] = jnp.moveaxis(leaves[name], axes, tuple(range(-inputs, 0)))
        return tuple(
            Block(self.arch, {name: leaf[i] for name, leaf in leaves.items()}, outputs_first=True)
            for i in range(self.arch.layers)
        )

    def __call__(self, tokens: Tokens, edit: Edit, **options: Any) -> Output:
        """Runs tokens through all layers; options as in `stream`."""
        return self.stream(self.embedded(tokens.ids), tokens, edit, **options)

    def embedded(self, ids: jax.Array) -> jax.Array:  # [B, T] -> [B, T, D]
        x = self.embed[...][ids]
        if self.arch.embed_scale != 1.0:
            # Rounded to the model's dtype before it multiplies, as Hugging Face does.
            x = x * jnp.asarray(self.arch.embed_scale, x.dtype)
        return constrain(x, "batch", None, "embed")

    def angles(
        self, positions: jax.Array, counted: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Cosines and sines of every rotary embedding in use, each [ropes, B, T, 1, W / 2]."""
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
        prefix: Cache | None = None,  # read only: N tokens in front of every row
        cache: Cache | None = None,  # read and written: the tokens before, and these
        span: tuple[jax.Array, jax.Array] | None = None,  # first layer to run, first not to run
        blocks: tuple[Block, ...] | None = None,  # from `unrolled`: no scan, and nothing is kept
    ) -> Output:
        """The blocks, from a residual stream to a residual stream.

        Every path goes through here: collection, packed scoring, prefill, decode, training.
        `span` starts at a saved stream or stops early; the layers outside it leave stream and cache
        as they are, and keep nothing.
        """
        if keep is not None and (span is not None or blocks is not None):
            raise ValueError("keep cannot be combined with span or blocks.")
        arch = self.arch
        by_length = any(rope.kind == "prompt_ntk" for rope in arch.ropes)
        angles = self.angles(tokens.positions, lengths(tokens) if by_length else None)
        context_positions, context_segments = tokens.positions, tokens.segments
        if cache is not None:
            start = cache.length
            cache = cache.note(tokens)
            context_positions, context_segments = cache.positions, cache.segments
        if prefix is not None:
            context_positions = jnp.concatenate([prefix.positions, context_positions], 1)
            context_segments = jnp.concatenate([prefix.segments, context_segments], 1)
        allowed, distance = visible(tokens, context_positions, context_segments)

        def layer(carry, scanned):
            x, k_cache, v_cache = carry
            index, block, window, rope, edit_layer, prefix_kv = scanned
            kept = {}

            def at(site, x):
                if keep is not None and site in sites:
                    kept[site] = jnp.take_along_axis(x, keep[..., None], 1)
                return constrain(edit.at_site(edit_layer, site, x), "batch", None, "embed")

            def attend(q, k, v):
                nonlocal k_cache, v_cache
                if cache is not None:
                    k_cache, k = write(k_cache, index, k, start, 3)
                    v_cache, v = write(v_cache, index, v, start, 2)
                if prefix_kv is not None:
                    k = jnp.concatenate([prefix_kv[0], k], 3)
                    v = jnp.concatenate([prefix_kv[1], v], 2)
                if growth is not None:
                    q = q * growth.astype(q.dtype)
                near = allowed if window is None else allowed & (distance < window)
                sinks = block.sinks[...] if arch.sinks else None
                return layers.dot_product_attention(
                    q, k, v, near, arch.score_scale, arch.score_cap, sinks
                )

            own = jax.tree.map(lambda a: a[0 if rope is None else rope], angles)
            x = block(x, at, own, attend)
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
            None if prefix is None else (prefix.k, prefix.v),
        )
        carry = (x, None, None) if cache is None else (x, cache.k, cache.v)
        body = layer if span is None else layer_in_span
        if blocks is None:
            scanned = (jnp.arange(arch.layers), self.blocks, *scanned)
            (x, k_cache, v_cache), kept = jax.lax.scan(body, carry, scanned)
        else:
            for index, block in enumerate(blocks):
                own = jax.tree.map(lambda a, i=index: a[i], scanned)
                carry, _ = body(carry, (index, block, *own))
            (x, k_cache, v_cache), kept = carry, {}
        if cache is not None:
            cache = dataclasses.replace(cache, k=k_cache, v=v_cache)
        return Output(x, kept, cache)

    def unembed(self, x: jax.Array) -> jax.Array:  # [B, Q, D] -> logits [B, Q, V], float32
        """Final norm and head, at the positions that were asked for."""
        with jax.named_scope("unembed"):
            arch = self.arch
            x = layers.rms_norm(x, self.final_norm[...], arch.norm_epsilon, arch.norm)
            if self.head is None:
                logits = layers.einsum("bqd,vd->bqv", x, self.embed[...])
            else:
                logits = layers.einsum("bqd,dv->bqv", x, self.head[...])
            logits = layers.soft_cap(logits.astype(jnp.float32), arch.logit_cap)
            return constrain(logits, "batch", None, "vocab")
