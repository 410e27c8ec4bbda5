"""What a stage depends on, as its value says; and judges: who is asked again, and who is not."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from jax_refusal import config as configs
from jax_refusal.config import RunConfig
from jax_refusal.evals.judge import UNPARSED, JudgeError
from jax_refusal.run import study
from jax_refusal.run.stages import first_use, remade, stages
from jax_refusal.run.study import StudyError
from jax_refusal.run.workdir import WorkdirError
from tests import runs
from tests.runs import COMPLETIONS, contents, results, run, small

ORDER = stages(RunConfig())


def test_every_section_of_the_config_that_says_what_is_computed_has_a_stage():
    sections = {name.split(".")[0] for name in configs.identity(RunConfig())}
    assert set(first_use(ORDER)) == sections


def test_what_is_refused_and_what_is_made_again_follows_from_the_stages():
    assert first_use(ORDER) == {
        "model": "refusal tokens",
        "data": "refusal tokens",
        "refusal": "refusal tokens",
        "selection": "selection",
        "generate": "completions",
        "evals": "metrics",
    }
    assert remade(ORDER) == {"evals": ["metrics", "report"]}


def test_stages_list_the_files_that_they_write(finished: Path):
    listed = runs.manifest(finished)["stages"]
    assert {name: list(s["files"]) for name, s in listed.items()} == {
        stage.name: list(stage.files) for stage in ORDER
    }


class Long:
    """A judge of one's own: replies that are long; on every third it has no opinion."""

    name, unit, rule = "long", "long", "it has more than three words"

    def __init__(self) -> None:
        self.asked: list[int] = []

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list:
        self.asked.append(len(pairs))
        words = [len(reply.split()) for _, reply in pairs]
        return [UNPARSED if i % 3 == 0 else n > 3 for i, n in enumerate(words)]


def test_another_judge_is_asked_and_nothing_else_is_made_again(
    copy: Path, finished: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    """No reply is made again, nor the other judge's verdicts; the report is."""

    def no_model(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(study, "load_model", no_model)
    judge, config = Long(), small(tiny_dir, evals__judges=("substring", "long"))
    log = run(config, copy, judges=[judge])
    assert runs.stages_run(log, config) == ["judge long", "metrics", "report"]
    assert judge.asked == [15]
    ours, before = results(copy), results(finished)
    changed = {name for name in ours if ours[name] != before.get(name)}
    assert changed == {"judgements/long.jsonl", "metrics.json", "report.md"}

    rows = runs.rows(copy / "judgements/long.jsonl")
    assert [row["condition"] for row in rows] == [name for name in COMPLETIONS for _ in range(3)]
    metrics = json.loads((copy / "metrics.json").read_text())
    told = json.loads((finished / "metrics.json").read_text())
    assert list(metrics["judges"]) == ["substring", "long"]
    assert {k: v for k, v in metrics.items() if k != "judges"} == {
        k: v for k, v in told.items() if k != "judges"
    }
    found = metrics["judges"]["long"]
    for name in COMPLETIONS:
        given = [row["verdict"] for row in rows if row["condition"] == name]
        assert found["unparsed"][name] == given.count(UNPARSED) == 1
        assert (found["rates"][name]["count"], found["rates"][name]["n"]) == (sum(given[1:]), 2)
    report = (copy / "report.md").read_text()
    assert "## Judge: long" in report and "| prompts and edit | long | 95% interval |" in report
    assert "counts as long if it has more than three words. 5 verdicts could not be read" in report

    # Asked once: what it said is there.
    assert run(config, copy, judges=[judge]) == [f"{copy} is complete: nothing to do."]
    assert judge.asked == [15]

    # Without it again, the report is what it was.
    log = run(small(tiny_dir), copy)
    assert runs.stages_run(log) == ["metrics", "report"]
    assert {name: results(copy)[name] for name in before} == before
    assert "judgements/long.jsonl" not in str(runs.manifest(copy))


def test_the_first_judge_gives_the_table(copy: Path, tiny_dir: Path):
    run(small(tiny_dir, evals__judges=("long", "substring")), copy, judges=[Long()])
    metrics = json.loads((copy / "metrics.json").read_text())
    assert metrics["refusal"] == metrics["judges"]["long"]["rates"]
    report = (copy / "report.md").read_text()
    assert "| prompts and edit | long | 95% interval |" in report.split("## ")[0]
    assert "## Long by category" in report


def test_verdicts_that_were_changed_are_asked_for_again(copy: Path, finished: Path, tiny_dir: Path):
    (copy / "judgements/substring.jsonl").write_text("")
    assert runs.stages_run(run(small(tiny_dir), copy)) == ["judge substring", "metrics", "report"]
    assert results(copy) == results(finished)


def test_other_settings_may_not_come_with_other_judges(copy: Path, tiny_dir: Path):
    """What a stage with replies depends on is refused, whatever else changes."""
    before = contents(copy)
    config = small(tiny_dir, evals__judges=("long",), generate__seed=1)
    with pytest.raises(WorkdirError, match=r"config\.generate\.seed: there 0, now 1"):
        run(config, copy, judges=[Long()])
    assert contents(copy) == before


def test_a_judge_that_does_not_exist(copy: Path, tiny_dir: Path):
    before = contents(copy)
    with pytest.raises(JudgeError, match=r"evals\.judges=\('guard',\): .*Known are substring"):
        run(small(tiny_dir, evals__judges=("guard",)), copy)
    assert contents(copy) == before


def test_a_judge_of_whom_nothing_could_be_read(copy: Path, tiny_dir: Path):
    class Mute(Long):
        def judge(self, pairs):
            return [UNPARSED] * len(pairs)

    config = small(tiny_dir, evals__judges=("substring", "long"))
    with pytest.raises(StudyError, match=r"'long' gave no verdict .*judgements/long\.jsonl"):
        run(config, copy, judges=[Mute()])
    assert "judge long" in runs.manifest(copy)["stages"]  # its words are there to be read
    log = run(small(tiny_dir), copy)
    assert runs.stages_run(log) == ["metrics", "report"]
