"""The command line: `python -m launch.run` and its errors, and the configs that ship."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jax_refusal import config as configs
from jax_refusal.config import RunConfig
from jax_refusal.data import templates
from jax_refusal.organism.config import OrganismConfig
from tests import runs
from tests.runs import ROOT, STAGES, launch

CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.py") if path.name != "__init__.py")


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.programs(tmp_path_factory)


@pytest.fixture
def nowhere(tmp_path: Path) -> tuple[str, str]:
    """--config and --workdir of a model that does not exist: the error after all flags are fine."""
    config = runs.write_config(tmp_path / "config.py", tmp_path / "no model")
    return f"--config={config}", f"--workdir={tmp_path / 'run'}"


def assert_refused(result, *words: str) -> None:
    """One error of one line, exit code 2, no trace."""
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert all(word in result.stderr for word in words), result.stderr


def test_interrupted_gone_on_and_done(tiny_dir: Path, tmp_path: Path, cache: Path):
    config = runs.write_config(tmp_path / "config.py", tiny_dir)
    workdir = tmp_path / "run"
    flags = (
        f"--config={config}",
        f"--workdir={workdir}",
        "--config.data.seed=None",
        "--config.refusal.token_ids=(41,44)",
        "--config.generate.max_new_tokens=6",
        "--config.data.filter=False",
    )

    # Ctrl-C after the first stage: a word, exit code 130, and what was complete is kept.
    process = runs.start(cache, *flags)
    assert process.stderr is not None
    said = ""
    while "[refusal tokens:" not in said:
        said += (line := process.stderr.readline())
        assert line, said
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate()
    assert process.returncode == 130, rest
    assert "Interrupted. What was complete is kept: the same command goes on" in rest
    assert "Traceback" not in rest
    done = list(runs.manifest(workdir)["stages"])
    assert done == STAGES[: len(done)] and 0 < len(done) < len(STAGES)

    # The same command again goes on to the closing table.
    result = launch(cache, *flags)
    assert result.returncode == 0, result.stderr
    assert "[refusal tokens:" not in result.stderr and "[report:" in result.stderr
    lines = result.stdout.strip().splitlines()
    assert lines[0].split() == "prompts and edit refused 95% interval".split()
    for name in ("harmful, unedited", "harmful, direction ablated", "harmless, unedited"):
        assert any(line.startswith(name) and "/3 = " in line for line in lines)
    assert lines[-2].startswith("direction: position -")
    assert lines[-1] == f"report: {workdir}/report.md"
    assert (workdir / "report.md").is_file()

    # The overrides were heeded, None and the tuple included.
    identity = runs.manifest(workdir)["identity"]
    assert identity["config.data.seed"] is None
    assert identity["config.refusal.token_ids"] == [41, 44]
    assert identity["config.generate.max_new_tokens"] == 6
    tokens = json.loads((workdir / "refusal_tokens.json").read_text())["tokens"]
    assert [token["token_id"] for token in tokens] == [41, 44]

    # A third time there is nothing to do, and the table is there all the same.
    again = launch(cache, *flags)
    assert (again.returncode, again.stdout) == (0, result.stdout)
    assert f"{workdir} is complete: nothing to do." in again.stderr


def test_an_error_that_hides_an_interrupt_is_an_interrupt(tmp_path: Path):
    """As code in C makes of one that comes while it calls back."""
    script = tmp_path / "entry.py"
    script.write_text(
        "import os, signal, sys\n"
        "from launch import common\n\n\n"
        "def main(_):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        signal.pause()\n"
        "    except KeyboardInterrupt as stop:\n"
        "        raise SystemError('returned a result with an exception set') from stop\n\n\n"
        "common.start(main, sys.argv)\n"
    )
    result = subprocess.run(
        [sys.executable, str(script)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 130, result.stderr
    assert "Interrupted." in result.stderr and "Traceback" not in result.stderr


def test_an_unknown_field_is_refused_with_suggestions(nowhere, cache: Path):
    result = launch(cache, *nowhere, "--config.generate.max_new_token=3")
    assert_refused(result, "no such field", "Did you mean generate.max_new_tokens")


def test_a_value_of_the_wrong_type_is_refused(nowhere, cache: Path):
    result = launch(cache, *nowhere, "--config.generate.max_new_tokens=many")
    assert_refused(result, "--config.generate.max_new_tokens=many", "int")


def test_a_tuple_of_the_wrong_type_is_refused(nowhere, cache: Path):
    result = launch(cache, *nowhere, "--config.refusal.token_ids=I")
    assert_refused(result, "refusal.token_ids=('I',)", "tuple[int, ...]")


def test_a_missing_config_file_is_refused(tmp_path: Path, cache: Path):
    result = launch(cache, f"--config={tmp_path}/no.py", f"--workdir={tmp_path / 'run'}")
    assert_refused(result, "no.py: there is no such file", "configs/")


def test_a_flag_that_is_needed_is_named(nowhere, cache: Path):
    assert_refused(launch(cache, nowhere[0]), "--workdir")


def test_the_config_of_another_command_is_refused(tmp_path: Path, cache: Path):
    config = runs.ROOT / "configs/organism_smollm2_135m.py"
    result = launch(cache, f"--config={config}", f"--workdir={tmp_path / 'run'}")
    assert_refused(result, "returns a OrganismConfig", "needs a RunConfig")


def test_an_error_of_the_study_is_one_line(nowhere, cache: Path, tmp_path: Path):
    result = launch(cache, *nowhere)
    assert_refused(result, "SourceError: model.source=", "no model' does not exist", "hub id")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_that_ships_is_valid(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.__doc__ and f"configs/{path.name}" in module.__doc__
    config = module.get_config()
    if path.stem.startswith("organism"):
        assert isinstance(config, OrganismConfig)
    else:
        assert isinstance(config, RunConfig)
        assert configs.validate(config) is config
        if config.model.template:
            assert templates.find(config.model.template).name == config.model.template


def test_the_13_models_of_the_paper_have_a_config():
    """Each with its family's template; the numbers to expect are said to be the paper's."""
    found = {}
    for path in CONFIGS:
        text = path.read_text()
        if "as the paper ran it" in text:
            assert "the paper's tables 5 and 7" in text and "not reproduced here yet" in text
            found.setdefault(text.split('template="')[1].split('"')[0], []).append(path.stem)
    sizes = {name: len(paths) for name, paths in found.items()}
    assert sizes == {
        "paper/qwen": 4,
        "paper/yi": 2,
        "paper/gemma": 2,
        "paper/llama-2": 3,
        "paper/llama-3@published": 2,
    }
