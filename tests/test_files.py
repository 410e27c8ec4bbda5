"""Files whole or not at all, and hashes of values."""

import os
import threading
from pathlib import Path
from stat import S_ISREG

import pytest
from etils import epath

from jax_refusal import files
from jax_refusal.files import atomic_write, content_hash, read_file


def test_folders_are_made_and_nothing_else_is_left(tmp_path: Path):
    atomic_write(tmp_path / "deep/er/file.txt", b"words")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [
        tmp_path / "deep/er/file.txt"
    ]
    assert (tmp_path / "deep/er/file.txt").read_bytes() == b"words"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_is_cut_short_leaves_the_old_file(tmp_path: Path, monkeypatch, error, call):
    path = epath.Path(tmp_path / "file.txt")
    atomic_write(path, b"old")

    def cut_short(*_):
        raise error

    monkeypatch.setattr(os, call, cut_short)
    with pytest.raises(type(error)):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_content_is_on_the_disk_before_its_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch
):
    done, fsync, replace = [], os.fsync, os.replace

    def flushed(descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        done.append(f"{size} bytes" if S_ISREG(os.fstat(descriptor).st_mode) else "folder")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("renamed"), replace(*names)))
    atomic_write(tmp_path / "file.txt", b"words")
    assert done == ["5 bytes", "renamed", "folder"]
    done.clear()
    atomic_write(tmp_path / "deep/er/file.txt", b"words")
    assert done == ["folder", "folder", "5 bytes", "renamed", "folder"]


def test_a_planted_link_is_never_followed(tmp_path: Path, monkeypatch):
    """Neither of the file's own name nor, should somebody guess it, of the unfinished one's."""
    (tmp_path / "mine").write_text("words")
    (tmp_path / "file.txt").symlink_to(tmp_path / "mine")
    atomic_write(tmp_path / "file.txt", b"new")
    assert (tmp_path / "file.txt").read_bytes() == b"new"
    assert not (tmp_path / "file.txt").is_symlink()
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: "guessed")
    (tmp_path / ".file.txt.guessed.tmp").symlink_to(tmp_path / "mine")
    with pytest.raises(FileExistsError):
        atomic_write(tmp_path / "file.txt", b"newer")
    assert (tmp_path / "mine").read_text() == "words"
    assert (tmp_path / "file.txt").read_bytes() == b"new"


def test_two_writers_of_one_file_never_mix(tmp_path: Path):
    contents = [bytes([i]) * 100_000 for i in range(4)]

    def often(content: bytes) -> None:
        for _ in range(20):
            atomic_write(tmp_path / "file", content)

    threads = [threading.Thread(target=often, args=[content]) for content in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if (tmp_path / "file").exists():
            assert (tmp_path / "file").read_bytes() in contents
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_is_no_file_is_not_read(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(OSError, match="it is no file"):
            read_file(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "nothing")


def test_content_hash_depends_on_the_value_alone():
    assert content_hash({"a": 1, "b": "é"}) == content_hash({"b": "é", "a": 1})
    assert content_hash(["a", "b"]) != content_hash(["b", "a"])
