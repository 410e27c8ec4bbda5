"""Edits of the residual stream written into the weights (Arditi et al. 2024, section 4.1, app. E).

Letters: L layers, D residual width, V vocabulary, E experts.

Ablating a direction at every write is a projection of the matrices that write: W <- W - W u u^T,
for the embedding, the attention and MLP outputs, and their biases. Every leaf of the model with an
axis of the residual stream is looked at before anything is changed: it is edited, or known to write
nothing, or named in an error. Weights are edited in float32 and cast back to their dtype.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jax_refusal import sharding
from jax_refusal.edits import unit_vector
from jax_refusal.models import convert, declaration, lora
from jax_refusal.models.families import Architecture
from jax_refusal.models.layers import PRECISION
from jax_refusal.models.transformer import Transformer
from jax_refusal.study.directions import check_width

STREAM = "embed"  # the residual stream among logical axes
# Leaves that write to the residual stream.
WRITERS = frozenset(
    {
        "embed",
        "blocks.o",
        "blocks.o_bias",
        "blocks.down",
        "blocks.down_bias",
        "blocks.expert_down",  # of every expert
        "blocks.expert_down_bias",
        *("local.o", "global.o", "own.down", "sharing.down"),  # of layers of several shapes
        "blocks.per_layer_out",
    }
)
# Leaves that read it: projections, and gains of norms in front of a block or of the head.
READERS = frozenset(
    {
        *(f"blocks.{name}" for name in ("q", "k", "v", "gate", "up", "router")),
        *("blocks.expert_gate", "blocks.expert_up", "blocks.per_layer_gate"),
        *(f"{kind}.{name}" for kind in ("local", "global") for name in ("q", "k", "v")),
        *(f"{part}.{name}" for part in ("own", "sharing") for name in ("gate", "up")),
        *("head", "per_layer_context"),
        "blocks.attn_norm",
        "blocks.mlp_norm",
        "blocks.expert_norm",
        "blocks.router_scale",
        "final_norm",
    }
)
# Gains of norms between a write and the stream, where a projection of the weights is not exact.
POST_NORMS = frozenset(
    {
        "blocks.attn_post_norm",
        "blocks.mlp_post_norm",
        "blocks.expert_post_norm",
        "blocks.dense_post_norm",
        "blocks.per_layer_post_norm",
    }
)
# Families whose Hugging Face config has `mlp_bias`, so that a bias baked in can be stored.
MLP_BIAS_FAMILIES = frozenset({"llama"})


class WeightEditError(ValueError):
    """An edit that the weights of this architecture cannot hold exactly; the message says why."""


def writers(arch: Architecture) -> list[str]:
    """The leaves that write to the residual stream.

    Raises WeightEditError naming every leaf of which that is not known.
    """
    touching = [path for path, logical in declaration.axes(arch).items() if STREAM in logical]
    unknown = sorted(set(touching) - WRITERS - READERS - POST_NORMS)
    if unknown:
        raise WeightEditError(
            f"{unknown} of this {arch.family} model have an axis of the residual stream; it is not "
            "known whether they write to it: nothing was edited. Add them to the tables of "
            "study/orthogonalize.py."
        )
    return [path for path in touching if path in WRITERS]


def orthogonalize(
    model: Transformer,
    direction: jax.Array | np.ndarray,  # [D], any length
    *,
    approximate: bool = False,
) -> Transformer:
    """A model that cannot write along `direction`: its logits are those of `ablate` at all sites.

    A tied head is untied first, since only the embedding writes. approximate: go on where a norm
    stands between a write and the stream, which the result then equals only nearly; inputs that
    layers make of the embedding (Gemma 4) change with it then too. Raises WeightEditError, and
    DirectionError for another width.
    """
    arch = model.arch
    edited = writers(arch)
    _check_exact(arch, approximate)
    unit = unit_vector(check_width(np.asarray(direction), arch.width, "The direction"))
    leaves = model.leaves()
    if arch.tied_head:
        arch = dataclasses.replace(arch, tied_head=False)
        leaves["head"] = leaves["embed"]
    for path in edited:
        leaves[path] = _project(leaves[path], unit, _stream_axis(arch, path))
    return _rebuilt(model, arch, leaves, {*edited, "head"})


def bake_addition(
    model: Transformer,
    direction: jax.Array | np.ndarray,  # [D], in activation units
    layer: int,
    coefficient: float = 1.0,
    *,
    approximate: bool = False,
) -> Transformer:
    """A model with `coefficient * direction` added to the input of block `layer`, at every token.

    It becomes a bias of the MLP output of the block before: the attention's would be seen by that
    MLP. Of experts whose shares add up to 1 it becomes a bias of each. So layer 0 has no room, nor
    has an architecture without MLP biases. Raises as `orthogonalize`.
    """
    arch = model.arch
    if not 1 <= layer < arch.layers:
        raise WeightEditError(
            f"layer={layer}: an addition becomes a bias of the block before, so it can be at "
            f"layers 1 to {arch.layers - 1}."
        )
    of_experts = arch.expert_bias and arch.shares_add_up
    if not (of_experts or arch.mlp_bias or arch.family in MLP_BIAS_FAMILIES):
        raise WeightEditError(
            f"A {arch.family} model has no bias at its MLP output, so no addition can be part of "
            "its weights. Add it while it runs (jax_refusal.add), or as a GGUF control vector."
        )
    _check_exact(arch, approximate)
    vector = np.asarray(check_width(np.asarray(direction), arch.width, "The direction"), np.float32)
    unit_vector(vector)  # finite, and not zero
    leaves = model.leaves()
    new = set()
    if not (of_experts or arch.mlp_bias):
        arch = dataclasses.replace(arch, mlp_bias=True)
        new = set(declaration.axes(arch)) - set(leaves)
        for path in new:
            shape = declaration.shape(arch, declaration.axes(arch)[path])
            leaves[path] = jnp.zeros(shape, model.dtype)
    path = "blocks.expert_down_bias" if of_experts else "blocks.down_bias"
    bias = leaves[path]
    rows = bias[layer - 1].astype(jnp.float32)  # [D], or [E, D]
    rows += coefficient * vector.reshape((1,) * (rows.ndim - 1) + vector.shape)
    leaves[path] = bias.at[layer - 1].set(rows.astype(bias.dtype))
    return _rebuilt(model, arch, leaves, {*new, path})


def rank_one(model: Transformer, direction: jax.Array | np.ndarray) -> lora.Adapter:
    """The part of `orthogonalize` that a LoRA of rank 1 holds: W - u u^T W, A = u^T W and B = -u.

    It covers the matrices by which attention and MLP write. The embedding and output biases are
    not part of it: the merged model is `ablate` at the sites attn_out and mlp_out, but for biases.
    """
    arch = model.arch
    edited = writers(arch)
    _check_exact(arch, approximate=False)
    if arch.experts:
        raise WeightEditError(
            f"A LoRA adapter has no place for the experts of this {arch.family} model: write the "
            "whole model (--to=hf) instead."
        )
    unit = unit_vector(check_width(np.asarray(direction), arch.width, "The direction"))
    a, b, leaves = {}, {}, model.leaves()
    for name, path, layout, _ in convert.rows(arch):
        if path not in edited or not path.startswith("blocks.") or len(layout) != 2:
            continue
        target = name.split(".")[-2]
        along = _along(leaves[path], unit, _stream_axis(arch, path))  # [L, ...]
        a[target] = along.reshape(arch.layers, 1, -1)
        b[target] = jnp.broadcast_to(-unit[None, :, None], (arch.layers, arch.width, 1))
    return lora.Adapter(a, b, 1.0)


def _check_exact(arch: Architecture, approximate: bool) -> None:
    between = sorted(POST_NORMS & set(declaration.axes(arch)))
    if between and not approximate:
        raise WeightEditError(
            f"This {arch.family} model norms what its blocks write ({between}), so that an edit of "
            "the weights before the norm is not the edit of the stream. Ask for the approximation "
            "(approximate=True) and measure it, or edit the stream while the model runs."
        )


def _stream_axis(arch: Architecture, path: str) -> int:
    return declaration.axes(arch)[path].index(STREAM)


def _along(weight: jax.Array, unit: jax.Array, axis: int) -> jax.Array:
    """weight [..., D, ...] with D at `axis`, unit [D] -> [..., ...]."""
    return jnp.tensordot(weight.astype(jnp.float32), unit, (axis, 0), precision=PRECISION)


@partial(jax.jit, static_argnames=("axis",))
def _project(weight: jax.Array, unit: jax.Array, axis: int) -> jax.Array:
    """weight <- weight - <weight, unit> unit along one axis, in float32."""
    along = jnp.expand_dims(_along(weight, unit, axis), axis)
    unit = unit.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
    return (weight.astype(jnp.float32) - along * unit).astype(weight.dtype)


def _rebuilt(
    model: Transformer, arch: Architecture, leaves: dict[str, jax.Array], changed: set[str]
) -> Transformer:
    """The model of these leaves, the changed ones laid out as a loaded model's are."""
    mesh = model.embed[...].sharding.mesh
    logical = declaration.axes(arch)
    for path in changed & set(leaves):
        leaves[path] = sharding.place(leaves[path], mesh, *logical[path])
    return Transformer(arch, leaves)
