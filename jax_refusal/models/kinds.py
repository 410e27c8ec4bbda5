"""Layers of several shapes in one scan (Gemma 4): local and global ones, shared keys and values.

Letters: B batch row, T token, Q token that is asked for, C context slot, D residual width, H query
heads, G key/value heads, K head width, F MLP width, L layers.

Layers with a sliding window (local) and without (global) have heads of other widths and numbers.
The last layers may attend to the keys and values of an earlier layer of their kind, and then have
no weights for their own and, in some models, a wider MLP. So weights that are not of one shape lie
in stacks of their own, whose first axis counts the layers that have them, and nothing is padded.
Which stack a layer reads and where in it is data by layer, and a conditional inside the one scan.
The cache is one stack: a head of a global layer lies in it as several heads of local width.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_refusal.models import layers
from jax_refusal.models.architecture import Architecture
from jax_refusal.sharding import unstacked

Index = int | jax.Array  # of a layer: static in an unrolled loop, data in a scan
Angles = tuple[jax.Array, jax.Array]

KINDS = ("local", "global")
SOME_LAYERS = (  # axes that count some of the layers
    "own_layers",
    "sharing_layers",
    "local_layers",
    "global_layers",
    "own_local_layers",
    "own_global_layers",
)


def axes(arch: Architecture) -> dict[str, tuple[str, ...]]:
    """The leaves that not every layer has in one shape, by path; with their logical axes."""
    found: dict[str, tuple[str, ...]] = {}
    for kind, heads, width in (
        ("local", "kv_heads", "head_width"),
        ("global", "global_kv_heads", "global_head_width"),
    ):
        every, own = f"{kind}_layers", f"own_{kind}_layers"
        found |= {
            f"{kind}.q": (every, "heads", width, "embed"),
            f"{kind}.k": (own, heads, width, "embed"),
            f"{kind}.v": (own, heads, width, "embed"),
            f"{kind}.o": (every, "embed", "heads", width),
            f"{kind}.q_norm": (every, width),
            f"{kind}.k_norm": (own, width),
        }
    if arch.keys_are_values:
        del found["global.v"]
    if arch.wide_mlp:
        for part, width in (("own", "mlp"), ("sharing", "wide_mlp")):
            found |= {
                f"{part}.gate": (f"{part}_layers", width, "embed"),
                f"{part}.up": (f"{part}_layers", width, "embed"),
                f"{part}.down": (f"{part}_layers", "embed", width),
            }
    return found


def members(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Axis of layers -> the layers that it counts, in order."""
    every = tuple(range(arch.layers))
    if not arch.global_head_width:
        return {"layers": every}
    own = every[: arch.cache_layers]
    local = tuple(layer for layer in every if arch.windows[layer])
    return {
        "layers": every,
        "own_layers": own,
        "sharing_layers": every[len(own) :],
        "local_layers": local,
        "global_layers": tuple(layer for layer in every if layer not in local),
        "own_local_layers": tuple(layer for layer in own if layer in local),
        "own_global_layers": tuple(layer for layer in own if layer not in local),
    }


def sizes(arch: Architecture) -> dict[str, int]:
    """The lengths of the logical axes that are here and nowhere else."""
    return {axis: len(found) for axis, found in members(arch).items()} | {
        "global_kv_heads": arch.global_kv_heads,
        "global_head_width": arch.global_head_width,
        "wide_mlp": arch.wide_mlp,
    }


class Stacks(nnx.Module):
    """The weights by "kind_name": stacked on their layers, or those that one layer has."""

    def __init__(self, leaves: Mapping[str, Any], layer: int | None = None):
        self.layer = layer
        for path, value in leaves.items():
            setattr(self, path.replace(".", "_"), nnx.Param(value))

    def get(self, path: str) -> jax.Array:
        return getattr(self, path.replace(".", "_"))[...]


def by_layers(arch: Architecture, stacks: Stacks) -> list[Stacks]:
    """The weights that each of the L layers has, out of the stacks."""
    found: list[dict[str, jax.Array]] = [{} for _ in range(arch.layers)]
    counted = members(arch)
    for path, (axis, *_) in axes(arch).items():
        for layer, part in zip(counted[axis], unstacked(stacks.get(path)), strict=True):
            found[layer][path] = part
    return [Stacks(leaves, layer) for layer, leaves in enumerate(found)]


def by_layer(values: tuple[int, ...], index: Index) -> Index:
    """The value of one layer, [L] -> []; static where the layer is."""
    return values[index] if isinstance(index, int) else jnp.array(values, jnp.int32)[index]


def choose(which: Index, branches: list[Callable], *operands: Any) -> Any:
    if isinstance(which, int):
        return branches[which](*operands)
    return jax.lax.switch(which, branches, *operands)


def _weights(
    arch: Architecture, stacks: Stacks, index: Index, group: str
) -> Callable[[str], jax.Array]:
    """The weights of layer `index`, by name, out of one group of stacks."""
    counted = members(arch)
    if stacks.layer is not None:
        return lambda name: stacks.get(f"{group}.{name}")
    own = counted[f"{group}_layers"]
    # The layers with keys of their own come first in every stack: one place serves all of them.
    place = by_layer(tuple(own.index(i) if i in own else 0 for i in counted["layers"]), index)
    return lambda name: jax.lax.dynamic_index_in_dim(
        stacks.get(f"{group}.{name}"), place, keepdims=False
    )


def _linear(stacks: Stacks) -> Callable[..., jax.Array]:
    """Single layers are run on few rows, as those of `Transformer.unrolled` are."""
    return partial(layers.linear, few_rows=stacks.layer is not None)


def attention(
    arch: Architecture,
    stacks: Stacks,
    index: Index,
    angles: tuple[Angles, Angles],  # local, global
    remember: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    look: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    pick: Callable[[jax.Array], jax.Array],
    x: jax.Array,  # [B, T, D], normed
) -> jax.Array:  # [B, Q, D]
    """remember: puts keys and values of the tokens into the cache, returns those of the context;
    look: what queries [B, Q, H, K] find in keys [B, G, K, C] and values [B, G, C, K]; pick: the
    tokens that have queries."""
    linear = _linear(stacks)

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        return layers.rms_norm(x, scale, arch.norm_epsilon, arch.norm)

    def project(kind: int) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
        def run(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            weight = _weights(arch, stacks, index, KINDS[kind])
            k = v = linear(x, weight("k"))
            if not (kind and arch.keys_are_values):
                v = linear(x, weight("v"))
            k = layers.rotate(norm(k, weight("k_norm")), angles[kind])
            v = norm(v, jnp.ones(v.shape[-1], v.dtype))
            return _packed(arch, k).transpose(0, 2, 3, 1), _packed(arch, v).swapaxes(1, 2)

        return run

    def nothing(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        B, T, _ = x.shape
        k = jnp.zeros((B, arch.cache_heads, arch.head_width, T), x.dtype)
        return k, k.swapaxes(2, 3)

    def answer(kind: int) -> Callable[..., jax.Array]:
        def run(x: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            weight = _weights(arch, stacks, index, KINDS[kind])
            q = norm(linear(x, weight("q")), weight("q_norm"))
            heads = (arch.kv_heads, arch.global_kv_heads)[kind]
            turned = layers.rotate(q, jax.tree.map(pick, angles[kind]))
            found = look(turned, *_unpacked(k, v, heads, q.shape[-1]))
            return linear(found, weight("o"), inputs=2)

        return run

    with jax.named_scope("attention"):
        kinds = tuple(int(not window) for window in arch.windows)
        projections: list[Callable] = [project(0), project(1)]
        which = kinds
        if arch.kv_of_layer:
            projections.append(nothing)
            own = arch.cache_layers
            which = (*kinds[:own], *[2] * (arch.layers - own))
        k, v = choose(by_layer(which, index), projections, x)
        k, v = remember(k, v)
        return choose(by_layer(kinds, index), [answer(0), answer(1)], pick(x), k, v)


def _packed(arch: Architecture, x: jax.Array) -> jax.Array:
    """[B, T, G, K] of either kind -> [B, T, heads of the cache, head width of local layers]."""
    x = x.reshape(*x.shape[:2], -1, arch.head_width)
    return jnp.pad(x, [(0, 0), (0, 0), (0, arch.cache_heads - x.shape[2]), (0, 0)])


def _unpacked(
    k: jax.Array, v: jax.Array, heads: int, width: int
) -> tuple[jax.Array, jax.Array]:  # [B, G, K, C], [B, G, C, K]
    """The keys and values of a kind as its layers see them: the way back of `_packed`."""
    B, _, part, C = k.shape
    parts = width // part
    k = k[:, : heads * parts].reshape(B, heads, width, C)
    v = v[:, : heads * parts].reshape(B, heads, parts, C, part)
    return k, v.swapaxes(2, 3).reshape(B, heads, C, width)


def mlp(
    arch: Architecture,
    stacks: Stacks,
    index: Index,
    x: jax.Array,  # [B, T, D], normed
) -> jax.Array:  # [B, T, D]
    """The MLP of a model whose layers with shared keys have a wider one."""
    linear = _linear(stacks)

    def run(group: str) -> Callable[[jax.Array], jax.Array]:
        def one(x: jax.Array) -> jax.Array:
            weight = _weights(arch, stacks, index, group)
            gate, up = linear(x, weight("gate")), linear(x, weight("up"))
            return linear(layers.ACTIVATIONS[arch.activation](gate) * up, weight("down"))

        return one

    with jax.named_scope("mlp"):
        sharing = tuple(int(i >= arch.cache_layers) for i in range(arch.layers))
        return choose(by_layer(sharing, index), [run("own"), run("sharing")], x)
