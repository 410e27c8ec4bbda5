"""The page that a run leaves: report.md, and the closing table in the terminal."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jax_refusal.report.plots import SCORES, coverage
from jax_refusal.study.conditions import CONDITIONS
from jax_refusal.study.selection import Candidate, Selection


def result_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(condition, refused, 95% interval) of every condition."""
    return [(c.title, *_share(metrics["refusal"][c.name])) for c in CONDITIONS]


def _share(rate: Mapping[str, Any]) -> tuple[str, str]:
    """A rate and its 95% interval."""
    share = f"{rate['count']}/{rate['n']} = {100 * rate['rate']:.0f}%"
    return share, f"{100 * rate['low']:.0f}–{100 * rate['high']:.0f}%"


def closing_table(metrics: Mapping[str, Any]) -> str:
    """The result table for a terminal."""
    rows = [("prompts and edit", _first(metrics)["unit"], "95% interval"), *result_rows(metrics)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def page(metrics: Mapping[str, Any], selection: Selection, labels: Sequence[str]) -> str:
    """report.md."""
    first = _first(metrics)
    lines = [
        f"# Refusal direction of {metrics['model']}",
        "",
        *_table(first, result_rows(metrics)),
        "",
        f"A reply counts as {first['unit']} if {first['rule']} "
        f"(greedy and sampled replies alike; here up to {metrics['max_new_tokens']} new tokens). "
        f"Intervals are Wilson's.{_unparsed(first)}",
        "",
        *_other_judges(metrics),
        *_direction(metrics, selection, labels),
    ]
    for score, (name, axis) in SCORES.items():
        text = coverage(selection, score)
        lines += [f"![{axis}, by layer](plots/{name}.png)", "", f"*{name}*: {text}", ""]
    lines += [
        "## Nearest candidates",
        "",
        "| position | layer | bypass | induce | KL | |",
        "|---|---|---|---|---|---|",
        *(_row(c) for c in _best(selection.table)),
        "",
        f"## {first['unit'].capitalize()} by category",
        "",
    ]
    for name, groups in metrics["by_category"].items():
        parts = [f"{group or '–'} {r['count']}/{r['n']}" for group, r in groups.items()]
        lines.append(f"- {name}: {', '.join(parts)}")
    return "\n".join([*lines, ""])


def _first(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    """What there is of the first judge."""
    return next(iter(metrics["judges"].values()))


def _table(judge: Mapping[str, Any], rows: Sequence[Sequence[str]]) -> list[str]:
    head = f"| prompts and edit | {judge['unit']} | 95% interval |"
    return [head, "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]


def _unparsed(judge: Mapping[str, Any]) -> str:
    count = sum(judge["unparsed"].values())
    return f" {count} verdicts could not be read and are counted nowhere." * bool(count)


def _other_judges(metrics: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, judge in list(metrics["judges"].items())[1:]:
        lines += [
            f"## Judge: {name}",
            "",
            *_table(judge, [(c.title, *_share(judge["rates"][c.name])) for c in CONDITIONS]),
            "",
            f"A reply counts as {judge['unit']} if {judge['rule']}.{_unparsed(judge)}",
            "",
        ]
    return lines


def _direction(
    metrics: Mapping[str, Any], selection: Selection, labels: Sequence[str]
) -> list[str]:
    """Which direction was chosen, its scores, and what they were measured on."""
    chosen, label = selection.chosen, labels[selection.position]
    lines = [
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
    return lines


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
