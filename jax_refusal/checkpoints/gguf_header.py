"""The header of a GGUF file: metadata and where each tensor lies, without touching the weights.

Written out here because `gguf.GGUFReader` makes several array views for each element of an array,
which takes seconds for the tokens and merges of one vocabulary. It lies on the lowest floor: the
tokenizer (data/) and the weights (models/) both start from it.
"""

import dataclasses
import mmap
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any

# GGUF value type -> struct format character; 8 is a string and 9 an array.
_SCALARS: dict[int, str] = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor's place: `kind` is its ggml type, `offset` the byte in the file it starts at."""

    name: str
    shape: tuple[int, ...]  # outermost axis first, as numpy has it
    kind: int
    offset: int


@dataclasses.dataclass(frozen=True)
class Header:
    order: str  # of the bytes, "<" or ">"
    metadata: dict[str, Any]
    tensors: tuple[TensorInfo, ...]


@lru_cache(maxsize=2)
def read_header(path: Path) -> Header:
    """Reads the header of a GGUF file (version 2 or 3, either byte order).

    Raises FileNotFoundError, or ValueError where the file is not a GGUF file or is cut short.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(
                f"{path} is not a GGUF file (it does not start with the letters GGUF); give the "
                "path of a .gguf file, or use the Hugging Face directory of this model"
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            try:
                return _parse(buffer)
            except (struct.error, KeyError, OverflowError, MemoryError, ValueError) as error:
                raise ValueError(
                    f"{path}: cannot read its header ({error}); the file may be damaged or cut "
                    "short: fetch it again"
                ) from error


def _parse(buffer: mmap.mmap) -> Header:
    # The version is a small number: read with the wrong byte order its low half is zero.
    order = "<" if struct.unpack_from("<I", buffer, 4)[0] & 0xFFFF else ">"
    version, count, pairs = struct.unpack_from(f"{order}IQQ", buffer, 4)
    if version not in (2, 3):
        raise ValueError(f"GGUF version {version} is not supported, only 2 and 3 are")
    offset, metadata = 24, {}
    for _ in range(pairs):
        key, offset = _value(buffer, offset, _STRING, order)
        (kind,) = struct.unpack_from(f"{order}I", buffer, offset)
        metadata[key], offset = _value(buffer, offset + 4, kind, order)
    tensors = []
    for _ in range(count):
        name, offset = _value(buffer, offset, _STRING, order)
        (axes,) = struct.unpack_from(f"{order}I", buffer, offset)
        *shape, kind, start = struct.unpack_from(f"{order}{axes}QIQ", buffer, offset + 4)
        offset += 4 + 8 * axes + 12
        tensors.append(TensorInfo(name, tuple(reversed(shape)), kind, start))
    alignment = metadata.get("general.alignment", 32)
    data = -(-offset // alignment) * alignment
    placed = (dataclasses.replace(tensor, offset=data + tensor.offset) for tensor in tensors)
    return Header(order, metadata, tuple(placed))


def _value(buffer: mmap.mmap, offset: int, kind: int, order: str) -> tuple[Any, int]:
    """The value of GGUF type `kind` at byte `offset`, and the offset of the byte behind it."""
    if kind == _STRING:
        (length,) = struct.unpack_from(f"{order}Q", buffer, offset)
        end = offset + 8 + length
        if end > len(buffer):  # slices past the end would come back short, not fail
            raise ValueError(f"a string of {length} bytes passes the end of the file")
        return buffer[offset + 8 : end].decode("utf-8"), end
    if kind != _ARRAY:
        layout = order + _SCALARS[kind]
        return struct.unpack_from(layout, buffer, offset)[0], offset + struct.calcsize(layout)
    item, count = struct.unpack_from(f"{order}IQ", buffer, offset)
    offset += 12
    if item in _SCALARS:
        layout = f"{order}{count}{_SCALARS[item]}"
        return list(struct.unpack_from(layout, buffer, offset)), offset + struct.calcsize(layout)
    items = []
    for _ in range(count):
        value, offset = _value(buffer, offset, item, order)
        items.append(value)
    return items, offset
