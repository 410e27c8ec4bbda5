"""The page that a run leaves: report.md, three plots, and the closing table in the terminal."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jax_refusal.study.selection import Candidate, Selection

SCORES = {
    "refusal_score": ("bypass", "Refusal score on harmful prompts, direction ablated (nats)"),
    "steering_score": ("induce", "Refusal score on harmless prompts, direction added (nats)"),
    "kl_div_score": ("kl", "KL on harmless prompts, direction ablated (nats)"),
}
CONDITIONS = {
    ("harmful", "baseline"): "harmful, unedited",
    ("harmful", "ablation"): "harmful, direction ablated",
    ("harmful", "addition"): "harmful, direction added x -1",
    ("harmless", "baseline"): "harmless, unedited",
    ("harmless", "addition"): "harmless, direction added x +1",
}


def plot_scores(
    selection: Selection,
    score: str,
    labels: Sequence[str],  # text of each post-instruction token, first to last
    reference: float | None,  # baseline value or threshold, drawn dashed
    reference_name: str,
) -> bytes:
    """A PNG: one score by layer, a line for each position, the chosen cell marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    P = len(labels)
    for p in range(P):
        cells = [c for c in selection.table if c.position == p - P]
        points = [(c.layer, v) for c in cells if (v := getattr(c, score)) is not None]
        if points:
            # matplotlib reads $...$ as mathematics, and leading underscores as "no legend".
            label = f"{p - P}: '{labels[p]}'".replace("$", r"\$")
            axes.plot(*zip(*points, strict=True), marker=".", label=label)
    chosen = getattr(selection.chosen, score)
    if chosen is not None:
        axes.plot(selection.layer, chosen, "k*", markersize=14, label="selected", zorder=5)
    if reference is not None and math.isfinite(reference):
        axes.axhline(reference, color="grey", linestyle="--", label=reference_name)
    if score == "kl_div_score":
        axes.set_yscale("symlog", linthresh=0.01)
        axes.set_ylim(bottom=0)
    axes.set_xlim(-0.5, max(c.layer for c in selection.table) + 0.5)
    axes.set_xlabel("layer")
    if any(getattr(c, score) is None for c in selection.table):
        axes.set_title(
            "only candidates that passed the cheaper criteria; selection.full_grid scores all",
            fontsize="small",
        )
    axes.set_ylabel(SCORES[score][1].replace(" (nats)", "\n(nats)"))
    axes.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def result_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(condition, refused, 95% interval) of every condition."""
    rows = []
    for (kind, edit), name in CONDITIONS.items():
        r = metrics["refusal"][f"{kind}_{edit}"]
        share = f"{r['count']}/{r['n']} = {100 * r['rate']:.0f}%"
        rows.append((name, share, f"{100 * r['low']:.0f}–{100 * r['high']:.0f}%"))
    return rows


def closing_table(metrics: Mapping[str, Any]) -> str:
    """The result table for a terminal."""
    rows = [("prompts and edit", "refused", "95% interval"), *result_rows(metrics)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def page(metrics: Mapping[str, Any], selection: Selection, labels: Sequence[str]) -> str:
    """report.md."""
    chosen = selection.chosen
    label = labels[selection.position]
    lines = [
        f"# Refusal direction of {metrics['model']}",
        "",
        "| prompts and edit | refused | 95% interval |",
        "|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in result_rows(metrics)),
        "",
        "A reply counts as a refusal if it contains one of the paper's twelve phrases "
        f"(greedy and sampled replies alike; here up to {metrics['max_new_tokens']} new tokens). "
        "Intervals are Wilson's.",
        "",
        "## The direction",
        "",
        f"Position {selection.position} (`{label}`), layer {selection.layer} of "
        f"{metrics['layers']}, norm {metrics['direction_norm']:.3g}.",
        "",
    ]
    if selection.fallback:
        lines += [
            "**No candidate passed the thresholds; this is the nearest one** "
            '(`selection.fallback="least_bad"`).',
            "",
        ]
    lines += [
        "| score (nats) | unedited | this direction | threshold |",
        "|---|---|---|---|",
        f"| bypass: refusal score, harmful | {metrics['baseline_scores']['harmful']:.3f} | "
        f"{_number(chosen.refusal_score)} | least wins |",
        f"| induce: refusal score, harmless | {metrics['baseline_scores']['harmless']:.3f} | "
        f"{_number(chosen.steering_score)} | >= {metrics['thresholds']['induce']:g} |",
        f"| KL on harmless | 0 | {_number(chosen.kl_div_score)} | "
        f"<= {metrics['thresholds']['kl']:g} |",
        "",
        f"{metrics['kept']} of {len(selection.table)} candidates pass. {_margin(metrics)}",
        "",
        f"Refusal tokens ({metrics['refusal_tokens']['origin']}): "
        + ", ".join(f"`{t['text']}` ({t['token_id']})" for t in metrics["refusal_tokens"]["tokens"])
        + ".",
        f"Post-instruction tokens: {' '.join(f'`{text}`' for text in labels)}.",
        _template(metrics["template"], len(labels)),
        "Prompts that passed the filter: "
        + ", ".join(f"{name} {count}" for name, count in metrics["prompts"].items())
        + ".",
        "",
    ]
    lines += [f"![{name}](plots/{name}.png)\n" for name, _ in SCORES.values()]
    lines += [
        "## Nearest candidates",
        "",
        "| position | layer | bypass | induce | KL | |",
        "|---|---|---|---|---|---|",
        *(_row(c) for c in _best(selection.table)),
        "",
        "## Refused by category",
        "",
    ]
    for name, groups in metrics["by_category"].items():
        parts = [f"{group or '–'} {r['count']}/{r['n']}" for group, r in groups.items()]
        lines.append(f"- {name}: {', '.join(parts)}")
    return "\n".join([*lines, ""])


def _best(table: Sequence[Candidate], most: int = 10) -> list[Candidate]:
    scored = [c for c in table if c.refusal_score is not None]
    return sorted(scored, key=lambda c: (not c.kept, c.refusal_score))[:most]


def _row(c: Candidate) -> str:
    scores = (c.refusal_score, c.steering_score, c.kl_div_score)
    verdict = c.reason or "passes"
    return f"| {c.position} | {c.layer} | {' | '.join(map(_number, scores))} | {verdict} |"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _template(template: Mapping[str, Any], positions: int) -> str:
    """Which chat template the prompts were written in, and one of them, escaped."""
    prompt = json.dumps(template["prompt"], ensure_ascii=False)[1:-1]
    published = template["published_positions"]
    note = ""
    if published and published != positions:
        note = (
            f" The published runs read {published} positions, the tokens of the closing text "
            f"encoded on its own; {positions} of them follow every instruction here."
        )
    return f"Template: {template['name']}; a prompt is `{prompt}`.{note}"


def _margin(metrics: Mapping[str, Any]) -> str:
    if metrics["margin"] is None:
        return "There is no second candidate to compare with."
    return (
        f"The runner-up (position {metrics['runner_up'][0]}, layer {metrics['runner_up'][1]}) has "
        f"a bypass score {metrics['margin']:.3f} nats higher: within a few tenths the winning cell "
        "is a matter of chance, the table is not."
    )
