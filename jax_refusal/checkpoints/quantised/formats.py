"""What a way of quantising weights has to say, and a checkpoint's tensors read by it.

A quantised weight lies as several tensors, its parts: codes, scales, and what else the format
knows. A format says what the parts of one weight are called and stored as, and how they make one
tensor, which is unread until it is asked for. What the weights stand for is computed; activations
and caches are never quantised here, so that their scales are left out.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping

from jax_refusal.checkpoints.tensors import DTYPES, FLOATS, ConversionError, Tensor
from jax_refusal.messages import listed

# Scales of what flows through a model, which change no weight.
ACTIVATIONS = re.compile(
    r".*\.(input|output|activation|prob_output|q|k|v|kv)_(scale|zero_point|global_scale)(_inv)?"
)


class Parts(dict[str, Tensor]):
    """The tensors of one weight, by how their names end."""

    def need(self, *names: str) -> list[Tensor]:
        """Some of them; ValueError naming those that are not there."""
        if lacking := [name for name in names if name not in self]:
            raise ValueError(f"lacks its {' and '.join(lacking)}, where its other parts are there")
        return [self[name] for name in names]

    def with_numbers(self) -> "Parts":
        """Itself; ValueError naming those that hold none."""
        if empty := [name for name, part in self.items() if 0 in part.shape]:
            raise ValueError(f"there are no numbers in its {' and '.join(empty)}")
        return self

    def fit(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """ValueError naming those that have another shape."""
        wrong = [
            f"its {name} has shape {self[name].shape}, not {shape}"
            for name, shape in shapes.items()
            if name in self and self[name].shape != shape
        ]
        if wrong:
            raise ValueError(" and ".join(wrong))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """How the weights of one checkpoint lie, by its config."""

    label: str  # as a card calls it
    part: re.Pattern[str]  # a part's name: what its weight's begins with, and how it ends itself
    whole: str  # how the weight's name ends
    dtypes: Mapping[str, Collection[str]]  # how a part's name ends -> what it may be stored as
    build: Callable[[Parts], Tensor]  # ValueError says what is wrong
    zero_biases: bool = False  # a tool gave every layer a bias, of zeros where there is none
    plain: str = "-"  # the part that alone, in floats, is a weight that is not quantised

    def allowed(self, name: str) -> Collection[str]:
        """What a tensor of a checkpoint may be stored as."""
        if ACTIVATIONS.fullmatch(name):
            return DTYPES
        match = self.part.fullmatch(name)
        return self.dtypes[match[2]] if match else FLOATS

    def dequantised(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors with one in place of the parts of each weight, all unread.

        Raises ConversionError naming every weight that its parts do not make.
        """
        found: dict[str, Tensor] = {}
        weights: dict[str, Parts] = {}
        for name, tensor in tensors.items():
            match = self.part.fullmatch(name)
            if match:
                weights.setdefault(match[1], Parts())[match[2]] = tensor
            elif not ACTIVATIONS.fullmatch(name):
                found[name] = tensor
        problems = []
        for stem, parts in weights.items():
            name = stem + self.whole
            if name in found:
                problems.append(f"{name} is there twice, as it is and as its parts")
            elif len(parts) == 1 and (plain := parts.get(self.plain)) and plain.dtype in FLOATS:
                found[name] = plain
            else:
                try:
                    found[name] = self.build(parts.with_numbers())
                except ValueError as error:
                    problems.append(f"{name}: {error}")
        if problems:
            raise ConversionError(f"The {self.label} weights cannot be read: {listed(problems)}.")
        return found
