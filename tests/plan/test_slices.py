"""Programs of large models, compiled by the TPU compiler for slices that are not there."""

from typing import Any

import jax.numpy as jnp
import pytest

from jax_refusal.families.registry import architecture
from jax_refusal.plan.chips import PlanError, chip_of, slice_mesh
from jax_refusal.plan.estimate import Estimate, estimate
from jax_refusal.plan.programs import Sizes, programs
from tests.families.test_family_configs import GRANITE4_H_TINY
from tests.plan.published import GEMMA_2B, LLAMA3_70B

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
    assert decode.arguments < 10.5 and decode.temporaries < 3
    largest = max(each.bytes for each in decode.exchanges)
    assert largest <= 2 * MIB  # the stream of 64 rows is 1 MiB; a layer's weights 1.6 GiB


@pytest.mark.parametrize("config", [GEMMA_2B, GRANITE4_H_TINY], ids=["one_kv_head", "hybrid"])
def test_small_models_fit_4_chips(config: dict[str, Any]) -> None:
    for found in planned(config, "v5e:2x2", 4, "means", "decode"):
        assert found.fits, found.program.name


def test_a_slice_that_is_unknown() -> None:
    with pytest.raises(PlanError, match=r"v9z:4x4: 'v9z' is no chip that is known.*v5e"):
        slice_mesh("v9z:4x4", 1, 16)
    with pytest.raises(PlanError, match="knows no such slice"):
        slice_mesh("v5e:3x5", 1, 15)
    with pytest.raises(PlanError, match="are 4 devices, and v5e:4x4 has 16"):
        slice_mesh("v5e:4x4", 1, 4)
