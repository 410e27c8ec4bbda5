"""Hugging Face tensors to the leaves of the decoder and back, slice by slice.

Which slice of which tensor a device needs, transposes, shape checks, missing and unused tensors,
and the way back follow from what each leaf declares; see `models.params`.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, cached_property, partial
from typing import Any, TypeVar

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from jax_refusal import sharding
from jax_refusal.checkpoints.tensors import ConversionError, Tensor
from jax_refusal.families.registry import family_of, other_modalities
from jax_refusal.messages import listed
from jax_refusal.models.decoder import Transformer
from jax_refusal.models.leaves import leaves
from jax_refusal.models.params import Leaf
from jax_refusal.models.spec import Architecture

# Buffers of old checkpoints that the config already states.
IGNORED = re.compile(
    r"(model\.layers\.\d+\.self_attn|transformer(\.h\.\d+\.attn)?)\.rotary_emb\.inv_freq"
)
# In a multimodal checkpoint: what stands for `model.` and `lm_head.` around the text model, as the
# hub's files and as newer ones have it.
PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}


@dataclasses.dataclass(frozen=True)
class TensorGroup:
    """The tensors of one name, which differ in the numbers in it alone."""

    name: str  # with {layer} and {expert} for numbers
    parts: tuple[Leaf, ...]  # what each of them holds, in order along its fused dimension

    @cached_property
    def along(self) -> int:
        """The dimension along which the parts follow each other."""
        first = self.parts[0]
        if first.split is not None:
            return first.split[0]
        return int(first.dimensions[0] == ("experts",) and len(first.dimensions) > 1)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of each whole tensor."""
        whole = list(self.parts[0].sizes)
        whole[self.along] = sum(part.sizes[self.along] for part in self.parts)
        return tuple(whole)

    @cached_property
    def names(self) -> dict[tuple[int, ...], str]:
        """Places along the axes that the name counts -> the tensor there."""
        first = self.parts[0]
        counted = len(first.counted)
        found = {}
        for place in itertools.product(*map(range, first.shape[:counted])):
            numbers = dict(zip(first.counted, place, strict=True))
            layer = first.layers[numbers["layers"]] if "layers" in numbers else None
            found[place] = self.name.format(layer=layer, expert=numbers.get("experts"))
        return found

    @cached_property
    def widths(self) -> dict[str, int]:
        """Path of a part -> entries that are its own each time that the parts follow each other."""
        along = self.along
        return {p.path: p.split[1] if p.split else p.sizes[along] for p in self.parts}

    @cached_property
    def starts(self) -> dict[str, int]:
        """Path of a part -> entries of the parts in front of it."""
        return dict(
            zip(self.widths, itertools.accumulate(self.widths.values(), initial=0), strict=False)
        )

    def where(self, part: Leaf, start: int, stop: int) -> slice:
        """Where the entries start..stop of a part lie along the fused dimension, with those of
        other parts among them unless each is one entry wide."""
        first, own, whole = self.starts[part.path], self.widths[part.path], self.period
        if part.split is None:
            return slice(first + start, first + stop)
        if whole == len(self.parts):
            return slice(whole * start + first, whole * stop, whole)
        return slice(start // own * whole, stop // own * whole)

    def own(self, part: Leaf, block: np.ndarray) -> np.ndarray:
        """What is a part's own of the entries `where` it lies."""
        if part.split is None or self.period == len(self.parts):
            return block
        start = self.starts[part.path]
        before, after = block.shape[: self.along], block.shape[self.along + 1 :]
        block = block.reshape(*before, -1, self.period, *after)
        run = slice(start, start + self.widths[part.path])
        return block[(*[slice(None)] * (self.along + 1), run)]

    @property
    def period(self) -> int:
        """Entries of all parts together, each time that they follow each other."""
        return sum(self.widths.values())


@cache
def groups(arch: Architecture) -> tuple[TensorGroup, ...]:
    """Everything that a checkpoint of this architecture holds."""
    parts: dict[tuple[tuple[int, ...], str], list[Leaf]] = {}
    for leaf in leaves(arch).values():
        parts.setdefault((leaf.layers, leaf.stored.name), []).append(leaf)
    return tuple(TensorGroup(name, tuple(found)) for (_, name), found in parts.items())


@cache
def expected(arch: Architecture) -> Mapping[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this architecture holds, with its shape."""
    return {name: group.shape for group in groups(arch) for name in group.names.values()}


AnyTensor = TypeVar("AnyTensor")


def as_stored(arch: Architecture, tensors: Mapping[str, Any]) -> Architecture:
    """The architecture, named as this checkpoint names it: experts may lie fused."""
    named = [dataclasses.replace(arch, naming=each) for each in family_of(arch).namings]
    if len(named) == 1:
        return arch
    return max(named, key=lambda arch: sum(name in tensors for name in expected(arch)))


def unwrapped(arch: Architecture, tensors: Mapping[str, AnyTensor]) -> dict[str, AnyTensor]:
    """Without what is no part of the model; the text model's own names in a multimodal one."""
    found, unread, others = {}, family_of(arch).unread, other_modalities()
    for name, tensor in tensors.items():
        if arch.wrapped:
            if name.removeprefix("model.").partition(".")[0] in others:
                continue
            prefix = next((p for p in PREFIXES if name.startswith(p)), "")
            name = PREFIXES.get(prefix, "") + name.removeprefix(prefix)
        if name in found:
            raise ConversionError(f"The checkpoint holds {name} twice, under two prefixes.")
        if not (IGNORED.fullmatch(name) or unread(arch, name)):
            found[name] = tensor
    return found


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
    tensors = unwrapped(arch, tensors)
    arch = as_stored(arch, tensors)
    check(arch, tensors)
    broken: set[str] = set()
    read = partial(_read, tensors, dtype, broken, partial(_empty, aligned=not donatable))
    arrays = {}
    for group in groups(arch):
        for leaf in group.parts:
            callback = _once(leaf.shape, partial(read, group, leaf))
            placed = sharding.named(mesh, leaf.axes, leaf.shape)
            arrays[leaf.path] = jax.make_array_from_callback(leaf.shape, placed, callback)
    if broken:
        raise ConversionError(
            f"Weights that are not finite (NaN or infinite): {listed(sorted(broken), ', ')}."
        )
    return Transformer(arch, arrays)


def _once(
    shape: tuple[int, ...], read: Callable[[list[range]], np.ndarray]
) -> Callable[[Any], np.ndarray]:
    """`read` for slices of every axis of a leaf; replicas of one slice are read once."""
    found: dict[str, np.ndarray] = {}

    def part(index: tuple[slice, ...]) -> np.ndarray:
        key = str(index)
        if key not in found:
            each = zip(index, shape, strict=True)
            found[key] = read([range(*part.indices(size)) for part, size in each])
        return found[key]

    return part


def check(arch: Architecture, tensors: Mapping[str, Tensor]) -> None:
    """Every tensor there, of the right shape, and none left over."""
    wanted = expected(arch)
    head, embedding = _head_and_embedding(arch)
    problems = [f"missing {name} {wanted[name]}" for name in wanted if name not in tensors]
    for name, tensor in tensors.items():
        if name in wanted:
            if tensor.shape != wanted[name]:
                problems.append(f"{name} has shape {tensor.shape}, not {wanted[name]}")
        elif name == head:
            every = (slice(None), slice(None))
            tied = tensors.get(embedding)
            if tied is None or not np.array_equal(tensor[every], tied[every]):
                problems.append(f"{name} differs from the embedding it is said to be tied to")
        else:
            problems.append(f"unused {name} {tensor.shape}")
    if head in wanted and head not in tensors:
        problems.append("(a head that is the embedding is said by tie_word_embeddings=true)")
    if problems:
        raise ConversionError(
            f"The checkpoint does not fit its {arch.family} config: {listed(problems)}."
        )


def _head_and_embedding(arch: Architecture) -> tuple[str, str]:
    """Their names, of a model whose head may be its embedding."""
    declared = leaves(dataclasses.replace(arch, tied_head=False))
    return declared["head"].stored.name, declared["embed"].stored.name


def stored(model: Transformer) -> dict[str, Tensor]:
    """The model's tensors under Hugging Face's names, in its layout, in the model's dtype.

    Each is brought to the host when it is read, so that a model larger than the host's memory can
    be written shard by shard. A tied head has no tensor of its own. A text model out of a
    multimodal checkpoint is named as a text model (`model_type` of its `text_config`). Loading
    these tensors gives the same bits.
    """
    arrays = model.leaves()
    return {
        name: Tensor(group.shape, partial(_written, group, arrays, place))
        for group in groups(model.arch)
        for place, name in group.names.items()
    }


def to_hugging_face(model: Transformer) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of `stored`, read one at a time."""
    for name, tensor in stored(model).items():
        yield name, tensor[(slice(None),) * len(tensor.shape)]


def _written(
    group: TensorGroup,
    arrays: Mapping[str, jax.Array],  # by path
    place: tuple[int, ...],
    slices: tuple[slice, ...],
) -> np.ndarray:
    """Part of one tensor, as Hugging Face lays it out."""
    pieces = []
    for leaf in group.parts:
        own = leaf.axes[len(leaf.counted) :]
        order = [own.index(axis) for dimension in leaf.dimensions for axis in dimension]
        piece, run = np.asarray(arrays[leaf.path][place]), group.widths[leaf.path]
        before, after = leaf.sizes[: group.along], leaf.sizes[group.along + 1 :]
        pieces.append(piece.transpose(order).reshape(*before, -1, run, *after))
    return np.concatenate(pieces, group.along + 1).reshape(group.shape)[slices]


def _read(
    tensors: Mapping[str, Tensor],
    dtype: np.dtype,
    broken: set[str],
    empty: Callable[..., np.ndarray],
    group: TensorGroup,
    leaf: Leaf,
    ranges: Sequence[range],  # of every axis of the leaf
) -> np.ndarray:
    """One slice of a leaf; adds the names of tensors with NaN or infinity to `broken`."""
    wanted = dict(zip(leaf.axes, ranges, strict=True))
    size = dict(zip(leaf.axes, leaf.shape, strict=True))
    own = leaf.axes[len(leaf.counted) :]
    # What to read of each tensor: of a dimension that holds several axes, a run of the first.
    slices = []
    for dimension, held in enumerate(leaf.dimensions):
        if not held:
            slices.append(slice(0, 1))
            continue
        first, *rest = held
        inner = math.prod(size[axis] for axis in rest)
        start, stop = wanted[first].start * inner, wanted[first].stop * inner
        fused = dimension == group.along
        slices.append(group.where(leaf, start, stop) if fused else slice(start, stop))
    axes = [axis for dimension in leaf.dimensions for axis in dimension]
    firsts = {dimension[0] for dimension in leaf.dimensions if dimension}
    sizes = [len(wanted[axis]) if axis in firsts else size[axis] for axis in axes]
    order = [axes.index(axis) for axis in own]
    others = tuple(
        slice(None) if a in firsts else slice(wanted[a].start, wanted[a].stop) for a in own
    )
    # Filled tensor by tensor: a list of them and its stack would be two copies.
    part = empty([len(wanted[axis]) for axis in leaf.axes], dtype)
    for place in itertools.product(*(wanted[axis] for axis in leaf.counted)):
        name = group.names[place]
        block = group.own(leaf, tensors[name][tuple(slices)]).astype(dtype)
        if not np.isfinite(block.astype(np.float32) if dtype != np.float32 else block).all():
            broken.add(name)
        at = tuple(i - run.start for i, run in zip(place, ranges, strict=False))
        part[at] = block.reshape(sizes).transpose(order)[others]
    return part


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
