"""What each stage of a study does: reads the files of the stages before, writes its own.

The order of the stages, and what is skipped, is in pipeline.py.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_refusal.data.prompts import KINDS, SPLITS
from jax_refusal.edits import ablate, add
from jax_refusal.edits import rows as edit_rows
from jax_refusal.evals import refusals
from jax_refusal.report import page
from jax_refusal.runtime.collect import mean_activations
from jax_refusal.runtime.generate import check_capacity
from jax_refusal.session import (
    CANDIDATES,
    CHOICE,
    DIRECTION,
    FILTER,
    MEANS,
    METRICS,
    REPORT,
    TOKENS,
    UNFINISHED,
    Study,
    StudyError,
)
from jax_refusal.study.directions import difference
from jax_refusal.study.scores import check_token_ids, refusal_score
from jax_refusal.study.selection import Rule, select
from jax_refusal.study.sweep import Sweep

# (kind of prompt, name of the edit, multiple of the direction added)
CONDITIONS = (
    ("harmful", "baseline", 0.0),
    ("harmful", "ablation", 0.0),
    ("harmful", "addition", -1.0),
    ("harmless", "baseline", 0.0),
    ("harmless", "addition", 1.0),
)
SIGNS = {"harmful": 1, "harmless": -1}  # of the refusal scores that the filter keeps
DISCOVERY_PROMPTS = 32  # of each kind
NO_REFUSALS = "first tokens of the refusal phrases; the model refused nothing"


def write_refusal_tokens(study: Study) -> list[str]:
    """The first tokens of a refusal: from the config, or from the model's own baseline replies."""
    for kind in KINDS:  # what is too long should be found out now, not after hours
        for split in SPLITS:
            prompts = study.encoded(study.prompts.texts(kind, split))
            if split == "test":
                check_capacity(prompts, study.config.generate.max_new_tokens, study.model.arch)
    given, text = study.config.refusal.token_ids, lambda i: study.chat.tokenizer.decode([i])
    if given:
        check_token_ids(given, study.model.arch.vocab)
        found, origin = [{"token_id": i, "text": text(i)} for i in given], "config"
    elif study.config.refusal.source == "paper" and study.chat.template is not None:
        ids = study.chat.template.refusal_ids(study.chat.tokenizer)
        found = [{"token_id": i, "text": text(i)} for i in ids]
        origin = f"the paper's, {study.chat.template_name}"
    else:
        found, origin = _discover(study), "discovered"
    if not found:
        _check_fallback(study)
        ids = {
            study.chat.tokenizer.encode(p, add_special_tokens=False)[0] for p in refusals.PHRASES
        }
        found = [{"token_id": i, "text": text(i)} for i in sorted(ids)]
        origin = NO_REFUSALS
    study.workdir.write_json(TOKENS, {"origin": origin, "tokens": found})
    return [TOKENS]


def _check_fallback(study: Study) -> None:
    """A model that refuses nothing is studied only where the config says so."""
    if study.config.selection.fallback != "least_bad":
        raise StudyError(
            f"The model refused none of the {DISCOVERY_PROMPTS} or fewer harmful training "
            "prompts, so there is no refusal to study and no refusal token to discover. Name "
            "the tokens in refusal.token_ids, or go on anyway with "
            'selection.fallback="least_bad".'
        )


def _discover(study: Study) -> list[dict[str, Any]]:
    texts = {kind: study.prompts.texts(kind, "train")[:DISCOVERY_PROMPTS] for kind in KINDS}
    every = study.replies(
        study.encoded([text for kind in KINDS for text in texts[kind]]),
        study.nothing,
        study.config.refusal.discovery_tokens,
        "refusal tokens",
    )
    replies, refused = {}, {}
    for kind in KINDS:
        replies[kind], every = every[: len(texts[kind])], every[len(texts[kind]) :]
        refused[kind] = [refusals.is_refusal(study.chat.decode(ids)) for ids in replies[kind]]
        study.log(f"{sum(refused[kind])} of {len(texts[kind])} {kind} training prompts are refused")
    firsts = {ids[0] for kind in KINDS for ids in replies[kind] if ids}
    shares = refusals.refusal_tokens(
        replies["harmful"],
        refused["harmful"],
        replies["harmless"],
        refused["harmless"],
        {i: study.chat.tokenizer.decode([i]) for i in firsts},
    )
    return [dataclasses.asdict(share) for share in shares]


def write_means(study: Study) -> list[str]:
    """Filters train and validation prompts by their score's sign, and takes the train means."""
    token_ids = jnp.array(study.token_ids, jnp.int32)
    keep_all = not study.config.data.filter
    means, record = {}, {}
    for kind in KINDS:
        record[kind] = {}
        for split in ("train", "val"):
            texts = study.prompts.texts(kind, split)
            means[kind, split], scores = mean_activations(
                study.model,
                study.encoded(texts),
                study.nothing,
                score=refusal_score,
                score_params=token_ids,
                sign=0 if keep_all else SIGNS[kind],
                progress=study.progress,
                title=f"means: {kind} {split}",
                **study.size,
            )
            assert scores is not None
            kept = [
                text
                for text, score in zip(texts, scores, strict=True)
                if keep_all or SIGNS[kind] * score > 0
            ]
            if not kept:
                raise StudyError(_nothing_kept(study, kind, split, scores))
            record[kind][split] = {
                "kept": kept,
                "of": len(texts),
                "mean_score_kept": float(
                    np.mean([s for s in scores if keep_all or SIGNS[kind] * s > 0])
                ),
                "scores": [round(float(s), 4) for s in scores],
            }
            study.log(f"{kind} {split}: {len(kept)} of {len(texts)} prompts kept")
    harmful, harmless = means["harmful", "train"], means["harmless", "train"]
    tensors = {
        "mean_harmful": harmful,
        "mean_harmless": harmless,
        "mean_diffs": difference(harmful, harmless),
    }
    study.workdir.write_tensors(MEANS, {k: v.astype(np.float32) for k, v in tensors.items()})
    study.workdir.write_json(FILTER, record)
    return [MEANS, FILTER]


def _nothing_kept(study: Study, kind: str, split: str, scores: np.ndarray) -> str:
    best = (SIGNS[kind] * scores).max() * SIGNS[kind]
    tokens = study.workdir.read_json(TOKENS)["tokens"]
    return (
        f"None of {len(scores)} {kind} {split} prompts has a refusal score "
        f"{'>' if SIGNS[kind] > 0 else '<'} 0; the nearest has {best:.3f}. The refusal tokens are "
        f"{[(t['token_id'], t['text']) for t in tokens]}: if the model refuses in other words, "
        "name them in refusal.token_ids; if it hardly refuses, set data.filter=False."
    )


def write_selection(study: Study) -> list[str]:
    """Scores the candidates and picks one by the paper's rule."""
    c = study.config.selection
    if study.workdir.read_json(TOKENS)["origin"] == NO_REFUSALS:
        _check_fallback(study)  # it may have changed since the tokens were written
    directions = study.workdir.read_tensors(MEANS)["mean_diffs"]
    sweep = Sweep(
        study.model,
        directions,
        study.encoded(study.kept("harmful", "val")),
        study.encoded(study.kept("harmless", "val")),
        study.token_ids,
        progress=study.progress,
        **study.size,
    )
    rule = Rule(study.model.arch.layers, c.kl_threshold, c.induce_threshold, c.prune_layers)
    selection = select(
        directions, sweep, rule, full_grid=c.full_grid, fallback=c.fallback, log=study.log
    )
    study.workdir.write_jsonl(CANDIDATES, map(dataclasses.asdict, selection.table))
    study.workdir.write_tensors(DIRECTION, {"direction": selection.direction})
    chosen = selection.chosen
    best = chosen.refusal_score
    margins = [
        x.refusal_score - best
        for x in selection.table
        if x.kept and x is not chosen and x.refusal_score is not None and best is not None
    ]
    study.workdir.write_json(
        CHOICE,
        {
            **dataclasses.asdict(chosen),
            "token": study.chat.position_labels[selection.position],
            "norm": float(np.linalg.norm(selection.direction)),
            "fallback": selection.fallback,
            "margin": min(margins, default=None),
        },
    )
    return [CANDIDATES, DIRECTION, CHOICE]


def write_completions(study: Study) -> list[str]:
    """Every condition's replies, judged. All are rows of one job: what refuses soon makes room."""
    g, layers = study.config.generate, study.model.arch.layers
    choice = study.selection()
    edits, row_edit, numbers, instructions = [], [], [], []
    for i, (kind, edit, coefficient) in enumerate(CONDITIONS):
        if edit == "ablation":
            edits.append(ablate(choice.direction, layers))
        elif edit == "addition":
            edits.append(add(choice.direction, layers, layer=choice.layer, coefficient=coefficient))
        else:
            edits.append(study.nothing)
        asked = getattr(study.prompts, kind)["test"]
        instructions += asked
        row_edit += [i] * len(asked)
        numbers += range(len(asked))  # a prompt is sampled with the same noise in every condition
    replies = study.kept_replies(
        UNFINISHED,
        study.encoded([i.text for i in instructions]),
        edit_rows(*edits),
        g.max_new_tokens,
        "completions",
        row_edit=row_edit,
        numbers=numbers,
        temperature=g.temperature,
        seed=g.seed,
    )
    rows = []
    for instruction, ids in zip(instructions, replies, strict=True):
        response = study.chat.decode(ids).strip()
        rows.append(
            {
                "instruction": instruction.text,
                "category": instruction.category,
                "response": response,
                "refused": refusals.is_refusal(response),
            }
        )
    files = [f"completions/{kind}_{edit}.jsonl" for kind, edit, _ in CONDITIONS]
    for i, name in enumerate(files):
        study.workdir.write_jsonl(
            name, [row for row, which in zip(rows, row_edit, strict=True) if which == i]
        )
    return files


def write_metrics(study: Study) -> list[str]:
    """Refusal rates with intervals, and what the report says of the direction."""
    study.workdir.delete(UNFINISHED)  # now that the manifest lists the completions
    selection, choice = study.selection(), study.workdir.read_json(CHOICE)
    record = study.workdir.read_json(FILTER)
    names = [f"{kind}_{edit}" for kind, edit, _ in CONDITIONS]
    rows = {name: study.workdir.read_jsonl(f"completions/{name}.jsonl") for name in names}
    kept = sorted((c for c in selection.table if c.kept), key=lambda c: c.refusal_score or 0.0)
    runner_up = next((c for c in kept if c is not selection.chosen), None)
    c = study.config
    study.workdir.write_json(
        METRICS,
        {
            "model": c.model.source + f" + {c.model.adapter}" * bool(c.model.adapter),
            "layers": len(selection.table) // len(study.chat.post_instruction),
            "position": selection.position,
            "layer": selection.layer,
            "direction_norm": choice["norm"],
            "bypass": selection.chosen.refusal_score,
            "induce": selection.chosen.steering_score,
            "kl": selection.chosen.kl_div_score,
            "thresholds": {"kl": c.selection.kl_threshold, "induce": c.selection.induce_threshold},
            "kept": len(kept),
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
            "refusal": {
                name: dataclasses.asdict(refusals.rate(row["refused"] for row in rows[name]))
                for name in names
            },
            "by_category": {
                name: {
                    k: dataclasses.asdict(v) for k, v in refusals.by_category(rows[name]).items()
                }
                for name in names
            },
        },
    )
    return [METRICS]


def write_report(study: Study) -> list[str]:
    """report.md and its three plots."""
    metrics, selection = study.workdir.read_json(METRICS), study.selection()
    labels = study.chat.position_labels
    references = {
        "refusal_score": (metrics["baseline_scores"]["harmful"], "unedited"),
        "steering_score": (metrics["thresholds"]["induce"], "threshold"),
        "kl_div_score": (metrics["thresholds"]["kl"], "threshold"),
    }
    files = [REPORT]
    for score, (name, _) in page.SCORES.items():
        files.append(f"plots/{name}.png")
        study.workdir.write(
            files[-1], page.plot_scores(selection, score, labels, *references[score])
        )
    study.workdir.write(REPORT, page.page(metrics, selection, labels).encode())
    return files
