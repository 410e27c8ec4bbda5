"""The stages of a study: each reads the files of those before it and writes its own."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_refusal.config import RunConfig
from jax_refusal.data.prompts import KINDS, SPLITS
from jax_refusal.edits import rows as edit_rows
from jax_refusal.evals.substring import PHRASES
from jax_refusal.run.results import PLOTS, write_judgements, write_metrics, write_report
from jax_refusal.run.study import (
    CANDIDATES,
    CHOICE,
    DIRECTION,
    FILTER,
    MEANS,
    METRICS,
    PARTIAL,
    REPORT,
    TOKENS,
    Study,
    StudyError,
    completions_file,
    judgements_file,
)
from jax_refusal.runtime.collect import mean_activations
from jax_refusal.runtime.generate import check_capacity
from jax_refusal.study.conditions import CONDITIONS
from jax_refusal.study.directions import difference
from jax_refusal.study.refusal_tokens import discover
from jax_refusal.study.scores import check_token_ids, refusal_score
from jax_refusal.study.selection import Rule, select
from jax_refusal.study.sweep import Sweep

SIGNS = {"harmful": 1, "harmless": -1}  # of the refusal scores that the filter keeps
DISCOVERY_PROMPTS = 32  # of each kind
NO_REFUSALS = "first tokens of the refusal phrases; the model refused nothing"


def write_refusal_tokens(study: Study) -> None:
    """The first tokens of a refusal: from the config, or from the model's own baseline replies."""
    for kind in KINDS:  # what is too long should be found out now, not after hours
        for split in SPLITS:
            prompts = study.encoded(study.instructions.texts(kind, split))
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
        ids = {study.chat.tokenizer.encode(p, add_special_tokens=False)[0] for p in PHRASES}
        found = [{"token_id": i, "text": text(i)} for i in sorted(ids)]
        origin = NO_REFUSALS
    study.workdir.write_json(TOKENS, {"origin": origin, "tokens": found})


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
    texts = {kind: study.instructions.texts(kind, "train")[:DISCOVERY_PROMPTS] for kind in KINDS}
    shares = discover(
        study.model,
        study.chat,
        texts,
        max_new_tokens=study.config.refusal.discovery_tokens,
        batch_size=study.config.generate.batch_size,
        progress=study.progress,
        log=study.log,
    )
    return [dataclasses.asdict(share) for share in shares]


def write_means(study: Study) -> None:
    """Filters train and validation prompts by their score's sign, and takes the train means."""
    token_ids = jnp.array(study.token_ids, jnp.int32)
    keep_all = not study.config.data.filter
    means, record = {}, {}
    for kind in KINDS:
        record[kind] = {}
        for split in ("train", "val"):
            texts = study.instructions.texts(kind, split)
            means[kind, split], scores = mean_activations(
                study.model,
                study.encoded(texts),
                study.identity_edit,
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


def _nothing_kept(study: Study, kind: str, split: str, scores: np.ndarray) -> str:
    best = (SIGNS[kind] * scores).max() * SIGNS[kind]
    tokens = study.workdir.read_json(TOKENS)["tokens"]
    return (
        f"None of {len(scores)} {kind} {split} prompts has a refusal score "
        f"{'>' if SIGNS[kind] > 0 else '<'} 0; the nearest has {best:.3f}. The refusal tokens are "
        f"{[(t['token_id'], t['text']) for t in tokens]}: if the model refuses in other words, "
        "name them in refusal.token_ids; if it hardly refuses, set data.filter=False."
    )


def write_selection(study: Study) -> None:
    """Scores the candidates and picks one by the paper's rule."""
    c = study.config.selection
    if study.workdir.read_json(TOKENS)["origin"] == NO_REFUSALS:
        _check_fallback(study)  # it may have changed since the tokens were written
    directions = study.workdir.read_tensors(MEANS)["mean_diffs"]
    sweep = Sweep(
        study.model,
        directions,
        study.encoded(study.filtered("harmful", "val")),
        study.encoded(study.filtered("harmless", "val")),
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


def write_completions(study: Study) -> None:
    """Every condition's replies. All are rows of one job: what refuses soon makes room."""
    g, layers = study.config.generate, study.model.arch.layers
    choice = study.selection()
    edits, row_edit, numbers, instructions = [], [], [], []
    for i, condition in enumerate(CONDITIONS):
        edits.append(condition.edit_with(choice.direction, choice.layer, layers))
        asked = getattr(study.instructions, condition.kind)["test"]
        instructions += asked
        row_edit += [i] * len(asked)
        numbers += range(len(asked))  # a prompt is sampled with the same noise in every condition
    replies = study.resumable_replies(
        PARTIAL,
        study.encoded([i.text for i in instructions]),
        edit_rows(*edits),
        g.max_new_tokens,
        "completions",
        row_edit=row_edit,
        numbers=numbers,
        temperature=g.temperature,
        seed=g.seed,
    )
    rows = [
        {
            "instruction": instruction.text,
            "category": instruction.category,
            "response": study.chat.decode(ids).strip(),
        }
        for instruction, ids in zip(instructions, replies, strict=True)
    ]
    for i, condition in enumerate(CONDITIONS):
        study.workdir.write_jsonl(
            completions_file(condition.name),
            [row for row, which in zip(rows, row_edit, strict=True) if which == i],
        )


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of a study. Its fields say what its results depend on: the stages before it, whose
    files it may read, and sections of the config."""

    name: str
    run: Callable[[Study], None]
    sections: tuple[str, ...]  # of the config, that its results depend on
    files: tuple[str, ...]  # that it writes
    # Where its sections change after it was made, it is made again; a workdir whose other stages
    # would have to be is refused, since what they hold may have taken hours.
    remade: bool = False


def stages(config: RunConfig) -> list[Stage]:
    """All stages, in order. A judge that is named last costs its own judging and a new report."""
    judging = [
        Stage(
            f"judge {name}",
            partial(write_judgements, judge=name),
            sections=(),
            files=(judgements_file(name),),
        )
        for name in config.evals.judges
    ]
    return [
        Stage("refusal tokens", write_refusal_tokens, ("model", "data", "refusal"), (TOKENS,)),
        Stage("means", write_means, ("model", "data"), (MEANS, FILTER)),
        Stage(
            "selection", write_selection, ("model", "selection"), (CANDIDATES, DIRECTION, CHOICE)
        ),
        Stage(
            "completions",
            write_completions,
            ("model", "data", "generate"),
            tuple(completions_file(condition.name) for condition in CONDITIONS),
        ),
        *judging,
        Stage("metrics", write_metrics, ("evals",), (METRICS,), remade=True),
        Stage("report", write_report, (), (REPORT, *PLOTS.values()), remade=True),
    ]


def first_use(order: Sequence[Stage]) -> dict[str, str]:
    """Config section -> the first stage that depends on it: until then it may change."""
    first: dict[str, str] = {}
    for stage in order:
        for section in stage.sections:
            first.setdefault(section, stage.name)
    return first


def remade(order: Sequence[Stage]) -> Mapping[str, list[str]]:
    """Config section that may change at any time -> the stages that are made again then."""
    names = [stage.name for stage in order]
    fixed = {section for stage in order if not stage.remade for section in stage.sections}
    return {
        section: names[names.index(first) :]
        for section, first in first_use(order).items()
        if section not in fixed
    }
