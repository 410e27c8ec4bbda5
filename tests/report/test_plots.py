"""What the plots show: every candidate, scored or not."""

import math

import numpy as np
import pytest

from jax_refusal.report.plots import NOT_SCORED, SCORES, plot_scores, score_figure
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


@pytest.mark.parametrize("score", SCORES)
def test_every_candidate_is_drawn_once_as_scored_or_as_not(score: str):
    chosen = selection(full_grid=False)
    figure = score_figure(chosen, score, LABELS, 0.1, "threshold")
    axes, strip = figure.axes
    drawn = {}
    for line in axes.lines:
        label = str(line.get_label())
        if label[0] == "-":
            position = int(label.split(":")[0])
            for layer, value in zip(line.get_xdata(), line.get_ydata(), strict=True):
                drawn[position, int(layer)] = value
    (marks,) = strip.collections
    missing = [(int(position), int(layer)) for layer, position in marks.get_offsets().tolist()]
    table = {(c.position, c.layer): getattr(c, score) for c in chosen.table}
    assert drawn == {cell: value for cell, value in table.items() if value is not None}
    assert sorted(missing) == sorted(cell for cell, value in table.items() if value is None)
    assert len(missing) == len(set(missing)) >= P * (L - Rule(L).end)  # the pruned layers
    assert NOT_SCORED in strip.get_title("left") and strip.get_xlim() == axes.get_xlim()


@pytest.mark.parametrize("score", SCORES)
def test_a_full_grid_has_nothing_that_was_not_scored_but_what_is_zero(score: str):
    chosen = selection(full_grid=True)
    figure = score_figure(chosen, score, LABELS, None, "")
    (marks,) = figure.axes[1].collections
    assert {layer for layer, _ in marks.get_offsets().tolist()} == {0}
    for c in chosen.table:
        setattr(c, score, 1.0)
    assert len(score_figure(chosen, score, LABELS, math.nan, "").axes) == 1


def test_a_png():
    png = plot_scores(selection(full_grid=False), "kl_div_score", LABELS, 0.1, "threshold")
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
