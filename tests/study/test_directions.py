"""Directions read back, the published ones among them, and their angles."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from jax_refusal.checkpoints import arrays
from jax_refusal.checkpoints.torch_pickle import TorchFileError
from jax_refusal.study.directions import (
    IN_WORKDIR,
    DirectionError,
    check_width,
    cosine,
    read_direction,
)
from tests import shared
from tests.tolerances import ROUNDING

RNG = np.random.default_rng(0)
GRID = RNG.normal(size=(5, 4, 8))  # P, L, D


def test_cosine_by_hand():
    assert cosine(np.array([3.0, 4.0]), np.array([4.0, 3.0])) == pytest.approx(24 / 25)
    assert cosine(np.array([1.0, 0.0]), np.array([-2.0, 0.0])) == -1.0
    both = cosine(np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 5.0]]), np.array([0.0, 2.0]))
    np.testing.assert_array_equal(both, [0.0, np.nan, 1.0])


def test_cosine_of_grids_is_cell_by_cell():
    similar = cosine(GRID, 2 * GRID)
    assert similar.shape == (5, 4)
    np.testing.assert_allclose(similar, 1.0, rtol=ROUNDING)


@pytest.mark.parametrize("shape", [(7,), (5, 4, 7), (), (4, 5, 8)])
def test_cosine_of_other_shapes_is_refused(shape):
    with pytest.raises(DirectionError, match=r"\(5, 4, 8\)"):
        cosine(GRID, np.ones(shape))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("shape", [(8,), (5, 4, 8)])
def test_files_are_read_in_float64(tmp_path: Path, suffix: str, shape: tuple[int, ...]):
    values = RNG.normal(size=shape).astype(np.float32)
    path = tmp_path / f"direction{suffix}"
    if suffix == ".pt":
        torch.save(torch.tensor(values), path)
    else:
        save_file({"direction": values}, path)
    found = read_direction(path)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, values)


def workdir(folder: Path, direction: np.ndarray) -> Path:
    (folder / "selection").mkdir(parents=True)
    save_file({"direction": direction.astype(np.float32)}, folder / IN_WORKDIR)
    return folder


def test_a_workdir_is_read_by_its_direction(tmp_path: Path):
    found = read_direction(str(workdir(tmp_path / "run", GRID[1, 2])))
    np.testing.assert_array_equal(found, GRID[1, 2].astype(np.float32))
    with pytest.raises(DirectionError, match=r"not the workdir of a run that got as far"):
        read_direction(tmp_path)


def test_one_of_several_tensors_is_named(tmp_path: Path):
    path = tmp_path / "means.safetensors"
    save_file({"a": GRID, "b": 2 * GRID}, path)
    np.testing.assert_array_equal(read_direction(path, "b"), 2 * GRID)
    with pytest.raises(DirectionError, match=r"2 tensors \['a', 'b'\]: say which one\."):
        read_direction(path)
    with pytest.raises(DirectionError, match=r"say which one; there is no 'c'\."):
        read_direction(path, "c")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_directions_that_are_not_finite(tmp_path: Path, value: float):
    save_file({"direction": np.array([1.0, value])}, tmp_path / "d.safetensors")
    with pytest.raises(DirectionError, match="NaN or infinity"):
        read_direction(tmp_path / "d.safetensors")


V, W = (torch.tensor(RNG.normal(size=8)) for _ in range(2))
NESTED: dict[str, tuple[Any, str]] = {  # what torch.save writes -> the name of V in it
    "one row": (V[None], ""),
    "a row of a row": (V[None, None], ""),
    "one of a list": ([V], ""),
    "by layer": ({14: W, 15: V}, "15"),
    "by layer, as text": ({"14": W, "15": V}, "15"),
    "by layer, as rows": ({14: W[None], 15: V[None]}, "15"),
    "dicts in dicts": ({"a": {"b": V, "c": W}, "d": W}, "a/b"),
    "dicts of layers": ({"harmful": {14: W, 15: V}, "harmless": {15: W}}, "harmful/15"),
    "a list": ([W, V], "1"),
    "a tuple": ((W, V), "1"),
    "a list in a dict": ({"layers": [W, W, V], "norms": [1.0]}, "layers/2"),
    "from the end": ({"layers": [W, V]}, "layers/-1"),
    "rows of a tensor": (torch.stack([W, V, W]), "1"),
    "a cell of a grid": (torch.stack([torch.stack([W, V]), torch.stack([W, W])]), "-2/1"),
    "a cell of a named grid": ({"mean_diffs": torch.stack([W, V])[None]}, "mean_diffs/0/1"),
    "numbers": (V.tolist(), ""),
    "numbers by layer": ({15: V.tolist(), 16: W.tolist()}, "15"),
    "beside numbers": ({"direction": V, "layer": 14, "pos": -1, "score": 0.5, "of": "x"}, ""),
    "beside a scalar": ({"direction": V, "norm": V.norm()}, ""),
    "a key with strokes": ({"blocks/15/resid": V, "blocks/16/resid": W}, "blocks/15/resid"),
    "a parameter": ({"direction": torch.nn.Parameter(V)}, ""),
}


@pytest.mark.parametrize("case", NESTED)
def test_the_ways_in_which_directions_are_saved(case: str, tmp_path: Path):
    value, name = NESTED[case]
    torch.save(value, tmp_path / "d.pt")
    np.testing.assert_array_equal(read_direction(tmp_path / "d.pt", name), V.numpy())


@pytest.mark.parametrize(
    ("value", "name", "words"),
    [
        ({14: V, 15: W}, "", r"holds 2 tensors \['14', '15'\]: say which one\."),
        ({14: V, 15: W}, "16", r"2 tensors \['14', '15'\]: say which one; there is no '16'\."),
        ({"a": {"b": V}, "c": [V]}, "", r"2 tensors \['a/b', 'c/0'\]: say which one"),
        ({15: V, "15": W}, "15", "holds 2 tensors that '15' may mean"),
        ({"a/b": V, "a": {"b": W}}, "a/b", "holds 2 tensors that 'a/b' may mean"),
        ([V, W], "2", r"\['0', '1'\]: say which one; there is no '2'"),
        ({"layer": 3}, "", r"holds 0 tensors \[\]\."),
        ({"layer": 3}, "layer", "holds 0 tensors"),
        (V.norm(), "", "holds 0 tensors"),
        (V.to(torch.bool), "0", "there is no '0'"),
        ({i: V for i in range(900)}, "", r"holds 900 tensors .* and 880 more: say which one"),
        ({i: V for i in range(20_000)}, "", "holds more than 10000 values"),
        ({(14, -1): V}, "", "keys that are neither text nor whole numbers"),
        ({15: V.numpy()}, "15", "neither run nor imported"),
        ([10**400, 2.0], "", "holds 0 tensors|needs? not"),
    ],
)
def test_directions_that_are_not_found(value: Any, name: str, words: str, tmp_path: Path):
    torch.save(value, tmp_path / "d.pt")
    with pytest.raises((DirectionError, TorchFileError), match=words) as caught:
        read_direction(tmp_path / "d.pt", name)
    assert len(str(caught.value)) < 1000


def test_a_small_file_with_endless_names(tmp_path: Path):
    value: Any = [V]
    for _ in range(25):
        value = [value, value]
    torch.save(value, tmp_path / "d.pt")
    with pytest.raises(DirectionError, match="more than 10000 values, or nests deeper than"):
        read_direction(tmp_path / "d.pt")
    itself: Any = [V]
    itself.append(itself)
    torch.save(itself, tmp_path / "d.pt")
    with pytest.raises(DirectionError, match="nests deeper"):
        read_direction(tmp_path / "d.pt")


def test_files_of_numpy(tmp_path: Path):
    grid = np.stack([W, V]).astype(np.float32)
    np.save(tmp_path / "d.npy", grid)
    np.savez(tmp_path / "d.npz", a=grid, b=grid[0])
    np.savez_compressed(tmp_path / "c.npz", direction=grid[1])
    np.testing.assert_array_equal(read_direction(tmp_path / "d.npy", "1"), grid[1])
    np.testing.assert_array_equal(read_direction(tmp_path / "d.npz", "a/1"), grid[1])
    np.testing.assert_array_equal(read_direction(tmp_path / "c.npz"), grid[1])
    with pytest.raises(DirectionError, match=r"2 tensors \['a', 'b'\]: say which one"):
        read_direction(tmp_path / "d.npz")


def test_no_pickle_of_numpy_is_opened(tmp_path: Path):
    np.save(tmp_path / "d.npy", np.array([V.numpy(), None], object))
    np.savez(tmp_path / "d.npz", a=np.array([None]))
    for name in ("d.npy", "d.npz"):
        with pytest.raises(DirectionError, match=r"Object arrays|Array can't be memory-mapped"):
            read_direction(tmp_path / name)


def test_an_archive_that_unpacks_to_too_much(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(arrays, "BYTES", 10_000)
    np.savez_compressed(tmp_path / "d.npz", direction=np.zeros(10_000))
    with pytest.raises(DirectionError, match=r"unpacks to 80128 bytes; at most 10000 are read"):
        read_direction(tmp_path / "d.npz")
    np.save(tmp_path / "d.npy", np.zeros(10_000))
    with pytest.raises(DirectionError, match=r"has 80128 bytes; at most 10000 are read"):
        read_direction(tmp_path / "d.npy")


@pytest.mark.parametrize("dtype", ["U3", "c16", "M8[s]", [("a", "f4")]])
def test_arrays_of_something_else(dtype: Any, tmp_path: Path):
    np.save(tmp_path / "d.npy", np.zeros(4, dtype))
    with pytest.raises(DirectionError, match="holds 0 tensors"):
        read_direction(tmp_path / "d.npy")


def test_what_is_no_direction(tmp_path: Path):
    (tmp_path / "d.txt").write_bytes(b"x")
    for name in ("d.npy", "d.npz", "d.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    for name, words in {
        "d.txt": r"is a file \.pt, \.pth, \.safetensors, \.npy, \.npz, or a workdir",
        "d.npy": "not a complete npy file of arrays",
        "d.npz": "not a complete npz file of arrays",
        "d.safetensors": "not a complete safetensors file",
        "none.pt": "there is no such file",
    }.items():
        with pytest.raises(DirectionError, match=words):
            read_direction(tmp_path / name)


def test_check_width():
    assert check_width(GRID[0, 0], 8, "d.pt") is not None
    for wrong in (GRID[0, 0, :7], GRID[0]):
        with pytest.raises(DirectionError, match=r"d.pt holds shape .* takes \(8,\)"):
            check_width(wrong, 8, "d.pt")
    with pytest.raises(DirectionError, match=r"which of them is meant: the tensor '4/3' is the"):
        check_width(GRID, 8, "d.pt")


def test_the_published_direction_is_its_cell_of_the_published_grid():
    """gemma-2b-it: 5 positions, 18 layers, and the cell that direction_metadata.json names."""
    run = shared.folder("published_runs") / "gemma-2b-it"
    cell = json.loads((run / "direction_metadata.json").read_text())
    direction = read_direction(run / "direction.pt")
    grid = read_direction(run / "generate_directions/mean_diffs.pt")
    assert direction.shape == (2048,) and grid.shape == (5, 18, 2048)
    np.testing.assert_array_equal(direction, grid[cell["pos"], cell["layer"]])
    # The published grid is the means of one template: block 0 sees the same embedding everywhere.
    assert np.linalg.norm(grid[-1, 0]) < 1e-3 * np.linalg.norm(direction)
