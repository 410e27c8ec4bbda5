"""The header of a GGUF file: metadata and where each tensor lies, without touching the weights.

Written out here because `gguf.GGUFReader` makes several array views for each element of an array,
which takes seconds for the tokens and merges of one vocabulary. It lies on the lowest floor: the
tokenizer (data/) and the weights (models/) both start from it.
"""

import dataclasses
import mmap
import re
import struct
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from jax_refusal.checkpoints.folder import inside
from jax_refusal.messages import shortened

# GGUF value type -> struct format character; 8 is a string and 9 an array.
_SCALARS: dict[int, str] = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9

# Bounds of what is read of a file before it is known to be one: far beyond any model's.
HEADER_BYTES = 2**28
ELEMENTS = 2**23  # of all arrays together
AXES = 4  # of a tensor, in ggml
ALIGNMENT = 2**16

# What a value may be: how a message calls it -> the test.
KINDS = {
    "text": lambda x: isinstance(x, str),
    "true or false": lambda x: isinstance(x, bool) or x in (0, 1),
    "a whole number that is not negative": lambda x: type(x) is int and x >= 0,
    "a finite number": lambda x: type(x) in (int, float) and abs(x) < float("inf"),
    "a list of texts": lambda x: isinstance(x, list) and all(type(y) is str for y in x),
    "a list of whole numbers": lambda x: isinstance(x, list) and all(type(y) is int for y in x),
    "a list of numbers": lambda x: isinstance(x, list) and all(type(y) in (int, float) for y in x),
}
TEXT, FLAG, COUNT, NUMBER, TEXTS, INTEGERS, NUMBERS = KINDS
# Of the metadata that are not of one architecture: what is read, and what it has to be.
FIELDS = {
    "general.architecture": TEXT,
    "general.alignment": COUNT,
    "split.no": COUNT,
    "split.count": COUNT,
    "split.tensors.count": COUNT,
    "tokenizer.ggml.model": TEXT,
    "tokenizer.ggml.pre": TEXT,
    "tokenizer.ggml.tokens": TEXTS,
    "tokenizer.ggml.token_type": INTEGERS,
    "tokenizer.ggml.scores": NUMBERS,
    "tokenizer.ggml.merges": TEXTS,
    "tokenizer.ggml.add_bos_token": FLAG,
    "tokenizer.ggml.add_eos_token": FLAG,
    "tokenizer.ggml.add_space_prefix": FLAG,
    "tokenizer.chat_template": TEXT,
    **{f"tokenizer.ggml.{each}_token_id": COUNT for each in ("bos", "eos", "unknown", "padding")},
}

# The name of a part of a model, as llama.cpp splits it.
PART = re.compile(r"(?P<name>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor's place: `kind` is its ggml type, `offset` the byte in its file it starts at."""

    name: str
    shape: tuple[int, ...]  # outermost axis first, as numpy has it
    kind: int
    offset: int
    file: Path = Path()


@dataclasses.dataclass(frozen=True)
class Header:
    order: str  # of the bytes, "<" or ">"
    metadata: dict[str, Any]
    tensors: tuple[TensorInfo, ...]
    files: tuple[Path, ...] = ()  # which it is the header of, in order


def read_header(path: Path) -> Header:
    """The header of a GGUF file (version 2 or 3, either byte order); of a model in several files,
    of which `path` is any, the header of all together.

    Raises OSError, or ValueError where a file is not a GGUF file, is cut short, or is a part of
    something else than the others.
    """
    at = path.stat()
    return _whole(path, at.st_size, at.st_mtime_ns)


@lru_cache(maxsize=2)
def _whole(path: Path, size: int, changed: int) -> Header:
    """`read_header` of a file as it is now."""
    given = _one(path)
    count = given.metadata.get("split.count", 0)
    if count <= 1:
        return given
    own = (given.metadata.get("split.no", -1) + 1, count)
    match = PART.fullmatch(path.name)
    if match is None or (int(match["number"]), int(match["count"])) != own:
        raise ValueError(
            f"{path} says that it is part {own[0]} of {count}: its name has to end in "
            f"-{own[0]:05}-of-{count:05}.gguf, and the other parts have to lie beside it"
        )
    paths = [
        inside(path.parent, f"{match['name']}-{number:05}-of-{count:05}.gguf")
        for number in range(1, count + 1)
    ]
    missing = [each.name for each in paths if not each.is_file()]
    if missing:
        raise ValueError(
            f"{path.parent} lacks {len(missing)} of the {count} parts of this model: "
            f"{shortened(missing)}; fetch them too"
        )
    return _joined([_one(each) for each in paths])


def _joined(parts: list[Header]) -> Header:
    """The header of a model in parts; ValueError for files that are not those of one model."""
    first = parts[0]
    tensors = tuple(tensor for part in parts for tensor in part.tensors)
    total = first.metadata.get("split.tensors.count")
    for number, part in enumerate(parts):
        expected = first.metadata | {"split.no": number, "split.count": len(parts)}
        # Of what describes the model the first part alone has to say everything.
        stated = {"split.no": None, "split.count": None, **part.metadata}
        differ = [key for key in stated if key in expected and stated[key] != expected[key]]
        if differ or part.order != first.order:
            raise ValueError(
                f"{part.files[0]} is not part {number + 1} of {len(parts)} of the model that "
                f"{first.files[0].name} begins: it differs in "
                f"{shortened(differ or ['the order of bytes'])}; fetch them again"
            )
    if total != len(tensors):
        raise ValueError(
            f"{first.files[0]} says that the {len(parts)} parts of this model have {total} "
            f"tensors, and they have {len(tensors)}: they are not of one model; fetch them again"
        )
    names = Counter(tensor.name for tensor in tensors)
    twice = [name for name, number in names.items() if number > 1]
    if twice:
        raise ValueError(f"the parts of {first.files[0]} hold {shortened(twice)} twice")
    return Header(first.order, first.metadata, tensors, tuple(part.files[0] for part in parts))


def _one(path: Path) -> Header:
    """The header of one file."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(
                f"{path} is not a GGUF file (it does not start with the letters GGUF); give the "
                "path of a .gguf file, or use the Hugging Face directory of this model"
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            try:
                return _parse(buffer, path)
            except (struct.error, KeyError, OverflowError, MemoryError, ValueError) as error:
                raise ValueError(
                    f"{path}: cannot read its header ({error}); the file may be damaged or cut "
                    "short: fetch it again"
                ) from error


def _parse(buffer: mmap.mmap, path: Path) -> Header:
    # The version is a small number: read with the wrong byte order its low half is zero.
    order = "<" if struct.unpack_from("<I", buffer, 4)[0] & 0xFFFF else ">"
    reader = _Reader(buffer, order)
    version, count, pairs = reader.take("IQQ")
    if version not in (2, 3):
        raise ValueError(f"GGUF version {version} is not supported, only 2 and 3 are")
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = reader.text()
        if key in metadata:
            raise ValueError(f"the field {key[:200]!r} is there twice")
        metadata[key] = reader.value(*reader.take("I"))
    for key, kind in FIELDS.items():
        checked(metadata, key, kind)
    found: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name = reader.text()
        (axes,) = reader.take("I")
        if axes > AXES:
            raise ValueError(f"the tensor {name[:200]!r} has {axes} axes, at most {AXES} are known")
        *shape, kind, start = reader.take(f"{axes}QIQ")
        if name in found:
            raise ValueError(f"the tensor {name[:200]!r} is there twice")
        found[name] = tuple(reversed(shape)), kind, start
    alignment = metadata.get("general.alignment", 32)
    if not 0 < alignment <= ALIGNMENT or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment}, not a power of two up to {ALIGNMENT}")
    data = -(-reader.at // alignment) * alignment
    infos = (TensorInfo(n, shape, kind, data + at, path) for n, (shape, kind, at) in found.items())
    return Header(order, metadata, tuple(infos), (path,))


def checked(metadata: Mapping[str, Any], key: str, kind: str) -> Any:
    """A value of the metadata, or None; ValueError for one that is not of the kind."""
    value = metadata.get(key)
    if value is not None and not KINDS[kind](value):
        raise ValueError(f"{key} is {repr(value)[:60]}, not {kind}")
    return value


class _Reader:
    """What lies in the header, one value after the other."""

    def __init__(self, buffer: mmap.mmap, order: str):
        self.buffer, self.order, self.at = buffer, order, 4
        self.left = ELEMENTS

    def take(self, layout: str) -> tuple[Any, ...]:
        """Scalars, as struct calls them."""
        layout = self.order + layout
        values = struct.unpack_from(layout, self.buffer, self.at)
        self._pass(struct.calcsize(layout))
        return values

    def text(self) -> str:
        (length,) = self.take("Q")
        start = self.at
        self._pass(length)
        return self.buffer[start : self.at].decode("utf-8")

    def value(self, kind: int, nested: bool = False) -> Any:
        """A value of a GGUF type; arrays hold arrays in no file that is known."""
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])[0]
        if kind != _ARRAY or nested:
            raise ValueError(f"there is a value of type {kind}, which is not known here")
        item, count = self.take("IQ")
        self.left -= count
        if self.left < 0:
            raise ValueError(f"arrays hold more than {ELEMENTS} elements")
        if item in _SCALARS:
            return list(self.take(f"{count}{_SCALARS[item]}"))
        return [self.value(item, nested=True) for _ in range(count)]

    def _pass(self, size: int) -> None:
        self.at += size
        if self.at > len(self.buffer):  # slices past the end would come back short, not fail
            raise ValueError(f"a value of {size} bytes passes the end of the file")
        if self.at > HEADER_BYTES:
            raise ValueError(f"the header is longer than {HEADER_BYTES} bytes")
