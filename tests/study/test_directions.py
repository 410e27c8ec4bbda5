"""Directions read back, the published ones among them, and their angles."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

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


def test_what_is_no_direction(tmp_path: Path):
    (tmp_path / "d.npy").write_bytes(b"x")
    (tmp_path / "d.safetensors").write_bytes(b"x")
    torch.save({"layer": 3}, tmp_path / "d.pt")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    for name, words in {
        "d.npy": "is a .pt or .safetensors file, or a workdir",
        "d.safetensors": "not a complete safetensors file",
        "d.pt": "holds 0 tensors",
        "list.pt": "holds a list and no vector",
        "none.pt": "there is no such file",
    }.items():
        with pytest.raises(DirectionError, match=words):
            read_direction(tmp_path / name)


def test_check_width():
    assert check_width(GRID[0, 0], 8, "d.pt") is not None
    for wrong in (GRID[0, 0, :7], GRID[0]):
        with pytest.raises(DirectionError, match=r"d.pt holds shape .* takes \(8,\)"):
            check_width(wrong, 8, "d.pt")


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
