"""A folder that is made whole or not at all, by one process, where nothing else was put."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jax_refusal.checkpoints.export import ExportError
from jax_refusal.run.folders import whole_folder


def test_whole_or_not_at_all(tmp_path: Path):
    out = tmp_path / "deep/out"
    with whole_folder(out) as folder:
        (folder / "a").write_text("1")
        assert not out.exists() and folder.parent == out.parent
    assert (out / "a").read_text() == "1" and list(out.parent.iterdir()) == [out]
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "other") as folder:
        (folder / "a").write_text("1")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


def test_it_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    done: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append(name_of(descriptor)))
    rename = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("renamed"), rename(a, b)))

    def name_of(descriptor: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name

    with whole_folder(tmp_path / "out") as folder:
        (folder / "inner").mkdir()
        (folder / "inner/a").write_text("1")
    at = done.index("renamed")
    assert {"a", "inner", ".out.tmp"} == set(done[:at]) and done[at + 1 :] == [tmp_path.name]


@pytest.mark.parametrize("what", ["a link", "a link to nowhere", "a file"])
def test_what_was_planted_is_not_written_through(what: str, tmp_path: Path):
    elsewhere, planted = tmp_path / "elsewhere", tmp_path / ".out.tmp"
    if what == "a file":
        planted.write_text("mine")
    else:
        planted.symlink_to(elsewhere)
        if what == "a link":
            elsewhere.mkdir()
            (elsewhere / "mine").write_text("mine")
    refused = pytest.raises(ExportError, match=r"\.out\.tmp .*link or a file")
    with refused, whole_folder(tmp_path / "out"):
        raise AssertionError
    assert os.path.lexists(planted) and not (tmp_path / "out").exists()
    if what == "a link":
        assert [path.name for path in elsewhere.iterdir()] == ["mine"]


KILLED = """
import os, signal, sys
from pathlib import Path
from jax_refusal.run.folders import whole_folder
with whole_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("half")
    print("there", flush=True)
    signal.pause()
"""


def test_one_process_at_a_time_and_what_a_killed_one_left(tmp_path: Path):
    out = tmp_path / "out"
    other = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(out)], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    try:
        assert other.stdout.readline() == "there\n"
        with pytest.raises(ExportError, match="Another process is writing"), whole_folder(out):
            raise AssertionError
        assert (tmp_path / ".out.tmp/half").is_file()  # the other's, as it was
    finally:
        other.kill()
        other.communicate()
    with whole_folder(out) as folder:
        assert not list(folder.iterdir())
        (folder / "a").write_text("1")
    assert [path.name for path in out.iterdir()] == ["a"] and list(tmp_path.iterdir()) == [out]


def test_a_place_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    refused = pytest.raises(ExportError, match=r"could not be written .*nothing was left")
    with refused, whole_folder(tmp_path / "file/out"):
        raise AssertionError
