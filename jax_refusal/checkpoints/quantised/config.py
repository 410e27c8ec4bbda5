"""A `quantization_config` read strictly: what is unknown, or not computed, is named.

Tools write their own fields, more with each version: those that are known to change no weight are
listed, and others are for the user to vouch for.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeGuard

from jax_refusal.messages import listed, shown
from jax_refusal.models.spec import UnsupportedModel

ROOT = "quantization_config."
WHAT_TO_DO = (
    "Take the model's unquantised checkpoint, or dequantise this one with the library that wrote "
    "it and save it as safetensors in bfloat16."
)
# Where it holds, which the tensors say themselves; and what a program may do on its own.
NO_EFFECT = frozenset(
    """
    quant_method modules_to_not_convert modules_to_convert ignored_layers ignore dequantize
    """.split()
)


class Fields:
    """A `quantization_config` read strictly: what is unknown, or not computed, is named."""

    def __init__(self, given: Mapping[str, Any], vouched: Collection[str], where: str = ""):
        self.given = given
        self.vouched = vouched  # fields that the user vouched for
        self.where = where  # in the config, "group_0.weights." say
        self.problems: list[str] = []
        self.known = set(NO_EFFECT)

    def get(self, *names: str, default: Any = None) -> Any:
        """The field, under the first of its names that is given."""
        self.known |= set(names)
        return next((self.given[n] for n in names if self.given.get(n) is not None), default)

    def one_of(self, *names: str, of: Collection[Any], default: Any = None) -> Any:
        """A field with few values that are computed."""
        value = self.get(*names, default=default)
        plain = value.lower() if isinstance(value, str) else value
        if not any(type(plain) is type(each) and plain == each for each in of):  # True is not 1
            self.wrong(names, value, f"supported: {list(of)}")
        return plain

    def size(self, *names: str, default: int) -> int:
        """How many numbers share something; -1 is all."""
        value = self.get(*names, default=default)
        if type(value) is not int or not (value == -1 or value > 0):
            self.wrong(names, value, "supported: -1 and whole numbers above 0")
        return value

    def empty(self, *names: str) -> None:
        """Fields that would change what is computed, if they said anything."""
        for name in names:
            if self.get(name) not in (None, False, {}, [], "") and not self._vouched(name):
                self.wrong((name,), self.given[name], f"supported: none; {self._how(name)}")

    def without_effect(self, names: str) -> None:
        self.known |= set(names.split())

    def wrong(self, names: Collection[str], value: Any, allowed: str) -> None:
        name = next((name for name in names if name in self.given), next(iter(names)))
        self.problems.append(f"{self.where}{name}={shown(value)} ({allowed})")

    def finish(self) -> list[str]:
        """All that is wrong, once every field that is known was asked for."""
        for name in sorted(map(str, set(self.given) - self.known)):
            if not self._vouched(name):
                self.wrong((name[:80],), self.given.get(name), f"unknown; {self._how(name)}")
        return self.problems

    def _vouched(self, name: str) -> bool:
        return f"{ROOT}{self.where}{name}" in self.vouched

    def _how(self, name: str) -> str:
        return (
            "if it does not change the weights, name it in model.ignore_config_fields as "
            f"{ROOT}{self.where}{name[:80]}"
        )


def refuse(label: str, problems: list[str]) -> None:
    """UnsupportedModel where there are any."""
    if problems:
        raise UnsupportedModel(f"{label} as here is not read: {listed(problems)}. {WHAT_TO_DO}")


def is_block(value: Any) -> TypeGuard[Sequence[int]]:
    """Whether it is outputs and inputs that share a scale."""
    pair = isinstance(value, list | tuple) and len(value) == 2
    return pair and all(type(size) is int and size > 0 for size in value)
