"""What the plots show: every candidate, scored, bounded, or with the reason why it is neither."""

import dataclasses
import math

import numpy as np
import pytest

from jax_refusal.report.plots import MARKS, SCORES, coverage, known, plot_scores, score_figure
from jax_refusal.study.selection import Rule, Selection, select

LABELS = ("<end>", "a_$b$", "\n")
P, L = len(LABELS), 10
DIRECTIONS = np.random.default_rng(0).normal(size=(P, L, 4))
DIRECTIONS[:, 0] = 0


class Scores:
    """The lower layers fail by KL, the next by induce."""

    def kl(self, cells):
        return [0.5 - 0.1 * layer if layer < 5 else 0.02 * (p + 1) for p, layer in cells]

    kl_at_least = kl

    def induce(self, cells):
        return [layer - 5.5 for _, layer in cells]

    def bypass(self, cells):
        return [-layer - p for p, layer in cells]


def selection(full_grid: bool) -> Selection:
    return select(DIRECTIONS, Scores(), Rule(L), full_grid=full_grid)


def lines(axes, of: str = "") -> dict[tuple[int, int], float]:
    """(position, layer) -> value, of the lines of scores or of those that carry a label."""
    found, position = {}, 0
    for line in axes.lines:
        label = str(line.get_label())
        position = int(label.split(":")[0]) if label[0] == "-" else position
        if label == of or (not of and label[0] == "-"):
            for layer, value in zip(line.get_xdata(), line.get_ydata(), strict=True):
                if math.isfinite(value):
                    found[position, int(layer)] = value
    return found


@pytest.mark.parametrize("score", SCORES)
def test_every_candidate_has_a_mark_that_says_what_became_of_it(score: str):
    chosen = selection(full_grid=False)
    axes, strip = score_figure(chosen, score, LABELS, 0.1, "threshold").axes
    table = {(c.position, c.layer): c for c in chosen.table}
    marked = {}
    for marks in strip.collections:
        for layer, position in np.asarray(marks.get_offsets()).tolist():
            assert (int(position), int(layer)) not in marked
            marked[int(position), int(layer)] = str(marks.get_label())
    assert marked == {cell: known(c, score)[0] for cell, c in table.items()}
    scored = {cell: getattr(c, score) for cell, c in table.items() if getattr(c, score) is not None}
    assert lines(axes) == scored and 0 < len(scored) < P * L
    assert {cell for cell, words in marked.items() if words == "scored"} == set(scored)
    pruned = [words for (_, layer), words in marked.items() if layer >= Rule(L).end]
    assert pruned == ["layer pruned"] * P * (L - Rule(L).end)
    assert strip.get_xlim() == axes.get_xlim()
    said = " ".join(strip.get_title("left").split())
    assert said == coverage(chosen, score) and f"layer pruned {len(pruned)}" in said
    assert said.startswith(f"Scored: {len(scored)} of {P * L} candidates.")


def test_a_bound_of_kl_is_drawn_apart_from_what_is_exact():
    """Layers 1 to 3 have a bound over the threshold, 4 and 5 induce too little: no more of them."""
    chosen = selection(full_grid=False)
    axes, _ = score_figure(chosen, "kl_div_score", LABELS, 0.1, "threshold").axes
    bounds, exact = lines(axes, "_at least"), lines(axes)
    assert {layer for _, layer in bounds} == {1, 2, 3, 4, 5} and not bounds.keys() & exact.keys()
    table = {(c.position, c.layer): c for c in chosen.table}
    assert bounds == {cell: table[cell].kl_at_least for cell in bounds}
    assert lines(axes, "_between") == bounds | exact
    assert "A lower bound from a few prompts: 15." in coverage(chosen, "kl_div_score")


def test_lines_join_neighbours_alone():
    """A gap between layers that were scored is no line, which would say what lies there."""
    chosen = selection(full_grid=False)
    for c in chosen.table:
        c.refusal_score = None if c.layer in (6, 8) else float(c.layer)
    axes, _ = score_figure(chosen, "refusal_score", LABELS, None, "").axes
    (first,) = [line for line in axes.lines if str(line.get_label()).startswith(f"{-P}:")]
    values = np.asarray(first.get_ydata(), float)
    assert np.isnan(values[[6, 8]]).all() and np.isfinite(values[[5, 7, 9]]).all()


def test_a_score_that_is_not_finite_is_said_to_be_so():
    chosen = selection(full_grid=True)
    c = next(c for c in chosen.table if c.layer == 9)
    c.steering_score, c.reason = math.nan, "a score is not finite"
    assert known(c, "steering_score")[0] == "not finite"
    assert "not finite 1" in coverage(chosen, "steering_score")
    score_figure(chosen, "steering_score", LABELS, 0.0, "threshold")


@pytest.mark.parametrize("score", SCORES)
def test_a_full_grid_has_nothing_that_was_not_scored_but_what_is_zero(score: str):
    chosen = selection(full_grid=True)
    _, strip = score_figure(chosen, score, LABELS, None, "").axes
    assert {str(marks.get_label()) for marks in strip.collections} == {
        "scored",
        "no difference of means",
    }
    table = [dataclasses.replace(c, **{score: 1.0}) for c in chosen.table]
    whole = dataclasses.replace(chosen, table=table)
    assert len(score_figure(whole, score, LABELS, math.nan, "").axes) == 1
    assert coverage(whole, score) == "Scored: 30 of 30 candidates."


def test_marks_differ_in_shape():
    """So that they can be told apart without colours."""
    assert len({marker for marker, _ in MARKS.values()}) == len(MARKS)


def test_a_png():
    png = plot_scores(selection(full_grid=False), "kl_div_score", LABELS, 0.1, "threshold")
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
