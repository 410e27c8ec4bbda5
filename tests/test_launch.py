"""The command line: `python -m launch.run` and its errors, and the configs that ship."""

import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from jax_refusal import config as configs
from jax_refusal.config import RunConfig
from jax_refusal.data import templates
from jax_refusal.families.registry import FAMILIES, WRAPPERS, architecture
from jax_refusal.models.leaves import leaves
from jax_refusal.organism.config import OrganismConfig
from tests import runs
from tests.families import test_family_configs as published
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


HIDDEN = {
    "by an error of code in C that called back": """
    try:
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    except KeyboardInterrupt as stop:
        raise SystemError("returned a result with an exception set") from stop
""",
    "by the garbage collector": """
    def callback(phase, info):
        gc.callbacks.remove(callback)
        signal.raise_signal(signal.SIGINT)

    gc.callbacks.append(callback)
    gc.collect()
    time.sleep(300)  # the work that goes on
""",
    "while the interpreter's lock is held": """
    def callback(phase, info):
        gc.callbacks.remove(callback)
        signal.raise_signal(signal.SIGINT)

    gc.callbacks.append(callback)
    gc.collect()
    sum(range(30_000_000))  # one call in C, which others wait for
    time.sleep(300)
""",
}


@pytest.mark.parametrize("how", HIDDEN)
def test_an_interrupt_that_is_hidden_is_an_interrupt(how: str, tmp_path: Path):
    script = tmp_path / "entry.py"
    script.write_text(
        "import gc, os, signal, sys, time\n\nfrom launch import common\n\n\n"
        f"def main(_):{HIDDEN[how]}\n\ncommon.start(main, sys.argv)\n"
    )
    result = subprocess.run(
        [sys.executable, str(script)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
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


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_that_ships_is_valid(path: Path):
    module = loaded(path)
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


# Config -> the family that its checkpoint names; the paper's 13 and the demo's among them.
FAMILY = {
    "llama_3_1_8b_instruct": "llama",
    "mistral_7b_instruct": "mistral",
    "qwen_1_8b_chat": "qwen",
    "qwen2_5_7b_instruct": "qwen2",
    "qwen3_8b": "qwen3",
    "gemma_2b_it": "gemma",
    "gemma_2_9b_it": "gemma2",
    "gemma_3_4b_it": "gemma3",
    "phi_3_mini_instruct": "phi3",
    "olmo_2_7b_instruct": "olmo2",
    "olmo_3_7b_instruct": "olmo3",
    "smollm3_3b": "smollm3",
    "ministral_3_3b_instruct": "mistral3",
    "mixtral_8x7b_instruct": "mixtral",
    "qwen3_30b_a3b_instruct": "qwen3_moe",
    "gemma_4_e4b_it": "gemma4",
    "gemma_4_12b_it": "gemma4_unified",
    "gpt_oss_20b": "gpt_oss",
    "qwen3_next_80b_a3b_instruct": "qwen3_next",
    "qwen3_5_27b": "qwen3_5",
    "qwen3_5_35b_a3b": "qwen3_5_moe",
    "granite_3_3_8b_instruct": "granite",
    "granite_3_1_1b_a400m_instruct": "granitemoe",
    "granite_4_0_h_tiny": "granitemoehybrid",
    "olmoe_1b_7b_instruct": "olmoe",
    "exaone_4_0_1_2b": "exaone4",
    "seed_oss_36b_instruct": "seed_oss",
}
# Families without a config of their own, and why.
WITHOUT = {
    "gemma3_text": "inside gemma3",
    "ministral3": "inside mistral3",
    "gemma4_text": "inside gemma4",
    "gemma4_unified_text": "inside gemma4_unified",
    "qwen3_5_text": "inside qwen3_5",
    "qwen3_5_moe_text": "inside qwen3_5_moe",
    "granitemoeshared": "between granitemoe and granitemoehybrid, with no chat model of its own",
}


def test_every_family_has_a_config():
    stems = {path.stem for path in CONFIGS}
    assert not set(FAMILY) - stems
    families = FAMILIES.keys() | WRAPPERS.keys()
    assert not families - set(FAMILY.values()) - set(WITHOUT)
    assert set(FAMILY.values()) <= families and not set(FAMILY.values()) & set(WITHOUT)


NEEDS = re.compile(
    r"([\d.]+) billion weights of 2 bytes are ([\d.]+) GB: "
    r"(\w+) GPUs? of 80 GB or (\w+) TPU v5e chips? of 16 GB"
)
WORDS = {"one": 1, "two": 2, "four": 4, "eight": 8, "16": 16}
# Config -> the published config.json, where tests/models has one.
SIZES = {
    "gemma_2_9b_it": published.GEMMA2_9B,
    "phi_4_mini_instruct": published.PHI4_MINI,
    "smollm3_3b": published.SMOLLM3_3B,
    "qwen2_5_7b_instruct": published.QWEN25_7B,
    "qwen2_7b_instruct": published.QWEN25_7B,
    "olmo_2_7b_instruct": published.OLMO2_7B,
    "olmo_3_7b_instruct": published.OLMO3_7B,
    "ministral_3_3b_instruct": published.MINISTRAL3_3B,
    "mixtral_8x7b_instruct": published.MIXTRAL_8X7B,
    "qwen3_next_80b_a3b_instruct": published.QWEN3_NEXT_80B,
    "granite_4_0_h_tiny": published.GRANITE4_H_TINY,
}


def test_what_the_other_models_need_adds_up():
    """Bytes, and that weights leave room: at most 64 GB on a GPU and 10 on a chip."""
    found = {}
    for path in CONFIGS:
        module = loaded(path)
        if "on a model that is not in it" not in module.__doc__:
            continue
        text = " ".join(module.__doc__.split())
        assert "the paper has no number of it, and it was not run here" in text
        needs = NEEDS.search(text)
        assert needs, path.stem
        billions, size = float(needs[1]), float(needs[2])
        gpus, chips = WORDS[needs[3]], WORDS[needs[4]]
        assert abs(size - 2 * billions) < 1 and size / gpus <= 64 and size / chips <= 10
        assert size > (64 * gpus / 2) * (gpus > 1) and size > (10 * chips / 2) * (chips > 1)
        config = module.get_config()
        assert config.mesh.model == gpus and config.model.dtype == "bfloat16"
        found[path.stem] = billions
    assert len(found) >= 19
    for stem, fields in SIZES.items():
        arch = architecture(fields)
        weights = sum(math.prod(leaf.shape) for leaf in leaves(arch).values())
        assert abs(weights / 1e9 - found[stem]) < 0.006, stem
