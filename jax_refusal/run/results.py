"""The last stages of a study: what judges say of the replies, the metrics, and the report."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax_refusal.data.prompts import KINDS
from jax_refusal.evals.judge import UNPARSED, Verdict, verdicts
from jax_refusal.evals.rates import Rate, by_category, rate
from jax_refusal.report import page, plots
from jax_refusal.run.study import (
    CHOICE,
    FILTER,
    METRICS,
    PARTIAL,
    REPORT,
    TOKENS,
    Study,
    StudyError,
    judgements_file,
)

PLOTS = {score: f"plots/{name}.png" for score, (name, _) in plots.SCORES.items()}


def write_judgements(study: Study, judge: str) -> None:
    """What one judge says of every reply."""
    study.workdir.delete(PARTIAL)  # now that the manifest lists the completions
    places, pairs = [], []
    for condition, rows in study.completions().items():
        places += [{"condition": condition, "prompt": number} for number in range(len(rows))]
        pairs += [(row["instruction"], row["response"]) for row in rows]
    given = verdicts(study.judges[judge], pairs)
    study.workdir.write_jsonl(
        judgements_file(judge),
        [place | {"verdict": value} for place, value in zip(places, given, strict=True)],
    )


def write_metrics(study: Study) -> None:
    """Rates with intervals, and what the report says of the direction."""
    selection, choice = study.selection(), study.workdir.read_json(CHOICE)
    record = study.workdir.read_json(FILTER)
    passed = sorted((c for c in selection.table if c.kept), key=lambda c: c.refusal_score or 0.0)
    runner_up = next((c for c in passed if c is not selection.chosen), None)
    c = study.config
    metrics = {
        "model": c.model.source + f" + {c.model.adapter}" * bool(c.model.adapter),
        "layers": len(selection.table) // len(study.chat.post_instruction),
        "position": selection.position,
        "layer": selection.layer,
        "direction_norm": choice["norm"],
        "bypass": selection.chosen.refusal_score,
        "induce": selection.chosen.steering_score,
        "kl": selection.chosen.kl_div_score,
        "thresholds": {"kl": c.selection.kl_threshold, "induce": c.selection.induce_threshold},
        "kept": len(passed),
        "fallback": selection.fallback,
        "margin": choice["margin"],
        "runner_up": runner_up and [runner_up.position, runner_up.layer],
        "baseline_scores": {k: record[k]["val"]["mean_score_kept"] for k in KINDS},
        "prompts": {
            f"{k} {s}": f"{len(record[k][s]['kept'])} of {record[k][s]['of']}"
            for k in KINDS
            for s in ("train", "val")
        },
        "refusal_tokens": study.workdir.read_json(TOKENS),
        "template": {
            "name": study.chat.template_name,
            "prompt": study.chat.render("{instruction}"),
            "published_positions": study.chat.template and study.chat.template.positions,
        },
        "max_new_tokens": c.generate.max_new_tokens,
    }
    study.workdir.write_json(METRICS, metrics | _judged(study))


def _judged(study: Study) -> dict[str, Any]:
    """The rates of the first judge, in all and by category, and those of every judge."""
    given = {name: study.verdicts(name) for name in study.judges}
    judges = {
        name: {
            "unit": judge.unit,
            "rule": judge.rule,
            "rates": {k: dataclasses.asdict(_rate(name, k, v)) for k, v in given[name].items()},
            "unparsed": {k: v.count(UNPARSED) for k, v in given[name].items()},
        }
        for name, judge in study.judges.items()
    }
    first, parts = next(iter(judges)), {}
    for condition, rows in study.completions().items():
        outcomes = zip((row["category"] for row in rows), given[first][condition], strict=True)
        parts[condition] = by_category((c, v is True) for c, v in outcomes if v != UNPARSED)
    return {
        "refusal": judges[first]["rates"],
        "by_category": {
            condition: {name: dataclasses.asdict(share) for name, share in shares.items()}
            for condition, shares in parts.items()
        },
        "judges": judges,
    }


def _rate(judge: str, condition: str, given: Sequence[Verdict]) -> Rate:
    """The share of true verdicts among those that could be read."""
    parsed = [verdict is True for verdict in given if verdict != UNPARSED]
    if not parsed:
        raise StudyError(
            f"The judge {judge!r} gave no verdict that could be read on the {len(given)} replies "
            f"of {condition}: see {judgements_file(judge)}, or leave it out of evals.judges."
        )
    return rate(parsed)


def write_report(study: Study) -> None:
    """report.md and its three plots."""
    metrics, selection = study.metrics(), study.selection()
    labels = study.chat.position_labels
    references = {
        "refusal_score": (metrics["baseline_scores"]["harmful"], "unedited"),
        "steering_score": (metrics["thresholds"]["induce"], "threshold"),
        "kl_div_score": (metrics["thresholds"]["kl"], "threshold"),
    }
    for score, file in PLOTS.items():
        png = plots.plot_scores(selection, score, labels, *references[score])
        study.workdir.write(file, png)
    study.workdir.write(REPORT, page.page(metrics, selection, labels).encode())
