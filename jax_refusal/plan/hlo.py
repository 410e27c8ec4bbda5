"""What a compiled program sends between devices, read from its text.

`cost_analysis` counts the body of a loop once; here it counts as often as it runs. A loop whose
number of turns is not known when it is compiled (steps of replies) counts once.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16}  # others say how many in their names: f32, s8, u4

COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{\s*$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
OPERATION = re.compile(rf" ({'|'.join(KINDS)})(-start)?\(")
ARRAY = re.compile(r"\b(pred|bf16|[fsuc]\d+\w*)\[([\d,]*)\]")
CALLED = re.compile(
    r"\b(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)"
    r"|\b(?:branch_computations|called_computations)=\{([^}]*)\}"
)
TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# Where no count is given: a counter, which begins at 0, is less than a constant.
CONDITION = re.compile(r"\bcondition=%?([\w.-]+)")
LESS = re.compile(r" compare\([^(),]+, %?([\w.-]+)\), direction=LT")
CONSTANT = re.compile(r" constant\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange, of arrays of one shape, in one run of a program."""

    kind: str
    shape: str  # what comes out on a device: "bf16[64,8192]"
    bytes: int  # of that
    times: int

    @property
    def total(self) -> int:
        return self.bytes * self.times


def collectives(text: str) -> list[Collective]:
    """The exchanges of a program, largest first; text: of `compiled.as_text()`."""
    bodies, entry = _computations(text)
    found: collections.Counter[tuple[str, str]] = collections.Counter()
    _count(bodies, entry, 1, found)
    every = [
        Collective(kind, shape, sum(map(_bytes, shape.split(" + "))), times)
        for (kind, shape), times in found.items()
    ]
    return sorted(every, key=lambda each: -each.total)


Bodies = dict[str, dict[str, str]]  # computation -> name of an instruction -> the instruction


def _computations(text: str) -> tuple[Bodies, str]:
    """All computations, and the name of the one that is run."""
    bodies: Bodies = {}
    entry = name = ""
    for line in text.splitlines():
        if match := COMPUTATION.match(line):
            name = match[2]
            bodies[name] = {}
            entry = name if match[1] else entry
        elif name and (match := INSTRUCTION.match(line)):
            bodies[name][match[1]] = match[2]
    return bodies, entry


def _count(
    bodies: Bodies,
    name: str,
    times: int,
    found: collections.Counter[tuple[str, str]],
) -> None:
    for instruction in bodies.get(name, {}).values():
        if match := OPERATION.search(instruction):
            arrays = [
                f"{kind}[{sizes}]" for kind, sizes in ARRAY.findall(instruction[: match.start()])
            ]
            # What an asynchronous one begins with is named beside what comes out.
            if match[2] and len(arrays) > 1:
                arrays = arrays[len(arrays) // 2 :] if match[1] != "all-reduce" else arrays
            found[match[1], " + ".join(arrays)] += times
        turns = _turns(bodies, instruction)
        for called in _called(instruction):
            _count(bodies, called, times * turns, found)


def _turns(bodies: Bodies, instruction: str) -> int:
    """How often what an instruction calls is run."""
    condition = CONDITION.search(instruction)
    if condition is None:
        return 1
    if match := TURNS.search(instruction):
        return int(match[1])
    own = bodies.get(condition[1], {})
    compared = [match[1] for text in own.values() if (match := LESS.search(text))]
    constants = [match[1] for name in compared if (match := CONSTANT.search(own.get(name, "")))]
    return int(constants[0]) if len(constants) == 1 else 1


def _called(instruction: str) -> Iterator[str]:
    for one, several in CALLED.findall(instruction):
        yield from ([one] if one else [name.strip(" %") for name in several.split(",")])


def _bytes(array: str) -> int:
    match = ARRAY.match(array)
    if match is None:
        return 0
    size = 1
    for part in match[2].split(","):
        size *= int(part) if part else 1
    bits = BITS.get(match[1]) or int(re.findall(r"\d+", match[1])[0])
    return size * bits // 8
