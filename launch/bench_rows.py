"""What launch/bench.py compares: the task of both sides, rows made of what they return, a table.

A job here calls `spawn(side, job, ...)` for each side and gives rows: JSON values with the timings
of both, their ratio, how far the numbers agree, and the floor. Importing this starts neither JAX
nor PyTorch. Letters: P post-instruction tokens, L layers, D residual width.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Row = dict[str, Any]
Spawn = Callable[..., dict[str, Any]]  # (side, job, **more of the task) -> what the job returned


@dataclasses.dataclass(frozen=True)
class Sizes:
    train: int  # prompts of each kind whose activations are collected
    val: int  # prompts of each kind that score a candidate
    grid: int  # candidates of the selection; 0 is every (position, layer)
    candidates: int  # of these, scored by the hooks side too
    rows: tuple[int, ...]  # batch sizes of generation
    new_tokens: int
    repeats: int  # timed calls
    grid_repeats: int  # timed selections of each mode
    warmups: int  # processes of `start` before the timed ones
    matmul: int  # side of the square product
    copy_mb: int  # what is copied to measure the memory


FULL = Sizes(64, 32, 0, 4, (1, 8, 32, 96), 64, 3, 1, 1, 2048, 1000)
QUICK = Sizes(4, 4, 6, 2, (1, 3), 4, 1, 1, 0, 256, 16)


def timed(call: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Seconds of a first call, which may compile, and of `repeats` more; what the last returned."""
    result, times = None, []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - began)
    return {"first": times[0], "seconds": times[1:], "result": result}


def task_of(source: str, sizes: Sizes) -> dict[str, Any]:
    """What both sides work on, as JSON values: where the model lies, and encoded prompts.

    Prompts are the fields of batching.Prompts: `ids` (one list a prompt), `prefix`, `positions`.
    """
    from jax_refusal.data.chat import load_chat
    from jax_refusal.data.prompts import KINDS, builtin
    from jax_refusal.runtime.batching import Prompts
    from jax_refusal.sources import locate

    chat, found = load_chat(source), locate(source)

    def encoded(instructions: list[str]) -> dict[str, Any]:
        return dataclasses.asdict(Prompts.encoded(chat, instructions))

    texts = {
        split: [[i.text for i in builtin(kind)[split][:count]] for kind in KINDS]
        for split, count in (("train", sizes.train), ("val", sizes.val))
    }
    # Two instructions in one make prompts of some 64 tokens.
    some = [text for kind in texts["train"] for text in kind]
    long = [f"{a}. {b}" for a, b in zip(some, some[1:] + some[:1], strict=True)]
    openings = chat.tokenizer(["I", "As"], add_special_tokens=False)["input_ids"]
    path = found.gguf or found.directory
    assert path is not None
    return {
        "source": source,
        "directory": str(path.parent if found.gguf else path),
        "gguf": found.gguf.name if found.gguf else None,
        "sizes": dataclasses.asdict(sizes),
        "train": [encoded(kind) for kind in texts["train"]],
        "val": [encoded(kind) for kind in texts["val"]],
        "long": encoded(long[: max(sizes.rows)]),
        "instruction": some[0],
        "refusal_ids": sorted({ids[0] for ids in openings}),
    }


def row(
    job: str, what: str, unit: str, ours: list[float], theirs: list[float] | str, **more
) -> Row:
    """One comparison; timings in `unit`. Theirs is a text where there is nothing to compare."""

    def spread(runs: list[float]) -> dict[str, Any]:
        return {"median": statistics.median(runs), "min": min(runs), "max": max(runs), "runs": runs}

    line: Row = {"job": job, "what": what, "unit": unit, "ours": spread(ours), "theirs": theirs}
    if not isinstance(theirs, str):
        line["theirs"] = spread(theirs)
        line["theirs_over_ours"] = line["theirs"]["median"] / line["ours"]["median"]
    if "floor" in more:
        line["ours_over_floor"] = line["ours"]["median"] / more["floor"]
    return line | more


def collect(spawn: Spawn, sizes: Sizes) -> list[Row]:
    """Agreement: the largest distance between two means, as a share of the mean's length."""
    ours = spawn("jax", "collect")
    means = np.array(ours["result"])  # [2, P, L, D]
    rows = []
    for way, theirs in spawn("hooks", "collect")["ways"].items():
        what = f"{2 * sizes.train} prompts, {way}"
        floors = {name: ours[name] for name in ("floor", "floor_without_shared_prefix")}
        if "missing" in theirs:
            rows.append(row("collect", what, "s", ours["seconds"], theirs["missing"], **floors))
            continue
        other = np.array(theirs["result"])
        gap = np.linalg.norm(means - other, axis=-1) / np.linalg.norm(other, axis=-1)
        more = {
            "agreement": float(gap.max()),
            "agreement_is": "of a mean's length",
            "first": {"ours": ours["first"], "theirs": theirs["first"]},
        }
        rows.append(row("collect", what, "s", ours["seconds"], theirs["seconds"], **floors, **more))
    apart = ours["floor_without_shared_prefix"]
    rows[0]["note"] = f"the floor is {apart:.3g} s where every prompt has its own prefix"
    return rows


def select(spawn: Spawn, sizes: Sizes) -> list[Row]:
    """Agreement: the largest difference of a score, over the candidates that both sides scored."""
    ours = spawn("jax", "select")
    theirs = spawn("hooks", "select", cells=ours["cells"], vectors=ours["vectors"])
    each = [seconds / len(ours["cells"]) for seconds in theirs["seconds"]]
    gap = np.abs(np.array(ours["scores"]) - np.array(theirs["result"])).max()
    count, rows = ours["candidates"], []
    for mode in ("full grid", "default mode"):
        more = dict(ours[mode])
        seconds, scored = more.pop("seconds"), more["scored"]
        one = statistics.median(seconds) / count, statistics.median(each)
        more |= {
            "ours_per_candidate": one[0],
            "theirs_per_candidate": one[1],
            "theirs_extrapolated_from": len(ours["cells"]),
            "agreement": float(gap),
            "agreement_is": "nats",
            "note": f"{one[0]:.3g} s a candidate, theirs {one[1]:.3g} s; ours scored induce, KL, "
            f"bypass of {', '.join(map(str, scored.values()))}",
        }
        what = f"{count} candidates, {mode}"
        rows.append(row("select", what, "s", seconds, [s * count for s in each], **more))
    return rows


def generate(spawn: Spawn, sizes: Sizes) -> list[Row]:
    """Agreement: the share of greedy tokens that are equal."""
    ours, theirs = spawn("jax", "generate"), spawn("hooks", "generate")

    def steps(found: dict[str, Any]) -> list[float]:  # ms
        prefill = statistics.median(found["one"]["seconds"])
        return [1000 * (s - prefill) / (sizes.new_tokens - 1) for s in found["many"]["seconds"]]

    rows = []
    for size in map(str, sizes.rows):
        a, b = ours[size], theirs[size]
        more = {
            "floor": a["floor"],
            "agreement": equal(a["many"]["result"], b["many"]["result"]),
            "agreement_is": "of tokens equal",
            "prompt_tokens": ours["prompt_tokens"],
            "first": {"ours": a["many"]["first"], "theirs": b["many"]["first"]},
        }
        what = f"one step of {size} row{'s' * (size != '1')}"
        rows.append(row("generate", what, "ms", steps(a), steps(b), **more))
    return rows


def start(spawn: Spawn, sizes: Sizes) -> list[Row]:
    """Agreement: the share of equal ids, of the prompt and the first new token."""
    runs = [
        {
            "empty compilation cache": spawn("jax", "start", cache=f"_start_{i}"),
            "filled compilation cache": spawn("jax", "start", cache=f"_start_{i}"),
            "theirs": spawn("hooks", "start"),
        }
        for i in range(sizes.warmups + sizes.repeats)
    ]

    counted = runs[sizes.warmups :]

    def seconds(who: str) -> list[float]:
        return [run[who]["done"] - run[who]["began"] for run in counted]

    def loading(who: str) -> float:
        return statistics.median(run[who]["loading"] for run in counted)

    rows = []
    for cache in ("empty compilation cache", "filled compilation cache"):
        agreement = equal(runs[-1][cache]["ids"], runs[-1]["theirs"]["ids"])
        more = {"agreement": agreement, "agreement_is": "of ids equal"}
        more["note"] = (
            f"tokenizer and weights are loaded in {loading(cache):.3g} s of ours, "
            f"{loading('theirs'):.3g} s of theirs"
        )
        rows.append(row("start", cache, "s", seconds(cache), seconds("theirs"), **more))
    return rows


JOBS: dict[str, Callable[[Spawn, Sizes], list[Row]]] = {
    "collect": collect,
    "select": select,
    "generate": generate,
    "start": start,
}


def equal(a: list[Any], b: list[Any]) -> float:
    """The share of places in which two nested lists agree; 0 where their shapes differ."""
    x, y = np.array(a), np.array(b)
    return float((x == y).mean()) if x.shape == y.shape else 0.0


HEAD = tuple("job|what||ours|theirs|theirs/ours|agreement|floor|ours/floor".split("|"))


def table(report: dict[str, Any]) -> str:
    """All rows as text, and what the columns mean."""

    def cell(side: dict[str, Any] | str) -> str:
        if isinstance(side, str):
            return side
        return f"{side['median']:.3g} [{side['min']:.3g}–{side['max']:.3g}]"

    def number(line: Row, name: str) -> str:
        return f"{line[name]:.3g}" if name in line else "–"

    lines: list[tuple[str, ...]] = [HEAD]
    for line in report["rows"]:
        extrapolated = line.get("theirs_extrapolated_from")
        theirs = cell(line["theirs"]) + f" (from {extrapolated})" * bool(extrapolated)
        agreement = f"{number(line, 'agreement')} {line.get('agreement_is', '')}"
        lines.append(
            (
                *(line["job"], line["what"], line["unit"], cell(line["ours"]), theirs),
                *(number(line, "theirs_over_ours"), agreement),
                *(number(line, "floor"), number(line, "ours_over_floor")),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    text.insert(1, "-" * max(map(len, text)))
    peaks = report["machine"]["peaks"]
    memory: dict[str, float] = {}
    for worker in report["workers"]:
        name = f"{worker['job']} {worker['side']}"
        memory[name] = max(memory.get(name, 0), worker["peak_rss_mib"])
    return "\n".join(
        [
            *text,
            "",
            *(f"{r['job']}, {r['what']}: {r['note']}." for r in report["rows"] if "note" in r),
            "ours, theirs: median [min–max]; (from k): extrapolated from k candidates to all.",
            "theirs/ours: their time over ours on the same job; above 1, ours is faster.",
            "ours/floor: our time over the least that this machine could take; 1 cannot be beaten.",
            f"machine: {peaks['gflops']:.0f} GFLOP/s in float32 products, {peaks['gb_s']:.1f} GB/s "
            "copied (read + written)",
            "peak memory [MiB]: " + ", ".join(f"{k} {v:.0f}" for k, v in memory.items()),
        ]
    )
