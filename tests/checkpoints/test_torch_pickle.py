"""Files of torch.save, read without torch: the same numbers, and nothing in them is run."""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jax_refusal.checkpoints.torch_pickle import TorchFileError, read_torch
from tests import shared

GRID = torch.arange(2 * 3 * 4, dtype=torch.float64).reshape(2, 3, 4)


def saved(folder: Path, value: Any, **options: Any) -> Path:
    path = folder / "value.pt"
    torch.save(value, path, **options)
    return path


def with_file(path: Path, name: str, content: bytes | None, **options: Any) -> Path:
    """The archive with one of its files replaced, or taken out."""
    with zipfile.ZipFile(path) as archive:
        files = {entry: archive.read(entry) for entry in archive.namelist()}
    (old,) = (entry for entry in files if entry.endswith(f"/{name}"))
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in files.items():
            if entry != old:
                archive.writestr(entry, data)
        if content is not None:
            archive.writestr(old, content, **options)
    return path


def same(ours: np.ndarray, theirs: torch.Tensor) -> None:
    assert isinstance(ours, np.ndarray) and ours.shape == tuple(theirs.shape)
    assert ours.dtype.name == str(theirs.dtype).removeprefix("torch.")
    wide = theirs.float() if theirs.dtype is torch.bfloat16 else theirs
    np.testing.assert_array_equal(ours.astype(wide.numpy().dtype), wide.numpy())


VIEWS = {
    "whole": GRID,
    "a cell": GRID[1, 2],  # storage offset
    "a column": GRID[:, 1, 3],  # offset and stride
    "transposed": GRID.permute(2, 0, 1),
    "expanded": GRID[0, 0, 1].expand(3, 2),  # stride 0
    "every second": GRID.reshape(-1)[::2],
    "a scalar": GRID[1, 1, 1],
    "empty": GRID[:, :0],
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_of_a_storage(tmp_path: Path, name: str):
    same(read_torch(saved(tmp_path, VIEWS[name])), VIEWS[name])


@pytest.mark.parametrize(
    "dtype",
    "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split(),
)
def test_dtypes(tmp_path: Path, dtype: str):
    values = (torch.randn(3, 5, generator=torch.Generator().manual_seed(0)) * 40).abs()
    tensor = values.to(getattr(torch, dtype))
    same(read_torch(saved(tmp_path, tensor.T)), tensor.T)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_containers_of_tensors_with_several_storages(tmp_path: Path, protocol: int):
    other = torch.nn.Parameter(torch.tensor([1.5, -2.0]))
    state = torch.nn.Linear(2, 3).state_dict()
    value = {
        "views": [GRID[0], GRID[1]],
        "pair": (other, None),
        "numbers": {"layer": 10, "far": 70_000, "below": -2, "score": 0.5, "kept": True},
        "state": state,
        7: OrderedDict(a=GRID.half()),
    }
    found = read_torch(saved(tmp_path, value, pickle_protocol=protocol))
    assert list(found) == list(value)
    same(found["views"][1], GRID[1])
    same(found["pair"][0], other.detach())
    assert found["pair"][1] is None and found["numbers"] == value["numbers"]
    same(found["state"]["weight"], state["weight"])
    same(found[7]["a"], GRID.half())


def test_tensors_are_read_only(tmp_path: Path):
    with pytest.raises(ValueError, match="read-only"):
        read_torch(saved(tmp_path, GRID))[0, 0, 0] = 1.0


def test_the_byte_order_is_the_files(tmp_path: Path):
    path = saved(tmp_path, torch.tensor([1.0, -2.5]))
    with_file(path, "data/0", struct.pack(">2f", 1.0, -2.5))
    with_file(path, "byteorder", b"big")
    np.testing.assert_array_equal(read_torch(path), np.float32([1.0, -2.5]))
    with_file(path, "byteorder", b"mixed")
    with pytest.raises(TorchFileError, match="byte order is 'mixed'"):
        read_torch(path)


# What is refused


class Runs:
    """Its pickle calls a function when it is loaded."""

    def __init__(self, *call: Any):
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


RAN: list[str] = []


def touch(name: str) -> None:
    RAN.append(name)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Runs(touch, ("ran",)), "tests.checkpoints.test_torch_pickle.touch"),
        (Runs(eval, ("__import__('os').abort()",)), ".*builtin.*eval"),
        (Runs(print, ("x",)), ".*builtin.*print"),
        (Runs(torch.load, ("x",)), "torch.serialization.load"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (torch.float16, "torch.float16"),
        (np.float64(1.0), "numpy.*scalar"),
        (torch.complex(GRID, GRID), "torch.ComplexDoubleStorage"),
        (GRID.to_sparse(), "torch._utils._rebuild_sparse_tensor"),
    ],
)
def test_other_names_are_refused_and_not_run(tmp_path: Path, value: Any, name: str, protocol: int):
    RAN.clear()
    path = saved(tmp_path, {"fine": GRID, "other": value}, pickle_protocol=protocol)
    with pytest.raises(TorchFileError, match=f"asks for {name}, which is neither run nor"):
        read_torch(path)
    assert not RAN


def test_a_malicious_pickle_would_have_run(tmp_path: Path):
    """The test above says something: pickle itself runs the call."""
    RAN.clear()
    pickle.loads(pickle.dumps(Runs(touch, ("ran",)), 2))
    assert RAN == ["ran"]


@pytest.mark.parametrize(
    ("pickled", "words"),
    [
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n.", "leaves .* behind"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "calls torch.FloatStorage"),
        (b"\x80\x02X\x01\x00\x00\x00a)R.", "calls 'a'"),
        (b"\x80\x02(ios\nsystem\n.", "instruction INST"),
        (b"\x80\x02(X\x01\x00\x00\x00ao.", "instruction OBJ"),
        (b"\x80\x02c_codecs\nencode\n.", "asks for _codecs.encode"),
        (b"\x80\x02]X\x01\x00\x00\x00ab.", "instruction BUILD"),
        (b"\x80\x02}]K\x01s.", "keys that are neither text nor"),
        (b"\x80\x02K\x01K\x02.", "damaged"),
        (b"\x80\x02]q\x00h\x05.", "damaged"),
        (b"\x80\x02t.", "damaged"),
        (b"\x80\x02R.", "damaged"),
        (b"\x80\x02]", "damaged"),
        (b"\x80\x02X\xff\xff\xff\x7fabc", "damaged"),
        (b"", "damaged"),
    ],
)
def test_pickles_that_no_tensor_needs(tmp_path: Path, pickled: bytes, words: str):
    with pytest.raises(TorchFileError, match=words):
        read_torch(with_file(saved(tmp_path, GRID), "data.pkl", pickled))


def test_a_list_that_holds_itself_ends(tmp_path: Path):
    path = with_file(saved(tmp_path, GRID), "data.pkl", b"\x80\x02]q\x00h\x00a.")
    found = read_torch(path)
    assert found[0] is found


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        # offset, size and stride of GRID[1, 2] are 20, (4,), (1,)
        (b"K\x14K\x04\x85", b"K\x15K\x04\x85", "ends at element 24 of a storage of 24"),
        (b"K\x14K\x04\x85", b"J\xff\xff\xff\xffK\x04\x85", "offset -1"),
        (b"K\x01\x85", b"K\x02\x85", "ends at element 26 of a storage of 24"),
        (b"K\x01\x85", b"K\x01K\x01\x86", "strides"),
        (b"K\x01\x85", b"\x88\x85", r"strides \(True,\)"),
        (b"K\x18t", b"K\x19t", "storage 0 has 192 bytes where 25 elements of float64 need 200"),
        (b"cpu", b"cpu", None),
    ],
)
def test_views_beyond_their_storage(tmp_path: Path, old: bytes, new: bytes, words: str | None):
    path = saved(tmp_path, GRID[1, 2])
    with zipfile.ZipFile(path) as archive:
        # Without the numbers under which the pickle remembers its values: they are not used here.
        pickled = pickletools_plain(archive.read("value/data.pkl"))
    assert pickled.count(old) == 1
    with_file(path, "data.pkl", pickled.replace(old, new))
    if words is None:
        same(read_torch(path), GRID[1, 2])
    else:
        with pytest.raises(TorchFileError, match=words):
            read_torch(path)


def pickletools_plain(pickled: bytes) -> bytes:
    import pickletools

    return pickletools.optimize(pickled)


@pytest.mark.parametrize("name", ["data.pkl", "data/0"])
def test_a_file_that_lacks_a_part(tmp_path: Path, name: str):
    path = with_file(saved(tmp_path, GRID), name, None)
    with pytest.raises(TorchFileError, match=r"lacks value/data/0|0 files NAME/data\.pkl"):
        read_torch(path)


def test_a_storage_cut_short(tmp_path: Path):
    with pytest.raises(TorchFileError, match="storage 0 has 100 bytes where 24 elements"):
        read_torch(with_file(saved(tmp_path, GRID), "data/0", bytes(100)))


def test_a_compressed_storage_is_not_inflated(tmp_path: Path):
    path = saved(tmp_path, GRID)
    with_file(path, "data/0", bytes(10**7), compress_type=zipfile.ZIP_DEFLATED)
    with pytest.raises(TorchFileError, match="value/data/0 is compressed"):
        read_torch(path)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_file_cut_short(tmp_path: Path, share: float):
    path = saved(tmp_path, GRID)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(TorchFileError, match=r"not a complete file of torch\.save.*Fetch it again"):
        read_torch(path)


def test_no_byte_that_is_overwritten_escapes_as_another_error(tmp_path: Path):
    """Every byte of the file in turn: it is read, or refused as what it is."""
    path = saved(tmp_path, torch.tensor([1.0, 2.0]))
    whole = path.read_bytes()
    refused = 0
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            read_torch(path)
        except TorchFileError:
            refused += 1
    assert refused > 200


def pickled(folder: Path, *instructions: bytes) -> Path:
    """A file whose data.pkl holds these instructions."""
    path = saved(folder, GRID)
    return with_file(path, "data.pkl", b"\x80\x02" + b"".join(instructions) + b".")


# A tuple of two, each of which is the tuple of two before it, sixty times.
DOUBLED = b")" + b"q\x00h\x00\x86" * 60
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
HOSTILE = {
    "a key that takes forever to hash": (b"}" + DOUBLED + b"K\x01s", "keys that are neither"),
    "a key of an ordered dict": (
        b"ccollections\nOrderedDict\n](" + DOUBLED + b"K\x01\x86e\x85R",
        "keys that are neither",
    ),
    "a message without end": (DOUBLED + b")R", "its pickle calls"),
    "a size without end": (
        TENSOR + b"((X\x07\x00\x00\x00storagectorch\nDoubleStorage\n"
        b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x18tQ" + DOUBLED + b"K\x01\x85K\x01\x85tR",
        "a tensor has offset",
    ),
    "a deep value": (b"]" * 100_000 + b"a" * 99_999, None),
    "a tensor that repeats one number": (
        TENSOR + b"((X\x07\x00\x00\x00storagectorch\nDoubleStorage\n"
        b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x18tQK\x00J\xff\xff\xff\x7f\x85K\x00\x85tR",
        "a tensor of 2147483647 elements repeats a storage of 24",
    ),
    "marks and no end": (b"(" * 200_000 + b"t" * 200_000, None),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_small_files_that_would_take_forever(case: str, tmp_path: Path):
    instructions, words = HOSTILE[case]
    path = pickled(tmp_path, instructions)
    if words is None:
        read_torch(path)
        return
    with pytest.raises(TorchFileError, match=words) as caught:
        read_torch(path)
    assert len(str(caught.value)) < 1000


def test_parts_that_lie_in_each_others_place(tmp_path: Path):
    """Two storages that the directory of the archive puts at one place."""
    path = saved(tmp_path, [torch.zeros(5000), torch.ones(5000)])
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        first, second = (archive.getinfo(f"value/data/{i}").header_offset for i in (0, 1))
    moved = content.replace(
        struct.pack("<I", second) + b"value", struct.pack("<I", first) + b"value"
    )
    assert moved != content
    path.write_bytes(moved[:second] + moved[second + 20_000 :])
    with pytest.raises(TorchFileError):
        read_torch(path)


def test_the_format_before_1_6_is_named(tmp_path: Path):
    path = saved(tmp_path, GRID, _use_new_zipfile_serialization=False)
    with pytest.raises(TorchFileError, match=r"PyTorch before 1\.6.*not read"):
        read_torch(path)


def test_a_zip_of_something_else(tmp_path: Path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "hello")
    (tmp_path / "a.pt").write_bytes(buffer.getvalue())
    with pytest.raises(TorchFileError, match=r"0 files NAME/data\.pkl where one is expected"):
        read_torch(tmp_path / "a.pt")
    with pytest.raises(FileNotFoundError):
        read_torch(tmp_path / "b.pt")


def test_the_published_files_are_those_that_torch_reads():
    run = shared.folder("published_runs") / "gemma-2b-it"
    for name in ("direction.pt", "generate_directions/mean_diffs.pt"):
        theirs = torch.load(run / name, map_location="cpu", weights_only=True)
        same(read_torch(run / name), theirs)
