"""Our side of the benchmark: one function for each job of launch/bench.py.

Letters: P post-instruction tokens, L layers, D residual width. Functions take the task
(launch.bench_rows.task_of) and return JSON values.
"""

import dataclasses
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_refusal as jr
from jax_refusal import config as configs
from jax_refusal.checkpoints.loading import read_checkpoint
from jax_refusal.checkpoints.sources import locate
from jax_refusal.data.prompts import KINDS, builtin, load_prompts
from jax_refusal.run import convert as conversion
from jax_refusal.run import pipeline as study_pipeline
from jax_refusal.run import study as files
from jax_refusal.run.workdir import Workdir
from jax_refusal.runtime import collect as collection
from jax_refusal.runtime import generate as generation
from jax_refusal.runtime import startup
from jax_refusal.runtime.batching import Prompts
from jax_refusal.study import selection
from jax_refusal.study.conditions import CONDITIONS
from jax_refusal.study.sweep import Sweep
from launch.bench_floor import (
    block_weights,
    cache_bytes,
    collect_flops,
    head_weights,
    select_flops,
    tokens,
    weight_bytes,
)
from launch.bench_rows import timed

Task = dict[str, Any]

_compiled = 0.0  # seconds that XLA has compiled in this process


def _on_duration(event: str, duration_secs: float, **_: Any) -> None:
    global _compiled
    if event.endswith(("/backend_compile_duration", "/jaxpr_to_mlir_module_duration")):
        _compiled += duration_secs
    if event.endswith("/cache_retrieval_time_sec"):  # counted as compiling, and is none
        _compiled -= duration_secs


jax.monitoring.register_event_duration_secs_listener(_on_duration)
startup.give_back_after_compiling()  # as every entry point does


def machine(task: Task) -> dict[str, Any]:
    """The rates of this side's float32 products [GFLOP/s], and of copying [GB/s]."""
    side, megabytes = task["sizes"]["matmul"], task["sizes"]["copy_mb"]
    a = jnp.ones((side, side), jnp.float32)
    product = jax.jit(jnp.matmul)
    matmul = timed(lambda: product(a, a).block_until_ready(), 20)
    # All cores copy: one alone may not fill the memory's bandwidth.
    parts = os.cpu_count() or 1
    source = np.array_split(np.ones(megabytes * 250_000, np.float32), parts)
    target = np.array_split(np.zeros(megabytes * 250_000, np.float32), parts)
    with ThreadPoolExecutor(parts) as pool:
        copy = timed(lambda: list(pool.map(np.copyto, target, source)), 10)
    return {
        "gflops": 2 * side**3 / min(matmul["seconds"]) / 1e9,
        "gb_s": 2 * megabytes / 1e3 / min(copy["seconds"]),  # read and written
    }


def _load(task: Task, adapter: str = "") -> tuple[Any, list[Prompts], list[Prompts], float]:
    model = jr.load_model(task["source"], adapter=adapter or None)
    train, val = ([Prompts(**kind) for kind in task[split]] for split in ("train", "val"))
    return model, train, val, task["peaks"]["gflops"] * 1e9


def _means(model: Any, kinds: list[Prompts]) -> list[np.ndarray]:  # harmful, harmless: [P, L, D]
    nothing = jr.identity(model.arch.layers, model.arch.width)
    return [collection.mean_activations(model, prompts, nothing)[0] for prompts in kinds]


def collect(task: Task) -> dict[str, Any]:
    model, train, _, rate = _load(task)
    found = timed(lambda: _means(model, train), task["sizes"]["repeats"])
    shared, own = sum(map(tokens, train)), sum(len(i) for p in train for i in p.ids)
    return found | {
        "result": [means.tolist() for means in found["result"]],
        "floor": collect_flops(model.arch, shared) / rate,
        "floor_without_shared_prefix": collect_flops(model.arch, own) / rate,
    }


def select(task: Task) -> dict[str, Any]:
    """The full grid, then the default mode; on the model that refuses, where there is one."""
    model, train, (harmful, harmless), rate = _load(task, task["workflow"]["adapter"])
    sizes, L = task["sizes"], model.arch.layers
    directions = jr.difference(*_means(model, train))  # [P, L, D]
    P, end = directions.shape[0], selection.Rule(L).end
    cells = [(p, l) for p in range(P) for l in range(L) if directions[p, l].any()]
    if sizes["grid"]:  # a zero difference is no candidate
        cells = _spread([c for c in cells if c[1] < end], sizes["grid"])
        chosen = np.zeros((P, L, 1))
        chosen[tuple(np.transpose(cells))] = 1
        directions = directions * chosen

    def fresh() -> Sweep:  # one for each selection: it remembers what a few prompts showed
        return Sweep(model, directions, harmful, harmless, task["refusal_ids"])

    everything = selection.Rule(L, kl_threshold=math.inf, induce_threshold=-math.inf)
    grid, grid_times = _without_compiling(
        lambda: selection.select(directions, fresh(), everything, full_grid=True),
        sizes["grid_repeats"],
    )
    scored = [c for c in grid.table if c.reason != selection.ZERO]
    refuses = task["workflow"]["adapter"] and not sizes["grid"]  # and is scored in full
    rule = selection.Rule(L) if refuses else _typical(scored, end, L)
    expected = selection.choose(scored, rule) or min(scored, key=rule.shortfall)
    default, default_times = _without_compiling(
        lambda: selection.select(directions, fresh(), rule, fallback="least_bad"),
        sizes["grid_repeats"],
    )
    same = (default.position, default.layer) == (expected.position, expected.layer)

    def facts(table: list[selection.Candidate]) -> dict[str, Any]:
        names = ("steering_score", "kl_div_score", "refusal_score")
        return {
            "floor": select_flops(model.arch, table, harmful, harmless) / rate,
            "scored": {name: sum(getattr(c, name) is not None for c in table) for name in names},
        }

    both = _spread(cells, sizes["candidates"])  # the ones that the hooks side scores too
    found = [selection.find(grid.table, p - P, l) for p, l in both]
    thresholds = {"kl_threshold": rule.kl_threshold, "induce_threshold": rule.induce_threshold}
    return {
        "adapter": task["workflow"]["adapter"],
        "bytes": {"weights": weight_bytes(model.arch)},
        "candidates": len(cells) if sizes["grid"] else P * L,
        "full grid": grid_times | facts(grid.table),
        "default mode": default_times | facts(default.table) | {"same_winner": same} | thresholds,
        "cells": both,
        "vectors": [directions[cell].tolist() for cell in both],
        "scores": [[c.kl_div_score, c.refusal_score, c.steering_score] for c in found],
    }


def _without_compiling(call: Callable[[], Any], repeats: int) -> tuple[Any, dict[str, list[float]]]:
    """A call of minutes, without one before it: its seconds less those that XLA compiled."""
    result, times = None, {"seconds": [], "compile_seconds": []}
    for _ in range(repeats):
        began, compiled = time.perf_counter(), _compiled
        result = call()
        times["compile_seconds"].append(_compiled - compiled)
        times["seconds"].append(time.perf_counter() - began - times["compile_seconds"][-1])
    return result, times


def _typical(table: list[selection.Candidate], end: int, layers: int) -> selection.Rule:
    """Thresholds for a few candidates, or a model that does not refuse: a third of the eligible
    pass on induce, half of those on KL; 4 to 16 % of the grid pass in the five published runs."""

    def between(values: list[float], count: int) -> float:
        """A threshold with `count` values below it, halfway to the next: no score lies on it."""
        values = sorted(values)
        return (values[count - 1] + values[count]) / 2 if count < len(values) else values[-1] + 1

    eligible = [c for c in table if c.steering_score is not None and c.layer < end]
    induce = -between([-(c.steering_score or 0.0) for c in eligible], -(-len(eligible) // 3))
    passing = [c for c in eligible if (c.steering_score or 0.0) >= induce]
    kl = between([c.kl_div_score or 0.0 for c in passing], -(-len(passing) // 2))
    return selection.Rule(layers, kl_threshold=kl, induce_threshold=induce)


def _spread(cells: list[Any], count: int) -> list[Any]:
    """`count` of the cells, evenly spaced."""
    count = min(count, len(cells))
    return [cells[int((i + 0.5) * len(cells) / count)] for i in range(count)]


def generate(task: Task) -> dict[str, Any]:
    sizes, encoded = task["sizes"], task["long"]
    model, _, _, rate = _load(task)
    arch, nothing = model.arch, jr.identity(model.arch.layers, model.arch.width)
    weights = block_weights(arch) + head_weights(arch)
    length = float(np.mean([len(ids) for ids in encoded["ids"]]))
    context = length + sizes["new_tokens"] / 2  # tokens in the cache, on average
    longest = max(map(len, encoded["ids"])) + sizes["new_tokens"]
    cache = cache_bytes(arch, max(sizes["rows"]), longest)
    found: dict[str, Any] = {
        "prompt_tokens": length,
        "bytes": {"weights": weight_bytes(arch), "cache": cache},
    }
    for rows in sizes["rows"]:
        prompts = Prompts(**encoded | {"ids": encoded["ids"][:rows]})

        def call(new: int, prompts: Prompts = prompts, rows: int = rows) -> list[list[int]]:
            return generation.generate(
                model, prompts, nothing, stop_ids=(), max_new_tokens=new, batch_size=rows
            )

        memory = (4 * weights + cache_bytes(arch, rows, context)) / (task["peaks"]["gb_s"] * 1e9)
        found[str(rows)] = {
            "many": timed(lambda call=call: call(sizes["new_tokens"]), sizes["repeats"]),
            "one": timed(lambda call=call: call(1), sizes["repeats"]),
            "floor": 1000 * max(memory, 2 * weights * rows / rate),  # ms
        }
    return found


def start(task: Task) -> dict[str, Any]:
    """From the instruction's text to its first new token; done is the clock at that token."""
    began = time.time()
    chat, model = jr.load_chat(task["source"]), jr.load_model(task["source"])
    loading = time.time() - began
    prompts = Prompts.encoded(chat, [task["instruction"]])
    nothing = jr.identity(model.arch.layers, model.arch.width)
    new = generation.generate(model, prompts, nothing, stop_ids=(), max_new_tokens=1)
    return {"done": time.time(), "loading": loading, "ids": prompts.ids[0] + new[0]}


def pipeline(task: Task) -> dict[str, Any]:
    """The library's own run in an empty workdir, and what the hooks side needs to do the same."""
    config, repeats = run_config(task), task["sizes"]["grid_repeats"]
    places = iter([_workdir(task, i) for i in range(repeats)])
    _, times = _without_compiling(
        lambda: study_pipeline.run(config, next(places), log=lambda message: None), repeats
    )
    work = Workdir.existing(_workdir(task, 0))
    arch, chat = read_checkpoint(locate(task["source"]), ())[0], jr.load_chat(task["source"])
    texts, kept = load_prompts(config.data), work.read_json(files.FILTER)
    choice, directions = work.read_json(files.CHOICE), work.read_tensors(files.MEANS)["mean_diffs"]
    cells = [(p, l) for p, l in np.ndindex(directions.shape[:2]) if directions[p, l].any()]
    both = _spread(cells, task["sizes"]["candidates"])

    def encoded(kinds: list[list[str]]) -> list[dict[str, Any]]:
        return [dataclasses.asdict(Prompts.encoded(chat, kind, arch)) for kind in kinds]

    def replies(name: str) -> list[str]:
        return [line["response"] for line in work.read_jsonl(files.completions_file(name))]

    prompts = {s: encoded([texts.texts(k, s) for k in KINDS]) for s in ("train", "val", "test")}
    for split in ("train", "val"):
        prompts[f"{split}_kept"] = encoded([kept[kind][split]["kept"] for kind in KINDS])
    data = config.data
    rows = min(config.generate.batch_size, data.n_test * len(CONDITIONS))
    longest = max(len(ids) for kind in prompts["test"] for ids in kind["ids"])
    cache = cache_bytes(arch, rows, longest + config.generate.max_new_tokens)
    return times | {
        "bytes": {"weights": weight_bytes(arch), "cache": cache},
        "origin": "published prompts" if data.source == "paper" else "builtin prompts",
        "counts": [data.n_train, data.n_val, data.n_test],
        "adapter": config.model.adapter,
        "stages": {name: s["seconds"] for name, s in work.manifest["stages"].items()},
        "conditions": [[c.kind, c.edit, c.coefficient] for c in CONDITIONS],
        "candidates": math.prod(directions.shape[:2]),
        "cells": both,
        "vectors": [directions[cell].tolist() for cell in both],
        "direction": work.read_tensors(files.DIRECTION)["direction"].tolist(),
        "layer": choice["layer"],
        "refusal_ids": [token["token_id"] for token in work.read_json(files.TOKENS)["tokens"]],
        "stop_ids": chat.stop_ids,
        "prompts": prompts,
        "replies": {c.name: replies(c.name) for c in CONDITIONS},
    }


def run_config(task: Task) -> configs.RunConfig:
    """The demo's config with the benchmark's prompts; a direction is taken whatever its scores."""
    asked = task["workflow"]
    return configs.RunConfig(
        model=configs.ModelConfig(source=task["source"], adapter=asked["adapter"]),
        data=configs.DataConfig(**asked["data"]),
        selection=configs.SelectionConfig(
            fallback="least_bad", prune_layers=task["sizes"]["prune_layers"]
        ),
        generate=configs.GenerateConfig(max_new_tokens=task["sizes"]["new_tokens"]),
    )


def _workdir(task: Task, run: int) -> str:
    return os.path.join(task["folder"], f"run_{run}")


def merged(task: Task) -> dict[str, Any]:
    """The model with its adapter, as a Hugging Face directory for the other side."""
    out = os.path.join(task["folder"], "merged")
    if not os.path.exists(out):
        asked = {"source": task["source"], "adapter": task["workflow"]["adapter"]}
        request = conversion.Request(to="hf", out=out, dtype="float32", **asked)
        conversion.convert(request, log=lambda message: None)
    return {"directory": out}


def scale_prompts(task: Task) -> dict[str, Any]:
    """The means of `count` prompts, none twice and all of about one length."""
    chat, model = jr.load_chat(task["source"]), jr.load_model(task["source"])
    some = [instruction.text for instruction in builtin("harmless")["train"]]
    texts = [f"{some[i % len(some)]} ({i:06d})" for i in range(task["count"])]
    prompts = Prompts.encoded(chat, texts)
    return _without_compiling(lambda: _means(model, [prompts]), task["sizes"]["grid_repeats"])[1]


def scale_candidates(task: Task) -> dict[str, Any]:
    """Seconds of KL and bypass for each number of candidates; any vectors take as long."""
    model, _, (harmful, harmless), _ = _load(task)
    shape = (harmful.positions, model.arch.layers, model.arch.width)
    directions = np.random.default_rng(0).normal(size=shape)

    def scores(cells: list[tuple[int, int]]) -> list[list[float]]:
        sweep = Sweep(model, directions, harmful, harmless, task["refusal_ids"])
        return [sweep.kl(cells), sweep.bypass(cells)]

    def seconds(count: int) -> list[float]:
        cells = _spread(list(np.ndindex(shape[:2])), count)
        return timed(lambda: scores(cells), task["sizes"]["grid_repeats"])["seconds"]

    return {"seconds": [seconds(count) for count in task["sizes"]["scale_candidates"]]}


def scale_tokens(task: Task) -> dict[str, Any]:
    """Seconds of whole replies, prefill included, for each number of new tokens."""
    sizes, (model, *_) = task["sizes"], _load(task)
    rows = sizes["scale_rows"]
    prompts = Prompts(**task["long"] | {"ids": task["long"]["ids"][:rows]})
    nothing = jr.identity(model.arch.layers, model.arch.width)

    def seconds(new: int) -> list[float]:
        def call() -> list[list[int]]:
            return generation.generate(
                model, prompts, nothing, stop_ids=(), max_new_tokens=new, batch_size=rows
            )

        return timed(call, sizes["repeats"])["seconds"]

    return {"seconds": [seconds(new) for new in sizes["scale_tokens"]]}
