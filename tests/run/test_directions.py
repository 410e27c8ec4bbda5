"""Directions of runs and files compared, the published ones among them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from jax_refusal.run.directions import compare
from jax_refusal.run.workdir import FORMAT
from jax_refusal.study.directions import IN_WORKDIR, DirectionError
from tests import shared

GRID = np.random.default_rng(0).normal(size=(5, 4, 8))  # P, L, D


def workdir(folder: Path, direction: np.ndarray) -> Path:
    (folder / "selection").mkdir(parents=True)
    save_file({"direction": direction.astype(np.float32)}, folder / IN_WORKDIR)
    return folder


def test_compare(tmp_path: Path):
    run = workdir(tmp_path / "run", GRID[1, 2])
    torch.save(torch.tensor(GRID), tmp_path / "grid.pt")
    torch.save(torch.tensor(-3 * GRID[1, 2]), tmp_path / "cell.pt")
    lines = compare(run, tmp_path / "cell.pt")
    assert lines[0].startswith(f"{run}: norm ") and lines[-1] == "cosine -1.000000"
    torch.save({1: torch.ones(8), 2: torch.tensor(GRID[1, 2])}, tmp_path / "layers.pt")
    assert compare(run, tmp_path / "layers.pt", "2")[-1] == "cosine 1.000000"
    assert compare(run, tmp_path / "grid.pt", "1/2")[-1] == "cosine 1.000000"
    assert compare(run, tmp_path / "grid.pt")[-1] == (
        "nearest cell (position -4, layer 2): cosine 1.000000"
    )
    assert compare(tmp_path / "grid.pt", tmp_path / "grid.pt")[-1] == (
        "cosine of equal cells: 1.000000 to 1.000000, median 1.000000"
    )
    other = workdir(tmp_path / "other", GRID[1, 2])
    for folder, model in ((run, "a"), (other, "a")):
        identity = {"format": FORMAT, "identity": {"model": model}, "versions": {}, "stages": {}}
        (folder / "manifest.json").write_text(json.dumps(identity))
    assert len(compare(run, other)) == 3
    identity["identity"]["model"] = "b"
    (other / "manifest.json").write_text(json.dumps(identity))
    assert "runs of different weights" in compare(run, other)[2]
    torch.save(torch.ones(9), tmp_path / "wide.pt")
    with pytest.raises(DirectionError, match=r"\(8,\) and \(9,\)"):
        compare(run, tmp_path / "wide.pt")
    torch.save(torch.zeros(8), tmp_path / "zero.pt")
    with pytest.raises(DirectionError, match="zero everywhere"):
        compare(run, tmp_path / "zero.pt")


def test_the_published_direction_is_nearest_to_its_cell():
    run = shared.folder("published_runs") / "gemma-2b-it"
    cell = json.loads((run / "direction_metadata.json").read_text())
    assert compare(run / "direction.pt", run / "generate_directions/mean_diffs.pt")[-1] == (
        f"nearest cell (position {cell['pos']}, layer {cell['layer']}): cosine 1.000000"
    )
