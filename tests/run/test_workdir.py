"""Files of a run: whole or not at all, hashed, and never those of another run."""

import hashlib
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from jax_refusal.run.workdir import FORMAT, MANIFEST, Workdir, WorkdirError
from tests.runs import contents

IDENTITY = {"config.a": 1, "config.b": [1, 2], "model": "abc"}
STAGES = ("first", "second", "third")


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix == ".tmp"]


@pytest.fixture
def made(tmp_path: Path) -> Workdir:
    """A workdir of three finished stages."""
    work = Workdir(tmp_path / "run", IDENTITY)
    for stage in STAGES:
        work.write_json(f"{stage}/file.json", {"stage": stage})
        work.finish(stage, [f"{stage}/file.json"], 1.0)
    return work


def test_nothing_is_written_before_there_is_something_to_write(tmp_path):
    Workdir(tmp_path / "run", IDENTITY)
    assert not (tmp_path / "run").exists()


def test_values_read_back_as_written(tmp_path):
    work = Workdir(tmp_path, IDENTITY)
    rows = [{"text": "a\u2028b\u0085c\nd"}, {"text": "ü – ’"}]
    work.write_json("deep/er/value.json", {"a": [1, None, "é"]})
    work.write_jsonl("rows.jsonl", rows)
    tensors = {"x": np.arange(6, dtype=np.float32).reshape(2, 3).T, "y": np.array([1, 2])}
    work.write_tensors("t.safetensors", tensors)
    assert work.read_json("deep/er/value.json") == {"a": [1, None, "é"]}
    assert work.read_jsonl("rows.jsonl") == rows
    for name, value in work.read_tensors("t.safetensors").items():
        np.testing.assert_array_equal(value, tensors[name])
        assert value.dtype == tensors[name].dtype


def test_the_manifest_lists_the_hash_of_every_file(made: Workdir):
    manifest = json.loads((made.root / MANIFEST).read_text())
    assert manifest["identity"] == IDENTITY
    assert set(manifest["versions"]) >= {"jax", "flax", "jax-refusal", "numpy"}
    for stage in STAGES:
        content = (made.root / stage / "file.json").read_bytes()
        files = manifest["stages"][stage]["files"]
        assert files == {f"{stage}/file.json": hashlib.sha256(content).hexdigest()}
    assert not leftovers(Path(made.root))


def test_a_stage_is_done_while_its_files_are_there_unchanged(made: Workdir):
    assert not made.done("fourth")
    again = Workdir(made.root, IDENTITY)
    assert all(again.done(stage) for stage in STAGES)
    (made.root / "first" / "file.json").unlink()
    (made.root / "second" / "file.json").write_text('{"stage": "Second"}\n')
    assert [again.done(stage) for stage in STAGES] == [False, False, True]


def test_a_stage_made_again_takes_the_later_ones_off_the_list(made: Workdir):
    made.finish("second", ["second/file.json"], 1.0, earlier=["first"])
    again = Workdir(made.root, IDENTITY)
    assert [again.done(stage) for stage in STAGES] == [True, True, False]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    work = Workdir(tmp_path, IDENTITY)
    work.write_json("value.json", "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(work.root), "write_bytes", full)
    with pytest.raises(WorkdirError, match=r"value\.json.*No space left.*make room"):
        work.write_json("value.json", "new")
    assert work.read_json("value.json") == "old"
    assert not leftovers(tmp_path)


def test_a_rename_that_fails_leaves_no_unfinished_file(tmp_path):
    work = Workdir(tmp_path, IDENTITY)
    (tmp_path / "value.json" / "in the way").mkdir(parents=True)
    with pytest.raises(WorkdirError, match=r"Could not write .*value\.json"):
        work.write_json("value.json", "new")
    assert not leftovers(tmp_path)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    work = Workdir(tmp_path, IDENTITY)
    work.write_json("value.json", "old")

    def interrupted(path, content):
        Path(path).write_text("hal")
        raise KeyboardInterrupt

    monkeypatch.setattr(type(work.root), "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        work.write_json("value.json", "new")
    assert work.read_json("value.json") == "old"
    assert not leftovers(tmp_path)


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path):
    (tmp_path / f".{MANIFEST}.tmp").write_text("hal")
    work = Workdir(tmp_path, IDENTITY)  # not taken for somebody else's folder
    work.finish("first", [], 0.0)
    assert not leftovers(tmp_path)


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    Workdir(tmp_path / "run", IDENTITY).write_json("value.json", 1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["../out.json", "a/../../out.json", "/tmp/out.json", ".."])
def test_a_path_outside_the_workdir_is_refused(tmp_path, name):
    work = Workdir(tmp_path / "run", IDENTITY)
    for act in (work.write_json, lambda name, _: work.read_json(name)):
        with pytest.raises(WorkdirError, match="outside"):
            act(name, 1)
    assert not list(tmp_path.iterdir())


def test_another_run_is_refused_naming_every_field_that_differs(made: Workdir):
    with pytest.raises(WorkdirError) as error:
        Workdir(made.root, IDENTITY | {"config.a": 2, "model": "xyz"})
    text = str(error.value)
    assert "config.a: there 1, now 2" in text and "model: there 'abc', now 'xyz'" in text
    assert "config.b" not in text
    assert Workdir(made.root, IDENTITY | {"config.new": 1})


def test_a_field_may_change_until_a_stage_depends_on_it(tmp_path):
    changed, first_use = IDENTITY | {"config.a": 2}, {"config.a": "second"}
    work = Workdir(tmp_path, IDENTITY)
    work.write_json(MANIFEST, work.manifest)
    Workdir(tmp_path, changed | {"model": "xyz"})  # no stage at all yet
    work.finish("first", [], 0.0)
    work = Workdir(tmp_path, changed, first_use)
    with pytest.raises(WorkdirError, match="model"):
        Workdir(tmp_path, IDENTITY | {"model": "xyz"}, first_use)
    work.finish("second", [], 0.0)
    assert Workdir(tmp_path, changed, first_use).manifest["identity"]["config.a"] == 2
    with pytest.raises(WorkdirError, match=r"config\.a: there 2, now 1"):
        Workdir(tmp_path, IDENTITY, first_use)


def test_a_field_that_may_change_takes_its_stages_off_the_list_at_once(made: Workdir):
    remade = {"config.a": ["second", "third"]}
    assert Workdir(made.root, IDENTITY, remade=remade).done("third")
    with pytest.raises(WorkdirError, match=r"model: there 'abc', now 'xyz'"):
        Workdir(made.root, IDENTITY | {"config.a": 2, "model": "xyz"}, remade=remade)
    changed = Workdir(made.root, IDENTITY | {"config.a": 2}, remade=remade)
    assert [changed.done(stage) for stage in STAGES] == [True, False, False]
    changed.note(template="t1")  # whatever writes the manifest next, it lists what is true
    again = Workdir(made.root, IDENTITY | {"config.a": 2}, remade=remade)
    assert [again.done(stage) for stage in STAGES] == [True, False, False]


def test_notes_are_kept_and_checked(made: Workdir):
    made.note(template="t1")
    assert json.loads((made.root / MANIFEST).read_text())["identity"]["template"] == "t1"
    before = os.stat(made.root / MANIFEST).st_mtime_ns
    Workdir(made.root, IDENTITY).note(template="t1")
    assert os.stat(made.root / MANIFEST).st_mtime_ns == before
    with pytest.raises(WorkdirError, match="template: there 't1', now 't2'"):
        Workdir(made.root, IDENTITY).note(template="t2")


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("words")
    with pytest.raises(WorkdirError, match=r"no manifest\.json.*empty or new folder"):
        Workdir(tmp_path, IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_is_no_workdir(tmp_path):
    (tmp_path / "run").write_text("words")
    with pytest.raises(WorkdirError, match="is a file"):
        Workdir(tmp_path / "run", IDENTITY)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 2, "stages": []}'])
def test_a_manifest_of_something_else_is_refused(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(WorkdirError, match="not a manifest of this program"):
        Workdir(tmp_path, IDENTITY)


@pytest.mark.parametrize(("layout", "age"), [(FORMAT - 1, "an older"), (FORMAT + 1, "a newer")])
def test_a_workdir_of_another_layout_is_refused_and_left_alone(made: Workdir, layout, age):
    manifest = json.loads((made.root / MANIFEST).read_text()) | {"format": layout}
    (made.root / MANIFEST).write_text(json.dumps(manifest))
    before = contents(Path(made.root))
    for act in (lambda: Workdir(made.root, IDENTITY), lambda: Workdir.existing(made.root)):
        with pytest.raises(WorkdirError, match=rf"{age} version.*layout {layout}.*--workdir"):
            act()
    assert contents(Path(made.root)) == before


def test_existing_needs_a_run(tmp_path, made: Workdir):
    assert Workdir.existing(made.root).done("third")
    with pytest.raises(WorkdirError, match="not the workdir of a run"):
        Workdir.existing(tmp_path)
