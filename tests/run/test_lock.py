"""Two runs never share a workdir: a lock on a disk, a lease on a bucket."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from jax_refusal.run import lock
from jax_refusal.run.workdir import Workdir, WorkdirError
from tests.runs import ROOT, contents, results, run, small

HELD = r"in use by another run: process \d+ on .* since 20.* UTC, .*. Wait for its end"


@pytest.fixture
def folder(tmp_path: Path) -> epath.Path:
    return epath.Path(tmp_path)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease whose times are short, in a folder that has no locks."""
    monkeypatch.setattr(lock, "_flock", lambda path: None)
    for name, seconds in (("BEAT", 0.05), ("LAPSE", 0.4), ("SETTLE", 0.1)):
        monkeypatch.setattr(lock, name, seconds)


def test_a_second_run_is_refused_and_told_who_works_there(
    finished: Path, tiny_dir: Path, tmp_path: Path
):
    workdir, refused = tmp_path / "run", []

    def progress(items, name):
        if name == "completions":
            before = contents(workdir)
            with pytest.raises(WorkdirError, match=HELD) as error:
                run(small(tiny_dir), workdir)
            assert contents(workdir) == before
            refused.append(str(error.value))
        return items

    run(small(tiny_dir), workdir, progress=progress)
    assert len(refused) == 1 and str(os.getpid()) in refused[0] and "pytest" in refused[0]
    assert results(workdir) == results(finished)  # and no lock is left


def test_a_run_that_only_reads_needs_no_lock(finished: Path, copy: Path, tiny_dir: Path):
    with Workdir.existing(copy).lock():
        assert run(small(tiny_dir), copy) == [f"{copy} is complete: nothing to do."]


def test_what_another_run_did_meanwhile_is_not_done_again(
    finished: Path, copy: Path, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It finishes between the look at the manifest and the lock."""
    workdir, held = tmp_path / "run", lock.held

    def later(folder):
        monkeypatch.setattr(lock, "held", held)
        run(small(tiny_dir), workdir)
        return held(folder)

    monkeypatch.setattr(lock, "held", later)
    assert run(small(tiny_dir), workdir) == []
    assert results(workdir) == results(finished)


def test_nothing_is_left_where_nothing_was_written(tmp_path: Path):
    for folder in ("new", "deep/er"):
        with Workdir(tmp_path / folder, {}).lock():
            assert (tmp_path / folder / ".lock").exists()
        assert not (tmp_path / folder).exists()
    (tmp_path / "mine").mkdir()
    with Workdir(tmp_path / "mine", {}).lock():
        pass
    assert (tmp_path / "mine").exists()


HOLDER = """
import time
from etils import epath
from jax_refusal.run import lock
with lock.held(epath.Path({folder!r})):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_process_that_is_killed_gives_it_back(folder: epath.Path):
    script = HOLDER.format(folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    with pytest.raises(WorkdirError, match=f"process {process.pid} on"), lock.held(folder):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (folder / ".lock").exists()
    with lock.held(folder):
        pass
    assert not list(folder.iterdir())


def test_of_many_one_has_it(folder: epath.Path):
    """Those that wait for a lock file that is just being removed included."""
    inside, most, had = [], [], []

    def often():
        for _ in range(200):
            try:
                with lock.held(folder):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
                    had.append(1)
            except WorkdirError:
                pass

    threads = [threading.Thread(target=often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1} and had
    assert not list(folder.iterdir())


@pytest.mark.parametrize("kind", ["link", "second name", "folder"])
def test_a_planted_lock_is_refused_and_what_it_leads_to_left_alone(tmp_path: Path, kind: str):
    (tmp_path / "mine").write_text("words")
    (tmp_path / "run").mkdir()
    planted = tmp_path / "run/.lock"
    if kind == "link":
        planted.symlink_to(tmp_path / "mine")
    elif kind == "second name":
        planted.hardlink_to(tmp_path / "mine")
    else:
        planted.mkdir()
    with (
        pytest.raises(WorkdirError, match=r"Could not write .*\.lock"),
        Workdir(tmp_path / "run", {}).lock(),
    ):
        pass
    assert (tmp_path / "mine").read_text() == "words"


def test_who_holds_it_is_said_in_one_line_whatever_the_file_says(folder: epath.Path):
    for content in (b"", b"hal", b"[]", b'{"pid": "a\\nb", "command": [1], "time": "now"}', b"\0"):
        with lock.held(folder):
            (folder / ".lock").write_bytes(content)
            with pytest.raises(WorkdirError, match="in use by another run") as error:
                lock.held(folder).__enter__()
            assert "\n" not in str(error.value)


def test_a_lease_refuses_while_its_holder_lives(folder: epath.Path, quick: None):
    with lock.held(folder) as check:
        time.sleep(1.0)  # longer than it lasts without a beat
        with pytest.raises(WorkdirError, match=HELD) as error:
            lock.held(folder).__enter__()
        assert "gives it back 0 s later" in str(error.value)
        check()
    assert not list(folder.iterdir())


def test_a_lease_of_a_run_that_was_killed_lapses(folder: epath.Path, quick: None):
    (folder / ".lock").write_text(json.dumps({"token": "a", "time": time.time()}))
    with pytest.raises(WorkdirError, match="in use by another run"):
        lock.held(folder).__enter__()
    time.sleep(0.5)
    with lock.held(folder) as check:
        check()


@pytest.mark.parametrize("content", ["", "hal", "[]", '{"time": "now"}', '{"time": NaN}'])
def test_a_lease_that_nobody_can_read_has_lapsed(folder: epath.Path, quick: None, content: str):
    (folder / ".lock").write_text(content)
    with lock.held(folder) as check:
        check()


def test_of_two_that_take_a_lease_at_once_one_stops(
    folder: epath.Path, quick: None, monkeypatch: pytest.MonkeyPatch
):
    start, outcomes = threading.Barrier(2), []

    def take():
        start.wait()
        try:
            with lock.held(folder) as check:
                time.sleep(0.3)
                check()
                outcomes.append("held")
        except WorkdirError:
            outcomes.append("refused")

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["held", "refused"]


class Bucket(MemoryFileSystem):
    """What gs:// leads to, in memory."""

    protocol = "gcs"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("gs://").strip("/")


def test_a_bucket_has_a_lease_and_keeps_its_files(quick: None):
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    root = "gs://bucket/run"
    Bucket.store.clear()
    work = Workdir(root, {"model": "a"})
    with work.lock():
        work.write_json("a/b.json", 1)
        work.finish("first", ["a/b.json"], 1.0)
        with pytest.raises(WorkdirError, match=HELD), Workdir(root, {"model": "a"}).lock():
            pass
    assert set(Bucket.store) == {"/bucket/run/a/b.json", "/bucket/run/manifest.json"}
    Bucket.store["/bucket/run/a/.b.json.tmp"] = Bucket.store["/bucket/run/a/b.json"]
    again = Workdir(root, {"model": "a"})
    with again.lock():
        assert again.done("first") and again.read_json("a/b.json") == 1
    assert set(Bucket.store) == {"/bucket/run/a/b.json", "/bucket/run/manifest.json"}


def test_a_run_that_lost_its_lease_writes_no_more(tmp_path: Path, quick: None):
    """This machine slept, and another took over."""
    work = Workdir(tmp_path / "run", {})
    with work.lock():
        work.write_json("a.json", 1)
        theirs = json.dumps({"token": "another", "time": time.time(), "pid": 1})
        (tmp_path / "run/.lock").write_text(theirs)
        time.sleep(0.2)
        with pytest.raises(WorkdirError, match="in use by another run: process 1"):
            work.write_json("a.json", 2)
        assert work.read_json("a.json") == 1
    assert (tmp_path / "run/.lock").read_text() == theirs
