"""MXFP4 weights dequantised: blocks of 32 four-bit floats that share a power of two.

Letters: E experts, I inputs and O outputs of a projection, N blocks of one output. A weight W
[E, I, O] lies as W_blocks [E, O, N, 16] and W_scales [E, O, N], both of bytes (Open Compute
Project, Microscaling Formats specification 1.0, sections 5.2 and 5.3). Every number has two
significant bits, so that bfloat16 holds it exactly.
"""

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from jax_refusal.checkpoints.tensors import PACKED, ConversionError, Tensor, listed

BLOCK = 32  # numbers that share a scale, two in a byte
MAGNITUDES = [0, 1, 2, 3, 4, 6, 8, 12]  # twice: then no scale is too large for the least of them
TWICE = np.array([*MAGNITUDES, *(-float(x) for x in MAGNITUDES)], np.float32)
BYTES = np.arange(256)
PAIRS = TWICE[np.stack([BYTES & 15, BYTES >> 4], -1)]  # [256, 2], the low half of a byte first


def dequantised(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with one in place of each pair of blocks and scales, all unread.

    Raises ConversionError naming every pair that is not one.
    """
    found = {name: tensor for name, tensor in tensors.items() if not PACKED.fullmatch(name)}
    problems = []
    for name in dict.fromkeys(match[1] for match in map(PACKED.fullmatch, tensors) if match):
        blocks, scales = tensors.get(f"{name}_blocks"), tensors.get(f"{name}_scales")
        if blocks is None or scales is None:
            lacking = "blocks" if blocks is None else "scales"
            problems.append(f"missing {name}_{lacking}, the other half of its pair is there")
        elif name in found:
            problems.append(f"{name} is there twice, as it is and as blocks and scales")
        elif len(scales.shape) != 3 or blocks.shape != (*scales.shape, BLOCK // 2):
            problems.append(
                f"{name}_blocks has shape {blocks.shape} and {name}_scales {scales.shape}, not "
                f"[experts, outputs, blocks, {BLOCK // 2}] and the same without the last"
            )
        else:
            found[name] = _tensor(blocks, scales)
    if problems:
        raise ConversionError(f"The MXFP4 weights cannot be read: {listed(problems)}.")
    return found


def dequantise(
    blocks: np.ndarray,  # [..., N, 16] uint8
    scales: np.ndarray,  # [..., N] uint8, exponents of 2 from -127 on
) -> np.ndarray:  # [..., 32 N] float32
    values = np.take(PAIRS, blocks, 0).reshape(*scales.shape, BLOCK)
    halves = np.ldexp(np.float32(1), scales.astype(np.int32) - 128)
    with np.errstate(over="ignore"):  # the loader names what is not finite
        values *= halves[..., None]
    return values.reshape(*scales.shape[:-1], -1)


def _tensor(blocks: Tensor, scales: Tensor) -> Tensor:
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
