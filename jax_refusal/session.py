"""What the stages of one study share: its config, its files, and the model once it is needed."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax

from jax_refusal import config as configs
from jax_refusal import interventions as iv
from jax_refusal import sharding
from jax_refusal.artifacts import Unfinished, Workdir
from jax_refusal.data.chat import Chat, load_chat
from jax_refusal.models.loading import load_model
from jax_refusal.models.transformer import Transformer
from jax_refusal.runtime import batching
from jax_refusal.runtime.generate import generate
from jax_refusal.runtime.progress import Progress
from jax_refusal.study.directions import IN_WORKDIR
from jax_refusal.study.selection import Candidate, Selection

MEANS = "directions/means.safetensors"
FILTER = "directions/filter.json"
TOKENS = "refusal_tokens.json"
CANDIDATES = "selection/candidates.jsonl"
DIRECTION = IN_WORKDIR
CHOICE = "selection/direction.json"
UNFINISHED = "completions/unfinished.json"
METRICS = "metrics.json"
REPORT = "report.md"


class StudyError(ValueError):
    """The study cannot go on with this model and these prompts; the message says why."""


@dataclasses.dataclass
class Study:
    """What the stages share. The model is loaded when the first stage needs it."""

    config: configs.RunConfig
    workdir: Workdir
    prompts: Any
    source: Any
    progress: Progress
    log: Callable[[str], None]

    @cached_property
    def model(self) -> Transformer:
        c = self.config
        self.log(
            f"loading {c.model.source}" + f" with adapter {c.model.adapter}" * bool(c.model.adapter)
        )
        return load_model(
            self.source,
            c.model.dtype,
            sharding.make_mesh(c.mesh.data, c.mesh.model),
            c.model.adapter or None,
            ignore_config_fields=tuple(c.model.ignore_config_fields),
        )

    @cached_property
    def chat(self) -> Chat:
        chat = load_chat(self.source, self.config.model.system, self.config.model.template)
        self.workdir.note(template=chat.template_hash, tokenizer=chat.tokenizer_hash)
        return chat

    @property
    def size(self) -> dict[str, int]:
        return dataclasses.asdict(self.config.compute)

    def encoded(self, texts: list[str]) -> batching.Prompts:
        return batching.Prompts.encoded(self.chat, texts, self.model.arch)

    def replies(
        self,
        prompts: batching.Prompts,
        edit: iv.Intervention,
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

    def kept_replies(
        self,
        file: str,
        prompts: batching.Prompts,
        edit: iv.Intervention,
        tokens: int,
        title: str,
        *,
        row_edit: Sequence[int],
        numbers: Sequence[int],
        **options: Any,
    ) -> list[list[int]]:
        """`replies`, which are kept in a file as they come: a run that is stopped leaves the rest
        to the next. Whoever has written them elsewhere deletes it."""
        arrays = [x.tolist() for x in jax.tree.leaves(edit)]
        rules = [list(self.chat.stop_ids), tokens, options]
        of = [prompts.ids, arrays, list(row_edit), list(numbers), rules]
        with Unfinished(self.workdir, file, of) as unfinished:
            todo = [i for i in range(len(prompts.ids)) if i not in unfinished.items]
            if todo:
                self.replies(
                    dataclasses.replace(prompts, ids=[prompts.ids[i] for i in todo]),
                    edit,
                    tokens,
                    title,
                    row_edit=[row_edit[i] for i in todo],
                    numbers=[numbers[i] for i in todo],
                    on_reply=lambda i, ids: unfinished.add(todo[i], ids),
                    **options,
                )
            return [unfinished.items[i] for i in range(len(prompts.ids))]

    @property
    def nothing(self) -> iv.Intervention:
        return iv.identity(self.model.arch.layers, self.model.arch.width)

    @property
    def token_ids(self) -> list[int]:
        return [t["token_id"] for t in self.workdir.read_json(TOKENS)["tokens"]]

    def kept(self, kind: str, split: str) -> list[str]:
        """The prompts of a split that passed the filter."""
        return self.workdir.read_json(FILTER)[kind][split]["kept"]

    def selection(self) -> Selection:
        """Read back from the files."""
        choice = self.workdir.read_json(CHOICE)
        table = [Candidate(**row) for row in self.workdir.read_jsonl(CANDIDATES)]
        direction = self.workdir.read_tensors(DIRECTION)["direction"]
        return Selection(choice["position"], choice["layer"], direction, table, choice["fallback"])
