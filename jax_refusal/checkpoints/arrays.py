"""Small files of arrays (.pt, .safetensors, .npy, .npz), and the arrays in them by name.

What a file holds may be nested: dicts, lists, and lists of numbers in place of vectors. A name is
then the way to an array, such as "15", "resid/15" or "vectors/0"; it goes on into the leading axes
of an array, so that "15" is also row 15 of one. No code of any file is run.
"""

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from jax_refusal.checkpoints.tensors import ConversionError, names_in
from jax_refusal.checkpoints.torch_pickle import TorchFileError, read_torch
from jax_refusal.messages import shortened

SUFFIXES = (".pt", ".pth", ".safetensors", ".npy", ".npz")
BYTES = 2**32  # of all arrays of a file: a grid of the largest model has a tenth
NAMES = 10_000  # that are looked through
DEEPEST = 32  # containers inside each other


class ArrayError(ValueError):
    """A file without the array that is asked for; the message says which there are."""


def read_arrays(path: Path) -> Any:
    """What a file holds: an array, or containers of arrays and other values.

    Raises ArrayError, or TorchFileError for a `.pt` file.
    """
    if (size := path.stat().st_size) > BYTES:
        raise ArrayError(f"{path} has {size} bytes; at most {BYTES} are read.")
    try:
        if path.suffix == ".safetensors":
            return _safetensors(path)
        if path.suffix == ".npy":
            return np.lib.format.open_memmap(path, mode="r")
        if path.suffix == ".npz":
            return _npz(path)
        return read_torch(path)
    except (ArrayError, TorchFileError):
        raise
    except ConversionError as error:
        raise ArrayError(str(error)) from None
    except Exception as error:  # of many kinds: numpy takes a header for a line of Python
        kind = path.suffix.removeprefix(".")
        raise ArrayError(f"{path} is not a complete {kind} file of arrays ({error}).") from None


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import safe_open

    names_in(path)  # refuses what is damaged
    with safe_open(path.resolve(), framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _npz(path: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > BYTES:
        raise ArrayError(f"{path} unpacks to {size} bytes; at most {BYTES} are read.")
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file}


def pick(found: Any, name: str, where: str | Path) -> np.ndarray:
    """The array of a name; without a name, the only one that there is.

    Raises ArrayError, which lists the names that there are.
    """
    ways = _find(found, name.split("/")) if name else [x for _, x in _leaves(found, where)]
    if len(ways) == 1:
        return ways[0]
    if name and len(ways) > 1:
        raise ArrayError(f"{where} holds {len(ways)} tensors that {name!r} may mean.")
    names = [name for name, _ in _leaves(found, where)]
    raise ArrayError(
        f"{where} holds {len(names)} tensors {shortened(names)}"
        + ": say which one" * bool(names)
        + f"; there is no {name!r}" * bool(name)
        + "."
    )


def _find(value: Any, rest: list[str]) -> list[np.ndarray]:
    """The arrays that a name may mean; keys may hold strokes themselves."""
    if not rest:
        array = _array(value)
        return [array] if array is not None else []
    if isinstance(value, dict):
        names = {"/".join(rest[:cut]): rest[cut:] for cut in range(1, len(rest) + 1)}
        ways = ((inner, names[str(key)]) for key, inner in value.items() if str(key) in names)
        return [array for way in ways for array in _find(*way)]
    if isinstance(value, list | tuple | np.ndarray) and re.fullmatch(r"-?\d{1,9}", rest[0]):
        at, length = int(rest[0]), len(value) if getattr(value, "shape", True) else 0
        return _find(value[at], rest[1:]) if -length <= at < length else []
    return []


def _leaves(value: Any, where: str | Path) -> list[tuple[str, np.ndarray]]:
    """All arrays with their names. One container may lie in many places, so that what is small in
    a file has no end."""
    found, looked = [], 0
    todo: list[tuple[tuple[Any, ...], Any]] = [((), value)]
    while todo:
        way, value = todo.pop()
        looked += 1
        if looked > NAMES or len(way) > DEEPEST:
            raise ArrayError(
                f"{where} holds more than {NAMES} values, or nests deeper than {DEEPEST} levels."
            )
        array = _array(value)
        if array is not None:
            found.append(("/".join(map(str, way)), array))
        elif isinstance(value, dict | list | tuple):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            todo += [((*way, key), inner) for key, inner in reversed(list(items))]
    return found


def _array(value: Any) -> np.ndarray | None:
    """An array of numbers with an axis, if that is what a value is."""
    if isinstance(value, list | tuple) and value and all(type(x) in (int, float) for x in value):
        try:
            value = np.array(value, np.float64)
        except OverflowError:
            return None
    if not isinstance(value, np.ndarray) or not value.ndim:
        return None
    return value if np.can_cast(value.dtype, np.float64, "same_kind") else None
