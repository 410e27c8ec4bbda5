"""Edits of the residual stream written into the weights (Arditi et al. 2024, section 4.1, app. E).

Letters: L layers, D residual width, V vocabulary, E experts.

Ablating a direction at every write is a projection of the matrices that write: W <- W - W u u^T,
for the embedding, the attention and MLP outputs, and their biases. Every leaf with an axis of the
residual stream declares its role there (`models.params`), so that none is passed over. Weights are
edited in float32 and cast back to their dtype.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jax_refusal import sharding
from jax_refusal.checkpoints import lora
from jax_refusal.edits import multiple, unit_vector
from jax_refusal.families.registry import family_of
from jax_refusal.messages import listed
from jax_refusal.models.decoder import Transformer
from jax_refusal.models.leaves import leaves
from jax_refusal.models.ops import PRECISION
from jax_refusal.models.params import POST_NORM, WRITES
from jax_refusal.models.spec import Architecture, Branch, Mlp, Moe, place
from jax_refusal.study.directions import check_width


class WeightEditError(ValueError):
    """An edit that the weights of this architecture cannot hold exactly; the message says why."""


def writers(arch: Architecture) -> list[str]:
    """The leaves that write to the residual stream."""
    return [path for path, leaf in leaves(arch).items() if leaf.role == WRITES]


def orthogonalize(
    model: Transformer,
    direction: jax.Array | np.ndarray,  # [D], any length
    *,
    approximate: bool = False,
) -> Transformer:
    """A model that cannot write along `direction`: its logits are those of `ablate` at all sites.

    A tied head is untied first, since only the embedding writes. approximate: go on where a norm
    stands between a write and the stream, which the result then equals only nearly; inputs that
    layers make of the embedding (Gemma 4) change with it then too. Raises WeightEditError,
    DirectionError for another width, EditError for a direction that is zero or not finite.
    """
    arch = model.arch
    edited = writers(arch)
    _check_exact(arch, approximate)
    unit = unit_vector(check_width(np.asarray(direction), arch.width, "The direction"))
    arrays = model.leaves()
    if arch.tied_head:
        arch = dataclasses.replace(arch, tied_head=False)
        arrays["head"] = arrays["embed"]
    for path in edited:
        arrays[path] = _project(arrays[path], unit, leaves(arch)[path].stream_axis)
    return _rebuilt(model, arch, arrays, {*edited, "head"})


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
    whole = isinstance(layer, int | np.integer) and not isinstance(layer, bool)
    if not whole or not 1 <= layer < arch.layers:
        raise WeightEditError(
            f"layer={layer}: an addition becomes a bias of the block before, so it can be at "
            f"layers 1 to {arch.layers - 1}."
        )
    bias = _output_bias(arch, layer - 1)
    if not bias and family_of(arch).has_mlp_bias_field:
        arch = with_mlp_bias(arch)
        bias = _output_bias(arch, layer - 1)
    if not bias:
        raise WeightEditError(
            f"A {arch.family} model has no bias at its MLP output, so no addition can be part of "
            "its weights. Add it while it runs (jax_refusal.add), or as a GGUF control vector."
        )
    _check_exact(arch, approximate)
    vector = multiple(check_width(np.asarray(direction), arch.width, "The direction"), coefficient)
    arrays = model.leaves()
    new = set(leaves(arch)) - set(arrays)
    for path in new:
        arrays[path] = jnp.zeros(leaves(arch)[path].shape, model.dtype)
    slot, at = place(arch, layer - 1)
    path = f"blocks.{slot}.{bias}"
    rows = arrays[path][at].astype(jnp.float32)  # [D], or [E, D]
    rows += vector.reshape((1,) * (rows.ndim - 1) + vector.shape)
    arrays[path] = arrays[path].at[at].set(rows.astype(arrays[path].dtype))
    return _rebuilt(model, arch, arrays, {*new, path})


def _output_bias(arch: Architecture, layer: int) -> str:
    """The leaf that adds to what a layer writes last, at every token; "" where none does."""
    _, branch = arch.specs[layer].branches[-1]
    if isinstance(branch, Mlp) and branch.bias:
        return "down_bias"
    # Shares that do not add up to 1 would scale what is added.
    if isinstance(branch, Moe) and branch.bias and branch.norm_topk_prob:
        return "expert_down_bias"
    return ""


def with_mlp_bias(arch: Architecture) -> Architecture:
    """The architecture with biases in the MLP of every layer."""

    def biased(branch: Branch) -> Branch:
        return dataclasses.replace(branch, bias=True) if isinstance(branch, Mlp) else branch

    specs = tuple(
        dataclasses.replace(spec, branches=tuple((site, biased(b)) for site, b in spec.branches))
        for spec in arch.specs
    )
    return dataclasses.replace(arch, specs=specs)


def rank_one(model: Transformer, direction: jax.Array | np.ndarray) -> lora.Adapter:
    """The part of `orthogonalize` that a LoRA of rank 1 holds: W - u u^T W, A = u^T W and B = -u.

    It covers the matrices by which attention and MLP write. The embedding and output biases are
    not part of it: the merged model is `ablate` at the sites attn_out and mlp_out, but for biases.
    """
    arch = model.arch
    _check_exact(arch, approximate=False)
    written = [leaf for leaf in leaves(arch).values() if leaf.role == WRITES and leaf.layers]
    if any("experts" in leaf.axes for leaf in written):
        raise WeightEditError(
            f"A LoRA adapter has no place for the experts of this {arch.family} model: write the "
            "whole model (--to=hf) instead."
        )
    unit = unit_vector(check_width(np.asarray(direction), arch.width, "The direction"))
    a, b, arrays = {}, {}, model.leaves()
    for leaf in (leaf for leaf in written if leaf.target):
        layers = len(leaf.layers)
        along = _along(arrays[leaf.path], unit, leaf.stream_axis)  # [L, ...]
        a[leaf.path] = along.reshape(layers, 1, -1)
        b[leaf.path] = jnp.broadcast_to(-unit[None, :, None], (layers, arch.width, 1))
    return lora.Adapter(a, b, 1.0)


def _check_exact(arch: Architecture, approximate: bool) -> None:
    between = sorted(path for path, leaf in leaves(arch).items() if leaf.role == POST_NORM)
    if between and not approximate:
        raise WeightEditError(
            f"This {arch.family} model norms what its blocks write ({between}), so that an edit of "
            "the weights before the norm is not the edit of the stream. Ask for the approximation "
            "(approximate=True) and measure it, or edit the stream while the model runs."
        )


def _along(weight: jax.Array, unit: jax.Array, axis: int) -> jax.Array:
    """weight [..., D, ...] with D at `axis`, unit [D] -> [..., ...]."""
    return jnp.tensordot(weight.astype(jnp.float32), unit, (axis, 0), precision=PRECISION)


@partial(jax.jit, static_argnames=("axis",))
def _project(weight: jax.Array, unit: jax.Array, axis: int) -> jax.Array:
    """weight <- weight - <weight, unit> unit along one axis, in float32."""
    along = jnp.expand_dims(_along(weight, unit, axis), axis)
    unit = unit.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
    return (weight.astype(jnp.float32) - along * unit).astype(weight.dtype)


def check_finite(arrays: Mapping[str, jax.Array], dtype: Any) -> None:
    """Raises WeightEditError for leaves that are not finite in this dtype."""
    known = {path: leaf for path, leaf in arrays.items() if not isinstance(leaf, Tracer)}
    lost = sorted(path for path, leaf in known.items() if not _is_finite(leaf, jnp.dtype(dtype)))
    if lost:
        raise WeightEditError(
            f"These weights would not be finite in {jnp.dtype(dtype)}, which ends at "
            f"{float(jnp.finfo(dtype).max):.3g}: {listed(lost, ', ')}. Take a smaller edit (its "
            "direction, its coefficient, the adapter) or a dtype of a larger range."
        )


@partial(jax.jit, static_argnames=("dtype",))
def _is_finite(weight: jax.Array, dtype: Any) -> jax.Array:
    return jnp.isfinite(weight.astype(dtype)).all()


def _rebuilt(
    model: Transformer, arch: Architecture, arrays: dict[str, jax.Array], changed: set[str]
) -> Transformer:
    """The model of these leaves, the changed ones laid out as a loaded model's are."""
    check_finite({path: arrays[path] for path in changed & set(arrays)}, model.dtype)
    mesh = model.embed[...].sharding.mesh
    for path in changed & set(arrays):
        arrays[path] = sharding.place(arrays[path], mesh, *leaves(arch)[path].axes)
    return Transformer(arch, arrays)
