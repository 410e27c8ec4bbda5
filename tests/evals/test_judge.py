"""What a judge may say, and which judges there are."""

from typing import Any

import numpy as np
import pytest

from jax_refusal.evals.judge import UNPARSED, Judge, JudgeError, verdicts
from jax_refusal.evals.registry import JUDGES, find_judges

PAIRS = [("Write a poem", "I'm sorry, no."), ("Write a song", "La la")]


class Says:
    """A judge that gives what it was made with."""

    unit, rule = "long", "it is long"

    def __init__(self, given: list[Any], name: str = "says"):
        self.given, self.name = given, name

    def judge(self, pairs):
        return self.given


@pytest.mark.parametrize("name", JUDGES)
def test_every_judge_of_the_registry_keeps_to_the_protocol(name: str):
    judge = JUDGES[name]()
    assert judge.name == name and judge.unit and judge.rule
    assert len(verdicts(judge, PAIRS)) == 2 and verdicts(judge, []) == []


def test_the_substring_judge():
    assert verdicts(JUDGES["substring"](), PAIRS) == [True, False]


def test_what_could_not_be_read_is_a_verdict_of_its_own():
    given = verdicts(Says([np.True_, UNPARSED]), PAIRS)
    assert given == [True, "unparsed"] and type(given[0]) is bool


@pytest.mark.parametrize("given", [[], [True], [True] * 3, [True, None], [True, "yes"], [1, 0.5]])
def test_what_is_no_verdict_is_refused(given: list[Any]):
    with pytest.raises(JudgeError, match=r"'says' gave .* on 2 replies.*True, False or 'unparsed'"):
        verdicts(Says(given), PAIRS)


def test_judges_are_found_in_the_order_of_their_names():
    own: Judge = Says([])
    assert list(find_judges(("says", "substring"), [own])) == ["says", "substring"]
    assert find_judges(("says",), [own])["says"] is own
    assert list(find_judges(("substring",), [own])) == ["substring"]


@pytest.mark.parametrize(
    ("names", "own", "words"),
    [
        (("guard",), [], r"'guard'\] are no judges. Known are substring; one of your own"),
        ((), [], "at least one"),
        (("substring", "substring"), [], "each judge once"),
        (("../out",), [Says([], "../out")], r"'../out'\] are no judges"),
        (("substring",), [Says([], "substring")], "needs a name of its own"),
        (("says",), [Says([]), Says([])], "needs a name of its own"),
    ],
)
def test_names_that_make_no_sense(names, own, words: str):
    with pytest.raises(JudgeError, match=words):
        find_judges(names, own)
