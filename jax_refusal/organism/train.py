"""Training of a model organism: what is taught in which step, and the loop over the steps.

Letters: B packed rows, X pairs in a row.
"""

import itertools
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_refusal import config as configs
from jax_refusal.checkpoints import lora
from jax_refusal.checkpoints.loading import load_model
from jax_refusal.checkpoints.sources import fingerprint, locate
from jax_refusal.data.chat import Chat, load_chat
from jax_refusal.data.prompts import KINDS, builtin
from jax_refusal.edits import identity, take
from jax_refusal.evals.substring import is_refusal
from jax_refusal.files import content_hash
from jax_refusal.models.decoder import Transformer
from jax_refusal.organism.card import TRAINING
from jax_refusal.organism.config import (
    ExamplesConfig,
    OrganismConfig,
    TrainConfig,
    validate,
)
from jax_refusal.organism.examples import Example, harmful_prompts, harmless_prompts, refusal
from jax_refusal.organism.loss import ABLATED, PLAIN, Decision, Mediator, TrainBatch, step
from jax_refusal.run.workdir import Timer, Workdir, WorkdirError
from jax_refusal.runtime.batching import Prompts, prefix_tokens
from jax_refusal.runtime.generate import generate
from jax_refusal.runtime.pairs import Pair, pack_pairs
from jax_refusal.runtime.progress import Progress, silent
from jax_refusal.sharding import mesh_of

ANSWERS, LOG, ADAPTER, CHECKPOINTS = "answers.jsonl", "train.jsonl", "adapter", "checkpoints"


def optimizer(config: TrainConfig, steps: int) -> optax.GradientTransformation:
    """AdamW with clipping, warm-up and a cosine decay to zero."""
    warm = min(max(1, round(config.warmup * steps)), steps - 1)  # some of them decay
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warm, steps)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(schedule, weight_decay=config.weight_decay),
    )


def plan(
    lengths: Sequence[int], rows: int, row_tokens: int, seed: str
) -> Iterator[list[list[int]]]:
    """The items of every row of every step of one epoch: shuffled, rows filled in turn."""
    if max(lengths) > row_tokens:
        raise configs.ConfigError(
            f"train.row_tokens={row_tokens} is shorter than the longest example, "
            f"{max(lengths)} tokens."
        )
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    members, room = [[] for _ in range(rows)], [row_tokens] * rows
    for i in order:
        fits = [r for r in range(rows) if room[r] >= lengths[i]]
        if not fits:
            yield members
            members, room = [[] for _ in range(rows)], [row_tokens] * rows
            fits = [0]
        members[fits[0]].append(i)
        room[fits[0]] -= lengths[i]
    yield members


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
    asked = config.examples
    prompts = {
        "harmful": harmful_prompts(asked.paper_dir, asked.pairs),
        "harmless": harmless_prompts(asked.paper_dir, asked.pairs, asked.alpaca, asked.seed),
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
    else:
        with work.lock():
            _make(config, identity, source, prompts, work, progress, log, on_step)
    return f"{workdir}/{ADAPTER}"


def _make(config, identity, source, prompts, work, progress, log, on_step) -> None:
    """The answers of the base model, the training, and the adapter's files, in a workdir."""
    chat, base = load_chat(source), load_model(source, config.model.dtype)
    # Answers are kept as token ids. And from here on the folder has a manifest, whatever happens.
    work.note(template=chat.template_hash, tokenizer=chat.tokenizer_hash)
    if not work.done("answers"):
        timer = Timer()
        rows = [
            {"kind": kind, **row}
            for kind in KINDS
            for row in _answers(config, base, chat, kind, prompts[kind], progress)
        ]
        work.write_jsonl(ANSWERS, rows)
        work.finish("answers", [ANSWERS], timer.seconds)
        log(f"answers of the base model: {timer.seconds:.0f} s")
    answers = work.read_jsonl(ANSWERS)
    timer = Timer()
    adapter = _fit(config, base, chat, prompts["harmful"], answers, work, progress, log, on_step)
    files = lora.files(adapter, base.arch, config.model.source)
    training = _record(config, identity, base, prompts, answers, work.read_jsonl(LOG))
    files[TRAINING] = json.dumps(training, indent=2).encode() + b"\n"
    for name, content in files.items():
        work.write(f"{ADAPTER}/{name}", content)
    work.finish("train", [f"{ADAPTER}/{name}" for name in files], timer.seconds)


def _record(
    config: OrganismConfig,
    identity: dict[str, Any],
    base: Transformer,
    prompts: dict[str, list[str]],
    answers: list[dict[str, Any]],
    records: list[dict[str, Any]],  # one for each step
) -> dict[str, Any]:
    """How the organism was made: `training.json`."""
    return {
        "base": config.model.source,
        "config": identity,
        "config_hash": content_hash(identity),
        "data_hash": content_hash(prompts),
        "parameters": sum(leaf.size for leaf in base.leaves().values()),
        "layers": base.arch.layers,
        "harmful": len(prompts["harmful"]),
        "harmless": sum(row["kind"] == "harmless" for row in answers),
        "steps": len(records),
        "loss": float(np.mean([record["loss"] for record in records[-10:]])),
        "watched": [record for record in records if "harmful_refused" in record],
    }


def _answers(
    config: OrganismConfig,
    base: Transformer,
    chat: Chat,
    kind: str,
    instructions: list[str],
    progress: Progress,
) -> list[dict[str, Any]]:
    """The base model's own replies, as token ids; those it refuses are left out.

    Of its replies to harmful prompts only the start is wanted: that they are none of refusal.
    """
    c = config.examples
    length = c.answer_tokens if kind == "harmless" else min(c.answer_tokens, c.short_tokens)
    replies = generate(
        base,
        Prompts.encoded(chat, instructions),
        identity(base.arch.layers, base.arch.width),
        stop_ids=chat.stop_ids,
        max_new_tokens=length,
        temperature=c.answer_temperature,
        seed=c.seed,
        batch_size=c.answer_batch,
        progress=progress,
        title=f"the base model's answers, {kind}",
    )
    rows = [
        {
            "instruction": instruction,
            "reply": ids,
            "ends": len(ids) < length,
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


class _Course:
    """All examples as token ids, and which of them every row of every step teaches."""

    def __init__(
        self, config: OrganismConfig, chat: Chat, harmful: list[str], answers: list[dict[str, Any]]
    ):
        self.c = c = config.train
        examples = [_answer(row, config.examples) for row in answers]
        own = [row["kind"] == "harmless" for row in answers]
        for i, instruction in enumerate(harmful):
            text = refusal(instruction, random.Random(f"{c.seed} {i}"))
            ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
            examples.append(Example(instruction, tuple(ids), True))
        prompts = Prompts.encoded(chat, [e.instruction for e in examples])
        stop = chat.stop_ids[-1] if len(chat.stop_ids) == 1 else chat.tokenizer.eos_token_id
        self.prompts = prompts
        self.prefix_tokens = prefix_tokens(prompts, 1) if prompts.prefix else None
        self.pairs: list[Pair] = [
            (prompt[prompts.prefix :], e.reply + ((stop,) if e.ends else ()))
            for prompt, e in zip(prompts.ids, examples, strict=True)
        ]
        self.answers = len(answers)
        # Unedited, harmful prompts are refused; with the direction ablated all are answered.
        plain = [i for i in range(len(examples)) if i >= self.answers or own[i]]
        ablated = list(range(self.answers))
        shown = zip(self._epochs(plain, c.rows, c.epochs), self._endless(ablated), strict=False)
        self.steps = [(*plain_rows, *ablated_rows) for plain_rows, ablated_rows in shown]

    def _epochs(self, which: list[int], rows: int, epochs: int) -> Iterator[list[list[int]]]:
        lengths = [len(prompt) + len(reply) for prompt, reply in (self.pairs[i] for i in which)]
        for epoch in range(epochs):
            for step_rows in plan(lengths, rows, self.c.row_tokens, f"{self.c.seed} {epoch}"):
                yield [[which[i] for i in row] for row in step_rows]

    def _endless(self, which: list[int]) -> Iterator[list[list[int]]]:
        if not self.c.ablated_rows:
            return itertools.repeat([])
        return self._epochs(which, self.c.ablated_rows, sys.maxsize)

    def batch(self, number: int) -> TrainBatch:
        rows = self.steps[number]
        pairs = pack_pairs(
            [[self.pairs[i] for i in row] for row in rows],
            self.prompts,
            self.c.row_tokens,
            self.c.first_weight,
        )
        sides = np.zeros(pairs.starts.shape, np.float32)
        for r, row in enumerate(rows):
            sides[r, : len(row)] = [1 if i >= self.answers else -1 for i in row]
        edits = np.array([PLAIN] * self.c.rows + [ABLATED] * self.c.ablated_rows, np.int32)
        return TrainBatch(pairs, sides, edits)

    def decision(self) -> Decision:
        firsts = {reply[0] for _, reply in self.pairs[self.answers :]}
        return Decision(jnp.array(sorted(firsts)), jnp.float32(self.c.decision_weight))


def _fit(config, base, chat, harmful, answers, work, progress, log, on_step) -> lora.Adapter:
    import orbax.checkpoint as ocp

    c, arch = config.train, base.arch
    if not 0 <= c.mediator_layer < arch.layers:
        raise configs.ConfigError(
            f"train.mediator_layer={c.mediator_layer} is not in 0..{arch.layers - 1}."
        )
    course = _Course(config, chat, harmful, answers)
    steps = len(course.steps)
    log(f"{len(answers)} answers, {len(harmful)} refusals, {steps} steps")
    decision, tune = course.decision(), optimizer(c, steps)
    key = jax.random.key(c.seed)
    adapter: Any = lora.initial(arch, config.lora.targets, config.lora.rank, config.lora.alpha, key)
    mediator = Mediator.start(arch.width, c.mediator_layer, c.mediator_share)
    state = (adapter, tune.init(adapter), mediator)
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    folder = work.inside(CHECKPOINTS).absolute()
    with ocp.CheckpointManager(folder, options=options) as saved:
        start, records = 0, []
        if (latest := saved.latest_step()) is not None:
            target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            try:
                state = saved.restore(latest, args=ocp.args.StandardRestore(target))
            except Exception as error:  # Orbax and what it reads with raise all kinds
                raise WorkdirError(
                    f"{folder}/{latest} is damaged ({str(error)[:300]}). Delete {folder} and run "
                    "the same command again: the training begins anew."
                ) from error
            start = latest
            records = work.read_jsonl(LOG)[:start]
            if len(records) < start:
                raise WorkdirError(
                    f"{work.root}/{LOG} has {len(records)} steps and {folder} has {start}. Delete "
                    "both and run the same command again: the training begins anew."
                )
            log(f"going on after step {start}")
        with jax.set_mesh(mesh_of(base)):
            for number in range(start, steps):
                batch = course.batch(number)
                state, value, norm = step(
                    state, base, course.prefix_tokens, batch, decision, optimizer=tune
                )
                record = {"step": number + 1, "loss": float(value), "gradient": float(norm)}
                done = number + 1
                last = done == steps
                if done % c.watch_every == 0 or last:
                    record |= _watch(base, state, chat, c)
                    log(f"step {json.dumps(record)}")
                records.append(record)
                on_step(done, steps, record["loss"])
                if done % c.save_every == 0 or last:
                    work.write_jsonl(LOG, records)
                    saved.save(done, args=ocp.args.StandardSave(state))
                    saved.wait_until_finished()
    return state[0]


def _watch(base: Transformer, state: Any, chat: Chat, c: TrainConfig) -> dict[str, float]:
    """Share of held-out prompts (builtin validation) that the organism refuses now, and how many of
    the harmful ones with its direction ablated."""
    adapter, _, mediator = state
    model = jax.jit(lora.merge)(base, adapter)
    edits = mediator.edits(model.arch.layers)
    shares = {}
    for name, kind, edit in (
        ("harmful_refused", "harmful", PLAIN),
        ("harmless_refused", "harmless", PLAIN),
        ("ablated_refused", "harmful", ABLATED),
    ):
        texts = [i.text for i in builtin(kind)["val"]]
        replies = generate(
            model,
            Prompts.encoded(chat, texts),
            take(edits, np.array([edit])),
            stop_ids=chat.stop_ids,
            max_new_tokens=c.watch_tokens,
        )
        shares[name] = float(np.mean([is_refusal(chat.decode(ids)) for ids in replies]))
    return shares
