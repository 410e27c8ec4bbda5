"""A study small enough for a test: about a second once its programs are compiled."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jax_refusal import config as configs
from jax_refusal.config import RunConfig
from jax_refusal.run import pipeline
from jax_refusal.run.stages import stages

ROOT = Path(__file__).parents[1]
COMPLETIONS = (
    "harmful_baseline",
    "harmful_ablation",
    "harmful_addition",
    "harmless_baseline",
    "harmless_addition",
)
STAGES = [stage.name for stage in stages(RunConfig())]
SMALL = {
    "data.n_train": 6,
    "data.n_val": 3,
    "data.n_test": 3,
    "data.filter": False,
    "refusal.token_ids": (40, 43),
    "selection.kl_threshold": 100.0,  # lets every candidate pass
    "selection.induce_threshold": -100.0,
    "generate.max_new_tokens": 8,
}


def small(source: Path | str, **fields: Any) -> RunConfig:
    """The config of a small run; `fields` are dotted names with __ for the dot."""
    fields = {name.replace("__", "."): value for name, value in fields.items()}
    return configs.from_identity({"model.source": str(source), **SMALL, **fields})


def run(config: RunConfig, workdir: Path, **options: Any) -> list[str]:
    """Runs a study; its log lines."""
    log: list[str] = []
    pipeline.run(config, str(workdir), log=log.append, **options)
    return log


def stop_at(title: str) -> Callable:
    """A progress function that interrupts the run where a loop of this title starts."""

    def progress(items, name):
        if name.startswith(title):
            raise KeyboardInterrupt
        return items

    return progress


def stages_run(log: list[str], config: RunConfig | None = None) -> list[str]:
    """The stages that a log says were made, of those of a config."""
    names = STAGES if config is None else [stage.name for stage in stages(config)]
    return [name for name in names if any(line.startswith(f"{name}: ") for line in log)]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by its path in the folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def results(folder: Path) -> dict[str, bytes]:
    """What a run leaves, without the manifest, which holds its times."""
    return {name: data for name, data in contents(folder).items() if name != "manifest.json"}


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def write_config(path: Path, source: Path | str, **fields: Any) -> Path:
    """A config file for `launch.run`."""
    identity = configs.identity(small(source, **fields))
    path.write_text(
        '"""A small run."""\n\nfrom jax_refusal.config import from_identity\n\n\n'
        f"def get_config():\n    return from_identity({identity!r})\n"
    )
    return path


def programs(factory: pytest.TempPathFactory) -> Path:
    """Where the processes of one test session keep their compiled programs."""
    return factory.getbasetemp() / "programs"


def environment(cache: Path) -> dict[str, str]:
    """As this process, with compiled programs kept in `cache`."""
    return os.environ | {
        "XDG_CACHE_HOME": str(cache),
        "JAX_COMPILATION_CACHE_DIR": str(cache / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONUNBUFFERED": "1",
    }


def start(cache: Path, *arguments: str) -> subprocess.Popen[str]:
    """`python -m launch.run` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "launch.run", *arguments],
        cwd=ROOT,
        env=environment(cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def launch(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m launch.run` to its end."""
    process = start(cache, *arguments)
    out, err = process.communicate(timeout=250)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def cut_after(workdir: Path, stage: str) -> None:
    """Makes it the workdir of a run that was killed between this stage and the next."""
    listed = manifest(workdir)
    for name in STAGES[STAGES.index(stage) + 1 :]:
        for file in listed["stages"].pop(name)["files"]:
            (workdir / file).unlink()
    (workdir / "manifest.json").write_text(json.dumps(listed))
