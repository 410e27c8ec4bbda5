"""Our side against PyTorch + Hugging Face hooks, and against the machine, on one model in float32.

python -m launch.bench [--quick] [--jobs=collect,...] [--model=SOURCE]

Jobs, on the same token ids for both sides, on the CPU:
  collect   mean block inputs at all post-instruction tokens and layers, 64 harmful and 64 harmless
            prompts [s]. Theirs: forward pre-hooks with float64 sums on left-padded batches of 32,
            as the paper's code does it; `output_hidden_states`; nnsight; TransformerLens.
  select    every (position, layer) candidate on 32 + 32 validation prompts: KL, bypass, induce [s].
            Theirs: the three loops of the paper's code for a few candidates, extrapolated to the
            grid. Ours: the full grid, and the default mode, which scores only what can still win.
            The model is the demo's, with the adapter that makes it refuse, and the thresholds are
            the paper's. Another --model has no such adapter: its thresholds are those that a third
            of the eligible candidates pass on induce, and half of those on KL.
  generate  one greedy decode step of 1, 8, 32 and 96 rows [ms]: prompts of some 64 tokens, 64 new
            ones, no early stop; the time of a one-token call (the prefill) is taken off.
  start     start of the process to the first new token of one prompt [s], with an empty and with a
            filled compilation cache; each side loads tokenizer and weights in its own way, and
            Hugging Face takes long to read a GGUF file: see the seconds under the table.
  pipeline  the whole workflow on 128 training, 32 validation and 100 test prompts of each kind,
            from loading to the last reply: filter, means, selection, and 64 new tokens at most in
            five conditions (harmful prompts unedited, ablated, subtracted from; harmless ones
            unedited, added to) [s]. The builtin set has fewer prompts, and all of them are used;
            --paper_dir=DIR takes the published ones from a local copy. Ours: pipeline.run in an
            empty workdir, with the demo's adapter, refusal tokens discovered and the report
            written. Theirs: loading, filter and means measured whole, the paper's full grid
            extrapolated from a few candidates, each condition's full batches from one of them; on
            the merged weights that launch.convert writes.
  scale     ours alone: the means of --scale_prompts prompts, each count in a process of its own,
            and the peak memory of that process [s, MiB]; KL and bypass of 4, 8 and 16 candidates
            [s]; 16 to 128 new tokens of 8 rows, no early stop [s]. Under the table is the line
            through each.

Each (job, side) is a process of its own, one after the other and never two at once: one call that
does not count, then --repeats that do. What takes minutes (the two selections, the workflow, the
means of many prompts) runs --grid_repeats times with no call before, and the seconds that XLA
compiled are taken off (they are in the JSON).

The floor is what float32 products cannot beat on this machine: 2 x the matmul weights that are
needed x tokens over the rate of a 2048^3 product (of the faster side), every real token once, the
shared prefix once for each edit, and nothing else (no attention scores, no norms). For a decode
step it is the larger of that and of reading weights and key/value cache once, at the rate of a copy
of 1 GB. The rates are measured in the same run: machines differ and are noisy, so trust ratios.

Flags and processes are here; what is compared in bench_rows.py, the table in bench_table.py, the
two sides in bench_jax.py and bench_hooks.py, the floors in bench_floor.py.
docs/benchmarks.md says how to read the results.
"""

import dataclasses
import datetime
import importlib
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from absl import app, flags

from launch import bench_rows, bench_sizes, bench_table, common

PACKAGES = "jax-refusal jax jaxlib flax numpy torch transformers nnsight transformer-lens"
JOBS = list(bench_rows.JOBS)

FLAGS = flags.FLAGS
flags.DEFINE_string("model", "", "Model source; empty is SmolLM2-135M-Instruct.")
flags.DEFINE_list("jobs", JOBS, f"Some of {', '.join(JOBS)}.")
flags.DEFINE_integer("repeats", None, "Timed calls of all but the selections.", lower_bound=1)
flags.DEFINE_integer("grid_repeats", None, "Timed selections of each mode.", lower_bound=1)
flags.DEFINE_integer("candidates", None, "Candidates that the hooks side scores.", lower_bound=1)
flags.DEFINE_list("scale_prompts", [], "Two or more prompt counts of the scale job.")
flags.DEFINE_string("paper_dir", "", "A local copy of the published sets, for the pipeline job.")
flags.DEFINE_bool("quick", False, "Tiny sizes: shows whether all of it runs, not how fast.")
flags.DEFINE_string("out", "runs/bench/bench.json", "The JSON file to write.")
flags.DEFINE_string("worker", "", "Internal: SIDE:JOB that this process is to do.")
flags.DEFINE_string("folder", "", "Internal: where parent and worker exchange JSON.")


def make_a_line(counts: list[str]) -> bool:
    """Whether these are two or more different numbers of prompts, or none."""
    numbers = {count for count in counts if count.isdigit() and int(count)}
    return not counts or len(numbers) == len(counts) > 1


flags.register_validator("jobs", lambda jobs: set(jobs) <= set(JOBS), f"They are {JOBS}.")
flags.register_validator(
    "scale_prompts", make_a_line, "A line needs two numbers or more, such as 1000,10000,100000."
)


def main(_: list[str]) -> None:
    from jax_refusal.checkpoints.sources import SMOLLM2
    from jax_refusal.files import atomic_write

    source = FLAGS.model or SMOLLM2
    names = ("repeats", "grid_repeats", "candidates")
    given = {name: FLAGS[name].value for name in names if FLAGS[name].value is not None}
    if FLAGS.scale_prompts:
        given["scale_prompts"] = tuple(sorted(map(int, FLAGS.scale_prompts)))
    sizes = dataclasses.replace(bench_sizes.QUICK if FLAGS.quick else bench_sizes.FULL, **given)
    report: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "launch.bench", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": source,
        "machine": machine(),
        "sizes": dataclasses.asdict(sizes),
        "rows": [],
        "workers": [],
    }
    if (load := report["machine"]["load_before"]) > 0.5:
        common.log(f"The load of this machine is {load:.1f}: other work disturbs the timings.")
    with tempfile.TemporaryDirectory(prefix="jax_refusal_bench_") as name:
        folder = Path(name)
        task = bench_rows.task_of(source, sizes, FLAGS.paper_dir) | {"folder": name}

        def spawn(side: str, job: str, cache: str = "", **more: Any) -> dict[str, Any]:
            common.log(f"{job}: {side}")
            cache = str(folder / f"compiled{cache}")
            result, worker = run_worker(side, job, task | more, folder, cache)
            report["workers"].append(worker)
            return result

        task["peaks"] = report["machine"]["peaks"] = bench_rows.machine(spawn)
        for job in (job for job in JOBS if job in FLAGS.jobs):
            report["rows"] += bench_rows.JOBS[job](spawn, sizes)
            # After each job, so that an interrupt loses one.
            atomic_write(FLAGS.out, json.dumps(report, indent=2).encode() + b"\n")
    print(f"{bench_table.table(report)}\n\nwritten: {FLAGS.out}")


def run_worker(
    side: str, job: str, task: dict[str, Any], folder: Path, cache: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One worker process from start to end: what its job returned, and what it took."""
    (folder / "task.json").write_text(json.dumps(task))
    command = [sys.executable, "-m", "launch.bench", f"--worker={side}:{job}", f"--folder={folder}"]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        # As runtime/startup.py sets it for the entry points, in a folder of this run.
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }
    began = time.time()
    done = subprocess.run(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        sys.exit(f"{job}, {side} side, ended with {done.returncode}:\n{done.stdout[-4000:]}")
    found = json.loads((folder / "result.json").read_text())
    worker = {"job": job, "side": side, "seconds": time.time() - began}
    peak = {"peak_rss_mib": found["peak_rss_mib"]}
    return found["result"] | {"began": began} | peak, worker | peak


def work(_: list[str]) -> None:
    """A worker process: one job of one side. The hooks side must not have to import JAX."""
    side, job = FLAGS.worker.split(":")
    folder = Path(FLAGS.folder)
    task = json.loads((folder / "task.json").read_text())
    module = importlib.import_module(f"launch.bench_{side}")
    result = getattr(module, job)(task)
    found = {"result": result, "peak_rss_mib": peak_rss_mib()}
    (folder / "result.json").write_text(json.dumps(found))


def peak_rss_mib() -> float:
    """The most memory that this process has held."""
    import resource

    status = Path("/proc/self/status")
    if status.exists():  # Linux hands ru_maxrss on from the parent, and the parent's may be larger
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return int(lines["VmHWM"].split()[0]) / 1024
    bytes_each = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * bytes_each / 2**20


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    installed = {d.name.lower(): d.version for d in metadata.distributions()}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": cores,
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: installed.get(name, "not installed") for name in PACKAGES.split()},
        "load_before": os.getloadavg()[0],
    }


if __name__ == "__main__":
    if any(argument.startswith("--worker=") for argument in sys.argv):
        app.run(work)
    else:
        common.start(main, sys.argv)
