"""Random damage to files, a function of a seed."""

import os
from collections.abc import Iterator, Sequence

import numpy as np

CASES = int(os.environ.get("FUZZ_CASES", "150"))  # of each kind of file
SEED = int(os.environ.get("FUZZ_SEED", "0"))

# Numbers at which bounds are, and words that JSON and pickles are made of.
NUMBERS = [0, 1, 2, 3, 7, 8, 9, 31, 32, 127, 128, 255, 256, 2**15, 2**16, 2**24]
NUMBERS += [2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
WORDS = [b"null", b"[]", b"{}", b"-1", b"1e999", b'""', b"true", b"0", b"[", b"}", b'"', b","]
WORDS += [b"NaN", b"9" * 30, b'"..\\/..\\/x"', b"\xff\xfe", b"\x00", b"(", b"t", b".", b"h\x00"]


def generators() -> Iterator[tuple[str, np.random.Generator]]:
    """One for each case, with what repeats it."""
    for case in range(CASES):
        yield f"FUZZ_SEED={SEED}, case {case}", np.random.default_rng([SEED, case])


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
