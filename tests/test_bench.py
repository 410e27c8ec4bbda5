"""Both sides of the benchmark do the same job and agree; no time is asserted."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from jax_refusal.models.decoder import Transformer
from jax_refusal.runtime.batching import Prompts
from launch import (
    bench,
    bench_floor,
    bench_hooks,
    bench_jax,
    bench_rows,
    bench_sizes,
    bench_table,
)

SIDES = {"jax": bench_jax, "hooks": bench_hooks}
PRODUCTS = ("q", "k", "v", "o", "gate", "up", "down")
TINY = ("collect", "select", "generate", "start")  # compile little enough for the default suite


def check_rows(rows: list[dict[str, Any]], jobs: Iterable[str]) -> None:
    """Every job has both sides, and their numbers agree."""
    assert {row["job"] for row in rows} == set(jobs)
    most = {"of a mean's length": 1e-4, "nats": 1e-3}
    for row in rows:
        assert row["ours"]["median"] == pytest.approx(row["ours"]["runs"][0])
        if row["job"] == "scale":
            assert row["theirs"] == "ours only"
            assert len(row["points"]) >= 2 and set(row["fit"]) == {"slope", "intercept", "r2"}
        elif isinstance(row["theirs"], str):
            assert row["what"].endswith(("nnsight", "TransformerLens")), row
        elif row["agreement_is"] in most:
            assert row["agreement"] < most[row["agreement_is"]], row
        else:  # a share; greedy tokens may part at a near tie
            assert row["agreement"] == 1 or row["job"] in ("generate", "pipeline"), row
            assert row["agreement"] > 0.7, row
    grid, default = (row for row in rows if row["job"] == "select")
    assert default["same_winner"]
    assert set(grid["scored"].values()) == {6}
    assert default["scored"]["refusal_score"] == 1
    assert default["scored"]["kl_div_score"] < 6


def test_the_sides_agree_on_a_tiny_model(tiny_dir: Path) -> None:
    sizes = dataclasses.replace(bench_sizes.QUICK, rows=(3,))
    task = bench_rows.task_of(str(tiny_dir), sizes)

    def spawn(side: str, job: str, cache: str = "", **more: Any) -> dict[str, Any]:
        began = time.time()
        found = getattr(SIDES[side], job)(task | more)
        return json.loads(json.dumps(found)) | {"began": began, "peak_rss_mib": 1.0}

    task = json.loads(json.dumps(task)) | {"peaks": bench_rows.machine(spawn)}
    rows = [row for job in TINY for row in bench_rows.JOBS[job](spawn, sizes)]
    check_rows(rows, TINY)
    worker = {"job": "collect", "side": "jax", "peak_rss_mib": 1.0}
    text = bench_table.table(
        {"rows": rows, "machine": {"peaks": task["peaks"]}, "workers": [worker]}
    )
    assert all(row["what"] in text for row in rows)
    assert text.splitlines()[-1].startswith("ours, peak memory over weights and cache: select ")


def test_a_line_is_fitted() -> None:
    line = bench_rows.fit([1, 2, 4], [5, 7, 11])
    assert line == pytest.approx({"slope": 2, "intercept": 3, "r2": 1})
    assert bench_rows.fit([1, 2], [3, 3]) == pytest.approx({"slope": 0, "intercept": 3, "r2": 1})
    assert bench_rows.fit([0, 1, 2], [0, 3, 0]) == pytest.approx(
        {"slope": 0, "intercept": 1, "r2": 0}, abs=1e-9
    )


def test_the_other_workflow_is_extrapolated_by_its_counts() -> None:
    once = {"loading": 1.0, "filter": 2.0, "means": 3.0, "unedited": 0.5}
    # 100 prompts: three full batches like the one that was measured, and the last.
    found = bench_rows.whole_workflow(
        once | {"scores": 8.0, "batches": [[10.0, 3], [2.0, 1]]}, candidates=150, scored=4
    )
    assert found.pop("selection") == 0.5 + 8.0 / 4 * 150
    assert found.pop("replies") == 32.0
    assert found == {"loading": 1.0, "filter": 2.0, "means": 3.0}


def test_rows_of_the_workflow_and_of_scaling_from_what_workers_say() -> None:
    """With workers that answer at once."""
    conditions = [["harmful", "baseline", 0.0], ["harmful", "ablation", 0.0]]
    ours = {
        "seconds": [10.0],
        "compile_seconds": [4.0],
        "stages": {"selection": 6.0, "completions": 3.0},
        "origin": "builtin prompts",
        "counts": [4, 3, 2],
        "adapter": "some",
        "conditions": conditions,
        "candidates": 10,
        "replies": {"harmful_baseline": ["I", "no"], "harmful_ablation": ["Yes", "Sure"]},
        "cells": [[0, 1], [0, 2]],
        "bytes": {"weights": 2**20, "cache": 2**20},
        **dict.fromkeys(("prompts", "vectors", "direction", "layer", "stop_ids", "refusal_ids")),
    }
    theirs = dict.fromkeys(("loading", "filter", "means", "unedited", "scores"), 1.0)
    replies = [["harmful_baseline", 1, "no"], ["harmful_ablation", 0, "No"]]
    answers: dict[tuple[str, str], dict[str, Any]] = {
        ("jax", "pipeline"): ours,
        ("jax", "merged"): {"directory": "merged"},
        ("hooks", "pipeline"): theirs | {"batches": [[1.0, 2]], "replies": replies},
        ("jax", "scale_candidates"): {"seconds": [[1.0], [2.0]]},
        ("jax", "scale_tokens"): {"seconds": [[1.0], [2.0]]},
    }

    def spawn(side: str, job: str, cache: str = "", **more: Any) -> dict[str, Any]:
        if job == "scale_prompts":  # linear time, constant memory
            seconds = {"seconds": [1 + 0.5 * more["count"]], "compile_seconds": [0.0]}
            return seconds | {"peak_rss_mib": 6.0}
        if side == "hooks":
            assert more["directory"] == "merged" and more["gguf"] is None
        return answers[side, job] | {"peak_rss_mib": 6.0}

    sizes = dataclasses.replace(bench_sizes.QUICK, scale_tokens=(4, 8))
    line, *scaled = bench_rows.pipeline(spawn, sizes) + bench_rows.scale(spawn, sizes)
    assert line["theirs"]["median"] == 1 + 1 + 1 + (1 + 1 / 2 * 10) + 2
    assert line["agreement"] == 0.5
    assert line["memory"]["peak_over_held"] == 3
    assert "replies 3 s and 2 s" in line["note"]
    assert "the ratio says nothing" in line["note"]
    fits = [(row["fit"]["slope"], row["fit"]["intercept"]) for row in scaled]
    assert fits == [pytest.approx(x) for x in ((0.5, 1), (0, 6), (1, 0), (0.25, 0))]
    rates = {"gflops": 2, "xla_gflops": 1, "torch_gflops": 2, "gb_s": 1}
    report = {"rows": [line, *scaled], "machine": {"peaks": rates}, "workers": []}
    text = bench_table.table(report)
    assert "machine: 2 GFLOP/s in float32 products (XLA 1, PyTorch 2), 1.0 GB/s" in text
    assert "pipeline 3 (weights of 1 MiB and 1 of cache)" in text
    assert "0.5 s each and 1 s once" in text and "(from 2)" in text


def test_the_model_that_refuses_is_the_other_sides_too() -> None:
    mode = {"seconds": [6.0], "scored": {"induce": 3}, "floor": 2.0}
    ours = {
        **{"adapter": "some", "cells": [[0, 1]], "vectors": [[1.0]], "scores": [[1.0, 2.0, 3.0]]},
        **{"candidates": 6, "bytes": {"weights": 2**20}, "full grid": mode, "default mode": mode},
    }

    def spawn(side: str, job: str, cache: str = "", **more: Any) -> dict[str, Any]:
        if side == "hooks":
            assert more["directory"] == "merged" and more["gguf"] is None
            return {"seconds": [4.0], "result": [[1.0, 2.0, 3.5]]}
        return {"select": ours, "merged": {"directory": "merged"}}[job] | {"peak_rss_mib": 2.0}

    grid, default = bench_rows.select(spawn, bench_sizes.QUICK)
    assert grid["theirs_over_ours"] == default["theirs_over_ours"] == 4 * 6 / 6
    assert grid["agreement"] == 0.5 and grid["memory"]["peak_over_held"] == 2


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


def test_a_line_needs_two_numbers_of_prompts() -> None:
    assert all(bench.make_a_line(counts) for counts in ([], ["1000", "100000"]))
    for counts in (["1000"], ["5", "5"], ["0", "10"], ["some", "more"]):
        assert not bench.make_a_line(counts)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_quick_run(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    found = python("-m", "launch.bench", "--quick", f"--out={out}")
    assert found.returncode == 0, found.stderr
    report = json.loads(out.read_text())
    check_rows(report["rows"], bench_rows.JOBS)
    assert list(tmp_path.iterdir()) == [out]
    ran = {(worker["job"], worker["side"]) for worker in report["workers"]}
    alone = {("merged", "jax")}
    alone |= {(f"scale_{what}", "jax") for what in ("prompts", "candidates", "tokens")}
    assert ran == alone | {(job, side) for job in ("machine", *TINY, "pipeline") for side in SIDES}
    assert all(worker["peak_rss_mib"] > 100 for worker in report["workers"])
    assert report["machine"]["versions"]["torch"] != "not installed"
    assert report["command"].endswith(f"--quick --out={out}")


def test_the_floors_count_every_product_once(model: Transformer) -> None:
    """By the model's own leaves: 2 operations for each weight that a token meets."""
    leaves, L = model.leaves(), model.arch.layers
    sizes = {name: leaves[f"blocks.0.{name}"].size // L for name in PRODUCTS}
    layer, keys = sum(sizes.values()), sizes["k"] + sizes["v"]
    prompts = Prompts([[1, 2, 3, 4], [1, 2, 5, 6, 7]], prefix=2)
    tokens, last = 2 + 2 + 3, 2
    head = leaves["embed"].size
    before = [layer * tokens * (L - 1 - start) for start in range(L)]
    behind = keys * tokens + (layer - keys + head) * last
    found = [bench_floor.score_flops(model.arch, prompts, start) for start in range(L)]
    assert found == [2 * (flops + behind) for flops in before]
    assert bench_floor.collect_flops(model.arch, tokens) == 2 * before[0]
