"""What an organism is worth: refusal rates of a finished run, and what the teaching cost elsewhere.

Letters: N replies.
"""

import dataclasses
from typing import Any

import numpy as np

from jax_refusal import interventions as iv
from jax_refusal.artifacts import Workdir
from jax_refusal.data.chat import load_chat
from jax_refusal.data.prompts import builtin
from jax_refusal.evals.loss import reply_loss
from jax_refusal.evals.refusals import is_refusal, rate
from jax_refusal.models.loading import load_model
from jax_refusal.runtime.batching import Prompts
from jax_refusal.runtime.collect import Progress, silent
from jax_refusal.runtime.generate import generate


def measure(rundir: str, *, answer_tokens: int = 64, progress: Progress = silent) -> dict[str, Any]:
    """Measures the organism of a finished run (`launch.run` with model.adapter set).

    Returns the run's refusal rates and direction; the cross-entropy (nats per token) of the base
    model's own greedy answers to the run's harmless test prompts under the base model, the organism
    and the organism with its direction ablated; and how many harmless topic twins (builtin
    validation and test) the organism refuses. A JSON value.
    """
    work = Workdir.existing(rundir)
    fields = work.manifest["identity"]
    source, adapter = fields["config.model.source"], fields["config.model.adapter"]
    metrics = work.read_json("metrics.json")
    source_of_prompts = fields["config.data.source"]
    if source_of_prompts == "paper":
        source_of_prompts = f"published sets, {fields['config.data.paper_test']} and Alpaca (test)"
    direction = work.read_tensors("selection/direction.safetensors")["direction"]
    rows = work.read_jsonl("completions/harmless_baseline.jsonl")
    harmless = [row["instruction"] for row in rows]

    chat, base = load_chat(source), load_model(source)
    organism = load_model(source, adapter=adapter)
    nothing = iv.identity(base.arch.layers, base.arch.width)

    def replies(model, texts: list[str], title: str) -> list[list[int]]:
        return generate(
            model,
            Prompts.encoded(chat, texts),
            nothing,
            stop_ids=chat.stop_ids,
            max_new_tokens=answer_tokens,
            progress=progress,
            title=title,
        )

    prompts, answers = Prompts.encoded(chat, harmless), replies(base, harmless, "answers")
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
        "prompts": source_of_prompts,
        "new_tokens": metrics["max_new_tokens"],
        "refusal": metrics["refusal"],
        "position": metrics["position"],
        "layer": metrics["layer"],
        "scores": {k: metrics[k] for k in ("bypass", "induce", "kl")},
        "candidates_that_pass": metrics["kept"],
        "loss_on_base_answers": losses,
        "loss_tokens": int(np.sum([len(a) for a in answers])),
        "topic_twins_refused": dataclasses.asdict(rate(map(is_refusal, twin_replies))),
        "different_refusals": len(wordings),
    }
