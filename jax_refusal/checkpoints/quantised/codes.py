"""Tensors that are made of others when they are read: unpacked, turned, scaled.

Letters: O outputs and I inputs of a projection, whose weight is [O, I]. Of what is asked for, about
CHUNK numbers are made at a time, so that what they are made of is never there as a whole.
"""

import math
from collections.abc import Sequence

import ml_dtypes
import numpy as np

from jax_refusal.checkpoints.tensors import Tensor

CHUNK = 2**20
WORD = 32  # bits that are packed together
SCALES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def ranges(slices: tuple[slice, ...], shape: tuple[int, ...]) -> list[range]:
    return [range(*part.indices(size)) for part, size in zip(slices, shape, strict=True)]


def whole(tensor: Tensor) -> np.ndarray:
    return tensor[(slice(None),) * len(tensor.shape)]


def blocks(size: int, block: int) -> int:
    """How many there are, the last of which may be smaller."""
    return -(-size // block)


def chunks(rows: range, width: int) -> list[range]:
    """Rows of so many numbers, in parts of about CHUNK numbers."""
    step = max(1, CHUNK // max(1, width))
    return [rows[at : at + step] for at in range(0, len(rows), step)]


def as_slice(part: range) -> slice:
    return slice(part.start, part.stop, part.step)


def turned(tensor: Tensor) -> Tensor:
    """Its transpose."""

    def read(slices: tuple[slice, ...]) -> np.ndarray:
        return tensor[slices[::-1]].T

    return Tensor(tensor.shape[::-1], read, tensor.dtype)


def reshaped(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A small tensor in another shape."""

    def read(slices: tuple[slice, ...]) -> np.ndarray:
        return whole(tensor).reshape(shape)[slices]

    return Tensor(shape, read, tensor.dtype)


def entry(tensor: Tensor, place: int) -> Tensor:
    """tensor[place]"""

    def read(slices: tuple[slice, ...]) -> np.ndarray:
        return tensor[(slice(place, place + 1), *slices)][0]

    return Tensor(tensor.shape[1:], read, tensor.dtype)


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape along a new first axis."""
    first = tensors[0]

    def read(slices: tuple[slice, ...]) -> np.ndarray:
        return np.stack([each[slices[1:]] for each in tensors[slices[0]]])

    return Tensor((len(tensors), *first.shape), read, first.dtype)


def unpacked(
    words: Tensor,  # 32-bit integers, [N, M]
    bits: int,
    axis: int,  # 0 or 1, along which the numbers of a word follow each other
    size: int,  # numbers along it
    *,
    places: Sequence[int] | None = None,  # of the numbers of a word, from its low end; in order
    plus: int = 0,  # added to each word, as an integer of 32 bits, before it is unpacked
    offset: int = 0,  # added to each number
) -> Tensor:
    """The whole numbers of `bits` bits in the words."""
    each = WORD // bits
    shifts = [place * bits for place in (places or range(each))]
    shape = (size, words.shape[1]) if axis == 0 else (words.shape[0], size)

    def read(slices: tuple[slice, ...]) -> np.ndarray:
        wanted = ranges(slices, shape)[axis]
        first, last = wanted.start // each, blocks(wanted.stop, each)
        near = list(slices)
        near[axis] = slice(first, last)
        found = words[tuple(near)].view(np.uint32) + np.uint32(plus % 2**WORD)
        spread = list(found.shape)
        spread[axis] *= each
        numbers = np.empty(spread, np.int16)
        for i, shift in enumerate(shifts):
            where = [slice(None)] * 2
            where[axis] = slice(i, None, each)
            numbers[tuple(where)] = (found >> np.uint32(shift)) & np.uint32(2**bits - 1)
        numbers += offset
        cut = [slice(None)] * 2
        start = wanted.start - first * each
        cut[axis] = slice(start, start + wanted.stop - wanted.start, wanted.step)
        return numbers[tuple(cut)]

    return Tensor(shape, read)


def scaled(
    codes: Tensor,  # [O, I]
    scales: Tensor,  # [blocks of O, blocks of I]
    block: tuple[int, int],  # outputs and inputs that share a scale
    *,
    zeros: Tensor | int = 0,  # as the scales, or one for all
    groups: np.ndarray | None = None,  # [I], whose scale each input has, instead of blocks of them
    dtype: np.dtype | None = None,  # of the result, in place of that of the scales
) -> Tensor:
    """(codes - zeros) * scales, rounded once."""
    O, I = codes.shape
    rounded = SCALES[scales.dtype] if dtype is None else dtype
    rows_each, columns_each = (min(pair) for pair in zip(block, (O, I), strict=True))
    scale_of = np.arange(I) // columns_each if groups is None else groups

    def read(slices: tuple[slice, ...]) -> np.ndarray:
        rows, columns = ranges(slices, (O, I))
        found = np.empty((len(rows), len(columns)), rounded)
        if not found.size:
            return found
        of_columns, done = scale_of[as_slice(columns)], 0
        for part in chunks(rows, len(columns)):
            of_rows = np.arange(part.start, part.stop, part.step) // rows_each
            values = _floats(codes[as_slice(part), slices[1]])
            # The loader names what is not finite.
            with np.errstate(over="ignore", invalid="ignore"):
                values -= zeros if isinstance(zeros, int) else _spread(zeros, of_rows, of_columns)
                values *= _spread(scales, of_rows, of_columns)
                found[done : done + len(part)] = values
            done += len(part)
        return found

    return Tensor((O, I), read)


def _floats(codes: np.ndarray) -> np.ndarray:
    """In float32, rows one after the other."""
    if codes.dtype.kind in "iu":
        return codes.astype(np.float32, order="C")
    table = np.arange(256, dtype=np.uint8).view(codes.dtype).astype(np.float32)  # of 8 bits
    return np.take(table, codes.view(np.uint8))


def _spread(values: Tensor, of_rows: np.ndarray, of_columns: np.ndarray) -> np.ndarray:
    """values[of_rows][:, of_columns], of which what is the same for all is there once."""
    low = [index.min() for index in (of_rows, of_columns)]
    near = tuple(slice(i.min(), i.max() + 1) for i in (of_rows, of_columns))
    found = values[near].astype(np.float32)
    for axis, index in enumerate((of_rows - low[0], of_columns - low[1])):
        if found.shape[axis] > 1:
            found = _taken(found, index, axis)
    return found


def _taken(values: np.ndarray, index: np.ndarray, axis: int) -> np.ndarray:
    """np.take; what is in order is repeated, which is faster."""
    if (np.diff(index) >= 0).all():
        return np.repeat(values, np.bincount(index, minlength=values.shape[axis]), axis)
    return np.take(values, index, axis)


def scale_grid(scales: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> Tensor | None:
    """The scales as [blocks of O, blocks of I], or None where they are of another shape.

    One scale may have no dimensions or several of size 1; one an output may be [O].
    """
    grid = tuple(map(blocks, shape, block))
    if scales.shape == grid:
        return scales
    if grid[1] == 1 and math.prod(scales.shape) == grid[0] and len(scales.shape) < 2:
        return reshaped(scales, grid)
    return None
