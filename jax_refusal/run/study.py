"""A study as its stages share it: config, files, and the model once it is needed; new or resumed.

Letters: D residual width.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import numpy as np

from jax_refusal import config as configs
from jax_refusal import sharding
from jax_refusal.checkpoints import lora
from jax_refusal.checkpoints.loading import load_model
from jax_refusal.checkpoints.sources import Source, fingerprint, locate
from jax_refusal.data.chat import Chat, load_chat
from jax_refusal.data.prompts import Instructions, load_prompts
from jax_refusal.edits import Edit, identity, unit_vector
from jax_refusal.evals.judge import Judge, Verdict
from jax_refusal.evals.registry import find_judges
from jax_refusal.fields import declared
from jax_refusal.files import content_hash
from jax_refusal.models.decoder import Transformer
from jax_refusal.report.page import closing_table
from jax_refusal.run.partial import PartialResults
from jax_refusal.run.workdir import MANIFEST, Workdir, WorkdirError
from jax_refusal.runtime.batching import Prompts
from jax_refusal.runtime.generate import generate
from jax_refusal.runtime.progress import Progress, silent
from jax_refusal.study.conditions import CONDITIONS
from jax_refusal.study.directions import IN_WORKDIR
from jax_refusal.study.selection import Candidate, Selection

MEANS = "directions/means.safetensors"
FILTER = "directions/filter.json"
TOKENS = "refusal_tokens.json"
CANDIDATES = "selection/candidates.jsonl"
DIRECTION = IN_WORKDIR
CHOICE = "selection/direction.json"
PARTIAL = "completions/partial.json"
METRICS = "metrics.json"
REPORT = "report.md"


def completions_file(condition: str) -> str:
    """The replies under a condition."""
    return f"completions/{condition}.jsonl"


def judgements_file(judge: str) -> str:
    """A judge's verdicts on the replies under all conditions."""
    return f"judgements/{judge}.jsonl"


class StudyError(ValueError):
    """The study cannot go on with this model and these prompts; the message says why."""


@dataclasses.dataclass
class Study:
    """What the stages share. The model is loaded when the first stage needs it."""

    config: configs.RunConfig
    workdir: Workdir
    source: Source
    instructions: Instructions  # without splits where the run is only read
    judges: Mapping[str, Judge]  # none where the run is only read
    progress: Progress
    log: Callable[[str], None]

    @cached_property
    def model(self) -> Transformer:
        c = self.config
        self.log(
            f"loading {c.model.source}" + f" with adapter {c.model.adapter}" * bool(c.model.adapter)
        )
        return self.load_model(c.model.adapter)

    def load_model(self, adapter: str = "") -> Transformer:
        """The model of the run as the config says, with this adapter alone merged in."""
        c = self.config
        return load_model(
            self.source,
            c.model.dtype,
            sharding.make_mesh(c.mesh.data, c.mesh.model),
            adapter or None,
            ignore_config_fields=tuple(c.model.ignore_config_fields),
        )

    @cached_property
    def chat(self) -> Chat:
        chat = load_chat(self.source, self.config.model.system, self.config.model.template)
        self.workdir.note(template=chat.template_hash, tokenizer=chat.tokenizer_hash)
        return chat

    @property
    def identity_edit(self) -> Edit:
        return identity(self.model.arch.layers, self.model.arch.width)

    @property
    def size(self) -> dict[str, int]:
        return dataclasses.asdict(self.config.compute)

    def encoded(self, texts: list[str]) -> Prompts:
        return Prompts.encoded(self.chat, texts, self.model.arch)

    def replies(
        self,
        prompts: Prompts,
        edit: Edit,
        tokens: int,
        title: str,
        **options: Any,
    ) -> list[list[int]]:
        return generate(
            self.model,
            prompts,
            edit,
            stop_ids=self.chat.stop_ids,
            max_new_tokens=tokens,
            batch_size=self.config.generate.batch_size,
            progress=self.progress,
            title=title,
            **options,
        )

    def resumable_replies(
        self,
        file: str,
        prompts: Prompts,
        edit: Edit,
        tokens: int,
        title: str,
        *,
        row_edit: Sequence[int],
        numbers: Sequence[int],
        **options: Any,
    ) -> list[list[int]]:
        """`replies`, which are written to a file as they come: a run that is stopped leaves the
        rest to the next. Whoever has written them elsewhere deletes it."""
        arrays = [x.tolist() for x in jax.tree.leaves(edit)]
        rules = [list(self.chat.stop_ids), tokens, options]
        of = [prompts.ids, arrays, list(row_edit), list(numbers), rules]

        def is_reply(ids: Any) -> bool:
            fits = isinstance(ids, list) and len(ids) <= tokens
            return fits and all(type(i) is int and 0 <= i < self.model.arch.vocab for i in ids)

        with PartialResults(self.workdir, file, of, is_reply, self.log) as partial:
            todo = [i for i in range(len(prompts.ids)) if i not in partial.items]
            if todo:
                self.replies(
                    dataclasses.replace(prompts, ids=[prompts.ids[i] for i in todo]),
                    edit,
                    tokens,
                    title,
                    row_edit=[row_edit[i] for i in todo],
                    numbers=[numbers[i] for i in todo],
                    on_reply=lambda i, ids: partial.add(todo[i], ids),
                    **options,
                )
            return [partial.items[i] for i in range(len(prompts.ids))]

    # What earlier stages wrote

    @property
    def token_ids(self) -> list[int]:
        with self.workdir.reading(TOKENS):
            return [int(t["token_id"]) for t in self.workdir.read_json(TOKENS)["tokens"]]

    def filtered(self, kind: str, split: str) -> list[str]:
        """The prompts of a split that passed the filter."""
        with self.workdir.reading(FILTER):
            return [str(text) for text in self.workdir.read_json(FILTER)[kind][split]["kept"]]

    @property
    def direction(self) -> np.ndarray:  # [D]
        with self.workdir.reading(DIRECTION):
            found = self.workdir.read_tensors(DIRECTION)["direction"]
            unit_vector(found)  # finite, and not zero
            return found

    def selection(self) -> Selection:
        with self.workdir.reading(CANDIDATES):
            table = [Candidate(**row) for row in self.workdir.read_jsonl(CANDIDATES)]
        with self.workdir.reading(CHOICE):
            choice = self.workdir.read_json(CHOICE)
            place = choice["position"], choice["layer"]
            if place not in [(c.position, c.layer) for c in table]:
                raise ValueError(f"{CANDIDATES} has no position and layer {place}")
            return Selection(*place, self.direction, table, bool(choice["fallback"]))

    def completions(self) -> dict[str, list[dict[str, Any]]]:
        """Condition -> its rows, one for each prompt."""
        return {c.name: self.workdir.read_jsonl(completions_file(c.name)) for c in CONDITIONS}

    def verdicts(self, judge: str) -> dict[str, list[Verdict]]:
        """Condition -> the judge's verdict on each of its replies."""
        found: dict[str, list[Verdict]] = {c.name: [] for c in CONDITIONS}
        with self.workdir.reading(judgements_file(judge)):
            for row in self.workdir.read_jsonl(judgements_file(judge)):
                found[row["condition"]].append(row["verdict"])
        return found

    def metrics(self) -> dict[str, Any]:
        with self.workdir.reading(METRICS):
            metrics = self.workdir.read_json(METRICS)
            closing_table(metrics)  # can be made of it
            if not all(isinstance(metrics[name], int) for name in ("position", "layer")):
                raise TypeError("a position or layer that is no number")
            return metrics


def open_study(
    config: configs.RunConfig,
    root: str,
    *,
    first_use: Mapping[str, str],
    remade: Mapping[str, Sequence[str]],
    judges: Sequence[Judge] = (),
    progress: Progress = silent,
    log: Callable[[str], None] = print,
) -> Study:
    """A study in a new workdir, or in that of an earlier run with the same settings.

    first_use, remade: config section -> the first stage that depends on it; the stages that are
    made again when it changes (see `Workdir`). judges: those that are not in the registry.
    """
    source, instructions = locate(config.model.source), load_prompts(config.data)
    found = find_judges(config.evals.judges, judges)
    fields = {f"config.{name}": value for name, value in configs.identity(config).items()}
    hashes = {
        "model": fingerprint(source),
        "adapter": lora.fingerprint(config.model.adapter),
        "data": content_hash(dataclasses.asdict(instructions)),
    }
    sections = {field: field.split(".")[1] for field in fields}
    workdir = Workdir(
        root,
        fields | hashes,
        first_use={f: first_use[s] for f, s in sections.items() if s in first_use},
        remade={f: remade[s] for f, s in sections.items() if s in remade},
    )
    return Study(config, workdir, source, instructions, found, progress, log)


def read_run(root: str) -> tuple[Workdir, configs.RunConfig]:
    """The workdir of an earlier run, and its config as the manifest has it."""
    workdir = Workdir.existing(root)
    fields = {
        name.removeprefix("config."): value
        for name, value in workdir.manifest["identity"].items()
        if name.startswith("config.")
    }
    strange = sorted(fields.keys() - declared(configs.RunConfig).keys())
    if strange:
        raise WorkdirError(
            f"{workdir.root / MANIFEST} is not of a study: launch.run has no {strange[:5]}"
            f"{'...' * (len(strange) > 5)}. Name the workdir of a launch.run."
        )
    try:
        return workdir, configs.validate(configs.from_identity(fields))
    except configs.ConfigError as error:
        raise WorkdirError(
            f"{workdir.root / MANIFEST} is damaged. {error} Put back a copy of it, or run "
            "launch.run in another --workdir."
        ) from error


def resume_study(
    root: str,
    needs: str,  # the stage that has to be complete
    *,
    mesh: tuple[int, int] = (1, 1),  # (data, model) axes
    progress: Progress = silent,
    log: Callable[[str], None] = lambda message: None,
) -> Study:
    """An earlier run, to be read and its model to be used.

    Raises StudyError where the run has not come far enough, WorkdirError where the model or the
    adapter is no longer what the run used.
    """
    workdir, config = read_run(root)
    if not workdir.done(needs):
        raise StudyError(
            f"{root} is not finished (there is no {needs} yet): run the same launch.run command "
            "again."
        )
    config.mesh.data, config.mesh.model = mesh
    source = locate(config.model.source)
    workdir.note(model=fingerprint(source), adapter=lora.fingerprint(config.model.adapter))
    return Study(config, workdir, source, Instructions({}, {}), {}, progress, log)
