"""Tensors in files, unread: what every kind of checkpoint is brought to."""

import dataclasses
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

FLOATS = {"F64", "F32", "F16", "BF16"}
OPEN_FOR = 2**28  # bytes that are read before the files are opened anew
# Halves of a tensor that lies in MXFP4; see `mxfp4`.
PACKED = re.compile(r"(.*)_(blocks|scales)")
LISTED, CHARACTERS = 20, 500  # of an error message: what it lists, and of what length each


class ConversionError(ValueError):
    """The tensors do not make the model that the config describes; all failures together."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor on disk: `read(slices)` returns that part of it as a numpy array."""

    shape: tuple[int, ...]
    read: Callable[[tuple[slice, ...]], np.ndarray]

    def __getitem__(self, slices: tuple[slice, ...]) -> np.ndarray:
        return self.read(slices)


def listed(found: Iterable[object], between: str = "; ") -> str:
    """The first of many things that an error message has to name, and how many more there are."""
    each = [str(thing) for thing in found]
    first = [t if len(t) <= CHARACTERS else f"{t[:CHARACTERS]}..." for t in each[:LISTED]]
    return between.join(first + [f"and {len(each) - LISTED} more"] * (len(each) > LISTED))


def shown(value: object, characters: int = 100) -> str:
    """A value of someone else's file in an error message."""
    text = repr(value)
    return text if len(text) <= characters else f"{text[:characters]}..."


def read_safetensors(files: list[Path], packed: bool = False) -> dict[str, Tensor]:
    """The tensors of some safetensors files, unread. packed: some of them as pairs of MXFP4."""
    tensors: dict[str, Tensor] = {}
    opened = _Files()
    for path in files:
        handle = opened.handle(path)
        for name in handle.keys():  # noqa: SIM118 (a handle, not a dict)
            part = handle.get_slice(name)
            allowed = {"U8"} if packed and PACKED.fullmatch(name) else FLOATS
            if part.get_dtype() not in allowed:
                raise ConversionError(
                    f"{name} in {path.name} is stored as {part.get_dtype()}; supported are "
                    f"{sorted(allowed)}. Quantised weights have to be dequantised first."
                )
            tensors[name] = Tensor(tuple(part.get_shape()), partial(opened.read, path, name))
    return tensors


class _Files:
    """Mapped safetensors files. What was read of a mapping counts as this process's memory until it
    is closed: all are, each time that OPEN_FOR bytes were read, or loading would seem to take the
    weights twice."""

    def __init__(self) -> None:
        self.handles: dict[Path, Any] = {}
        self.left = OPEN_FOR

    def handle(self, path: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        if path not in self.handles:
            try:
                self.handles[path] = safe_open(path.resolve(), framework="np")
            except (SafetensorError, OSError) as error:
                raise ConversionError(
                    f"{path} is not a complete safetensors file ({error}). Fetch it again."
                ) from None
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
