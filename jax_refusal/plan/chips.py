"""What the chips of TPU slices have, and devices of a slice that is not there."""

import dataclasses
import os
from typing import Any

import jax
from jax.sharding import Mesh

from jax_refusal.sharding import make_mesh


@dataclasses.dataclass(frozen=True)
class Chip:
    """Of one chip, by its maker's figures; memory is what a program may use."""

    memory: float  # GiB
    bandwidth: float  # GB/s, of that memory
    flops: float  # TFLOP/s, of products in bfloat16


CHIPS = {
    "v4": Chip(memory=31.75, bandwidth=1228, flops=275),
    "v5e": Chip(memory=15.75, bandwidth=819, flops=197),
    "v5p": Chip(memory=95.74, bandwidth=2765, flops=459),
    "v6e": Chip(memory=31.25, bandwidth=1640, flops=918),
}
# The compiler asks its host what it is part of; a host that is part of nothing has to say so.
ALONE = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}


class PlanError(ValueError):
    """A plan that cannot be made: the message says what is missing."""


def chip_of(topology: str) -> Chip:
    """Of "v5e:4x4": PlanError for a kind that is not known."""
    kind = topology.partition(":")[0]
    if kind not in CHIPS:
        raise PlanError(
            f"--topology={topology}: {kind!r} is no chip that is known. Give KIND:SHAPE, such as "
            f"v5e:4x4; kinds are {', '.join(CHIPS)}."
        )
    return CHIPS[kind]


def slice_devices(topology: str) -> list[Any]:
    """The devices of a TPU slice, for compiling. Needs libtpu, and no TPU."""
    from jax.experimental import topologies

    chip_of(topology)
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # of what a plugin raises, nothing is promised
        raise PlanError(
            f"--topology={topology}: the TPU compiler is not there or knows no such slice "
            f"({str(error).splitlines()[0]}). Install it with: pip install 'jax_refusal[tpu]'."
        ) from error
    return list(found.devices)


def slice_mesh(topology: str, data: int, model: int) -> Mesh:
    devices = slice_devices(topology)
    if data == -1:
        data = max(1, len(devices) // model)
    if data * model != len(devices):
        raise PlanError(
            f"mesh.data={data} x mesh.model={model} are {data * model} devices, and {topology} has "
            f"{len(devices)}: a run takes all of them."
        )
    return make_mesh(data, model, devices)


def without_accelerator() -> None:
    """Keeps this process off any accelerator of its own: it compiles for others."""
    jax.config.update("jax_platforms", "cpu")
