"""Hugging Face tensors to the leaves of the decoder and back, slice by slice; see `names`."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from jax_refusal import sharding
from jax_refusal.models import declaration, names
from jax_refusal.models.architecture import Architecture
from jax_refusal.models.names import NUMBERS, Row, rows
from jax_refusal.models.decoder import Transformer

FLOATS = {"F64", "F32", "F16", "BF16"}
OPEN_FOR = 2**28  # bytes that are read before the files are opened anew


class ConversionError(ValueError):
    """The tensors do not make the model that the config describes; all failures together."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor on disk: `read(slices)` returns that part of it as a numpy array."""

    shape: tuple[int, ...]
    read: Callable[[tuple[slice, ...]], np.ndarray]

    def __getitem__(self, slices: tuple[slice, ...]) -> np.ndarray:
        return self.read(slices)


def safetensors(files: list[Path], packed: bool = False) -> dict[str, Tensor]:
    """The tensors of some safetensors files, unread. packed: some of them as pairs of MXFP4."""
    tensors: dict[str, Tensor] = {}
    opened = _Files()
    for path in files:
        handle = opened.handle(path)
        for name in handle.keys():  # noqa: SIM118 (a handle, not a dict)
            part = handle.get_slice(name)
            allowed = {"U8"} if packed and names.PACKED.fullmatch(name) else FLOATS
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


def load(
    arch: Architecture,
    tensors: Mapping[str, Tensor],
    mesh: Mesh,
    dtype: np.dtype,
    *,
    donatable: bool = False,
) -> Transformer:
    """Builds the model on the mesh, reading only the slices that this process's devices need.

    donatable: a program will write over the weights. A CPU can do that only in memory of its own,
    into which it copies what was read; otherwise it computes in the memory that was read into.
    Raises ConversionError naming every missing, unused, misshapen or non-finite tensor.
    """
    tensors = names.unwrapped(arch, tensors)
    arch = names.as_stored(arch, tensors) if arch.experts else arch
    check(arch, tensors)
    broken: list[str] = []
    leaves = {}
    empty = partial(_empty, aligned=not donatable)
    for row in rows(arch):
        logical = declaration.axes(arch)[row.path]
        shape = declaration.shape(arch, logical)
        parts: dict[str, np.ndarray] = {}  # replicas of one slice are read once

        def part(index, *, row=row, shape=shape, parts=parts):
            ranges = [range(*i.indices(size)) for i, size in zip(index, shape, strict=True)]
            key = str(index)
            if key not in parts:
                parts[key] = _read(arch, tensors, row, ranges, dtype, broken, empty)
            return parts[key]

        leaves[row.path] = jax.make_array_from_callback(
            shape, sharding.named(mesh, logical, shape), part
        )
    if broken:
        raise ConversionError(
            f"Weights that are not finite (NaN or infinite): {sorted(set(broken))}."
        )
    return Transformer(arch, leaves)


def check(arch: Architecture, tensors: Mapping[str, Tensor]) -> None:
    """Every tensor there, of the right shape, and none left over."""
    expected: dict[str, tuple[int, ...]] = {}
    for row in rows(arch):
        size, count = names.full_sizes(arch, row.name), names.counts(arch, row)
        expected |= {name: size for _, name in _each(arch, row, count)}
    problems = [f"missing {name} {expected[name]}" for name in expected if name not in tensors]
    for name, tensor in tensors.items():
        if name in expected:
            if tensor.shape != expected[name]:
                problems.append(f"{name} has shape {tensor.shape}, not {expected[name]}")
        elif name == names.HEAD and arch.tied_head:
            every = (slice(None), slice(None))
            embedding = tensors.get(names.EMBEDDING)
            if embedding is None or not np.array_equal(tensor[every], embedding[every]):
                problems.append(f"{name} differs from the embedding it is said to be tied to")
        else:
            problems.append(f"unused {name} {tensor.shape}")
    if names.HEAD in expected and names.HEAD not in tensors:
        problems.append("(a head that is the embedding is said by tie_word_embeddings=true)")
    if problems:
        shown = problems[:20] + [f"and {len(problems) - 20} more"] * (len(problems) > 20)
        raise ConversionError(
            f"The checkpoint does not fit its {arch.family} config: " + "; ".join(shown) + "."
        )


def stored(model: Transformer) -> dict[str, Tensor]:
    """The model's tensors under Hugging Face's names, in its layout, in the model's dtype.

    Each is brought to the host when it is read, so that a model larger than the host's memory can
    be written shard by shard. A tied head has no tensor of its own. A text model out of a
    multimodal checkpoint is named as a text model (`model_type` of its `text_config`). Loading
    these tensors gives the same bits.
    """
    arch, leaves = model.arch, model.leaves()
    found: dict[str, Tensor] = {}
    for row in rows(arch):
        fused = names.parts(arch, row.name)
        if row != fused[0]:
            continue  # with the first part of its tensor

        def read(slices, index, fused=fused):
            pieces = [_stored(arch, leaves, part, index) for part in fused]
            if fused[0].alternates:
                return np.stack(pieces, -1).reshape(*pieces[0].shape[:-1], -1)[slices]
            return np.concatenate(pieces, names.along(fused[0]))[slices]

        for index, name in _each(arch, row, names.counts(arch, row)):
            found[name] = Tensor(names.full_sizes(arch, row.name), partial(read, index=index))
    return found


def to_hugging_face(model: Transformer) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of `stored`, read one at a time."""
    for name, tensor in stored(model).items():
        yield name, tensor[(slice(None),) * len(tensor.shape)]


def _stored(
    arch: Architecture, leaves: Mapping[str, jax.Array], row: Row, index: tuple[int, ...]
) -> np.ndarray:
    """One row's part of a tensor, as Hugging Face lays it out."""
    own = declaration.axes(arch)[row.path][len(index) :]
    block = np.asarray(leaves[row.path][index])
    order = [own.index(axis) for group in row.layout for axis in group]
    return block.transpose(order).reshape(names.sizes(arch, row))


def _each(
    arch: Architecture, row: Row, count: list[range]
) -> Iterator[tuple[tuple[int, ...], str]]:
    """The places that a row's name counts, and its name with their numbers."""
    axes = names.numbered(arch, row)
    for index in itertools.product(*count):
        places = zip(axes, index, strict=True)
        numbers = {NUMBERS[axis]: names.number(arch, axis, i) for axis, i in places}
        yield index, row.name.format(**numbers)


def _read(
    arch: Architecture,
    tensors: Mapping[str, Tensor],
    row: Row,
    ranges: list[range],  # of every axis of the leaf
    dtype: np.dtype,
    broken: list[str],
    empty: Callable[..., np.ndarray],
) -> np.ndarray:
    """One slice of a leaf; appends the names of tensors with NaN or infinity to `broken`."""
    logical = declaration.axes(arch)[row.path]
    wanted = dict(zip(logical, ranges, strict=True))
    counted = names.numbered(arch, row)
    own = logical[len(counted) :]
    # What to read of each tensor: of a dimension that holds several axes, a run of the first.
    slices = []
    for dimension, (first, *rest) in enumerate(row.layout):
        inner = math.prod(declaration.shape(arch, rest))
        start, stop = wanted[first].start * inner, wanted[first].stop * inner
        fused = dimension == names.along(row)
        slices.append(names.where(arch, row, start, stop) if fused else slice(start, stop))
    axes = [axis for group in row.layout for axis in group]
    firsts = {group[0] for group in row.layout}
    sizes = [len(wanted[a]) if a in firsts else declaration.shape(arch, [a])[0] for a in axes]
    order = [axes.index(axis) for axis in own]
    others = tuple(
        slice(None) if a in firsts else slice(wanted[a].start, wanted[a].stop) for a in own
    )
    # Filled tensor by tensor: a list of them and its stack would be two copies.
    leaf = empty([len(wanted[axis]) for axis in logical], dtype)
    places = itertools.product(*(range(len(wanted[axis])) for axis in counted))
    numbers = _each(arch, row, [wanted[axis] for axis in counted])
    for place, (_, name) in zip(places, numbers, strict=True):
        block = tensors[name][tuple(slices)].astype(dtype)
        if not np.isfinite(block.astype(np.float32) if dtype != np.float32 else block).all():
            broken.append(name)
        leaf[place] = block.reshape(sizes).transpose(order)[others]
    return leaf


def _empty(shape: list[int], dtype: np.dtype, aligned: bool) -> np.ndarray:
    """`numpy.empty` where XLA asks for arrays to begin, so that a CPU takes it as it is; or not
    there, so that it copies."""
    size, at = math.prod(shape) * dtype.itemsize, 64
    raw = np.empty(size + 2 * at, np.uint8)
    start = -raw.ctypes.data % at + (0 if aligned else dtype.itemsize)
    return raw[start : start + size].view(dtype).reshape(shape)


def numpy_dtype(name: str) -> np.dtype:
    """'float32' or 'bfloat16' as numpy knows it."""
    dtypes = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
    if name not in dtypes:
        raise ValueError(f"dtype={name!r} is not supported; supported are {sorted(dtypes)}.")
    return dtypes[name]
