"""The study, stage by stage: the only reader of the whole RunConfig.

checkpoint -> refusal tokens -> filter and means -> directions -> selection -> completions ->
metrics -> report. Every stage writes its files and is listed in the manifest; a second run skips
it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jax_refusal import config as configs
from jax_refusal import interventions as iv
from jax_refusal.artifacts import Timer, Workdir, content_hash
from jax_refusal.data import templates
from jax_refusal.data.prompts import load_prompts
from jax_refusal.models import lora
from jax_refusal.models.loading import read_checkpoint
from jax_refusal.runtime.progress import Progress, silent
from jax_refusal.runtime.startup import end_stage
from jax_refusal.session import METRICS, Study, StudyError
from jax_refusal.sources import fingerprint, locate
from jax_refusal.stages import (
    write_completions,
    write_means,
    write_metrics,
    write_refusal_tokens,
    write_report,
    write_selection,
)

# Section of the config -> the first stage that depends on it: until then it may change.
FIRST_USE = {"selection": "selection", "generate": "completions"}


def run(
    config: configs.RunConfig,
    workdir: str,
    *,
    progress: Progress = silent,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Runs what is not done yet of the study, and returns the metrics.

    Raises ConfigError, SourceError, PromptError, WorkdirError, StudyError, SelectionError and the
    model's own errors; whatever was complete before stays in the workdir. With JAX's persistent
    cache on, the process's compiled programs are dropped after each stage, to save memory.
    """
    configs.validate(config)
    if jax.process_count() > 1:
        raise configs.ConfigError(
            f"{jax.process_count()} JAX processes: a run is one process so far, with all the "
            "devices of its host."
        )
    if config.model.template:
        templates.find(config.model.template)
    source = locate(config.model.source)
    prompts = load_prompts(config.data)
    study = Study(
        config=config,
        workdir=Workdir(
            workdir,
            {f"config.{name}": value for name, value in configs.identity(config).items()}
            | {
                "model": fingerprint(source),
                "adapter": lora.fingerprint(config.model.adapter),
                "data": content_hash(dataclasses.asdict(prompts)),
            },
            first_use={
                f"config.{name}": FIRST_USE[section]
                for name in configs.identity(config)
                if (section := name.split(".")[0]) in FIRST_USE
            },
        ),
        prompts=prompts,
        source=source,
        progress=progress,
        log=log,
    )
    todo = stages()
    while todo and study.workdir.done(todo[0][0]):
        todo.pop(0)
    if not todo:
        log(f"{workdir} is complete: nothing to do.")
    else:  # a model that cannot be run is refused before its tokenizer or weights are read
        read_checkpoint(source, tuple(config.model.ignore_config_fields))
    for i, (name, stage) in enumerate(todo):
        timer = Timer()
        files = stage(study)
        end_stage()
        later = [later for later, _ in todo[i + 1 :]]
        study.workdir.finish(name, files, timer.seconds, later)
        log(f"{name}: {timer.seconds:.1f} s")
    return study.workdir.read_json(METRICS)


def stages() -> list[tuple[str, Callable[[Study], list[str]]]]:
    """Name and function of each stage, in order."""
    return [
        ("refusal tokens", write_refusal_tokens),
        ("means", write_means),
        ("selection", write_selection),
        ("completions", write_completions),
        ("metrics", write_metrics),
        ("report", write_report),
    ]


def side_by_side(
    workdir: str,
    instructions: list[str],
    max_new_tokens: int = 64,
    coefficient: float = 1.0,
    mesh: tuple[int, int] = (1, 1),  # (data, model) axes
) -> list[dict[str, str]]:
    """Each instruction's reply unedited, with the run's direction ablated, subtracted and added.

    All conditions are rows of one job. Raises StudyError where the run is not finished,
    WorkdirError where the model or the adapter is no longer what the run used.
    """
    path = Workdir.existing(workdir)
    manifest = path.manifest["identity"]
    if not path.done("selection"):
        raise StudyError(f"{workdir} has no selected direction yet: finish the run first.")
    config = configs.from_identity(
        {k.removeprefix("config."): v for k, v in manifest.items() if k.startswith("config.")}
    )
    config.mesh.data, config.mesh.model = mesh
    source = locate(config.model.source)
    path.note(model=fingerprint(source), adapter=lora.fingerprint(config.model.adapter))
    study = Study(config, path, None, source, silent, lambda message: None)
    choice, L = study.selection(), study.model.arch.layers
    edits = {
        "unedited": study.nothing,
        "ablated": iv.ablate(choice.direction, L),
        f"added x {-coefficient:g}": iv.add(
            choice.direction, L, layer=choice.layer, coefficient=-coefficient
        ),
        f"added x {coefficient:g}": iv.add(
            choice.direction, L, layer=choice.layer, coefficient=coefficient
        ),
    }
    each = len(instructions)
    replies = study.replies(
        study.encoded(instructions * len(edits)),
        iv.rows(*edits.values()),
        max_new_tokens,
        "generate",
        row_edit=np.repeat(range(len(edits)), each).tolist(),
    )
    texts = [study.chat.decode(ids).strip() for ids in replies]
    return [dict(zip(edits, texts[i::each], strict=True)) for i in range(each)]
