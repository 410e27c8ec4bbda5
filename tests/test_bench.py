"""Both sides of the benchmark do the same job and agree; no time is asserted."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch import bench_hooks, bench_jax, bench_rows, bench_table

SIDES = {"jax": bench_jax, "hooks": bench_hooks}


def check_rows(rows: list[dict[str, Any]]) -> None:
    """Every job has both sides, and their numbers agree."""
    assert {row["job"] for row in rows} == set(bench_rows.JOBS)
    most = {"of a mean's length": 1e-4, "nats": 1e-3}
    for row in rows:
        assert row["ours"]["median"] == pytest.approx(row["ours"]["runs"][0])
        if isinstance(row["theirs"], str):
            assert row["what"].endswith(("nnsight", "TransformerLens")), row
        elif row["agreement_is"] in most:
            assert row["agreement"] < most[row["agreement_is"]], row
        else:  # a share; greedy tokens may part at a near tie
            assert row["agreement"] == 1 or row["job"] == "generate", row
            assert row["agreement"] > 0.7, row
    grid, default = (row for row in rows if row["job"] == "select")
    assert default["same_winner"]
    assert set(grid["scored"].values()) == {6}
    assert default["scored"] == {"steering_score": 6, "kl_div_score": 2, "refusal_score": 1}


def test_the_sides_agree_on_a_tiny_model(tiny_dir: Path) -> None:
    sizes = dataclasses.replace(bench_rows.QUICK, rows=(3,))
    task = bench_rows.task_of(str(tiny_dir), sizes)

    def spawn(side: str, job: str, cache: str = "", **more: Any) -> dict[str, Any]:
        began = time.time()
        found = getattr(SIDES[side], job)(task | more)
        return json.loads(json.dumps(found)) | {"began": began}

    task = json.loads(json.dumps(task)) | {"peaks": spawn("jax", "machine")["peaks"]}
    rows = [row for job in bench_rows.JOBS.values() for row in job(spawn, sizes)]
    check_rows(rows)
    worker = {"job": "collect", "side": "jax", "peak_rss_mib": 1.0}
    text = bench_table.table(
        {"rows": rows, "machine": {"peaks": task["peaks"]}, "workers": [worker]}
    )
    assert all(row["what"] in text for row in rows)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    drop = ("XLA_FLAGS",)  # the eight devices of the tests
    environment = {k: v for k, v in os.environ.items() if k not in drop}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )


def test_the_hooks_side_starts_without_jax() -> None:
    found = python("-c", "import sys, launch.bench, launch.bench_hooks; print(*sys.modules)")
    modules = found.stdout.split()
    assert "torch" in modules, found.stderr
    assert not {"jax", "jax_refusal"} & set(modules)


def test_an_unknown_job_is_refused() -> None:
    found = python("-m", "launch.bench", "--jobs=collect,sleep")
    assert found.returncode != 0
    assert "select" in found.stderr and "Traceback" not in found.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_quick_run(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    found = python("-m", "launch.bench", "--quick", f"--out={out}")
    assert found.returncode == 0, found.stderr
    report = json.loads(out.read_text())
    check_rows(report["rows"])
    assert list(tmp_path.iterdir()) == [out]
    ran = {(worker["job"], worker["side"]) for worker in report["workers"]}
    assert ran == {("machine", "jax")} | {(job, side) for job in bench_rows.JOBS for side in SIDES}
    assert all(worker["peak_rss_mib"] > 100 for worker in report["workers"])
    assert report["machine"]["versions"]["torch"] != "not installed"
    assert report["command"].endswith(f"--quick --out={out}")
