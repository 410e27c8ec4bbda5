"""One table from logical axes to mesh axes; params, caches, batches and edits are placed by it.

It lies on the lowest floor, below models/ and runtime/, since a module constrains its activations
with the same table that places its weights.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DATA, MODEL = "data", "model"

# Logical axis -> mesh axis. An axis that the mesh axis does not divide is split over as many of
# its parts as do (see `make_mesh`): of 8 key/value heads on a model axis of 16 each lies on two
# devices, and 9 heads on a mesh of 2 are replicated: slower, not wrong.
RULES: dict[str | None, str | None] = {
    "batch": "data",
    "heads": "model",
    "kv_heads": "model",
    "mlp": "model",
    "vocab": "model",
    "expert_mlp": "model",
    "per_layer_vocab": "model",
    "key_heads": "model",
    "state_heads": "model",
    "experts": None,
    "layers": None,
    "slots": None,
    "embed": None,
    "per_layer": None,
    "scalar": None,
    "head_width": None,
    "value_heads": None,
    "key_width": None,
    "value_width": None,
    "taps": None,
    "tail": None,
    None: None,
}


class MeshError(ValueError):
    """A mesh that does not fit the devices."""


def make_mesh(data: int = 1, model: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of data x model devices; data = -1 takes all that model leaves over.

    The model axis is one mesh axis for each of its prime factors, the largest first (`parts`): what
    does not divide into all of them is split over the first of them and copied over the others, so
    that query heads and the fewer key/value heads that they read lie on the same devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if data == -1 and model >= 1:
        data = len(devices) // model
    if data < 1 or model < 1 or data * model > len(devices):
        raise MeshError(
            f"mesh.data={data} x mesh.model={model} does not fit {len(devices)} "
            f"{devices[0].platform} devices. Allowed: data * model <= {len(devices)}, "
            "and data=-1 for as many as there are."
        )
    factors = _prime_factors(model) or [1]
    names = (DATA, MODEL, *(f"{MODEL}_{i}" for i in range(2, len(factors) + 1)))
    return Mesh(np.array(devices[: data * model]).reshape(data, *factors), names)


def _prime_factors(number: int) -> list[int]:
    """Largest first; none of 1."""
    for factor in range(2, math.isqrt(number) + 1):
        if number % factor == 0:
            return sorted([factor, *_prime_factors(number // factor)], reverse=True)
    return [number] * (number > 1)


def parts(mesh: Any, axis: str) -> list[str]:
    """The mesh axes that make up "data" or "model", major first."""
    return [name for name in mesh.shape if name.partition("_")[0] == axis]


def mesh_of(model: Any) -> Mesh:
    """The mesh that the weights of a model lie on."""
    return model.embed[...].sharding.mesh


def spec(
    mesh: Any,  # Mesh or, inside jit, AbstractMesh
    logical: Sequence[str | None],
    shape: Sequence[int],
) -> PartitionSpec:
    """The PartitionSpec of an array of this shape whose axes carry these logical names."""
    if len(logical) != len(shape):
        raise ValueError(f"Logical axes {tuple(logical)} do not fit the shape {tuple(shape)}.")
    return PartitionSpec(
        *(_split(mesh, RULES[name], size) for name, size in zip(logical, shape, strict=True))
    )


def _split(mesh: Any, axis: str | None, size: int) -> str | tuple[str, ...] | None:
    """Which mesh axes split an axis of this size: the first parts of its own that divide it."""
    found: list[str] = []
    for part in parts(mesh, axis) if axis else ():
        if size % math.prod(mesh.shape[name] for name in (*found, part)):
            break
        found.append(part)
    return found[0] if len(found) == 1 else tuple(found) or None


def named(mesh: Mesh, logical: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    return NamedSharding(mesh, spec(mesh, logical, shape))


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Pins an activation's layout inside jit, when a mesh is set (`jax.set_mesh`); else a no-op."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.shape.values()) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(mesh, logical, x.shape))


def place(x: np.ndarray | jax.Array, mesh: Mesh, *logical: str | None) -> jax.Array:
    """Puts a host array on the mesh by its logical axes."""
    return jax.device_put(x, named(mesh, logical, np.shape(x)))


def to_host(tree: Any) -> Any:
    """Device arrays as numpy's, whole on every process: all of them have to ask together."""
    if all(x.is_fully_addressable or x.is_fully_replicated for x in jax.tree.leaves(tree)):
        return jax.tree.map(np.asarray, tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


def unstacked(x: jax.Array) -> list[jax.Array]:  # [L, ...] -> L of [...]
    """The parts along the first axis; views that take no memory, where x lies on one CPU device."""
    traced = isinstance(x, Tracer)
    if traced or [device.platform for device in x.devices()] != ["cpu"]:
        return list(_one_by_one(x))
    # The host's view of x is x itself; a part that is not aligned as XLA asks for is copied.
    mesh = getattr(x.sharding, "mesh", None)
    whole = x.sharding if mesh is None else NamedSharding(mesh, PartitionSpec())
    return [jax.device_put(part, whole) for part in np.asarray(x)]


@jax.jit
def _one_by_one(x: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(x)
