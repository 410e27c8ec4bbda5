"""The plan of a run on a slice, and its table."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp

from jax_refusal.checkpoints.loading import read_config
from jax_refusal.checkpoints.sources import locate, read_json
from jax_refusal.config import RunConfig
from jax_refusal.families.registry import architecture
from jax_refusal.models.spec import Architecture
from jax_refusal.plan.chips import Chip, chip_of, slice_mesh, without_accelerator
from jax_refusal.plan.estimate import Estimate, estimate
from jax_refusal.plan.programs import Sizes, programs

MOST = 3  # kinds of exchange that a row names


@dataclasses.dataclass(frozen=True)
class Plan:
    """Estimates of a run's programs on one slice."""

    topology: str
    chip: Chip
    mesh: tuple[int, int]  # (data, model)
    estimates: tuple[Estimate, ...]

    @property
    def fits(self) -> bool:
        return all(each.fits for each in self.estimates)


def plan(
    config: RunConfig,
    topology: str,
    *,
    model_config: str = "",
    prompt_tokens: int = 64,
    log: Callable[[str], None] = lambda message: None,
) -> Plan:
    """Compiles every program of a run for a slice. Raises PlanError and UnsupportedModel."""
    without_accelerator()
    chip, arch = chip_of(topology), _architecture(config, model_config)
    mesh = slice_mesh(topology, config.mesh.data, config.mesh.model)
    sizes = Sizes(
        prompt_tokens=prompt_tokens,
        row_tokens=max(config.compute.row_tokens, prompt_tokens),
        batch_tokens=config.compute.batch_tokens,
        batch_size=config.generate.batch_size,
        max_new_tokens=config.generate.max_new_tokens,
    )
    dtype = jnp.dtype(config.model.dtype)
    estimates = []
    for program in programs(arch, mesh, dtype, sizes):
        log(f"compiling {program.name}")
        estimates.append(estimate(program, arch, chip, mesh.size, dtype.itemsize))
    model = mesh.size // mesh.shape["data"]
    return Plan(topology, chip, (mesh.shape["data"], model), tuple(estimates))


def _architecture(config: RunConfig, model_config: str) -> Architecture:
    if model_config:
        fields = read_json(Path(model_config))
    else:
        fields = read_config(locate(config.model.source, weights=False))
    return architecture(fields, tuple(config.model.ignore_config_fields))


def table(planned: Plan) -> str:
    """For a terminal, and as it stands for docs."""
    data, model = planned.mesh
    lines = [
        f"{planned.topology}, mesh {data} x {model}; GiB of {planned.chip.memory} a chip; ms that "
        "neither products nor memory can beat",
        "",
        "| program | arguments | temporaries | peak | | TFLOP a chip | ms | exchanged a run |",
        "|---|---|---|---|---|---|---|---|",
        *(f"| {' | '.join(_cells(each))} |" for each in planned.estimates),
    ]
    return "\n".join(lines)


def _cells(each: Estimate) -> Iterator[str]:
    yield each.program.name
    for gib in (each.arguments, each.temporaries, each.peak):
        yield "–" if gib != gib else f"{gib:.2f}"
    yield "fits" if each.fits else "does not fit"
    yield f"{each.flops / 1e12:.3g}"
    yield f"{each.roofline * 1e3:.3g}"
    shown = [
        f"{c.times} {c.kind} of {c.shape} ({c.total / 2**20:.3g} MiB)"
        for c in each.exchanges[:MOST]
    ]
    more = len(each.exchanges) - len(shown)
    yield "; ".join(shown) + f"; {more} smaller" * (more > 0)
