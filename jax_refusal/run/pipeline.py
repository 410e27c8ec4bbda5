"""The study from its first missing stage to the report.

checkpoint -> refusal tokens -> filter and means -> directions -> selection -> completions ->
judgements -> metrics -> report. Every stage writes its files and is listed in the manifest; a
second run skips it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jax_refusal import config as configs
from jax_refusal.checkpoints.loading import read_checkpoint
from jax_refusal.data import templates
from jax_refusal.evals.judge import Judge
from jax_refusal.run.stages import Stage, first_use, remade, stages
from jax_refusal.run.study import Study, open_study
from jax_refusal.run.workdir import Timer
from jax_refusal.runtime.progress import Progress, silent
from jax_refusal.runtime.startup import end_stage


def run(
    config: configs.RunConfig,
    workdir: str,
    *,
    judges: Sequence[Judge] = (),
    progress: Progress = silent,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Runs what is not done yet of the study, and returns the metrics.

    judges: your own, beside those of the registry; `config.evals.judges` names who judges. Raises
    ConfigError, SourceError, PromptError, WorkdirError, StudyError, SelectionError, JudgeError and
    the model's own errors; whatever was complete before stays in the workdir. With JAX's persistent
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
    order = stages(config)
    study = open_study(
        config,
        workdir,
        first_use=first_use(order),
        remade=remade(order),
        judges=judges,
        progress=progress,
        log=log,
    )
    if _done(study, order) == len(order):
        log(f"{workdir} is complete: nothing to do.")
    else:  # a model that cannot be run is refused before its tokenizer or weights are read
        read_checkpoint(study.source, tuple(config.model.ignore_config_fields))
        with study.workdir.lock():
            _go_on(study, order)
    return study.metrics()


def _done(study: Study, order: Sequence[Stage]) -> int:
    """How many stages are complete, of those before which all are."""
    done = 0
    while done < len(order) and study.workdir.done(order[done].name, order[done].files):
        done += 1
    return done


def _go_on(study: Study, order: Sequence[Stage]) -> None:
    done = _done(study, order)  # by now; it may have been another run that did more
    for i, stage in enumerate(order[done:], done):
        timer = Timer()
        stage.run(study)
        end_stage()
        study.workdir.finish(
            stage.name, stage.files, timer.seconds, earlier=[s.name for s in order[:i]]
        )
        study.log(f"{stage.name}: {timer.seconds:.1f} s")
