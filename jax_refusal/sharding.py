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

MESH_AXES = ("data", "model")

# Logical axis -> mesh axis. An axis that the mesh axis does not divide stays replicated, so that 9
# heads on a mesh of 2 work: slower, not wrong.
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
    """A mesh of data x model devices; data = -1 takes all that model leaves over."""
    devices = list(jax.devices() if devices is None else devices)
    if data == -1 and model >= 1:
        data = len(devices) // model
    if data < 1 or model < 1 or data * model > len(devices):
        raise MeshError(
            f"mesh.data={data} x mesh.model={model} does not fit {len(devices)} "
            f"{devices[0].platform} devices. Allowed: data * model <= {len(devices)}, "
            "and data=-1 for as many as there are."
        )
    return Mesh(np.array(devices[: data * model]).reshape(data, model), MESH_AXES)


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
    sizes = dict(mesh.shape)
    axes = [RULES[name] for name in logical]
    return PartitionSpec(
        *(a if a and size % sizes[a] == 0 else None for a, size in zip(axes, shape, strict=True))
    )


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


def unstacked(x: jax.Array) -> list[jax.Array]:  # [L, ...] -> L of [...]
    """The parts along the first axis; views that take no memory, where x lies on one CPU device."""
    traced = isinstance(x, Tracer)
    if traced or [device.platform for device in x.devices()] != ["cpu"]:
        return list(_split(x))
    # The host's view of x is x itself; a part that is not aligned as XLA asks for is copied.
    mesh = getattr(x.sharding, "mesh", None)
    whole = x.sharding if mesh is None else NamedSharding(mesh, PartitionSpec())
    return [jax.device_put(part, whole) for part in np.asarray(x)]


@jax.jit
def _split(x: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(x)
