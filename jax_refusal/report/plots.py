"""The plots of the report: one score of all candidates by layer, and what became of the others.

Without `selection.full_grid` most candidates are dropped by a cheaper test before a score is
computed. So that a plot shows all of them, it draws what is known in three ways (exact, bounded
from below, not scored), and a map below has a mark for every candidate, with the reason.

Letters: P post-instruction tokens, L layers.
"""

import io
import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jax_refusal.study.selection import Candidate, Selection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Field of a candidate -> file name, and what the axis says.
SCORES = {
    "refusal_score": ("bypass", "Refusal score on harmful prompts, direction ablated (nats)"),
    "steering_score": ("induce", "Refusal score on harmless prompts, direction added (nats)"),
    "kl_div_score": ("kl", "KL on harmless prompts, direction ablated (nats)"),
}
# What is known of a candidate's score -> its mark, and whether that is hollow.
MARKS = {
    "scored": ("o", False),
    "at least": ("^", True),
    "KL too high": ("x", False),
    "induces too little": ("v", False),
    "layer pruned": ("|", False),
    "no difference of means": ("_", False),
    "not finite": ("s", False),
    "not scored": ("d", True),
}
# How the reason begins for which a candidate was dropped -> what its mark says.
REASONS = {
    "KL": "KL too high",
    "induce": "induces too little",
    "layer": "layer pruned",
    "zero": "no difference of means",
    "a score": "not finite",
}


def plot_scores(
    selection: Selection,
    score: str,
    labels: Sequence[str],  # text of each post-instruction token, first to last
    reference: float | None,  # baseline value or threshold, drawn dashed
    reference_name: str,
) -> bytes:
    """A PNG: one score by layer, a line for each position, the chosen cell marked.

    Lines join neighbouring layers, dots are joined faintly where some between them were not
    scored, and hollow triangles are lower bounds.
    """
    buffer = io.BytesIO()
    figure = score_figure(selection, score, labels, reference, reference_name)
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def known(c: Candidate, score: str) -> tuple[str, float]:
    """One of MARKS, and the value or the bound; NaN where there is neither."""
    value = getattr(c, score)
    if value is not None and math.isfinite(value):
        return "scored", value
    bound = c.kl_at_least if score == "kl_div_score" and value is None else None
    if bound is not None and math.isfinite(bound):
        return "at least", max(0.0, bound)
    reasons = [mark for start, mark in REASONS.items() if c.reason.startswith(start)]
    return next(iter(reasons), "not scored"), math.nan


def coverage(selection: Selection, score: str) -> str:
    """How many candidates have the score, and why the others do not."""
    counts = Counter(known(c, score)[0] for c in selection.table)
    text = f"Scored: {counts.pop('scored', 0)} of {len(selection.table)} candidates."
    if bounded := counts.pop("at least", 0):
        text += f" A lower bound from a few prompts: {bounded}."
    others = [f"{words} {counts[words]}" for words in MARKS if counts[words]]
    return text + f" Not scored: {', '.join(others)}." * bool(others)


def score_figure(
    selection: Selection,
    score: str,
    labels: Sequence[str],
    reference: float | None,
    reference_name: str,
) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    complete = all(known(c, score)[0] == "scored" for c in selection.table)
    strip = 0.0 if complete else 0.6 + 0.16 * len(labels)  # inches
    figure = Figure(figsize=(8, 4.5 + strip), layout="constrained")
    if complete:
        axes = lowest = figure.subplots()
    else:
        axes, lowest = figure.subplots(2, sharex=True, height_ratios=(4.5, strip))
        _draw_map(lowest, selection, score, len(labels))
    _draw_scores(axes, selection, score, labels)
    if reference is not None and math.isfinite(reference):
        axes.axhline(reference, color="grey", linestyle="--", label=reference_name)
    if score == "kl_div_score":
        axes.set_yscale("symlog", linthresh=0.01)
        axes.set_ylim(bottom=0)
    axes.set_ylabel(SCORES[score][1].replace(", ", ",\n"))
    axes.legend(fontsize="small")
    lowest.set_xlim(-0.5, max(c.layer for c in selection.table) + 0.5)
    lowest.set_xlabel("layer")
    lowest.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _draw_scores(axes: "Axes", selection: Selection, score: str, labels: Sequence[str]) -> None:
    P = len(labels)
    for p in range(P):
        cells = [c for c in selection.table if c.position == p - P]  # in the order of layers
        found = [(c.layer, *known(c, score)) for c in cells]
        layers = [layer for layer, _, _ in found]
        exact = [value if mark == "scored" else math.nan for _, mark, value in found]
        bounds = [value if mark == "at least" else math.nan for _, mark, value in found]
        there = [(layer, value) for layer, _, value in found if math.isfinite(value)]
        # matplotlib reads $...$ as mathematics, and leading underscores as "no legend".
        label = f"{p - P}: '{labels[p]}'".replace("$", r"\$")
        color = f"C{p}"
        axes.plot(layers, exact, marker="o", markersize=4, color=color, label=label)
        if there:
            faint: dict[str, Any] = {"linestyle": ":", "linewidth": 0.8, "alpha": 0.6}
            axes.plot(*zip(*there, strict=True), color=color, label="_between", **faint)
        style: dict[str, Any] = {
            "linestyle": "none",
            "marker": MARKS["at least"][0],
            "markerfacecolor": "none",
        }
        axes.plot(layers, bounds, color=color, markersize=4, label="_at least", **style)
    chosen = getattr(selection.chosen, score)
    if chosen is not None:
        axes.plot(selection.layer, chosen, "k*", markersize=14, label="selected", zorder=5)


def _draw_map(axes: "Axes", selection: Selection, score: str, positions: int) -> None:
    """A mark for every candidate: a row for each position, the last at the bottom."""
    for words, (marker, hollow) in MARKS.items():
        cells = [c for c in selection.table if known(c, score)[0] == words]
        if not cells:
            continue
        own: Any = [f"C{c.position + positions}" for c in cells]
        color = own if words in ("scored", "at least") else "grey"
        places = ([c.layer for c in cells], [c.position for c in cells])
        style: dict[str, Any] = (
            {"facecolors": "none", "edgecolors": color} if hollow else {"color": color}
        )
        axes.scatter(*places, marker=marker, s=22, linewidths=1, label=words, **style)
    axes.set_ylim(-0.5, -positions - 0.5)
    axes.set_yticks(range(-positions, 0))
    axes.tick_params(axis="y", labelsize="x-small", length=0)
    axes.set_ylabel("position", fontsize="small")
    axes.set_title(textwrap.fill(coverage(selection, score), 115), fontsize="small", loc="left")
    axes.set_facecolor("0.95")
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.45), ncols=5, fontsize="x-small", frameon=False
    )
