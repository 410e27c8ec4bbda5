"""Tokens that refusals begin with, on made up replies."""

import pytest

from jax_refusal.study.refusal_tokens import refusal_tokens

TEXT = {1: "I", 2: "As", 3: "Sure", 4: "The", 5: "Sorry"}


def discovered(harmful: list[tuple[int, bool]], harmless: list[tuple[int, bool]], **options):
    """Replies as (first token, refused) pairs; 0 is an empty reply."""
    halves = []
    for replies in (harmful, harmless):
        halves += [[[t, 9] if t else [] for t, _ in replies], [refused for _, refused in replies]]
    return refusal_tokens(*halves, TEXT, **options)


def test_the_tokens_that_refusals_begin_with_are_found_most_frequent_first():
    harmful = [(1, True)] * 6 + [(2, True)] * 3 + [(3, False)] * 5 + [(5, True)]
    shares = discovered(harmful, [(3, False)] * 8 + [(4, False)] * 2)
    assert [(s.token_id, s.text) for s in shares] == [(1, "I"), (2, "As"), (5, "Sorry")]
    assert [s.refusals for s in shares] == pytest.approx([0.6, 0.3, 0.1])
    assert [s.answers for s in shares] == [0, 0, 0]


def test_a_rare_token_is_left_out():
    shares = discovered([(1, True)] * 19 + [(2, True)], [(3, False)])
    assert [s.token_id for s in shares] == [1]


def test_a_token_that_answers_begin_with_too_is_left_out():
    harmful = [(1, True)] * 6 + [(2, True)] * 4
    harmless = [(2, False)] * 3 + [(3, False)] * 7  # 0.4 of refusals, 0.3 of answers
    assert [s.token_id for s in discovered(harmful, harmless)] == [1]


def test_refusals_of_harmless_prompts_are_no_answers():
    shares = discovered([(1, True)] * 4, [(1, True)] * 9 + [(3, False)])
    assert [(s.token_id, s.answers) for s in shares] == [(1, 0)]


def test_where_none_stands_out_it_is_the_most_frequent():
    shares = discovered([(1, True)] * 3 + [(2, True)], [(1, False)] * 3 + [(2, False)])
    assert [s.token_id for s in shares] == [1]


def test_no_refusals_no_tokens():
    assert discovered([(3, False), (0, True)], [(3, False)]) == []
