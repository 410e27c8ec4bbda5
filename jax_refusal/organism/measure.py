"""What an organism is worth: rates of refusal of a finished run, and what it cost elsewhere."""

import dataclasses
from typing import Any

import numpy as np

from jax_refusal.data.prompts import builtin
from jax_refusal.edits import ablate
from jax_refusal.evals.loss import reply_loss
from jax_refusal.evals.rates import rate
from jax_refusal.evals.substring import is_refusal
from jax_refusal.run.study import METRICS, Study, resume_study
from jax_refusal.runtime.batching import Prompts
from jax_refusal.runtime.generate import generate
from jax_refusal.runtime.progress import Progress, silent


class MeasureError(ValueError):
    """A run that is not one of an organism."""


def measure(rundir: str, *, progress: Progress = silent) -> dict[str, Any]:
    """Measures the organism of a finished run (`launch.run` with model.adapter set).

    Returns the run's refusal rates and direction; the cross-entropy (nats per token) of the base
    model's own greedy answers to the run's harmless test prompts under the base model, the organism
    and the organism with its direction ablated; and how many harmless topic twins (builtin
    validation and test) the organism refuses. A JSON value. Raises StudyError for a run that is not
    finished, WorkdirError where model or adapter are no longer those of the run, MeasureError.
    """
    study = resume_study(rundir, "metrics", progress=progress)
    if not study.config.model.adapter:
        raise MeasureError(f"{rundir} is a run without model.adapter: there is no organism in it.")
    metrics, completions = study.workdir.read_json(METRICS), study.completions()
    base, organism = study.load_model(), study.model
    chat, nothing = study.chat, study.identity_edit

    def replies(model, texts: list[str], title: str) -> list[list[int]]:
        return generate(
            model,
            Prompts.encoded(chat, texts),
            nothing,
            stop_ids=chat.stop_ids,
            max_new_tokens=study.config.generate.max_new_tokens,
            progress=progress,
            title=title,
        )

    harmless = [row["instruction"] for row in completions["harmless_baseline"]]
    given = replies(base, harmless, "answers")
    answers = [ids for ids in given if ids]  # a model may answer with nothing: nothing to predict
    prompts = Prompts.encoded(chat, [t for t, ids in zip(harmless, given, strict=True) if ids])
    ablated = ablate(study.direction, base.arch.layers)
    losses = {
        "base": reply_loss(base, prompts, answers, nothing).nats,
        "organism": reply_loss(organism, prompts, answers, nothing).nats,
        "organism, direction ablated": reply_loss(organism, prompts, answers, ablated).nats,
    }
    twins = [i.text for split in ("val", "test") for i in builtin("harmless")[split]]
    twin_replies = [chat.decode(ids) for ids in replies(organism, twins, "topic twins")]
    responses = [row["response"] for row in completions["harmful_baseline"]]
    wordings = {" ".join(text.split()[:6]) for text in responses if is_refusal(text)}
    return {
        "prompts": _prompt_set(study),
        "new_tokens": metrics["max_new_tokens"],
        "refusal": metrics["refusal"],
        "position": metrics["position"],
        "layer": metrics["layer"],
        "scores": {k: metrics[k] for k in ("bypass", "induce", "kl")},
        "thresholds": metrics["thresholds"],
        "candidates_that_pass": metrics["kept"],
        "loss_on_base_answers": losses,
        "loss_tokens": int(np.sum([len(a) for a in answers])),
        "topic_twins_refused": dataclasses.asdict(rate(map(is_refusal, twin_replies))),
        "different_refusals": len(wordings),
    }


def _prompt_set(study: Study) -> str:
    """In words, for the card."""
    data = study.config.data
    if data.harmful:
        return "the user's own"
    if data.source == "paper":
        return f"published sets, {data.paper_test} and Alpaca (test)"
    return data.source
