"""MXFP4 weights dequantised: blocks of 32 four-bit floats that share a power of two.

Letters: E experts, I inputs and O outputs of a projection, N blocks of one output. A weight W
[E, I, O] lies as W_blocks [E, O, N, 16] and W_scales [E, O, N], both of bytes (Open Compute
Project, Microscaling Formats specification 1.0, sections 5.2 and 5.3). Every number has two
significant bits, so that bfloat16 holds it exactly.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jax_refusal.checkpoints.quantised.config import Fields, refuse
from jax_refusal.checkpoints.quantised.formats import Format, Parts
from jax_refusal.checkpoints.tensors import Tensor

PART = re.compile(r"(.*)(_blocks|_scales)")
BLOCK = 32  # numbers that share a scale, two in a byte
MAGNITUDES = [0, 1, 2, 3, 4, 6, 8, 12]  # twice: then no scale is too large for the least of them
TWICE = np.array([*MAGNITUDES, *(-float(x) for x in MAGNITUDES)], np.float32)
BYTES = np.arange(256)
PAIRS = TWICE[np.stack([BYTES & 15, BYTES >> 4], -1)]  # [256, 2], the low half of a byte first


def read(given: Mapping[str, Any], vouched: Collection[str] = ()) -> Format:
    refuse("MXFP4", Fields(given, vouched).finish())
    return Format(
        label="MXFP4",
        part=PART,
        whole="",
        dtypes={"_blocks": {"U8"}, "_scales": {"U8"}},
        build=_build,
    )


def dequantise(
    blocks: np.ndarray,  # [..., N, 16] uint8
    scales: np.ndarray,  # [..., N] uint8, exponents of 2 from -127 on
) -> np.ndarray:  # [..., 32 N] float32
    values = np.take(PAIRS, blocks, 0).reshape(*scales.shape, BLOCK)
    halves = np.ldexp(np.float32(1), scales.astype(np.int32) - 128)
    with np.errstate(over="ignore"):  # the loader names what is not finite
        values *= halves[..., None]
    return values.reshape(*scales.shape[:-1], -1)


def _build(parts: Parts) -> Tensor:
    blocks, scales = parts.need("_blocks", "_scales")
    if len(scales.shape) != 3 or blocks.shape != (*scales.shape, BLOCK // 2):
        raise ValueError(
            f"its _blocks have shape {blocks.shape} and its _scales {scales.shape}, not "
            f"[experts, outputs, blocks, {BLOCK // 2}] and the same without the last"
        )
    E, O, N = scales.shape
    shape = (E, BLOCK * N, O)

    def read(slices: tuple[slice, ...]) -> np.ndarray:
        experts, inputs, outputs = (
            range(*part.indices(size)) for part, size in zip(slices, shape, strict=True)
        )
        near = slice(inputs.start // BLOCK, -(-inputs.stop // BLOCK))  # whole blocks around
        own = slice(inputs.start - near.start * BLOCK, inputs.stop - near.start * BLOCK)
        whole = np.empty((len(experts), len(inputs), len(outputs)), ml_dtypes.bfloat16)
        for place, expert in enumerate(experts):  # one at a time: float32 is twice as large
            part = (slice(expert, expert + 1), slices[2], near)
            values = dequantise(blocks[(*part, slice(None))], scales[part])
            whole[place] = values[0, :, own].T
        return whole

    return Tensor(shape, read)
