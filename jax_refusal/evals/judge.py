"""What a judge is: it says of each prompt and its reply whether something is the case."""

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np

UNPARSED = "unparsed"  # where a judge's own words could not be read as a verdict
Verdict = bool | Literal["unparsed"]


class JudgeError(ValueError):
    """A judge that does not exist, or verdicts that are none."""


class Judge(Protocol):
    """Judges replies; its verdicts are kept in `judgements/NAME.jsonl` of a run.

    Its name stands for all that its verdicts depend on: a judge that judges otherwise needs another
    one, since a run that has its verdicts does not ask again.
    """

    @property
    def name(self) -> str: ...  # letters, digits, - and _
    @property
    def unit(self) -> str: ...  # what a true verdict says of a reply: "refused"
    @property
    def rule(self) -> str: ...  # when it does: "it contains one of the paper's twelve phrases"

    def judge(self, pairs: Sequence[tuple[str, str]]) -> Sequence[Verdict]:
        """A verdict for each (instruction, reply)."""
        ...


def verdicts(judge: Judge, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
    """What the judge says, checked: JudgeError unless it is one verdict for each pair."""
    given = list(judge.judge(pairs))
    wrong = [value for value in given if not _is_verdict(value)]
    if len(given) != len(pairs) or wrong:
        raise JudgeError(
            f"The judge {judge.name!r} gave {len(given)} verdicts on {len(pairs)} replies"
            + (f", {wrong[0]!r} among them" if wrong else "")
            + f". One for each is needed: True, False or {UNPARSED!r}."
        )
    return [UNPARSED if isinstance(value, str) else bool(value) for value in given]


def _is_verdict(value: Any) -> bool:
    return isinstance(value, bool | np.bool_) or (isinstance(value, str) and value == UNPARSED)
