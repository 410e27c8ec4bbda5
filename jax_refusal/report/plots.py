"""The plots of the report: one score of all candidates by layer, and which were not scored.

Letters: P post-instruction tokens.
"""

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jax_refusal.study.selection import Selection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Field of a candidate -> file name, and what the axis says.
SCORES = {
    "refusal_score": ("bypass", "Refusal score on harmful prompts, direction ablated (nats)"),
    "steering_score": ("induce", "Refusal score on harmless prompts, direction added (nats)"),
    "kl_div_score": ("kl", "KL on harmless prompts, direction ablated (nats)"),
}
NOT_SCORED = "not scored"


def plot_scores(
    selection: Selection,
    score: str,
    labels: Sequence[str],  # text of each post-instruction token, first to last
    reference: float | None,  # baseline value or threshold, drawn dashed
    reference_name: str,
) -> bytes:
    """A PNG: one score by layer, a line for each position, the chosen cell marked.

    A strip below has a row for each position, with a mark where a candidate was not scored: its
    layer is pruned, its difference of means is zero, or it failed a cheaper criterion.
    """
    buffer = io.BytesIO()
    figure = score_figure(selection, score, labels, reference, reference_name)
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def score_figure(
    selection: Selection,
    score: str,
    labels: Sequence[str],
    reference: float | None,
    reference_name: str,
) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    complete = all(getattr(c, score) is not None for c in selection.table)
    strip = 0.0 if complete else 0.2 + 0.14 * len(labels)  # inches
    figure = Figure(figsize=(8, 4.5 + strip), layout="constrained")
    if complete:
        axes = lowest = figure.subplots()
    else:
        axes, lowest = figure.subplots(2, sharex=True, height_ratios=(4.5, strip))
        _draw_not_scored(lowest, selection, score, len(labels))
    _draw_scores(axes, selection, score, labels)
    if reference is not None and math.isfinite(reference):
        axes.axhline(reference, color="grey", linestyle="--", label=reference_name)
    if score == "kl_div_score":
        axes.set_yscale("symlog", linthresh=0.01)
        axes.set_ylim(bottom=0)
    axes.set_ylabel(SCORES[score][1].replace(" (nats)", "\n(nats)"))
    axes.legend(fontsize="small")
    lowest.set_xlim(-0.5, max(c.layer for c in selection.table) + 0.5)
    lowest.set_xlabel("layer")
    lowest.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _draw_scores(axes: "Axes", selection: Selection, score: str, labels: Sequence[str]) -> None:
    P = len(labels)
    for p in range(P):
        cells = [c for c in selection.table if c.position == p - P]
        points = [(c.layer, v) for c in cells if (v := getattr(c, score)) is not None]
        if points:
            # matplotlib reads $...$ as mathematics, and leading underscores as "no legend".
            label = f"{p - P}: '{labels[p]}'".replace("$", r"\$")
            axes.plot(*zip(*points, strict=True), marker=".", color=f"C{p}", label=label)
    chosen = getattr(selection.chosen, score)
    if chosen is not None:
        axes.plot(selection.layer, chosen, "k*", markersize=14, label="selected", zorder=5)


def _draw_not_scored(axes: "Axes", selection: Selection, score: str, positions: int) -> None:
    """A row for each position, the last at the bottom."""
    missing = [(c.layer, c.position) for c in selection.table if getattr(c, score) is None]
    axes.scatter(*zip(*missing, strict=True), marker="x", s=14, color="grey", label=NOT_SCORED)
    axes.set_ylim(-0.5, -positions - 0.5)
    axes.set_yticks(range(-positions, 0))
    axes.tick_params(axis="y", labelsize="x-small", length=0)
    axes.set_ylabel("position", fontsize="small")
    axes.set_title(
        f"{NOT_SCORED}: zero, or, without selection.full_grid, pruned or failed a cheaper test",
        fontsize="small",
        loc="left",
    )
    axes.set_facecolor("0.95")
