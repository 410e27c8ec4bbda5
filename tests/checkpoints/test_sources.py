"""Which files of a folder are read: those that Hugging Face takes, and none outside of it."""

import json
import os
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save, save_file

import jax_refusal as jr
from jax_refusal.checkpoints import sources
from jax_refusal.checkpoints.folder import inside, read_json
from jax_refusal.checkpoints.sources import Source, SourceError, fingerprint, locate
from jax_refusal.checkpoints.tensors import ConversionError, read_safetensors
from tests import tiny
from tests.tolerances import PARITY, assert_close

ONES = np.ones((2, 3), np.float32)
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def folder_of(root: Path, files: dict[str, dict[str, np.ndarray]], index: Any = None) -> Path:
    """A checkpoint's folder with these files, and an index (as it follows from them)."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text("{}")
    for name, tensors in files.items():
        save_file(tensors, root / name)
    if index is None:
        index = {"weight_map": {t: name for name, tensors in files.items() for t in tensors}}
    text = index if isinstance(index, str) else json.dumps(index)
    (root / "model.safetensors.index.json").write_text(text)
    return root


def two(root: Path, index: Any = None) -> Path:
    return folder_of(root, {FIRST: {"a": ONES, "b": 2 * ONES}, SECOND: {"c": 3 * ONES}}, index)


def refused(folder: Path, error: type[Exception] = SourceError) -> str:
    with pytest.raises(error) as caught:
        Source("x", directory=folder).weight_files()
    return str(caught.value)


# The order of Hugging Face


def test_one_file_is_taken_before_an_index(checkpoint: Callable[..., Path], tmp_path: Path):
    pytest.importorskip("torch")
    folder = Path(shutil.copytree(checkpoint(shards=3), tmp_path / "model"))
    shutil.copy(checkpoint(seed=9) / "model.safetensors", folder)
    ids = np.arange(3, 23)[None]
    theirs = tiny.hf_model(folder)(input_ids=_torch(ids)).logits.detach().numpy()
    model = jr.load_model(str(folder))
    assert_close(jr.logits(model, ids), theirs, PARITY, "logits")
    before = fingerprint(locate(str(folder)))
    for path in folder.glob("model-0*"):  # the index is stale: it was never read
        path.unlink()
    assert fingerprint(locate(str(folder))) == before
    for leaf, values in jr.load_model(str(folder)).leaves().items():
        np.testing.assert_array_equal(values, model.leaves()[leaf], err_msg=leaf)


def _torch(ids: np.ndarray) -> Any:
    import torch

    return torch.tensor(ids).long()


def test_shards_are_those_that_the_index_names(tmp_path: Path):
    folder = two(tmp_path)
    save_file({"a": 5 * ONES}, folder / "model-00001-of-00009.safetensors")  # of another time
    files = Source("x", directory=folder).weight_files()
    assert [path.name for path in files] == [FIRST, SECOND]
    assert sorted(read_safetensors(files)) == ["a", "b", "c"]


def test_a_tensor_that_the_index_forgets_is_read_as_hugging_face_reads_it(tmp_path: Path):
    folder = two(tmp_path, {"weight_map": {"a": FIRST, "c": SECOND}})
    assert sorted(read_safetensors(Source("x", directory=folder).weight_files())) == ["a", "b", "c"]


INDEXES: dict[str, tuple[Any, list[str]]] = {
    "empty": ({}, ["has no weight_map"]),
    "no map": ({"weight_map": [FIRST]}, ["has no weight_map"]),
    "nothing in it": ({"weight_map": {}}, ["has no weight_map"]),
    "not JSON": ('{"weight_map": {', ["is not valid JSON"]),
    "not text": ("\udc80", ["is not valid JSON", "utf-8"]),
    "a list": ([], ["holds a list where an object is expected"]),
    "a number": ({"weight_map": {"a": 1}}, ["no .safetensors file for 1 tensors: ['a: 1']"]),
    "a pickle": ({"weight_map": {"a": "a.bin"}}, ["'a.bin'", "no .safetensors file"]),
    "twice": (
        f'{{"weight_map": {{"a": "{FIRST}", "b": "{FIRST}", "a": "{SECOND}"}}}}',
        ["one object says ['a'] twice"],
    ),
    "of another file": (
        {"weight_map": {"a": SECOND, "c": FIRST}},
        [f"a is in ['{FIRST}'], not in"],
    ),
    "of another revision": ({"weight_map": {"a": FIRST, "d": SECOND}}, ["d is in none, not in"]),
    "missing": ({"weight_map": {"a": "z.safetensors"}}, ["lacks 1 of 1 shards", "z.safetensors"]),
    "above": ({"weight_map": {"a": f"../{FIRST}"}}, ["not below this folder", "../model-"]),
    "absolute": ({"weight_map": {"a": "/tmp/x.safetensors"}}, ["not below this folder", "/tmp/x"]),
    "deep": ('{"weight_map":' * 40 + "1" + "}" * 40, ["nests deeper than 32"]),
    "deeper": ("[" * 100_000, ["nests deeper than 32"]),
    "a number of many digits": ('{"weight_map": ' + "1" * 5000 + "}", ["is not valid JSON"]),
}


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_that_is_none(case: str, tmp_path: Path):
    index, words = INDEXES[case]
    folder = two(tmp_path, index if index != "\udc80" else {})
    if index == "\udc80":
        (folder / "model.safetensors.index.json").write_bytes(b'{"\x80": 1}')
    text = refused(folder)
    assert "model.safetensors.index.json" in text or case in ("missing", "above", "absolute")
    assert not [word for word in words if word not in text], text


def test_an_index_with_thousands_of_faults_is_a_short_message(tmp_path: Path):
    folder = two(tmp_path, {"weight_map": {f"layer.{i}": FIRST for i in range(5000)}})
    text = refused(folder)
    assert len(text) < 5000 and "and 4980 more" in text


def test_a_tensor_in_two_files(tmp_path: Path):
    folder = folder_of(tmp_path, {FIRST: {"a": ONES, "c": ONES}, SECOND: {"a": ONES}})
    assert f"a is in ['{FIRST}', '{SECOND}']" in refused(folder)
    with pytest.raises(ConversionError, match=r"a is in .* and in a file before it"):
        read_safetensors([folder / FIRST, folder / SECOND])


def test_a_distributed_checkpoint_is_named(tmp_path: Path):
    """Hugging Face takes it before every other file."""
    folder = two(tmp_path)
    save_file({"a": ONES}, folder / "shard-00000-model-00001-of-00002.safetensors")
    assert "distributed checkpoint of PyTorch (['shard-00000-model" in refused(folder)


def test_weights_in_two_formats(tmp_path: Path):
    folder = two(tmp_path)
    (folder / "orbax").mkdir()
    assert "holds weights twice, in orbax/ and in model.safetensors.index.json" in refused(folder)


# Safetensors files


def safetensors(header: str, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header.encode() + data


HEADERS = {
    "a name twice": (
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
        '"a": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}}',
        r"says \['a'\] twice",
    ),
    "overlapping": (
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
        '"b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        "not a complete safetensors file",
    ),
    "a hole": (
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        "not a complete safetensors file",
    ),
    "beyond the end": (
        '{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',
        "not a complete safetensors file",
    ),
    "before the start": (
        '{"a": {"dtype": "F32", "shape": [4], "data_offsets": [-8, 8]}}',
        "not a complete safetensors file",
    ),
    "another shape": (
        '{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
        "not a complete safetensors file",
    ),
    "an absurd shape": (
        f'{{"a": {{"dtype": "F32", "shape": [{2**62}, 4], "data_offsets": [0, 8]}}}}',
        "not a complete safetensors file",
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_its_data_do_not_bear_out(case: str, tmp_path: Path):
    header, words = HEADERS[case]
    (tmp_path / "a.safetensors").write_bytes(safetensors(header, bytes(8)))
    with pytest.raises(ConversionError, match=words):
        read_safetensors([tmp_path / "a.safetensors"])


def test_what_git_keeps_in_place_of_a_file(tmp_path: Path):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / "a.safetensors").write_text(text)
    with pytest.raises(ConversionError, match="git lfs pull"):
        read_safetensors([tmp_path / "a.safetensors"])


# JSON


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[1]", "holds a list where an object is expected"),
        (b"null", "holds a NoneType"),
        (b'{"a": ' * 2000, "nests deeper"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', r"says \['c'\] twice"),
        (b"\xff\xfe{}", "is not valid JSON"),
        (b'{"a": "' + b"x" * 2**22 + b'"}', "has 4194313 bytes; at most 4194304 are read"),
    ],
)
def test_a_config_that_is_none(content: bytes, words: str, tmp_path: Path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(SourceError, match=words) as caught:
        Source("x", directory=tmp_path).config()
    assert len(str(caught.value)) < 500


def test_a_config_that_may_not_be_read(tmp_path: Path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(SourceError, match=r"has no config\.json"):
        Source("x", directory=tmp_path).config()
    with pytest.raises(SourceError, match="cannot be read"):
        read_json(tmp_path / "config.json")


# Paths


def test_links_inside_of_a_folder_are_followed(tmp_path: Path):
    two(tmp_path / "real")
    (tmp_path / "real/weights").mkdir()
    (tmp_path / "real" / FIRST).rename(tmp_path / "real/weights/first")
    (tmp_path / "real" / FIRST).symlink_to("weights/first")
    (tmp_path / "model").symlink_to("real")  # the user named it
    assert len(locate(str(tmp_path / "model")).weight_files()) == 2


@pytest.mark.parametrize("name", ["config.json", FIRST, "tokenizer.json", "merges.txt"])
@pytest.mark.parametrize("there", [True, False])
def test_a_link_out_of_a_folder_is_named(name: str, there: bool, tmp_path: Path):
    folder = two(tmp_path / "model")
    outside = tmp_path / "outside"
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    if there:
        outside.write_text("{}")
    words = rf"{folder / name} is or lies behind a link to {outside}, outside of {folder}\..*copy"
    with pytest.raises(SourceError, match=words):
        locate(str(folder))
    source = Source("x", directory=folder)
    if name == "config.json":
        with pytest.raises(SourceError, match=words):
            source.config()
    if name == FIRST:
        assert "lies behind a link" in refused(folder)


@pytest.mark.parametrize("name", ["orbax", "additional_chat_templates"])
def test_folders_of_a_folder_do_not_lead_out(name: str, tmp_path: Path):
    folder = two(tmp_path / "model")
    (tmp_path / "outside").mkdir()
    (folder / name).symlink_to(tmp_path / "outside")
    with pytest.raises(SourceError, match="lies behind a link"):
        locate(str(folder))
    (folder / name).unlink()
    (folder / name).mkdir()
    (folder / name / "x.jinja").symlink_to(tmp_path / "outside")
    with pytest.raises(SourceError, match="lies behind a link"):
        locate(str(folder))


def test_a_folder_behind_a_link(tmp_path: Path):
    folder = two(tmp_path / "model", {"weight_map": {"a": "sub/a.safetensors"}})
    (tmp_path / "outside").mkdir()
    save_file({"a": ONES}, tmp_path / "outside/a.safetensors")
    (folder / "sub").symlink_to(tmp_path / "outside")
    assert "sub/a.safetensors is or lies behind a link" in refused(folder)
    (folder / "sub").unlink()
    shutil.move(tmp_path / "outside", folder / "sub")
    assert Source("x", directory=folder).weight_files() == [folder / "sub/a.safetensors"]


def test_a_loop_of_links(tmp_path: Path):
    folder = two(tmp_path / "model")
    (folder / "loop.json").symlink_to("loop.json")
    with pytest.raises(SourceError, match=r"loop\.json cannot be followed|has no loop\.json"):
        locate(str(folder)).file("loop.json")


SHA = "0123456789abcdef" * 4


def test_the_hub_keeps_files_behind_links(tmp_path: Path):
    """Once for all revisions of a repository, or once for all repositories."""
    repository = tmp_path / "models--org--tiny"
    folder = two(repository / "snapshots" / SHA[:40])
    (repository / "blobs").mkdir()
    (tmp_path / "blobs/01").mkdir(parents=True)
    (folder / FIRST).rename(repository / "blobs/first")
    (folder / FIRST).symlink_to("../../blobs/first")
    (folder / SECOND).rename(tmp_path / "blobs/01" / SHA)
    (repository / "blobs/second").symlink_to(f"../../blobs/01/{SHA}")
    (folder / SECOND).symlink_to("../../blobs/second")
    assert len(locate(str(folder)).weight_files()) == 2

    other = tmp_path / "models--org--other/blobs"
    other.mkdir(parents=True)
    (other / "key").write_text("{}")
    for target in ("../../../models--org--other/blobs/key", "../../refs/main", "../../../key"):
        (folder / "config.json").unlink()
        (folder / "config.json").symlink_to(target)
        with pytest.raises(SourceError, match="outside of"):
            locate(str(folder))


@pytest.mark.parametrize("name", ["", "../x", "a/../../x", "/etc/hostname", "a\0b"])
def test_names_that_are_not_below_a_folder(name: str, tmp_path: Path):
    with pytest.raises(SourceError, match="not below this folder"):
        inside(tmp_path, name)


@pytest.mark.parametrize("inner", ["../x.gguf", "/x.gguf", "numpy/../../x.gguf"])
def test_a_file_of_a_package_lies_in_it(inner: str, tmp_path: Path, monkeypatch):
    class Distribution:
        locate_file = staticmethod((tmp_path / "packages").joinpath)

    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(sources.metadata, "distribution", lambda _: Distribution)
    with pytest.raises(SourceError, match="names no file of a package"):
        locate(f"package:numpy/{inner}")


@pytest.mark.parametrize(
    "source", ["package:", "package:/x.gguf", "~nobody-here/model", "x" * 300, "x/" * 3000, "a\0b"]
)
def test_sources_that_cannot_be_names(source: str):
    with pytest.raises(SourceError) as caught:
        locate(source)
    assert len(str(caught.value)) < 7500


def test_a_folder_that_may_not_be_looked_into(tmp_path: Path):
    if os.geteuid() == 0:
        pytest.skip("root may look into every folder")
    folder = two(tmp_path / "model")
    folder.chmod(0)
    try:
        with pytest.raises(SourceError, match="Permission denied"):
            locate(str(folder))
    finally:
        folder.chmod(0o755)


def test_a_large_header_takes_no_memory(tmp_path: Path):
    """A file that says that its header has 80 MB: refused before it is parsed."""
    size = 80 * 2**20
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        whole = save({"a": ONES})
        (length,) = struct.unpack("<Q", whole[:8])
        file.write(struct.pack("<Q", size) + whole[8 : 8 + length])
        file.write(b" " * (size - length) + whole[8 + length :])
    tracemalloc.start()
    with pytest.raises(ConversionError, match=r"has 83886080 bytes; at most"):
        read_safetensors([path])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
