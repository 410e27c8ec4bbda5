"""The programs of a study, lowered for devices from shapes alone."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jax_refusal as jr
from jax_refusal.checkpoints.loading import read_checkpoint
from jax_refusal.checkpoints.sources import locate
from jax_refusal.models.spec import Architecture
from jax_refusal.plan.chips import CHIPS, PlanError, slice_mesh
from jax_refusal.plan.estimate import estimate, weights_of_a_token, weights_read
from jax_refusal.plan.programs import Shapes, Sizes, programs
from jax_refusal.runtime import decode
from jax_refusal.runtime.batching import bucket
from tests.models.cases import SMALL

SIZES = Sizes(
    prompt_tokens=16,
    prefix_tokens=4,
    positions=3,
    row_tokens=16,
    batch_tokens=64,
    batch_size=8,
    max_new_tokens=16,
)
FAMILIES = {  # with fewer key/value heads than the model axis has devices
    "llama": {"num_attention_heads": 8, "num_key_value_heads": 2},
    "gemma4_text": {},
    "qwen3_next": {},  # experts too
}


@pytest.fixture(params=FAMILIES)
def arch(request: pytest.FixtureRequest, checkpoint: Callable[..., Path]) -> Architecture:
    path = checkpoint(architecture=request.param, **FAMILIES[request.param])
    return read_checkpoint(locate(str(path)))[0]


def test_every_program_is_planned(arch: Architecture) -> None:
    mesh = jr.make_mesh(2, 4)
    found = programs(arch, mesh, jnp.float32, SIZES)
    assert [p.name for p in found] == ["means", "kl", "bypass", "induce", "prefill", "decode"]
    for program in found[-2:]:
        planned = estimate(program, arch, CHIPS["v5e"], mesh.size, 4)
        assert planned.fits and 0 < planned.arguments < planned.peak < 1
        assert planned.flops > 0 and planned.roofline > 0


def test_scoring_is_planned(checkpoint: Callable[..., Path]) -> None:
    arch = read_checkpoint(locate(str(checkpoint())))[0]
    mesh = jr.make_mesh(2, 4)
    for program in programs(arch, mesh, jnp.float32, SIZES)[:4]:
        assert estimate(program, arch, CHIPS["v5e"], mesh.size, 4).fits


def test_replies_lie_where_the_plan_has_them(arch: Architecture, checkpoint) -> None:
    """Else a run would compile other programs than the plan."""
    mesh = jr.make_mesh(2, 4)
    shapes = Shapes(arch, mesh, jnp.dtype(jnp.float32), SIZES)
    planned, options = shapes.replies(8, 16), {"rows": 8, "slots": 20, "unrolled": False}
    with jax.set_mesh(mesh):
        program = decode.empty.lower(shapes.model, **options, capacity=bucket(16)).compile()
    made = jax.tree.leaves(program.output_shardings)
    for one, sharding in zip(jax.tree.leaves(planned), made, strict=True):
        assert sharding.is_equivalent_to(one.sharding, one.ndim), one


def test_decoding_moves_no_weights_and_no_cache(checkpoint: Callable[..., Path]) -> None:
    """On 8 devices with 2 key/value heads: a step exchanges what layers write and, on a CPU, the
    logits; nothing of the size of a cache or of a layer's weights."""
    path = checkpoint(num_attention_heads=8, num_key_value_heads=2, vocab_size=416)
    arch = read_checkpoint(locate(str(path)))[0]
    mesh = jr.make_mesh(1, 8)
    sizes = dataclasses.replace(SIZES, max_new_tokens=128)
    decoding = programs(arch, mesh, jnp.float32, sizes)[-1]
    found = estimate(decoding, arch, CHIPS["v5e"], mesh.size, 4).exchanges
    stream, logits = (4 * sizes.batch_size * size for size in (arch.width, arch.vocab))
    assert found and max(each.bytes for each in found) <= logits
    assert logits < 4 * sizes.batch_size * 128 * 16  # the keys of one head
    reduced = [each for each in found if each.kind == "all-reduce" and each.bytes == stream]
    assert sum(each.times for each in reduced) == 2 * arch.layers + 1  # and the embedding


def test_experts_count_by_the_tokens_that_choose_them(checkpoint: Callable[..., Path]) -> None:
    count = partial(checkpoint, architecture="qwen3_moe", moe_intermediate_size=20, num_experts=6)
    few, many = (read_checkpoint(locate(str(count(num_experts_per_tok=k))))[0] for k in (1, 3))
    experts = few.layers * 3 * 64 * 20
    assert weights_of_a_token(many) - weights_of_a_token(few) == pytest.approx(2 * experts)
    assert weights_read(few, 1) < weights_read(few, 4) < weights_read(few, 6)
    assert weights_read(few, 6) == weights_read(few, 600) == weights_read(many, 2)


SAME = """
import hashlib, sys
import jax.numpy as jnp
import jax_refusal as jr
from jax_refusal.checkpoints.loading import read_checkpoint
from jax_refusal.checkpoints.sources import locate
from jax_refusal.plan.programs import programs
from tests.plan.test_programs import SIZES

arch = read_checkpoint(locate(sys.argv[1]))[0]
for program in programs(arch, jr.make_mesh(), jnp.float32, SIZES)[::5]:
    print(program.name, hashlib.sha256(program.lower().as_text().encode()).hexdigest())
"""


def test_every_process_makes_the_same_programs(checkpoint: Callable[..., Path]) -> None:
    """Else a compiled program is found again by chance: the order of a set of names differs from
    process to process."""
    path = str(checkpoint(architecture="granitemoehybrid", **SMALL))
    found = set()
    for seed in ("0", "1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", SAME, path]
        found.add(subprocess.run(command, env=environment, capture_output=True, text=True).stdout)
    assert len(found) == 1 and next(iter(found)).count("\n") == 2


@pytest.mark.skipif(find_spec("libtpu") is not None, reason="the TPU compiler is installed")
def test_a_plan_without_the_compiler() -> None:
    with pytest.raises(PlanError, match=r"compiler is not there.*jax_refusal\[tpu\]"):
        slice_mesh("v5e:4x4", 1, 16)
