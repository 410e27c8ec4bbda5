"""Edits by what they do: nothing, ablation, affine concept editing, addition.

Letters: D residual width, L layers, S residual sites, R edit rows, M rank.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jax_refusal.edits.forms import SITES, Affine
from jax_refusal.fields import LARGEST

# Directions are independent where this share of each at least is new beside those before it.
DEPENDENT = 1e-4


class EditError(ValueError):
    """An edit that cannot be made of what was given; the message says of what it can."""


def identity(num_layers: int, width: int) -> Affine:
    """The edit that changes no bit of any activation, in any dtype."""
    none, gates = jnp.zeros((1, width)), jnp.zeros((num_layers, len(SITES), 1))
    return Affine(unit=none[:, None], vector=none, remove=gates, add=gates)


def ablate(
    direction: jax.Array | np.ndarray,  # [D], or [M, D] for the space they span; any length
    num_layers: int,
    *,
    sites: Sequence[str] = SITES,
    strength: float = 1.0,
) -> Affine:
    """Directional ablation (paper eq. 4): takes the component along `direction` out everywhere.

    Raises EditError for a direction that is zero, not finite, or in the span of those before it.
    """
    unit = _orthonormal(direction)[None]
    return _ablation(unit, _finite("strength", strength) * _gates(num_layers, None, sites))


def ablations(
    units: jax.Array,  # [R, D] of length 1; one of length 0 takes nothing out
    num_layers: int,
) -> Affine:  # [R]
    """`ablate` of many directions at once, a row each."""
    return _ablation(units[:, None], jnp.ones((num_layers, len(SITES), len(units))))


def _ablation(unit: jax.Array, gates: jax.Array) -> Affine:  # [R, M, D], [L, S, R]
    none = jnp.zeros_like
    return Affine(unit=unit, vector=none(unit[:, 0]), remove=gates, add=none(gates))


def affine(
    direction: jax.Array | np.ndarray,  # [D], or [M, D] for the space they span; any length
    num_layers: int,
    *,
    target: float | jax.Array | np.ndarray,  # coordinate along the unit direction, or a point [D]
    coefficient: float | jax.Array = 0.0,
    layer: int | jax.Array | None = None,  # None is every layer
    sites: Sequence[str] = ("resid_pre",),
) -> Affine:
    """Affine concept editing (Marshall et al. 2024, arXiv 2411.09003): the component along
    `direction` becomes that of `target`, and `coefficient` times `direction` on top of it:

        x <- x - proj(x) + proj(target) + coefficient * direction

    With `direction` the difference of means and `target` the mean of harmless prompts, coefficient
    0 makes every prompt look harmless along it and 1 harmful. Of directions [M, D] the target is a
    point, and `coefficient` multiplies their sum. Raises EditError as `ablate` does, and for
    numbers that are not finite.
    """
    unit, point = _orthonormal(direction), _finite("target", target)
    if point.ndim:
        offset = unit @ _vector(point)
    elif len(unit) == 1:
        offset = point[None]
    else:
        raise EditError(
            f"target={target} is one number and there are {len(unit)} directions: give a point "
            "[D], such as the mean of harmless prompts."
        )
    whole = jnp.asarray(direction, jnp.float32).reshape(unit.shape).sum(0)
    along = _finite("coefficient", coefficient) * (unit @ whole)
    offset = _finite("target + coefficient * direction", offset + along)
    edit = _ablation(unit[None], _gates(num_layers, layer, sites))
    return dataclasses.replace(edit, offset=offset[None])


def add(
    vector: jax.Array | np.ndarray,  # [D], in activation units
    num_layers: int,
    *,
    layer: int | jax.Array,
    site: str = "resid_pre",
    coefficient: float | jax.Array = 1.0,
) -> Affine:
    """Activation addition (paper eq. 3): puts `coefficient * vector` in at one layer, all tokens.

    +1 induces refusal and -1 bypasses it when `vector` is the difference of means. Raises EditError
    for a vector that is zero, and where one of them or their product is not finite.
    """
    multiple(vector, coefficient)
    gates = _finite("coefficient", coefficient) * _gates(num_layers, layer, [site])
    return _addition(_vector(vector)[None], gates)


def multiple(
    vector: jax.Array | np.ndarray,  # [D]
    coefficient: float | jax.Array,
) -> jax.Array:  # [D]
    """What `add` puts in, coefficient * vector in float32; raises EditError as `add` does."""
    vector = _vector(vector)
    if not isinstance(vector, Tracer) and not vector.any():
        raise EditError(
            "The vector is zero: there is nothing to add. A zero difference of means says that "
            "both instruction sets look alike there."
        )
    return _finite("coefficient * vector", _finite("coefficient", coefficient) * vector)


def additions(
    vectors: jax.Array,  # [R, D]
    num_layers: int,
    layer: jax.Array,
) -> Affine:  # [R]
    """`add` of many vectors at once, a row each, in front of one layer."""
    gates = _gates(num_layers, layer, ["resid_pre"])
    return _addition(vectors, jnp.tile(gates, (1, 1, len(vectors))))


def _addition(vector: jax.Array, gates: jax.Array) -> Affine:  # [R, D], [L, S, R]
    none = jnp.zeros_like
    return Affine(unit=none(vector)[:, None], vector=vector, remove=none(gates), add=gates)


def unit_vector(direction: jax.Array | np.ndarray) -> jax.Array:
    """direction [D] scaled to length 1, float32; EditError where that is not possible."""
    direction = _vector(direction)
    norm = jnp.linalg.norm(direction)
    if not isinstance(norm, Tracer) and not (np.isfinite(norm) and norm > 0):
        raise EditError(
            f"The direction has norm {float(norm)} in float32; a finite, non-zero vector is "
            "needed. A zero difference of means says that both instruction sets look alike there."
        )
    return direction / norm


def _orthonormal(directions: jax.Array | np.ndarray) -> jax.Array:  # [D] or [M, D] -> [M, D]
    """Orthonormal rows that span what the directions span; of one direction its unit vector."""
    if np.ndim(directions) != 2:
        return unit_vector(directions)[None]
    units = jnp.stack([unit_vector(each) for each in directions])
    if len(units) == 1:
        return units
    q, r = jnp.linalg.qr(units.T)  # [D, M'], [M', M], where M' is the smaller of M and D
    left = jnp.abs(jnp.diagonal(r))  # of each direction when those before it are taken out
    if not isinstance(left, Tracer) and (len(left) < len(units) or left.min() < DEPENDENT):
        raise EditError(
            f"The {len(units)} directions of width {units.shape[-1]} depend on each other: what "
            f"each has beside those before it is {np.asarray(left).round(6).tolist()} of its "
            "length. Leave out those that the others span."
        )
    return q.T


def _vector(vector: jax.Array | np.ndarray) -> jax.Array:
    if np.ndim(vector) != 1:
        raise EditError(f"A vector [D] is needed and the shape given is {np.shape(vector)}.")
    return _finite("The vector", vector)


def _finite(name: str, value: Any) -> jax.Array:
    """In float32; EditError for NaN, infinity and what is as large. What is traced goes through."""
    with np.errstate(over="ignore"):  # it is infinity then
        value = jnp.asarray(value, jnp.float32)
    if not isinstance(value, Tracer) and not np.isfinite(value).all():
        what = "holds" if value.ndim else f"is {float(value)} and not"
        raise EditError(
            f"{name} {what} NaN or infinity in float32: finite numbers are needed, of at most "
            f"{LARGEST:.3g}."
        )
    return value


def _gates(
    num_layers: int,
    layer: int | jax.Array | None,  # None is every layer
    sites: Sequence[str],
) -> jax.Array:  # [L, S, 1]
    """1 at these sites of the layer, 0 elsewhere."""
    unknown = [site for site in sites if site not in SITES]
    if unknown or not len(sites):
        raise EditError(f"Unknown sites {unknown}; allowed are some of {list(SITES)}.")
    if layer is not None and not isinstance(layer, Tracer):
        whole = np.ndim(layer) == 0 and np.asarray(layer).dtype.kind in "iu"
        if not whole or not 0 <= int(layer) < num_layers:
            raise EditError(f"layer={layer} is not in 0..{num_layers - 1}.")
    own = jnp.array([float(site in sites) for site in SITES], jnp.float32)[None, :, None]
    if layer is None:
        return jnp.tile(own, (num_layers, 1, 1))
    return jnp.where(jnp.arange(num_layers)[:, None, None] == layer, own, 0.0)
