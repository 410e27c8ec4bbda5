"""Files of a run: whole or not at all, hashed, and never those of another run."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
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
def locked() -> Iterator[Callable[..., Workdir]]:
    """Makes a Workdir that may write until the test ends."""
    with contextlib.ExitStack() as stack:

        def make(root: Path, identity=IDENTITY, **options) -> Workdir:
            work = Workdir(root, identity, **options)
            stack.enter_context(work.lock())
            return work

        yield make


@pytest.fixture
def made(tmp_path: Path) -> Workdir:
    """A workdir of three finished stages."""
    work = Workdir(tmp_path / "run", IDENTITY)
    with work.lock():
        for stage in STAGES:
            work.write_json(f"{stage}/file.json", {"stage": stage})
            work.finish(stage, [f"{stage}/file.json"], 1.0)
    return work


def test_nothing_is_written_before_there_is_something_to_write(tmp_path):
    Workdir(tmp_path / "run", IDENTITY)
    assert not (tmp_path / "run").exists()


def test_values_read_back_as_written(tmp_path, locked):
    work = locked(tmp_path)
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
    with made.lock():
        made.write_json("second/file.json", {"stage": "second"})
        made.finish("second", ["second/file.json"], 1.0, earlier=["first"])
    again = Workdir(made.root, IDENTITY)
    assert [again.done(stage) for stage in STAGES] == [True, True, False]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, locked, monkeypatch):
    work = locked(tmp_path)
    work.write_json("value.json", "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WorkdirError, match=r"value\.json.*No space left.*make room"):
        work.write_json("value.json", "new")
    assert work.read_json("value.json") == "old"
    assert not leftovers(tmp_path)


def test_a_rename_that_fails_leaves_no_unfinished_file(tmp_path, locked):
    work = locked(tmp_path)
    (tmp_path / "value.json" / "in the way").mkdir(parents=True)
    with pytest.raises(WorkdirError, match=r"Could not write .*value\.json"):
        work.write_json("value.json", "new")
    assert not leftovers(tmp_path)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, locked, monkeypatch):
    work = locked(tmp_path)
    work.write_json("value.json", "old")

    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        work.write_json("value.json", "new")
    assert work.read_json("value.json") == "old"
    assert not leftovers(tmp_path)


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path):
    (tmp_path / f".{MANIFEST}.{8 * '0'}.tmp").write_text("hal")
    (tmp_path / ".lock").write_text("hal")
    work = Workdir(tmp_path, IDENTITY)  # not taken for somebody else's folder
    with work.lock():
        work.note(template="t1")
        work.write_json("plots/value.json", 1)
    (tmp_path / "plots/.kl.png.tmp").write_text("hal")
    with work.lock():
        work.finish("first", [], 0.0)
    assert sorted(contents(tmp_path)) == [MANIFEST, "plots/value.json"]


def test_only_process_0_locks_and_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    work = Workdir(tmp_path / "run", IDENTITY)
    with work.lock():
        work.write_json("value.json", 1)
        work.finish("first", ["value.json"], 0.0)
    assert not (tmp_path / "run").exists()


def test_nobody_writes_without_the_lock(made: Workdir):
    before = contents(Path(made.root))
    for act in (lambda: made.write_json("a.json", 1), lambda: made.delete("first/file.json")):
        with pytest.raises(AssertionError, match="lock"):
            act()
    made.note(template="t1")  # of a run that is only read: checked, and not written
    with pytest.raises(WorkdirError, match="template: there 't1', now 't2'"):
        made.note(template="t2")
    assert contents(Path(made.root)) == before


OUTSIDE = ["../out.json", "a/../../out.json", "/tmp/out.json", "..", "", "a//b", "./a", "a\0b"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_path_outside_the_workdir_is_refused(tmp_path, locked, name):
    work = locked(tmp_path / "run")
    for act in (work.write_json, lambda name, _: work.read_json(name)):
        with pytest.raises(WorkdirError, match="outside"):
            act(name, 1)
    assert [path.name for path in tmp_path.rglob("*")] == ["run", ".lock"]


@pytest.mark.parametrize("name", ["first", "first/file.json", MANIFEST])
def test_a_link_that_leads_outside_the_workdir_is_refused(made: Workdir, tmp_path, name):
    """Of a folder or a file, whatever it leads to."""
    planted, elsewhere = Path(made.root) / name, tmp_path / "elsewhere"
    planted.rename(elsewhere)
    planted.symlink_to(elsewhere)
    before = contents(elsewhere) if elsewhere.is_dir() else elsewhere.read_bytes()

    def go_on():
        work = Workdir(made.root, IDENTITY)
        assert not work.done("first")
        with work.lock():
            work.write_json("first/file.json", "new")

    for act in (go_on, lambda: Workdir.existing(made.root).read_json("first/file.json")):
        with pytest.raises(WorkdirError, match=r"link that leads outside.*elsewhere.*remove"):
            act()
    after = contents(elsewhere) if elsewhere.is_dir() else elsewhere.read_bytes()
    assert after == before


def test_a_workdir_may_itself_be_a_link(made: Workdir, tmp_path):
    (tmp_path / "link").symlink_to(made.root)
    assert Workdir(tmp_path / "link", IDENTITY).done("third")


def test_a_pipe_is_not_waited_for(made: Workdir):
    path = Path(made.root) / "first/file.json"
    path.unlink()
    os.mkfifo(path)
    assert not Workdir(made.root, IDENTITY).done("first")
    with pytest.raises(WorkdirError, match=r"file\.json cannot be read \(it is no file\)"):
        made.read_json("first/file.json")


def test_what_is_read_is_what_was_written(made: Workdir):
    (Path(made.root) / "first/file.json").write_text('{"stage": "other"}')
    work = Workdir.existing(made.root)
    with pytest.raises(WorkdirError, match=r"first/file\.json is not as the run wrote it. Delete"):
        work.read_json("first/file.json")
    (Path(made.root) / "first/file.json").unlink()
    with pytest.raises(WorkdirError, match=r"first/file\.json cannot be read \(No such file"):
        work.read_json("first/file.json")


def test_the_hash_is_of_what_was_written_whatever_lies_there(tmp_path, locked):
    work = locked(tmp_path)
    work.write("file.txt", b"ours")
    (tmp_path / "file.txt").write_bytes(b"another's")
    work.finish("first", ["file.txt"], 0.0)
    assert not work.done("first")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
def test_a_file_that_is_no_json_is_one_error(tmp_path, content):
    (tmp_path / "other.json").write_bytes(content)
    (tmp_path / MANIFEST).write_text(json.dumps(GOOD))
    work = Workdir.existing(tmp_path)
    for read in (work.read_json, work.read_tensors):
        with pytest.raises(WorkdirError, match=r"other\.json does not hold what a run writes"):
            read("other.json")


def test_a_stage_that_lists_too_few_files_is_not_done(made: Workdir):
    assert made.done("first", ["first/file.json"])
    assert not made.done("first", ["first/file.json", "first/other.json"])


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
    with work.lock():
        work.write_json(MANIFEST, work.manifest)
        Workdir(tmp_path, changed | {"model": "xyz"})  # no stage at all yet
        work.finish("first", [], 0.0)
    work = Workdir(tmp_path, changed, first_use)
    with pytest.raises(WorkdirError, match="model"):
        Workdir(tmp_path, IDENTITY | {"model": "xyz"}, first_use)
    with work.lock():
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
    with changed.lock():
        changed.note(template="t1")  # whatever writes the manifest next, it lists what is true
    again = Workdir(made.root, IDENTITY | {"config.a": 2}, remade=remade)
    assert [again.done(stage) for stage in STAGES] == [True, False, False]


def test_notes_are_kept_and_checked(made: Workdir):
    with made.lock():
        made.note(template="t1")
        assert json.loads((made.root / MANIFEST).read_text())["identity"]["template"] == "t1"
        before = os.stat(made.root / MANIFEST).st_mtime_ns
        made.note(template="t1")
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


STAGE = {"files": {"a.json": "00"}, "seconds": 1.0}
GOOD = {"format": FORMAT, "identity": {"model": "abc"}, "stages": {"first": STAGE}}
TEXTS = ["", "[]", "{}", "null", "1", '"a"', "\ud800", "[" * 100_000, '{"format": 2}', "\0"]
BAD = [
    {"format": "2"},
    {"format": None},
    {"format": True},
    {"format": 2.0},
    {"identity": []},
    {"identity": None},
    {"identity": {"model": 5}},
    {"identity": {"model": None}},
    {"identity": {"tokenizer": ["a"]}},
    {"identity": {"\ud800": 1}},
    {"stages": []},
    {"stages": {"first": []}},
    {"stages": {"first": {}}},
    {"stages": {"first": STAGE | {"files": ["a.json"]}}},
    {"stages": {"first": STAGE | {"files": {"a.json": 1}}}},
    {"stages": {"first": STAGE | {"files": {"a.json": None}}}},
    {"stages": {"first": STAGE | {"seconds": "1"}}},
    *({"stages": {"first": STAGE | {"files": {name: "00"}}}} for name in OUTSIDE),
]


@pytest.mark.parametrize(
    "text", [*TEXTS, *(json.dumps(GOOD | bad) for bad in BAD)], ids=lambda text: text[-70:]
)
def test_a_manifest_of_something_else_is_refused_in_one_line(tmp_path, text):
    (tmp_path / MANIFEST).write_bytes(text.encode(errors="surrogatepass"))
    for act in (lambda: Workdir(tmp_path, IDENTITY), lambda: Workdir.existing(tmp_path)):
        with pytest.raises(WorkdirError, match="not a manifest of this program") as error:
            act()
        assert len(str(error.value)) < 1000 and "\n" not in str(error.value)
        assert "Put back a copy of it, or choose another --workdir" in str(error.value)
    (tmp_path / MANIFEST).write_text(json.dumps(GOOD))
    Workdir.existing(tmp_path)


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
