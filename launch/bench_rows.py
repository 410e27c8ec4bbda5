"""What launch/bench.py compares: the task of both sides, and rows made of what they return.

A job here calls `spawn(side, job, ...)` for each side and gives rows: JSON values with the timings
of both, their ratio, how far the numbers agree, and the floor. Importing this starts neither JAX
nor PyTorch. Letters: P post-instruction tokens, L layers, D residual width.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from launch.bench_sizes import Sizes

Row = dict[str, Any]
Spawn = Callable[..., dict[str, Any]]  # (side, job, **more of the task) -> what the job returned


def timed(call: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Seconds of a first call, which may compile, and of `repeats` more; what the last returned."""
    result, times = None, []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - began)
    return {"first": times[0], "seconds": times[1:], "result": result}


def machine(spawn: Spawn) -> dict[str, float]:
    """The rates that floors are made of: of products, the faster of the two sides'."""
    ours, theirs = (spawn(side, "machine") for side in ("jax", "hooks"))
    return {
        "gflops": max(ours["gflops"], theirs["gflops"]),
        "xla_gflops": ours["gflops"],
        "torch_gflops": theirs["gflops"],
        "gb_s": ours["gb_s"],
    }


def task_of(source: str, sizes: Sizes, paper_dir: str = "") -> dict[str, Any]:
    """What both sides work on, as JSON values: where the model lies, and encoded prompts.

    Prompts are the fields of batching.Prompts: `ids` (one list a prompt), `prefix`, `positions`.
    paper_dir: the published sets, for the whole workflow; empty is the builtin set.
    """
    from jax_refusal.checkpoints.sources import locate
    from jax_refusal.data.chat import load_chat
    from jax_refusal.data.prompts import KINDS, builtin
    from jax_refusal.runtime.batching import Prompts

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
        "long": encoded(long[: max(*sizes.rows, sizes.scale_rows)]),
        "instruction": some[0],
        "refusal_ids": sorted({ids[0] for ids in openings}),
        "workflow": workflow(source, sizes, paper_dir),
    }


def workflow(source: str, sizes: Sizes, paper_dir: str) -> dict[str, Any]:
    """Fields of a RunConfig's `data` and `model`: the prompts there are, the adapter that fits.

    Only the demo's model has an adapter that makes it refuse; the filter would leave another one
    without prompts.
    """
    from jax_refusal.checkpoints.sources import SMOLLM2
    from jax_refusal.data.prompts import KINDS, SPLITS, builtin

    data: dict[str, Any] = {f"n_{s}": n for s, n in zip(SPLITS, sizes.workflow, strict=True)}
    if paper_dir:
        data |= {"source": "paper", "paper_dir": paper_dir}
    else:
        sets = [builtin(kind) for kind in KINDS]
        data = {f"n_{s}": min(data[f"n_{s}"], *(len(x[s]) for x in sets)) for s in SPLITS}
    adapter = "builtin:smollm2_135m_refuser" if source == SMOLLM2 else ""
    return {"data": data | {"filter": bool(adapter)}, "adapter": adapter}


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
    more = {name: ours[name] for name in ("cells", "vectors")}
    if ours["adapter"]:
        more |= merged(spawn)
    theirs = spawn("hooks", "select", **more)
    each = [seconds / len(ours["cells"]) for seconds in theirs["seconds"]]
    gap = np.abs(np.array(ours["scores"]) - np.array(theirs["result"])).max()
    count, rows, peak = ours["candidates"], [], memory(ours)
    for mode in ("full grid", "default mode"):
        more = dict(ours[mode])
        seconds, scored = more.pop("seconds"), more["scored"]
        one = statistics.median(seconds) / count, statistics.median(each)
        more |= {
            "memory": peak,
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


def merged(spawn: Spawn) -> dict[str, Any]:
    """Of the task: where the other side finds the model that has an adapter."""
    return {"directory": spawn("jax", "merged")["directory"], "gguf": None}


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
            "memory": memory(ours),
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


def pipeline(spawn: Spawn, sizes: Sizes) -> list[Row]:
    """Agreement: the share of equal replies, among the prompts that both sides answered."""
    ours = spawn("jax", "pipeline")
    asked = ("prompts", "conditions", "cells", "vectors", "direction", "layer", "stop_ids")
    more = {name: ours[name] for name in asked} | {"refusal_ids": ours["refusal_ids"]}
    if ours["adapter"]:
        more |= merged(spawn)
    theirs = spawn("hooks", "pipeline", **more)
    parts = whole_workflow(theirs, ours["candidates"], len(ours["cells"]))
    pairs = [(ours["replies"][name][i], text) for name, i, text in theirs["replies"]]
    stages, compiled = ours["stages"], statistics.median(ours["compile_seconds"])
    note = (
        f"{ours['origin']}, the model {'with' if ours['adapter'] else 'without'} an adapter that "
        f"makes it refuse; selection {stages['selection']:.4g} s of ours, "
        f"{parts['selection']:.4g} s of theirs, replies {stages['completions']:.4g} s and "
        f"{parts['replies']:.4g} s, ours with compiling, of which the row leaves out all "
        f"{compiled:.4g} s"
    )
    if sizes.prune_layers > 0.2:  # the paper's; its loops score every layer whatever is pruned
        note += f"; ours prunes {sizes.prune_layers:.0%} of the layers, so the ratio says nothing"
    train, val, test = ours["counts"]
    line = row(
        *("pipeline", f"{train} + {val} + {test} prompts of a kind, five conditions", "s"),
        *(ours["seconds"], [sum(parts.values())]),
        agreement=sum(a == b for a, b in pairs) / len(pairs),
        agreement_is="of replies equal",
        theirs_extrapolated_from=len(ours["cells"]),
        new_tokens=sizes.new_tokens,
        stages=stages,
        compile_seconds=ours["compile_seconds"],
        theirs_parts=parts,
        memory=memory(ours),
        note=note,
    )
    return [line]


def whole_workflow(theirs: dict[str, Any], candidates: int, scored: int) -> dict[str, float]:
    """Seconds of each part of the hooks side's workflow, from the parts that were measured.

    Loading, filter, means and the unedited logits were measured whole; of the candidates `scored`
    of all; of each condition's replies one full batch, for all full ones, and the last.
    """
    once = {name: theirs[name] for name in ("loading", "filter", "means")}
    selection = theirs["unedited"] + theirs["scores"] / scored * candidates
    replies = sum(seconds * times for seconds, times in theirs["batches"])
    return once | {"selection": selection, "replies": replies}


def scale(spawn: Spawn, sizes: Sizes) -> list[Row]:
    """Ours alone, at several sizes, and the line through them."""
    runs = [spawn("jax", "scale_prompts", count=count) for count in sizes.scale_prompts]
    seconds = [run["seconds"] for run in runs]
    peaks = [[run["peak_rss_mib"]] for run in runs]
    candidates = spawn("jax", "scale_candidates")["seconds"]
    tokens = spawn("jax", "scale_tokens")["seconds"]
    each = f"new tokens of {sizes.scale_rows} rows"
    compiled = {"compile_seconds": [run["compile_seconds"] for run in runs]}
    return [
        scaling("prompts, their means", "s", sizes.scale_prompts, seconds) | compiled,
        scaling("prompts, their means: peak memory", "MiB", sizes.scale_prompts, peaks),
        scaling("candidates, KL and bypass", "s", sizes.scale_candidates, candidates),
        scaling(each, "s", sizes.scale_tokens, tokens),
    ]


def scaling(what: str, unit: str, counts: tuple[int, ...], runs: list[list[float]]) -> Row:
    """A row of the largest count, with the line through the medians of all."""
    medians = [statistics.median(times) for times in runs]
    line = fit(counts, medians)
    points = ", ".join(f"{y:.3g} at {x}" for x, y in zip(counts, medians, strict=True))
    note = (
        f"{points}; the line is {line['slope']:.3g} {unit} each and {line['intercept']:.3g} {unit} "
        f"once, R² {line['r2']:.4f}"
    )
    return row(
        *("scale", f"{counts[-1]} {what}", unit, runs[-1], "ours only"),
        points=[list(point) for point in zip(counts, medians, strict=True)],
        fit=line,
        note=note,
    )


def fit(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """The least-squares line: slope [unit of y, over x], intercept [unit of y], R^2."""
    slope, intercept = np.polyfit(x, y, 1)
    around = np.square(np.subtract(y, np.mean(y))).sum()
    left = np.square(np.subtract(y, slope * np.array(x) + intercept)).sum()
    # A constant has nothing to explain, and the line meets it.
    r2 = 1 - left / around if around else 1.0
    return {"slope": float(slope), "intercept": float(intercept), "r2": float(r2)}


def memory(ours: dict[str, Any]) -> dict[str, float]:
    """Our peak memory beside what has to be held [MiB]: the weights and, where asked, the cache."""
    held = {f"{name}_mib": size / 2**20 for name, size in ours["bytes"].items()}
    peak = ours["peak_rss_mib"]
    return {"peak_rss_mib": peak, **held, "peak_over_held": peak / sum(held.values())}


JOBS: dict[str, Callable[[Spawn, Sizes], list[Row]]] = {
    "collect": collect,
    "select": select,
    "generate": generate,
    "start": start,
    "pipeline": pipeline,
    "scale": scale,
}


def equal(a: list[Any], b: list[Any]) -> float:
    """The share of places in which two nested lists agree; 0 where their shapes differ."""
    x, y = np.array(a), np.array(b)
    return float((x == y).mean()) if x.shape == y.shape else 0.0
