"""One declaration of each leaf: shape, sharding, names and layout in files, role in the stream.

Letters: L layers, D residual width.

Each mixer and branch declares its own `Param`s, beside the function that uses them. What
conversion, export, LoRA, orthogonalising and sharding know of a leaf, they read here.
"""

import dataclasses
import math
import re
from functools import cache, cached_property

from jax_refusal.models.spec import Stored

STREAM = "embed"  # the residual stream among logical axes

READS, WRITES = "reads", "writes"  # the residual stream
POST_NORM = "post_norm"  # the gain of a norm between a write and the stream
INSIDE = ""  # has no axis of the stream

Axis = tuple[str, int]  # logical name (a key of `sharding.RULES`), size


@dataclasses.dataclass(frozen=True)
class Param:
    """A leaf of one layer, or of the model beside its layers.

    Outputs come first, as in Hugging Face's linear layers (see `ops.linear`); kernels of experts
    have them last, as the product of rows that are sorted by expert takes them.
    """

    name: str
    axes: tuple[Axis, ...]
    role: str  # READS, WRITES, POST_NORM or INSIDE
    # In Hugging Face's files, behind the layer's prefix. Leaves of one name are the parts of one
    # fused tensor, in the order of their declaration along its first dimension (after that of
    # experts). `{expert}` stands for the number of an expert.
    hf: str
    # The tensor's dimensions in the leaf's axis names, where `(heads head_width)` is one dimension
    # holding both; a bar in it says that the parts follow each other within each entry of the axes
    # in front of it: `(heads | head_width)`, or `(mlp |)` for parts that alternate entry by entry.
    layout: str = ""  # "" is the axes as they are
    gguf: str = ""  # llama.cpp's name, behind `blk.N.`

    def __post_init__(self) -> None:
        if (STREAM in dict(self.axes)) != bool(self.role):
            raise ValueError(
                f"The leaf {self.name!r} has axes {[name for name, _ in self.axes]} and the role "
                f"{self.role!r}: it has a role if and only if it has the axis {STREAM!r} of the "
                f"residual stream. Say which of {[READS, WRITES, POST_NORM]} it is: an edit of the "
                "weights has to know."
            )


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A `Param` where it lies in a model: stacked on the layers of a slot, or single."""

    path: str
    param: Param
    layers: tuple[int, ...]  # of the model, along the first axis; () for what is in no layer
    stored: Stored  # its whole name, with {layer} for a number, and its layout

    @cached_property
    def axes(self) -> tuple[str, ...]:
        return ("layers",) * bool(self.layers) + tuple(name for name, _ in self.param.axes)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        stack = (len(self.layers),) if self.layers else ()
        return stack + tuple(size for _, size in self.param.axes)

    @property
    def role(self) -> str:
        return self.param.role

    @property
    def stream_axis(self) -> int:
        """Where among its axes that of the residual stream is."""
        return self.axes.index(STREAM)

    @cached_property
    def counted(self) -> tuple[str, ...]:
        """The leading axes along which each number is a tensor of its own."""
        stands = {"layers": "{layer}", "experts": "{expert}"}
        return tuple(a for a in self.axes if stands.get(a, "-") in self.stored.name)

    @cached_property
    def dimensions(self) -> tuple[tuple[str, ...], ...]:
        """Of the tensor's part, the axes that each dimension holds."""
        return _dimensions(self.stored.layout)

    @cached_property
    def split(self) -> tuple[int, int] | None:
        """Of a tensor whose parts follow each other again and again: along which dimension, and how
        many entries are this part's each time."""
        size = dict(zip(self.axes, self.shape, strict=True))
        for dimension, group in enumerate(_groups(self.stored.layout)):
            if "|" in group:
                own = group.strip("()").partition("|")[2].split()
                return dimension, math.prod(size[axis] for axis in own)
        return None

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The dimensions of the tensor's part as it is stored."""
        size = dict(zip(self.axes, self.shape, strict=True))
        return tuple(math.prod(size[axis] for axis in group) for group in self.dimensions)

    @property
    def target(self) -> str:
        """The projection that LoRA calls it by ("q_proj"), "" for what is none."""
        *_, module, kind = ("", *self.stored.name.split("."))
        matrix = kind == "weight" and len(self.dimensions) == 2
        return module if matrix and self.counted == ("layers",) else ""


@cache
def _dimensions(layout: str) -> tuple[tuple[str, ...], ...]:
    """'(heads head_width) embed' -> (('heads', 'head_width'), ('embed',))."""
    return tuple(tuple(g.strip("()").replace("|", " ").split()) for g in _groups(layout))


def _groups(layout: str) -> list[str]:
    """'(heads head_width) embed' -> ['(heads head_width)', 'embed']."""
    return re.findall(r"\([^)]*\)|\S+", layout)
