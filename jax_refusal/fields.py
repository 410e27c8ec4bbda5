"""What a field of a config may be: its type, and the range or the choices that it declares.

It lies on the lowest floor: a number that comes in from a file, a flag or a call is held against
a `Range`, the one that its field declares wherever there is such a field.
"""

import dataclasses
import functools
import types
import typing
from typing import Any

import numpy as np

from jax_refusal.messages import shown

LARGEST = float(np.finfo(np.float32).max)  # what models compute with ends here
INT32 = 2**31 - 1
MANY = 10**7  # tokens, rows, prompts or devices: more than any machine has room for
SEEDS = 2**32 - 1


class ConfigError(ValueError):
    """A field that does not exist or a value that is not allowed."""


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a value may be. NaN and infinity are in none."""

    low: float = -LARGEST
    high: float = LARGEST
    above: bool = False  # low itself is left out
    below: bool = False  # high itself is left out
    also: tuple[float, ...] = ()  # single numbers outside

    def __contains__(self, value: Any) -> bool:
        # Comparisons: false for NaN, and right for integers that no float can hold.
        lost = (self.above and value == self.low) or (self.below and value == self.high)
        return value in self.also or (self.low <= value <= self.high and not lost)

    def __str__(self) -> str:
        ends = []
        if self.low == -LARGEST or self.high == LARGEST:
            ends.append("finite")
        if self.low > -LARGEST:
            ends.append(f"{'above' if self.above else 'at least'} {self.low}")
        if self.high < LARGEST:
            ends.append(f"{'below' if self.below else 'at most'} {self.high}")
        return ", or ".join([" and ".join(ends), *map(str, self.also)])


FINITE = Range()
Allowed = Range | tuple[Any, ...] | None


def number(
    default: float | tuple[float, ...] | None,
    low: float = -LARGEST,
    high: float = LARGEST,
    *,
    how: bool = False,  # says how to compute, not what: see `config.identity`
    **more: Any,  # of the Range
) -> Any:
    """A field of a config that is a number in a range, or some of them."""
    allowed = Range(low, high, **more)
    return dataclasses.field(default=default, metadata={"allowed": allowed, "identity": not how})


def choice(*allowed: str) -> Any:
    """A field of a config that is one of these, the first by default."""
    return dataclasses.field(default=allowed[0], metadata={"allowed": allowed})


@functools.cache
def declared(schema: type) -> dict[str, tuple[Any, Allowed]]:
    """Dotted field name -> its annotated type, and what it may be."""
    hints, found = typing.get_type_hints(schema), {}
    for field in dataclasses.fields(schema):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            found |= {f"{field.name}.{name}": rule for name, rule in declared(kind).items()}
        else:
            found[field.name] = kind, field.metadata.get("allowed")
    return found


def flatten(config: Any) -> dict[str, Any]:
    """Dotted field name -> value."""
    flat = {}
    for section in dataclasses.fields(config):
        value = getattr(config, section.name)
        if dataclasses.is_dataclass(value):
            flat |= {f"{section.name}.{k}": v for k, v in flatten(value).items()}
        else:
            flat[section.name] = value
    return flat


def check_values(config: Any) -> list[str]:
    """What is wrong with single values; ConfigError at once for values of a wrong type, and for
    attributes that are no fields."""
    rules, wrong = declared(type(config)), _misplaced(config)
    names = [] if wrong else rules
    flat = {name: functools.reduce(getattr, name.split("."), config) for name in names}
    wrong += [text for name, x in flat.items() if (text := _wrong_type(name, x, rules[name][0]))]
    if wrong:
        raise ConfigError("The config has values of a wrong type: " + "; ".join(wrong) + ".")
    return [text for name, x in flat.items() if (text := _not_allowed(name, x, rules[name][1]))]


def check_fields(schema: type, **values: Any) -> None:
    """The same for arguments that are named as fields of a section of a config."""
    problems = []
    for name, value in values.items():
        kind, allowed = declared(schema)[name]
        value = value.item() if isinstance(value, np.generic) else value
        problems.append(_wrong_type(name, value, kind) or _not_allowed(name, value, allowed))
    if any(problems):
        raise ConfigError("This cannot be: " + "; ".join(filter(None, problems)) + ".")


def check_number(
    name: str, value: Any, allowed: Range = FINITE, error: type[ValueError] = ConfigError
) -> None:
    """Raises `error` for what is no number of the range."""
    value = value.item() if isinstance(value, np.generic) else value
    problem = _wrong_type(name, value, float) or _not_allowed(name, value, allowed)
    if problem:
        raise error(f"This cannot be: {problem}.")


def _misplaced(config: Any, where: str = "") -> list[str]:
    """Sections of another kind, and attributes that nothing reads."""
    hints = typing.get_type_hints(type(config))
    wrong = []
    for name, value in vars(config).items():
        kind = hints.get(name)
        if kind is None:
            wrong.append(f"{where}{name}={shown(value, 80)} (there is no such field)")
        elif dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            if type(value) is not kind:
                wrong.append(f"{where}{name}={shown(value, 80)} ({kind.__name__} is needed)")
            else:
                wrong += _misplaced(value, f"{where}{name}.")
    return wrong


def _wrong_type(name: str, value: Any, kind: Any) -> str:
    if _fits(value, kind):
        return ""
    return f"{name}={shown(value, 80)} ({kind.__name__ if _plain(kind) else kind} is needed)"


def _not_allowed(name: str, value: Any, allowed: Allowed) -> str:
    parts = value if isinstance(value, tuple | list) else [value]
    if not all(_is_text(part) for part in parts if isinstance(part, str)):
        return f"{name}={shown(value, 80)} (allowed: text without NUL that UTF-8 can hold)"
    if allowed is None or all(part is None or part in allowed for part in parts):
        return ""
    named = str(allowed) if isinstance(allowed, Range) else ", ".join(allowed)
    return f"{name}={shown(value, 80)} (allowed: {named})"


def _is_text(text: str) -> bool:
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


def _plain(kind: Any) -> bool:
    return isinstance(kind, type) and not isinstance(kind, types.GenericAlias)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated type; an int is a float, and a bool is neither."""
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple | list) and all(_fits(v, parts[0]) for v in value)
    if parts:
        return any(_fits(value, part) for part in parts)
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, int | float if kind is float else kind)
