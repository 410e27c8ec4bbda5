"""Floats of 8 bits in a safetensors file, which the library hands to no numpy."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np

FLOATS_8 = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}
Read = Callable[[tuple[slice, ...]], np.ndarray]


def readers(path: Path) -> dict[str, Read]:
    """Name -> what reads a part of it, of such tensors in a file that the library has opened.

    So its header is sound: 8 bytes of its size, and JSON of where each tensor lies behind it.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {
        name: partial(
            _read, path, 8 + size + said["data_offsets"][0], said["shape"], FLOATS_8[said["dtype"]]
        )
        for name, said in header.items()
        if said.get("dtype") in FLOATS_8
    }


def _read(
    path: Path, offset: int, shape: list[int], dtype: type, slices: tuple[slice, ...]
) -> np.ndarray:
    if not math.prod(shape):
        return np.empty(shape, dtype)[slices]
    every = np.memmap(path, np.uint8, "r", offset, (math.prod(shape),))  # until this returns
    return np.array(every.reshape(shape)[slices]).view(dtype)
