"""Files whole or not at all, and hashes of values."""

from pathlib import Path

import pytest
from etils import epath

from jax_refusal.files import atomic_write, content_hash


def test_folders_are_made_and_nothing_else_is_left(tmp_path: Path):
    atomic_write(tmp_path / "deep/er/file.txt", b"words")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [
        tmp_path / "deep/er/file.txt"
    ]
    assert (tmp_path / "deep/er/file.txt").read_bytes() == b"words"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_is_cut_short_leaves_the_old_file(tmp_path: Path, monkeypatch, error):
    path = epath.Path(tmp_path / "file.txt")
    atomic_write(path, b"old")

    def cut_short(self, content):
        Path(self).write_text("ne")
        raise error

    monkeypatch.setattr(type(path), "write_bytes", cut_short)
    with pytest.raises(type(error)):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_content_hash_depends_on_the_value_alone():
    assert content_hash({"a": 1, "b": "é"}) == content_hash({"b": "é", "a": 1})
    assert content_hash(["a", "b"]) != content_hash(["b", "a"])
