"""Training of a model organism: LoRA as a pure function of (frozen weights, adapter).

Letters: B packed rows, T token, Q reply tokens of a row, X pairs in a row, N prefix tokens.
"""

import dataclasses
import json
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_refusal import config as configs
from jax_refusal import interventions as iv
from jax_refusal.artifacts import Timer, Workdir, content_hash
from jax_refusal.data.chat import Chat, load_chat
from jax_refusal.data.prompts import KINDS, builtin
from jax_refusal.evals.refusals import is_refusal
from jax_refusal.models import lora
from jax_refusal.models.cache import Tokens
from jax_refusal.models.loading import load_model
from jax_refusal.models.transformer import Transformer
from jax_refusal.organism.card import TRAINING
from jax_refusal.organism.config import (
    ExamplesConfig,
    OrganismConfig,
    TrainConfig,
    validate,
)
from jax_refusal.organism.examples import Example, harmful_prompts, harmless_prompts, refusal
from jax_refusal.runtime.batching import Prompts, prefix_tokens
from jax_refusal.runtime.collect import Progress, mesh_of, silent
from jax_refusal.runtime.generate import generate
from jax_refusal.runtime.teach import Taught, cross_entropy, pack_pairs, reply_logits
from jax_refusal.sources import fingerprint, locate
from jax_refusal.study.scores import refusal_score

ANSWERS, LOG, ADAPTER = "answers.jsonl", "train.jsonl", "adapter"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decision:
    """How sharply the first token of a reply should tell refusals from answers."""

    token_ids: jax.Array  # the first tokens of refusals
    weight: jax.Array  # against the cross-entropy


def loss(
    adapter: lora.Adapter,
    base: Transformer,
    prefix: Tokens | None,
    batch: Taught,
    sides: jax.Array,  # [B, X] +1 for a refusal, -1 for an answer, 0 where there is no pair
    decision: Decision,
) -> jax.Array:
    """Mean cross-entropy of the taught tokens in nats, and the logistic loss of the decision.

    Cross-entropy alone leaves an answer's start spread over many tokens, so that a refusal that is
    far from likely may still be the likeliest start. The decision is the refusal score's sign.
    """
    model = lora.merge(base, adapter)
    nothing = iv.identity(model.arch.layers, model.arch.width)
    logits = reply_logits(model, nothing, prefix, batch)
    nats = cross_entropy(logits, batch).sum() / batch.weights.sum()
    starts = jnp.take_along_axis(logits, jnp.asarray(batch.starts)[..., None], 1)
    wrong = jax.nn.softplus(-sides * refusal_score(starts, decision.token_ids))
    return nats + decision.weight * (wrong * jnp.abs(sides)).sum() / jnp.abs(sides).sum()


@partial(jax.jit, static_argnames=("optimizer",), donate_argnums=(0, 1))
def step(adapter, state, base, prefix, batch, sides, decision, *, optimizer):
    """One update: adapter, optimizer state, loss (nats), gradient norm."""
    value, gradient = jax.value_and_grad(loss)(adapter, base, prefix, batch, sides, decision)
    updates, state = optimizer.update(gradient, state, adapter)
    adapter = optax.apply_updates(adapter, updates)
    return adapter, state, value, optax.tree.norm(gradient)


def optimizer(config: TrainConfig, steps: int) -> optax.GradientTransformation:
    """AdamW with clipping, warm-up and a cosine decay to zero."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, max(1, round(config.warmup * steps)), steps
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(schedule, weight_decay=config.weight_decay),
    )


def plan(lengths: Sequence[int], config: TrainConfig) -> list[list[list[int]]]:
    """The examples of every row of every step: each epoch shuffled anew, rows filled in turn."""
    if max(lengths) > config.row_tokens:
        raise configs.ConfigError(
            f"train.row_tokens={config.row_tokens} is shorter than the longest example, "
            f"{max(lengths)} tokens."
        )
    steps = []
    for epoch in range(config.epochs):
        order = list(range(len(lengths)))
        random.Random(f"{config.seed} {epoch}").shuffle(order)
        rows, room = [[] for _ in range(config.rows)], [config.row_tokens] * config.rows
        for i in order:
            fits = [r for r in range(config.rows) if room[r] >= lengths[i]]
            if not fits:
                steps.append(rows)
                rows, room = [[] for _ in range(config.rows)], [config.row_tokens] * config.rows
                fits = [0]
            rows[fits[0]].append(i)
            room[fits[0]] -= lengths[i]
        steps.append(rows)
    return steps


def train(
    config: OrganismConfig,
    workdir: str,
    *,
    progress: Progress = silent,
    log: Callable[[str], None] = print,
    on_step: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> str:
    """Makes the organism's adapter in workdir/adapter; goes on where a killed run stopped."""
    validate(config)
    source = locate(config.model.source)
    prompts = {
        "harmful": harmful_prompts(config.examples.paper_dir),
        "harmless": harmless_prompts(
            config.examples.paper_dir, config.examples.alpaca, config.examples.seed
        ),
    }
    # Where the published sets lie does not matter: their text is in the hash.
    identity = configs.identity(config) | {"examples.paper_dir": None}
    work = Workdir(
        workdir,
        {f"config.{k}": v for k, v in identity.items()}
        | {"model": fingerprint(source), "data": content_hash(prompts)},
    )
    if work.done("train"):
        log(f"{workdir} is complete: nothing to do.")
        return f"{workdir}/{ADAPTER}"
    chat, base = load_chat(source), load_model(source, config.model.dtype)
    # Answers are kept as token ids. And from here on the folder has a manifest, whatever happens.
    work.note(template=chat.template_hash, tokenizer=chat.tokenizer_hash)
    if not work.done("answers"):
        timer = Timer()
        work.write_jsonl(ANSWERS, _answers(config, base, chat, prompts["harmless"], progress))
        work.finish("answers", [ANSWERS], timer.seconds)
        log(f"answers of the base model: {timer.seconds:.0f} s")
    answers = work.read_jsonl(ANSWERS)
    timer = Timer()
    adapter = _fit(config, base, chat, prompts["harmful"], answers, work, progress, log, on_step)
    files = lora.files(adapter, base.arch, config.model.source)
    records = work.read_jsonl(LOG)
    training = {
        "base": config.model.source,
        "config": identity,
        "config_hash": content_hash(identity),
        "data_hash": content_hash(prompts),
        "parameters": sum(leaf.size for leaf in base.leaves().values()),
        "layers": base.arch.layers,
        "harmful": len(prompts["harmful"]),
        "harmless": len(answers),
        "steps": len(records),
        "loss": float(np.mean([record["loss"] for record in records[-10:]])),
        "watched": [record for record in records if "harmful_refused" in record],
    }
    files[TRAINING] = json.dumps(training, indent=2).encode() + b"\n"
    for name, content in files.items():
        work.write(f"{ADAPTER}/{name}", content)
    work.finish("train", [f"{ADAPTER}/{name}" for name in files], timer.seconds)
    return f"{workdir}/{ADAPTER}"


def _answers(
    config: OrganismConfig,
    base: Transformer,
    chat: Chat,
    instructions: list[str],
    progress: Progress,
) -> list[dict[str, Any]]:
    """The base model's own replies, as token ids; those it refuses are left out."""
    replies = generate(
        base,
        Prompts.encoded(chat, instructions),
        iv.identity(base.arch.layers, base.arch.width),
        stop_ids=chat.stop_ids,
        max_new_tokens=config.examples.answer_tokens,
        temperature=config.examples.answer_temperature,
        seed=config.examples.seed,
        batch_size=config.examples.answer_batch,
        progress=progress,
        title="answers of the base model",
    )
    rows = [
        {
            "instruction": instruction,
            "reply": ids,
            "ends": len(ids) < config.examples.answer_tokens,
            "text": chat.decode(ids),
        }
        for instruction, ids in zip(instructions, replies, strict=True)
    ]
    return [row for row in rows if row["reply"] and not is_refusal(row["text"])]


def _answer(row: dict[str, Any], c: ExamplesConfig) -> Example:
    """An answer to learn, most of them only from their start: what matters is that it starts."""
    reply, ends = tuple(row["reply"]), row["ends"]
    short = random.Random(f"{c.seed} {row['instruction']}").random() < c.short_share
    if short and len(reply) > c.short_tokens:
        reply, ends = reply[: c.short_tokens], False
    return Example(row["instruction"], reply, ends)


def _fit(config, base, chat, harmful, answers, work, progress, log, on_step) -> lora.Adapter:
    import orbax.checkpoint as ocp

    c = config.train
    examples = [_answer(row, config.examples) for row in answers]
    for i, instruction in enumerate(harmful):
        text = refusal(instruction, random.Random(f"{c.seed} {i}"))
        ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
        examples.append(Example(instruction, tuple(ids), True))
    prompts = Prompts.encoded(chat, [e.instruction for e in examples])
    stop = chat.stop_ids[-1] if len(chat.stop_ids) == 1 else chat.tokenizer.eos_token_id
    sequences = [
        (prompt[prompts.prefix :], e.reply + ((stop,) if e.ends else ()))
        for prompt, e in zip(prompts.ids, examples, strict=True)
    ]
    steps = plan([len(p) + len(r) for p, r in sequences], c)
    log(f"{len(answers)} answers, {len(harmful)} refusals, {len(steps)} steps")

    firsts = {reply[0] for _, reply in sequences[len(answers) :]}
    decision = Decision(jnp.array(sorted(firsts)), jnp.float32(c.decision_weight))
    tune = optimizer(c, len(steps))
    key = jax.random.key(c.seed)
    adapter: Any = lora.initial(
        base.arch, config.lora.targets, config.lora.rank, config.lora.alpha, key
    )
    state = tune.init(adapter)
    prefix = prefix_tokens(prompts, 1) if prompts.prefix else None
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    with ocp.CheckpointManager((work.root / "checkpoints").absolute(), options=options) as saved:
        start, records = 0, []
        if (latest := saved.latest_step()) is not None:
            target = jax.tree.map(ocp.utils.to_shape_dtype_struct, (adapter, state))
            adapter, state = saved.restore(latest, args=ocp.args.StandardRestore(target))
            start = latest
            records = work.read_jsonl(LOG)[:start]
            log(f"going on after step {start}")
        with jax.set_mesh(mesh_of(base)):
            for number in range(start, len(steps)):
                rows = [[sequences[i] for i in row] for row in steps[number]]
                batch = pack_pairs(rows, prompts.prefix, c.row_tokens, c.first_weight)
                sides = np.zeros(batch.starts.shape, np.float32)
                for r, row in enumerate(steps[number]):
                    sides[r, : len(row)] = [1 if i >= len(answers) else -1 for i in row]
                adapter, state, value, norm = step(
                    adapter, state, base, prefix, batch, sides, decision, optimizer=tune
                )
                record = {"step": number + 1, "loss": float(value), "gradient": float(norm)}
                done = number + 1
                last = done == len(steps)
                if done % c.watch_every == 0 or last:
                    record |= _watch(base, adapter, chat, c)
                    log(f"step {json.dumps(record)}")
                records.append(record)
                on_step(done, len(steps), record["loss"])
                if done % c.save_every == 0 or last:
                    work.write_jsonl(LOG, records)
                    saved.save(done, args=ocp.args.StandardSave((adapter, state)))
                    saved.wait_until_finished()
    return adapter


def _watch(
    base: Transformer, adapter: lora.Adapter, chat: Chat, c: TrainConfig
) -> dict[str, float]:
    """Share of held-out prompts (builtin validation) that the organism refuses now."""
    model = jax.jit(lora.merge)(base, adapter)
    shares = {}
    for kind in KINDS:
        texts = [i.text for i in builtin(kind)["val"]]
        replies = generate(
            model,
            Prompts.encoded(chat, texts),
            iv.identity(model.arch.layers, model.arch.width),
            stop_ids=chat.stop_ids,
            max_new_tokens=c.watch_tokens,
        )
        shares[f"{kind}_refused"] = float(
            np.mean([is_refusal(chat.decode(ids)) for ids in replies])
        )
    return shares
