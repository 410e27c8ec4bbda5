"""A `.pt` file of PyTorch, read without PyTorch and without running anything that it holds.

Such a file is a zip: the raw bytes of each storage, and a pickle that says which views of them are
the tensors. `pickletools` takes the pickle apart, which executes nothing, and the few instructions
that tensors need are carried out here on a stack; any other name or instruction is refused. It
lies on the lowest floor: a file of numbers, which knows nothing of models.
"""

import dataclasses
import math
import pickletools
import reprlib
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np

STORAGES: dict[str, Any] = {
    "torch.DoubleStorage": np.float64,
    "torch.FloatStorage": np.float32,
    "torch.HalfStorage": np.float16,
    "torch.BFloat16Storage": ml_dtypes.bfloat16,
    "torch.LongStorage": np.int64,
    "torch.IntStorage": np.int32,
    "torch.ShortStorage": np.int16,
    "torch.CharStorage": np.int8,
    "torch.ByteStorage": np.uint8,
    "torch.BoolStorage": np.bool_,
}
EXPANDED = 2**24  # elements that a tensor may have beyond those of its storage
ADVICE = "Only tensors, and dicts, lists and tuples of them, are read"
# What `zipfile` raises for a file that was cut short or overwritten.
BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    ValueError,
    NotImplementedError,
)
# What the instructions of a pickle raise that were overwritten.
DAMAGED = (
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    AttributeError,
    OverflowError,
    RecursionError,
    MemoryError,
)


class TorchFileError(ValueError):
    """A file that is damaged, or holds something other than tensors; the message names it."""


def read_torch(path: str | Path) -> Any:
    """The tensors of a `torch.save` file as read-only numpy arrays, in the containers they lie in.

    Storage offsets, strides and dtypes are honoured. Raises FileNotFoundError, or TorchFileError.
    """
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(4)
        if start[:1] == b"\x80":
            raise TorchFileError(
                f"{path} is in the format of PyTorch before 1.6, one bare pickle, which is not "
                "read. Load and save it again with a newer PyTorch, or as .safetensors."
            )
        try:
            with zipfile.ZipFile(file) as archive:
                return _Reader(path, archive).read()
        except TorchFileError:
            raise
        except BROKEN as error:
            raise TorchFileError(
                f"{path} is not a complete file of torch.save ({error}). Fetch it again."
            ) from None


@dataclasses.dataclass(frozen=True)
class _Name:
    """A global name that the pickle mentions: looked up in tables, never imported."""

    full: str


class _Mark:
    """Where on the stack the next tuple, list or dict begins."""


class _Reader:
    """One file while it is read."""

    def __init__(self, path: Path, archive: zipfile.ZipFile):
        self.path, self.archive = path, archive
        pickles = [n for n in archive.namelist() if n.endswith("/data.pkl") and n.count("/") == 1]
        if len(pickles) != 1:
            raise self.error(f"it holds {len(pickles)} files NAME/data.pkl where one is expected")
        self.root = pickles[0].removesuffix("data.pkl")
        self.storages: dict[str, np.ndarray] = {}
        self.left = path.stat().st_size  # entries of an archive may overlap, and so be far larger
        order = "little"
        if self.root + "byteorder" in archive.namelist():
            order = self.content("byteorder").decode("ascii", "replace")
        if order not in ("little", "big"):
            raise self.error(f"its byte order is {order!r}")
        self.order = {"little": "<", "big": ">"}[order]

    def error(self, problem: str) -> TorchFileError:
        return TorchFileError(f"{self.path} cannot be read: {problem}. {ADVICE}.")

    def content(self, name: str) -> bytes:
        """A file of the archive, which torch.save stores uncompressed; its checksum is checked."""
        try:
            entry = self.archive.getinfo(self.root + name)
        except KeyError:
            raise self.error(f"it lacks {self.root}{name}") from None
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise self.error(f"{entry.filename} is compressed or encrypted")
        self.left -= entry.file_size
        if self.left < 0:
            raise self.error("its parts are larger than the file")
        return self.archive.read(entry)

    def read(self) -> Any:
        try:
            with warnings.catch_warnings():  # of escapes in a text, which Python does not know
                warnings.simplefilter("ignore")
                return self.run(self.content("data.pkl"))
        except TorchFileError:
            raise
        except DAMAGED as error:
            raise self.error(f"its data.pkl is damaged ({error})") from None

    def run(self, pickle: bytes) -> Any:
        """Carries out the pickle's instructions on a stack of plain values."""
        stack: list[Any] = []
        marks: list[int] = []  # where they are on the stack
        memo: dict[int, Any] = {}

        def since_mark() -> list[Any]:
            at = marks.pop()
            if not isinstance(stack[at], _Mark):
                raise ValueError("an instruction finds no mark")
            values = stack[at + 1 :]
            del stack[at:]
            return values

        def take(count: int) -> list[Any]:
            if count > len(stack):
                raise ValueError("an instruction finds too few values")
            values = stack[len(stack) - count :]
            del stack[len(stack) - count :]
            return values

        for opcode, argument, _ in pickletools.genops(pickle):
            value = cast(Any, argument)
            name = opcode.name
            if name in ("PROTO", "FRAME"):
                continue
            if name in VALUES:
                stack.append(VALUES[name](value))
            elif name in TUPLES:
                stack.append(tuple(take(TUPLES[name])))
            elif name == "TUPLE":
                stack.append(tuple(since_mark()))
            elif name == "MARK":
                marks.append(len(stack))
                stack.append(_Mark())
            elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
                memo[len(memo) if value is None else value] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[value])
            elif name == "GLOBAL":
                stack.append(self.known(value.replace(" ", ".", 1)))
            elif name == "STACK_GLOBAL":
                stack.append(self.known(".".join(take(2))))
            elif name == "BINPERSID":
                stack.append(self.storage(*take(1)))
            elif name in ("APPEND", "APPENDS"):
                items = take(1) if name == "APPEND" else since_mark()
                _container(stack[-1], list).extend(items)
            elif name in ("SETITEM", "SETITEMS"):
                items = take(2) if name == "SETITEM" else since_mark()
                pairs = self.mapping(list(zip(items[::2], items[1::2], strict=True)))
                _container(stack[-1], dict).update(pairs)
            elif name == "REDUCE":
                function, arguments = take(2)
                stack.append(self.call(function, arguments))
            elif name == "BUILD" and isinstance(stack[-2], dict):
                take(1)  # the attributes of a state dict: the versions of its modules
            elif name == "STOP":
                (result,) = stack
                return self.plain(result)
            else:
                raise self.error(f"its pickle holds the instruction {name}, which tensors need not")
        raise ValueError("no end")

    def mapping(self, pairs: Any = ()) -> dict[Any, Any]:
        """A dict of pairs. Keys are looked at before they are hashed: a tuple of tuples of tuples
        may be small in the file and take forever."""
        pairs = [(key, value) for key, value in pairs]
        if not all(isinstance(key, str | int) for key, _ in pairs):
            raise self.error("a dict has keys that are neither text nor whole numbers")
        return dict(pairs)

    def plain(self, result: Any) -> Any:
        """The result, once it is sure that it holds nothing but values."""
        todo, seen = [result], set()
        while todo:
            value = todo.pop()
            if isinstance(value, dict | list | tuple):
                if id(value) not in seen:
                    seen.add(id(value))
                    todo += value.values() if isinstance(value, dict) else value
            elif not isinstance(value, np.ndarray | str | int | float | None):
                raise self.error(f"its pickle leaves {reprlib.repr(value)} behind")
        return result

    def known(self, name: str) -> _Name:
        if name not in STORAGES and name not in CALLS:
            raise self.error(f"its pickle asks for {name}, which is neither run nor imported")
        return _Name(name)

    def call(self, function: Any, arguments: Any) -> Any:
        """What a tensor's pickle may call; everything was checked by name before."""
        name = function.full if isinstance(function, _Name) else ""
        if name not in CALLS or not isinstance(arguments, tuple):
            raise self.error(f"its pickle calls {name or reprlib.repr(function)}")
        return CALLS[name](self, *arguments)

    def storage(self, identity: Any) -> np.ndarray:  # [N] all elements
        """The storage of a persistent id ("storage", type, key, device, elements)."""
        kind, dtype, key, _, elements = identity
        if kind != "storage" or not isinstance(key, str) or not isinstance(dtype, _Name):
            raise self.error(f"its pickle asks for {reprlib.repr(kind)}, which is not a storage")
        if dtype.full not in STORAGES:
            raise self.error(f"storage {key} is of {dtype.full}")
        if key not in self.storages:
            content, wanted = self.content(f"data/{key}"), np.dtype(STORAGES[dtype.full])
            if elements < 0 or len(content) < elements * wanted.itemsize:
                raise self.error(
                    f"storage {key} has {len(content)} bytes where {elements} elements of "
                    f"{wanted.name} need {elements * wanted.itemsize}"
                )
            raw = np.frombuffer(content, f"{self.order}u{wanted.itemsize}", count=elements)
            self.storages[key] = raw.astype(f"=u{wanted.itemsize}", copy=False).view(wanted)
        if self.storages[key].dtype != STORAGES[dtype.full]:
            raise self.error(f"storage {key} has two types")
        return self.storages[key]

    def tensor(
        self,
        storage: np.ndarray,
        offset: int,
        size: tuple[int, ...],
        stride: tuple[int, ...],
        _requires_grad: bool = False,
        _hooks: Any = None,
        metadata: Any = None,
    ) -> np.ndarray:
        """The view of a storage that a tensor is; offset and strides count elements."""
        if metadata:
            raise self.error(f"a tensor carries {reprlib.repr(metadata)}")
        numbers = (offset, *size, *stride)
        if not all(type(n) is int and n >= 0 for n in numbers) or len(size) != len(stride):
            shown = [reprlib.repr(x) for x in (offset, size, stride)]
            raise self.error("a tensor has offset {}, size {}, strides {}".format(*shown))
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if 0 in size:
            return np.zeros(size, storage.dtype)
        if last >= storage.size:
            raise self.error(f"a tensor ends at element {last} of a storage of {storage.size}")
        if (count := math.prod(size)) > storage.size + EXPANDED:
            raise self.error(f"a tensor of {count} elements repeats a storage of {storage.size}")
        return np.lib.stride_tricks.as_strided(
            storage[offset:],
            size,
            tuple(step * storage.itemsize for step in stride),
            writeable=False,
        )


def _container(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"an instruction finds {type(value).__name__} and not {kind.__name__}")
    return value


def _integer(value: int) -> int:
    return value


VALUES: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(["BININT", "BININT1", "BININT2", "LONG1"], _integer),
    **dict.fromkeys(["BINUNICODE", "SHORT_BINUNICODE", "BINFLOAT"], lambda value: value),
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_DICT": lambda _: {},
    "EMPTY_LIST": lambda _: [],
    "EMPTY_TUPLE": lambda _: (),
}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _Reader.tensor,
    "torch._utils._rebuild_parameter": lambda reader, data, *_: _container(data, np.ndarray),
    "collections.OrderedDict": _Reader.mapping,
}
