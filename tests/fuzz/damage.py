"""Random damage to files, a function of a seed."""

import copy
import json
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

CASES = int(os.environ.get("FUZZ_CASES", "150"))  # of each kind of file
SEED = int(os.environ.get("FUZZ_SEED", "0"))
LONGEST = 8000  # characters of a message

# Numbers at which bounds are, and words that JSON and pickles are made of.
NUMBERS = [0, 1, 2, 3, 7, 8, 9, 31, 32, 127, 128, 255, 256, 2**15, 2**16, 2**24]
NUMBERS += [2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
WORDS = [b"null", b"[]", b"{}", b"-1", b"1e999", b'""', b"true", b"0", b"[", b"}", b'"', b","]
WORDS += [b"NaN", b"9" * 30, b'"..\\/..\\/x"', b"\xff\xfe", b"\x00", b"(", b"t", b".", b"h\x00"]


def generators() -> Iterator[tuple[str, np.random.Generator]]:
    """One for each case, with what repeats it."""
    for case in range(CASES):
        yield f"FUZZ_SEED={SEED}, case {case}", np.random.default_rng([SEED, case])


def campaign(
    check: Callable[[np.random.Generator], None], errors: tuple[type[Exception], ...]
) -> None:
    """Raises AssertionError that names every case that ends in anything but a result or an error of
    the library, once for each place in the code."""
    read, faults = 0, dict[str, str]()
    for case, rng in generators():
        try:
            check(rng)
            read += 1
        except errors as error:
            if not 10 < len(str(error)) < LONGEST:
                faults["message"] = f"{case}: {str(error)[:200]!r}"
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            faults[f"{place.name}:{place.lineno}"] = f"{case}: {type(error).__name__}: {error}"
    assert not faults, "\n".join(f"{place} {fault[:300]}" for place, fault in faults.items())
    assert read, "no damaged file was read: the damage is too great to find anything"


def damaged(rng: np.random.Generator, content: bytes, places: Sequence[int] = ()) -> bytes:
    """The content with one to three changes. places: where most of them begin, if given."""
    found = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        end = len(found)
        at = int(rng.integers(end + 1))
        if len(places) and rng.random() < 0.7:
            at = min(int(rng.choice(places)), end)
        size = int(rng.choice([1, 2, 4, 8, 16, 40]))
        number = NUMBERS[rng.integers(len(NUMBERS))]
        other = int(rng.integers(end + 1))
        match rng.integers(8):
            case 0:
                found[at : at + 1] = bytes([rng.integers(256)])
            case 1:
                width = min(8, size)
                found[at : at + width] = (number % 256**width).to_bytes(width, "little")
            case 2:
                del found[at : at + size]
            case 3:
                found[at:at] = found[other : other + size]
            case 4:
                found[at : at + size] = found[other : other + size]
            case 5:
                word = WORDS[rng.integers(len(WORDS))]
                found[at : at + int(rng.integers(len(word) + 1))] = word
            case 6:
                found[at:at] = str(number).encode()
            case 7 if rng.random() < 0.2:
                del found[at:]
    return bytes(found)


def rearranged(rng: np.random.Generator, pieces: Sequence[bytes]) -> bytes:
    """Whole pieces, some of them lost, repeated, exchanged, or damaged."""
    found = list(pieces)
    for _ in range(rng.integers(1, 4)):
        one, other = (int(rng.integers(len(found))) for _ in range(2))
        match rng.integers(5):
            case 0 if len(found) > 1:
                del found[one]
            case 1:
                found.insert(one, found[other])
            case 2:
                found[one], found[other] = found[other], found[one]
            case 3:
                found[one] = found[other]
            case 4 if found[one]:
                found[one] = damaged(rng, found[one])
    return b"".join(found)


def any_value(rng: np.random.Generator, others: Sequence[Any]) -> Any:
    """A value as JSON knows them, one that stands elsewhere in half of all cases."""
    if rng.random() < 0.5:
        return copy.deepcopy(others[rng.integers(len(others))])
    match rng.integers(8):
        case 0:
            return NUMBERS[rng.integers(len(NUMBERS))] * int(rng.choice([1, -1]))
        case 1:
            return float(rng.choice([0.5, -1.0, 1e-30, 1e300, np.inf, -np.inf, np.nan]))
        case 2:
            return ["", "a", "..", "/tmp/x", "../x", "\0", "é" * 40, "true", "1"][rng.integers(9)]
        case 3:
            return [True, False, None][rng.integers(3)]
        case 4:
            return []
        case 5:
            return {}
        case 6:
            return copy.deepcopy([others[rng.integers(len(others))]] * int(rng.integers(1, 5)))
        case _:
            return {"a": {"b": {"c": [1]}}}


def altered(rng: np.random.Generator, whole: Any) -> Any:
    """A value of JSON with one to three of the values in it replaced, lost, added or renamed."""
    whole = copy.deepcopy(whole)
    for _ in range(rng.integers(1, 4)):
        nodes: list[Any] = [whole]
        for node in nodes:
            if isinstance(node, dict | list):
                nodes += node.values() if isinstance(node, dict) else node
        inner = [node for node in nodes if isinstance(node, dict | list) and node]
        if not inner:
            return whole
        place = inner[rng.integers(len(inner))]
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key, value = keys[rng.integers(len(keys))], any_value(rng, nodes)
        match rng.integers(5):
            case 0:
                del place[key]
            case 1 if isinstance(place, dict):
                place[str(value)[:60]] = place.pop(key)
            case 2 if isinstance(place, dict):
                place[f"{key}{'x' * int(rng.integers(2))}"] = value
            case 2:
                place.insert(key, value)
            case _:
                place[key] = value
    return whole


def as_json(rng: np.random.Generator, value: Any) -> bytes:
    """The value as JSON; one name in it stands twice in a tenth of all cases."""
    text = json.dumps(value)
    if rng.random() < 0.1 and text.startswith("{") and len(text) > 2:
        key = rng.choice(list(value))
        text = f"{{{json.dumps(str(key))}: {json.dumps(any_value(rng, [value]))}, {text[1:]}"
    return text.encode()
