"""Tensors in files, unread: what every kind of checkpoint is brought to."""

import dataclasses
import struct
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jax_refusal.checkpoints.floats8 import FLOATS_8, readers
from jax_refusal.checkpoints.folder import SourceError, parse_json

FLOATS = {"F64", "F32", "F16", "BF16"}
DTYPES = FLOATS | set(FLOATS_8) | {"I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}
OPEN_FOR = 2**28  # bytes that are read before the files are opened anew
HEADER_BYTES = 2**25  # some 250,000 tensors in one file
POINTER = b"version https://git-lfs"  # what git keeps in place of a large file


class ConversionError(ValueError):
    """The tensors do not make the model that the config describes; all failures together."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor on disk: `read(slices)` returns that part of it as a numpy array."""

    shape: tuple[int, ...]
    read: Callable[[tuple[slice, ...]], np.ndarray]
    dtype: str = ""  # as a safetensors file calls it, where it lies in one

    def __getitem__(self, slices: tuple[slice, ...]) -> np.ndarray:
        return self.read(slices)


def floats(name: str) -> Collection[str]:
    return FLOATS


def read_safetensors(
    files: list[Path], allowed: Callable[[str], Collection[str]] = floats
) -> dict[str, Tensor]:
    """The tensors of some safetensors files, unread. allowed: dtypes of one, by its name."""
    tensors: dict[str, Tensor] = {}
    opened = _Files()
    for path in files:
        handle, eights = opened.handle(path), {}
        for name in names_in(path):
            if name in tensors:
                raise ConversionError(f"{name} is in {path.name} and in a file before it, twice.")
            part = handle.get_slice(name)
            dtype = part.get_dtype()
            if dtype not in allowed(name):
                raise ConversionError(
                    f"{name} in {path.name} is stored as {dtype}; supported are "
                    f"{sorted(allowed(name))}. Quantised weights have to be dequantised first, "
                    "unless a quantization_config in config.json says how they lie."
                )
            read = partial(opened.read, path, name)
            if dtype in FLOATS_8:
                eights = eights or readers(path)
                read = eights[name]
            tensors[name] = Tensor(tuple(part.get_shape()), read, dtype)
    return tensors


def names_in(path: Path) -> list[str]:
    """The names of the tensors in a safetensors file; ConversionError for one that is damaged.

    The library sees to it that the tensors fill the file and no two overlap, but of a name that
    stands twice in the header it takes one: here that is an error.
    """
    names = list(_open(path).keys())
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > HEADER_BYTES:
                raise ConversionError(
                    f"The header of {path} has {size} bytes; at most {HEADER_BYTES} are read."
                )
            parse_json(file.read(size), f"the header of {path}")
    except SourceError as error:
        raise ConversionError(str(error)) from None
    return names


def _open(path: Path) -> Any:
    """A handle of a safetensors file, whose header is valid."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path.resolve(), framework="np")
    except (SafetensorError, OSError) as error:
        pointer = path.is_file() and path.stat().st_size < 1000 and POINTER in path.read_bytes()
        raise ConversionError(
            f"{path} is not a complete safetensors file ({error}). "
            + ("It stands for one that git lfs pull fetches." if pointer else "Fetch it again.")
        ) from None


class _Files:
    """Mapped safetensors files. What was read of a mapping counts as this process's memory until it
    is closed: all are, each time that OPEN_FOR bytes were read, or loading would seem to take the
    weights twice."""

    def __init__(self) -> None:
        self.handles: dict[Path, Any] = {}
        self.left = OPEN_FOR

    def handle(self, path: Path) -> Any:
        if path not in self.handles:
            self.handles[path] = _open(path)
        return self.handles[path]

    def read(self, path: Path, name: str, slices: tuple[slice, ...]) -> np.ndarray:
        """Part of a tensor; steps are taken here, since not every reader of files knows them."""
        steps = tuple(slice(None, None, each.step) for each in slices)
        plain = tuple(slice(each.start, each.stop) for each in slices)
        found = self.handle(path).get_slice(name)[plain]
        self.left -= found.nbytes
        if self.left <= 0:
            self.handles.clear()
            self.left = OPEN_FOR
        return found[steps]
