"""What an organism is worth: refusal rates of a finished run, and what the teaching cost elsewhere.

Letters: N replies.
"""

import dataclasses
from functools import partial
from typing import Any

import numpy as np

from jax_refusal import config as configs
from jax_refusal import interventions as iv
from jax_refusal.artifacts import Workdir
from jax_refusal.data.chat import load_chat
from jax_refusal.data.prompts import builtin
from jax_refusal.evals.loss import reply_loss
from jax_refusal.evals.refusals import is_refusal, rate
from jax_refusal.models import lora
from jax_refusal.models.loading import load_model
from jax_refusal.runtime.batching import Prompts
from jax_refusal.runtime.generate import generate
from jax_refusal.runtime.progress import Progress, silent
from jax_refusal.sources import fingerprint, locate


class MeasureError(ValueError):
    """A run that is not one of an organism, or is not finished."""


def measure(rundir: str, *, progress: Progress = silent) -> dict[str, Any]:
    """Measures the organism of a finished run (`launch.run` with model.adapter set).

    Returns the run's refusal rates and direction; the cross-entropy (nats per token) of the base
    model's own greedy answers to the run's harmless test prompts under the base model, the organism
    and the organism with its direction ablated; and how many harmless topic twins (builtin
    validation and test) the organism refuses. A JSON value.
    """
    work = Workdir.existing(rundir)
    if not work.done("metrics"):
        raise MeasureError(f"{rundir} is not finished: run the same launch.run command again.")
    fields = {
        name.removeprefix("config."): value
        for name, value in work.manifest["identity"].items()
        if name.startswith("config.")
    }
    config = configs.from_identity(fields)
    if not config.model.adapter:
        raise MeasureError(f"{rundir} is a run without model.adapter: there is no organism in it.")
    source = locate(config.model.source)
    work.note(model=fingerprint(source), adapter=lora.fingerprint(config.model.adapter))
    metrics = work.read_json("metrics.json")
    prompt_set = config.data.source
    if config.data.harmful:
        prompt_set = "the user's own"
    elif prompt_set == "paper":
        prompt_set = f"published sets, {config.data.paper_test} and Alpaca (test)"
    direction = work.read_tensors("selection/direction.safetensors")["direction"]
    rows = work.read_jsonl("completions/harmless_baseline.jsonl")
    harmless = [row["instruction"] for row in rows]

    chat = load_chat(source, config.model.system, config.model.template)
    load = partial(
        load_model,
        source,
        config.model.dtype,
        ignore_config_fields=tuple(config.model.ignore_config_fields),
    )
    base, organism = load(), load(adapter=config.model.adapter)
    nothing = iv.identity(base.arch.layers, base.arch.width)

    def replies(model, texts: list[str], title: str) -> list[list[int]]:
        return generate(
            model,
            Prompts.encoded(chat, texts),
            nothing,
            stop_ids=chat.stop_ids,
            max_new_tokens=config.generate.max_new_tokens,
            progress=progress,
            title=title,
        )

    given = replies(base, harmless, "answers")
    answers = [ids for ids in given if ids]  # a model may answer with nothing: nothing to predict
    asked = [text for text, ids in zip(harmless, given, strict=True) if ids]
    prompts = Prompts.encoded(chat, asked)
    ablated = iv.ablate(direction, base.arch.layers)
    losses = {
        "base": reply_loss(base, prompts, answers, nothing).nats,
        "organism": reply_loss(organism, prompts, answers, nothing).nats,
        "organism, direction ablated": reply_loss(organism, prompts, answers, ablated).nats,
    }
    twins = [i.text for split in ("val", "test") for i in builtin("harmless")[split]]
    twin_replies = [chat.decode(ids) for ids in replies(organism, twins, "topic twins")]
    refused = work.read_jsonl("completions/harmful_baseline.jsonl")
    wordings = {" ".join(row["response"].split()[:6]) for row in refused if row["refused"]}
    return {
        "prompts": prompt_set,
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
