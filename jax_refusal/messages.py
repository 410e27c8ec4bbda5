"""How error messages name what was given, however long it is."""

from collections.abc import Iterable, Sequence
from typing import Any

MOST, CHARACTERS = 20, 500  # things that one message lists, and of what length each


def listed(found: Iterable[object], between: str = "; ") -> str:
    """The first of many things that an error message has to name, and how many more there are."""
    each = [str(thing) for thing in found]
    first = [t if len(t) <= CHARACTERS else f"{t[:CHARACTERS]}..." for t in each[:MOST]]
    return between.join(first + [f"and {len(each) - MOST} more"] * (len(each) > MOST))


def shortened(names: Sequence[Any], most: int = MOST) -> str:
    """The same of a list, as Python shows one."""
    more = f" and {len(names) - most} more" * (len(names) > most)
    return f"{list(names[:most])}{more}"


def shown(value: object, characters: int = 100) -> str:
    """A value of someone else's file or flag: its repr, which may be long, or fail."""
    if isinstance(value, str) and len(value) > characters:
        return f"{value[:characters]!r}..."
    try:
        text = repr(value)
    except Exception:  # integers of thousands of digits have none
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= characters else f"{text[:characters]}..."
