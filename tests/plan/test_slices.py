"""Programs of large models, compiled by the TPU compiler for slices that are not there."""

from typing import Any

import jax.numpy as jnp
import pytest

from jax_refusal.families.registry import architecture
from jax_refusal.plan.chips import PlanError, chip_of, slice_mesh
from jax_refusal.plan.estimate import Estimate, estimate
from jax_refusal.plan.programs import Sizes, programs
from tests.plan.published import GEMMA_2B, GRANITE4_H_MICRO, LLAMA3_70B, QWEN3_30B_A3B

pytestmark = pytest.mark.tpu
MIB = 2**20


def planned(config: dict[str, Any], topology: str, model: int, *names: str) -> list[Estimate]:
    arch, mesh, chip = architecture(config), slice_mesh(topology, -1, model), chip_of(topology)
    found = programs(arch, mesh, jnp.bfloat16, Sizes())
    chosen = [program for program in found if program.name in names]
    assert len(chosen) == len(names)
    return [estimate(program, arch, chip, mesh.size, 2) for program in chosen]


def test_llama_3_70b_fits_16_chips() -> None:
    """Its 8 key/value heads on 16 chips: each on two of them, and no copy of the cache."""
    prefill, decode = planned(LLAMA3_70B, "v5e:4x4", 16, "prefill", "decode")
    assert prefill.fits and decode.fits, (prefill.peak, decode.peak)
    assert decode.arguments < 10.5 and decode.temporaries < 2
    stream = 64 * 8192 * 2
    assert max(each.bytes for each in decode.exchanges) == stream
    reduced = [each for each in decode.exchanges if each.bytes == stream]
    assert {each.kind for each in reduced} == {"all-reduce"}
    assert sum(each.times for each in reduced) == 2 * 80 + 1  # and the embedding


SMALLER = {  # config, slice, chips that share out the weights, bytes that are exchanged at most
    "one_kv_head": (GEMMA_2B, "v5e:2x2", 4, MIB),
    "experts": (QWEN3_30B_A3B, "v5e:4x4", 16, 2 * MIB),
    "hybrid": (GRANITE4_H_MICRO, "v5e:2x2", 4, MIB),
}


@pytest.mark.parametrize("name", SMALLER)
def test_a_step_fits_and_moves_no_weights(name: str) -> None:
    config, topology, model, most = SMALLER[name]
    (found,) = planned(config, topology, model, "decode")
    assert found.fits, found.peak
    assert found.exchanges and max(each.bytes for each in found.exchanges) <= most


def test_what_does_not_fit_is_said() -> None:
    (found,) = planned(LLAMA3_70B, "v5e:2x4", 8, "decode")
    assert not found.fits and found.peak > 15.75


def test_a_slice_that_is_unknown() -> None:
    with pytest.raises(PlanError, match=r"v9z:4x4: 'v9z' is no chip that is known.*v5e"):
        slice_mesh("v9z:4x4", 1, 16)
    with pytest.raises(PlanError, match="knows no such slice"):
        slice_mesh("v5e:3x5", 1, 15)
    with pytest.raises(PlanError, match="are 4 devices, and v5e:4x4 has 16"):
        slice_mesh("v5e:4x4", 1, 4)
