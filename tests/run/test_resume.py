"""A run on a tiny checkpoint goes on wherever it was stopped, and with nothing but its own."""

import hashlib
import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from jax_refusal.run import study
from jax_refusal.run.partial import PartialResults
from jax_refusal.run.side_by_side import side_by_side
from jax_refusal.run.workdir import WorkdirError
from jax_refusal.runtime.generate import generate
from jax_refusal.study.selection import SelectionError
from tests import runs, tiny
from tests.runs import COMPLETIONS, SMALL, STAGES, contents, results, run, small

# Run again


def test_a_second_run_does_nothing_and_says_so(finished: Path, tiny_dir: Path, monkeypatch):
    def no_model(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(study, "load_model", no_model)
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    log = run(small(tiny_dir), finished)
    assert log == [f"{finished} is complete: nothing to do."]
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_how_it_is_computed_may_change(finished: Path, tiny_dir: Path):
    config = small(
        tiny_dir,
        mesh__data=-1,
        mesh__model=2,
        generate__batch_size=1,
        compute__row_tokens=128,
        compute__batch_tokens=128,
    )
    assert run(config, finished) == [f"{finished} is complete: nothing to do."]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data.n_train", 7),
        ("data.seed", None),
        ("data.filter", True),
        ("model.dtype", "bfloat16"),
        ("model.system", "Be brief."),
        ("refusal.token_ids", (40,)),
        ("selection.kl_threshold", 0.1),
        ("generate.max_new_tokens", 9),
        ("generate.seed", 1),
    ],
)
def test_what_is_computed_may_not_change(field, value, copy: Path, tiny_dir: Path):
    before = contents(copy)
    with pytest.raises(WorkdirError) as error:
        run(small(tiny_dir, **{field.replace(".", "__"): value}), copy)
    assert f"config.{field}: there " in str(error.value)
    assert "Choose another --workdir" in str(error.value)
    assert contents(copy) == before


def test_other_weights_under_the_same_name_are_refused(copy: Path, tiny_dir: Path, tmp_path: Path):
    moved = tmp_path / "model"
    tiny.write_checkpoint(moved, seed=1)
    manifest = runs.manifest(copy)
    manifest["identity"]["config.model.source"] = str(moved)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(WorkdirError, match=r"model: there '[0-9a-f]+', now '[0-9a-f]+'"):
        run(small(moved), copy)
    with pytest.raises(WorkdirError, match=r"model: there '[0-9a-f]+', now '[0-9a-f]+'"):
        side_by_side(str(copy), ["Hi"])


# Stopped and gone on


@pytest.mark.parametrize("stage", ["refusal tokens", "selection", "completions"])
def test_a_run_that_was_killed_goes_on_after_the_last_complete_stage(
    stage: str, copy: Path, finished: Path, tiny_dir: Path
):
    runs.cut_after(copy, stage)
    log = run(small(tiny_dir), copy)
    assert runs.stages_run(log) == STAGES[STAGES.index(stage) + 1 :]
    assert results(copy) == results(finished)


def test_files_of_a_stage_that_was_not_listed_yet_are_made_again(
    copy: Path, finished: Path, tiny_dir: Path
):
    """Killed after the file was renamed and before the manifest was: half of another run's file."""
    half = (copy / "completions/harmful_ablation.jsonl").read_bytes()[:100]
    runs.cut_after(copy, "selection")
    (copy / "completions/harmful_ablation.jsonl").write_bytes(half)
    (copy / "completions/.harmful_addition.jsonl.tmp").write_bytes(half)
    run(small(tiny_dir), copy)
    assert results(copy) == results(finished)


def test_an_interrupt_in_the_middle_of_a_stage_leaves_it_to_the_next_run(
    finished: Path, tiny_dir: Path, tmp_path: Path
):
    workdir = tmp_path / "run"
    for title, done in (("means: harmless", 1), ("select", 2), ("completions", 3)):
        with pytest.raises(KeyboardInterrupt):
            run(small(tiny_dir), workdir, progress=runs.stop_at(title))
        manifest = runs.manifest(workdir)
        assert list(manifest["stages"]) == STAGES[:done]
        listed = {name for stage in manifest["stages"].values() for name in stage["files"]}
        assert set(contents(workdir)) == listed | {"manifest.json"}
    run(small(tiny_dir), workdir)
    assert results(workdir) == results(finished)


PARTIAL = "completions/partial.json"


def stop_after(replies: int) -> Callable:
    """A progress function that interrupts the run behind so many replies of its test prompts."""

    def progress(items, name):
        for done, item in enumerate(items):
            if name == "completions" and done == replies:
                raise KeyboardInterrupt
            yield item

    return progress


@pytest.fixture
def half_answered(copy: Path, tiny_dir: Path) -> Path:
    runs.cut_after(copy, "selection")
    with pytest.raises(KeyboardInterrupt):
        run(small(tiny_dir), copy, progress=stop_after(7))
    assert len(json.loads((copy / PARTIAL).read_bytes())["items"]) == 7
    return copy


def answered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each call of `generate` is given, from now on."""
    asked: list[int] = []

    def counted(model, prompts, *args, **options):
        asked.append(len(prompts.ids))
        return generate(model, prompts, *args, **options)

    monkeypatch.setattr(study, "generate", counted)
    return asked


def test_replies_that_were_ready_are_not_made_again(
    half_answered: Path, finished: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = answered(monkeypatch)
    run(small(tiny_dir), half_answered)
    assert asked == [len(COMPLETIONS) * SMALL["data.n_test"] - 7]
    assert results(half_answered) == results(finished)  # the file is gone, too


def test_replies_of_another_rule_are_not_taken(
    half_answered: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    """While no completions are listed, what they depend on may be changed."""
    asked = answered(monkeypatch)
    run(small(tiny_dir, generate__max_new_tokens=7), half_answered)
    assert asked == [len(COMPLETIONS) * SMALL["data.n_test"]]


def test_replies_under_another_edit_are_not_taken(
    half_answered: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    file = "selection/direction.safetensors"
    path, listed = half_answered / file, runs.manifest(half_answered)
    save_file({name: 2 * x for name, x in load_file(path).items()}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    listed["stages"]["selection"]["files"][file] = digest
    (half_answered / "manifest.json").write_text(json.dumps(listed))
    asked = answered(monkeypatch)
    run(small(tiny_dir), half_answered)
    assert asked == [len(COMPLETIONS) * SMALL["data.n_test"]]


DAMAGED = [b"", b"{", b"[]", b"{}", b"null", b"\xff", b"[" * 100_000]
ITEMS = [[], "a", {"a": []}, {"0": "a"}, {"0": 5}, {"0": [1.5]}, {"0": [True]}, {"0": [-1]}]
ITEMS += [{"0": [10**9]}, {"0": [1] * 9}, {"0": None}, None, {"9" * 5000: []}]


@pytest.mark.parametrize("damage", [*DAMAGED, *ITEMS], ids=lambda damage: str(damage)[:20])
def test_kept_replies_that_are_damaged_are_made_again_and_it_is_said(
    damage, half_answered: Path, finished: Path, tiny_dir: Path
):
    path = half_answered / PARTIAL
    of = json.loads(path.read_bytes())["of"]
    content = damage if isinstance(damage, bytes) else json.dumps({"of": of, "items": damage})
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    log = run(small(tiny_dir), half_answered)
    assert f"{PARTIAL} is damaged: what it held is made again" in log
    assert results(half_answered) == results(finished)


def test_sampled_replies_go_on_with_the_same_noise(tiny_dir: Path, copy: Path, tmp_path: Path):
    runs.cut_after(copy, "selection")
    config, whole = small(tiny_dir, generate__temperature=1.0), tmp_path / "whole"
    shutil.copytree(copy, whole)
    run(config, whole)
    with pytest.raises(KeyboardInterrupt):
        run(config, copy, progress=stop_after(7))
    run(config, copy)
    assert results(copy) == results(whole)


def test_ready_replies_are_written_at_times(
    copy: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    """What a kill leaves: the file is there before the stage ends."""
    runs.cut_after(copy, "selection")
    monkeypatch.setattr(PartialResults, "every", 0.0)
    seen: list[int] = []

    def look(items, name):
        for item in items:
            if name == "completions" and (copy / PARTIAL).exists():
                seen.append(len(json.loads((copy / PARTIAL).read_bytes())["items"]))
            yield item

    run(small(tiny_dir), copy, progress=look)
    assert seen == list(range(1, len(COMPLETIONS) * SMALL["data.n_test"]))


def edit_tensor(path: Path) -> None:
    tensors = load_file(path)
    save_file({name: x * 1.001 for name, x in tensors.items()}, path)


@pytest.mark.parametrize(
    ("file", "stage"),
    [
        ("refusal_tokens.json", "refusal tokens"),
        ("directions/means.safetensors", "means"),
        ("selection/candidates.jsonl", "selection"),
        ("completions/harmful_addition.jsonl", "completions"),
        ("plots/kl.png", "report"),
    ],
)
def test_a_file_that_was_changed_or_lost_is_made_again_with_all_that_follows(
    file: str, stage: str, copy: Path, finished: Path, tiny_dir: Path
):
    if file.endswith("safetensors"):
        edit_tensor(copy / file)
    elif file.endswith("png"):
        (copy / file).unlink()
    else:
        (copy / file).write_bytes((copy / file).read_bytes() + b"\n")
    log = run(small(tiny_dir), copy)
    assert runs.stages_run(log) == STAGES[STAGES.index(stage) :]
    assert results(copy) == results(finished)


def test_what_follows_a_stage_made_again_is_never_taken_from_before(copy: Path, tiny_dir: Path):
    """The run that makes a stage again may itself be stopped right after it."""
    edit_tensor(copy / "directions/means.safetensors")
    with pytest.raises(KeyboardInterrupt):
        run(small(tiny_dir), copy, progress=runs.stop_at("select"))
    assert list(runs.manifest(copy)["stages"]) == ["refusal tokens", "means"]


def test_another_batch_size_goes_on_to_the_same_replies(copy: Path, finished: Path, tiny_dir: Path):
    runs.cut_after(copy, "selection")
    run(small(tiny_dir, generate__batch_size=2), copy)
    assert results(copy) == results(finished)


def test_thresholds_may_be_moved_where_nothing_was_selected(tiny_dir: Path, tmp_path: Path):
    """What the error advises is possible, and keeps what was computed."""
    strict = {"selection__kl_threshold": 0.0, "selection__induce_threshold": 100.0}
    with pytest.raises(SelectionError, match=r'selection\.fallback="least_bad"'):
        run(small(tiny_dir, **strict), tmp_path)
    assert list(runs.manifest(tmp_path)["stages"]) == ["refusal tokens", "means"]
    log = run(small(tiny_dir, **strict, selection__fallback="least_bad"), tmp_path)
    assert runs.stages_run(log) == STAGES[2:]
    assert json.loads((tmp_path / "metrics.json").read_text())["fallback"] is True
    assert "No candidate passed the thresholds" in (tmp_path / "report.md").read_text()


def test_killed_by_the_system_and_gone_on(
    finished: Path, tiny_dir: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
):
    """SIGKILL to a process of its own as soon as a direction is chosen."""
    config = runs.write_config(tmp_path / "config.py", tiny_dir)
    workdir, first = tmp_path / "run", tmp_path / "run/selection/direction.json"
    cache = runs.programs(tmp_path_factory)
    process = runs.start(cache, f"--config={config}", f"--workdir={workdir}")
    while not first.exists() and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err
    todo = runs.stages_run(run(small(tiny_dir), workdir))
    assert 0 < len(todo) < len(STAGES) and todo == STAGES[-len(todo) :]
    ours, theirs = results(workdir), results(finished)
    assert ours["metrics.json"] == theirs["metrics.json"]
    for name in COMPLETIONS:
        assert ours[f"completions/{name}.jsonl"] == theirs[f"completions/{name}.jsonl"]
