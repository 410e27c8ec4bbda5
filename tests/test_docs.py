"""README and docs/ run as they are printed: every block of Python, every command.

The README's lines run on the embedded model. The pages' run on a tiny one under its name, and their
studies with few prompts; a command that says what it needs is only read.
"""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import jax_refusal as jr
from tests import runs
from tests.runs import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(#[\w-]+)?\)")
ADAPTER = "builtin:smollm2_135m_refuser"
SMALL = [f"--config.{name}={value}" for name, value in runs.SMALL.items()]


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind == language]


def commands(page: Path) -> list[str]:
    return [line for block in blocks(page, "sh") for line in block.splitlines() if line]


def python(*arguments: str, cache: Path, tiny: bool = False) -> subprocess.CompletedProcess[str]:
    """A process of its own, to a good end. A tiny model compiles for longer than it runs: that is
    done carelessly, as in other tests, and else as a reader has it."""
    given = runs.environment(cache)
    if not tiny:
        del given["XLA_FLAGS"]
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=given,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, f"{arguments}\n{done.stderr}"
    return done


def test_the_ten_lines(tmp_path_factory: pytest.TempPathFactory) -> None:
    """As they stand: two replies, which the two edits make differ; and what is captured."""
    code = blocks(ROOT / "README.md", "python")
    assert len(code) == 2
    shapes = "print(heads.shape, sorted(means))"
    done = python("-c", "\n".join([*code, shapes]), cache=runs.programs(tmp_path_factory))
    replies, captured = done.stdout.splitlines()
    removed, induced = ast.literal_eval(replies)
    assert removed != induced and len(removed) > 20 and len(induced) > 20
    assert captured == "(4, 1, 30, 9, 64) ['attn_out', 'mlp_out']"


PYTHON = [page.stem for page in PAGES if blocks(page, "python")]


@pytest.mark.parametrize("name", PYTHON)
def test_the_python_of_a_page(
    name: str, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All blocks of a page, one after the other, as in one notebook."""
    monkeypatch.setattr(jr, "SMOLLM2", str(tiny_dir))
    scope: dict = {}
    for code in blocks(ROOT / "docs" / f"{name}.md", "python"):
        exec(compile(code, f"{name}.md", "exec"), scope)
    assert capsys.readouterr().out


@pytest.mark.timeout(600)
def test_the_commands_of_the_pages(
    tiny_dir: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In the order in which a reader meets them, with runs/ in a folder of the test."""
    known = {"MODEL": tiny_dir}
    for name, what in (("HARMFUL", "birds"), ("HARMLESS", "rivers")):
        texts = [{"instruction": f"Name {n} {what}."} for n in range(12)]
        known[name] = tmp_path / f"{name}.json"
        known[name].write_text(json.dumps(texts))
    pages = [ROOT / "docs" / f"{name}.md" for name in ("run", "prompts", "export")]
    every = [line for page in pages for line in commands(page)]
    ran = 0
    for line in every:
        command, _, needs = line.partition("   # needs")
        for name, path in known.items():
            command = command.replace(f"${name}", str(path))
        words = shlex.split(command.replace("runs/", f"{tmp_path}/"))
        assert words[:2] == ["python", "-m"]
        assert (ROOT / words[2].replace(".", "/")).with_suffix(".py").is_file()
        if needs:
            continue
        if words[2] == "launch.run":
            words += [*SMALL, "--config.selection.fallback=least_bad"]
            if not any("model.source" in word for word in words):
                words += [f"--config.model.source={tiny_dir}", "--config.model.adapter="]
        python(*words[1:], cache=runs.programs(tmp_path_factory), tiny=True)
        ran += 1
    assert ran == 8
    assert (tmp_path / "mine" / "report.md").is_file() and (tmp_path / "edited").is_dir()


def test_every_page_is_known_and_its_links_lead_somewhere() -> None:
    """From the first page to every other; no link to what is not there."""
    readme = ROOT / "README.md"
    linked = {target for target, _ in LINK.findall(readme.read_text())}
    assert {f"docs/{page.name}" for page in PAGES} <= linked
    for page in (readme, ROOT / "CONTRIBUTING.md", *PAGES):
        for target, _ in LINK.findall(page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
