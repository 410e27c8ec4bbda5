"""Kills a tiny run at random moments, lets it go on, and compares what it leaves at the end with
what an undisturbed run leaves.

python -m tests.campaign.kill --times=50 [--seed=0] [--signals=KILL,TERM,INT,INT] [--jobs=2]
    [--minutes=30]

Every run is a process of its own (`launch.run`), killed again and again until it gets to its end.
Prints a row for each kill and each run, then a table; exits with 1 after any fault: another exit
code than the signal's, a trace, or files that differ.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import itertools
import json
import math
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from jax_refusal.run.lock import LOCK
from tests import runs, tiny
from tests.runs import STAGES

# Large enough that a stage has moments.
FIELDS = {
    "data__n_train": 24,
    "data__n_val": 12,
    "data__n_test": 6,
    "generate__max_new_tokens": 24,
    "selection__full_grid": True,
}
CODES = {"KILL": (-9, -9), "INT": (130, -2), "TERM": (143, -15), "HUP": (129, -1)}
START, END = "start", "end"  # before the first stage of a process, and behind the last
MOST = 12  # kills of one run
LIMIT = 300  # seconds of a process


class Process:
    """A `launch.run`, and what it says as it says it."""

    def __init__(self, cache: Path, config: Path, workdir: Path):
        self.workdir = workdir
        self.started = time.monotonic()
        self.process = runs.start(cache, f"--config={config}", f"--workdir={workdir}")
        self.lines: list[tuple[float, str]] = []  # seconds since the start
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append((time.monotonic() - self.started, line))

    @property
    def said(self) -> str:
        return "".join(line for _, line in self.lines)

    def wait_for(self, words: str) -> None:
        """Until a line begins with these words, or the process has ended."""
        while not any(line.startswith(words) for _, line in self.lines):
            if self.process.poll() is not None or time.monotonic() - self.started > LIMIT:
                return
            time.sleep(0.002)

    def works(self) -> bool:
        """Whether it holds the workdir's lock; one that was killed leaves the file."""
        try:
            return json.loads((self.workdir / LOCK).read_text())["pid"] == self.process.pid
        except (OSError, ValueError):
            return False

    def end(self) -> int:
        """Its exit code."""
        try:
            code = self.process.wait(LIMIT)
        except Exception:
            self.process.kill()
            raise
        self.reader.join()
        assert self.process.stdout is not None and self.process.stderr is not None
        self.process.stdout.close()
        self.process.stderr.close()
        return code


def complete(workdir: Path) -> int:
    """How many stages are listed."""
    return len(runs.manifest(workdir)["stages"]) if (workdir / "manifest.json").exists() else 0


@dataclasses.dataclass
class Kill:
    """One signal and what came of it."""

    signal: str
    stage: str  # that it hit
    code: int
    fault: str = ""


@dataclasses.dataclass
class Campaign:
    """Runs that are killed, and one that is not."""

    folder: Path
    signals: tuple[str, ...]
    seed: int
    most: int  # kills in all
    end: float = math.inf  # on the monotonic clock: the last moment of a kill
    times: dict[str, float] = dataclasses.field(default_factory=dict)  # stage -> its seconds
    kills: list[Kill] = dataclasses.field(default_factory=list)
    faults: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        model = tiny.write_checkpoint(self.folder / "model")
        self.cache = self.folder / "programs"
        self.config = runs.write_config(self.folder / "config.py", model, **FIELDS)
        for name in ("first", "whole"):  # compiled programs are there from the second on
            process = self.process(self.folder / name)
            if process.end():
                raise RuntimeError(f"the undisturbed run failed:\n{process.said}")
        began = {"[loading": START} | {f"[{stage}:": stage for stage in STAGES}
        last = 0.0
        for seconds, line in process.lines:
            for words, stage in began.items():
                if line.startswith(words):
                    self.times[stage], last = seconds - last, seconds
        self.whole = self.left(self.folder / "whole")

    def process(self, workdir: Path) -> Process:
        return Process(self.cache, self.config, workdir)

    def left(self, workdir: Path) -> dict[str, Any]:
        """All files, with the manifest as it is but for its times."""
        listed = runs.manifest(workdir)
        for stage in listed["stages"].values():
            del stage["seconds"]
        return runs.results(workdir) | {"manifest.json": listed}

    @property
    def goes_on(self) -> bool:
        return len(self.kills) < self.most and time.monotonic() < self.end

    def run(self, number: int) -> None:
        """One run, killed until it is complete or enough were killed, and what it left."""
        workdir, killed = self.folder / f"run {number}", 0
        dice = random.Random(f"{self.seed} {number}")
        while self.goes_on and killed < MOST and complete(workdir) < len(STAGES):
            killed += 1
            self.kill(workdir, dice)
        process = self.process(workdir)
        code = process.end()
        if code or "Traceback" in process.said:
            self.faults.append(f"run {number} did not go on: {code}\n{process.said}")
        there = self.left(workdir) if complete(workdir) else {}
        differ = sorted(
            name
            for name in there.keys() | self.whole.keys()
            if there.get(name) != self.whole.get(name)
        )
        if differ:
            self.faults.append(f"run {number} left other files: {differ}")
        print(f"run {number}: killed {killed} times, identical: {not differ}", flush=True)

    def kill(self, workdir: Path, dice: random.Random) -> None:
        """Starts or goes on, and sends a signal at a random moment of a random stage to come."""
        name, done = dice.choice(self.signals), complete(workdir)
        # Mostly of the next stage, so that all get their share.
        ahead = min(int(dice.expovariate(1.0)), len(STAGES) - done - 1)
        stage, share = STAGES[done + ahead], dice.uniform(0.0, 1.1)
        if done == 0 and dice.random() < 0.2:
            stage = START
        process = self.process(workdir)
        if stage != START:
            process.wait_for(f"[{STAGES[done + ahead - 1]}:" if ahead else "[loading")
        time.sleep(share * self.times[stage])
        working = process.works()
        process.process.send_signal(getattr(signal, f"SIG{name}"))
        code = process.end()
        over = complete(workdir)
        hit = END if over == len(STAGES) else STAGES[over] if working else START
        kill = Kill(name, hit, code)
        kill.fault = self.fault(kill, process.said)
        self.kills.append(kill)
        print(f"{len(self.kills):5} {name:5} {hit:18} {code:5}  {kill.fault[:60]}", flush=True)
        if kill.fault:
            self.faults.append(f"{kill.fault}: {name} in {hit}, exit code {code}\n{process.said}")

    @staticmethod
    def fault(kill: Kill, said: str) -> str:
        """What is wrong with how a process ended; empty where nothing is."""
        code, python = CODES[kill.signal]
        early = kill.stage == START and kill.code == python  # before it has a handler
        late = kill.stage == END and kill.code == 0
        if not (kill.code == code or early or late):
            return "another exit code"
        if ("Traceback" in said or "Fatal" in said) and not early:
            return "a trace"
        if kill.signal != "KILL" and not (early or late) and "Interrupted" not in said:
            return "nothing was said"
        return ""

    def table(self) -> str:
        """Signal and stage -> how many, and their exit codes."""
        codes: dict[tuple[str, str], list[int]] = collections.defaultdict(list)
        for kill in self.kills:
            codes[kill.signal, kill.stage].append(kill.code)
        lines = [f"{'signal':7}{'stage hit':20}{'kills':>6}  exit codes"]
        for name in dict.fromkeys(self.signals):
            for stage in (START, *STAGES, END):
                if given := collections.Counter(codes[name, stage]):
                    counts = ", ".join(f"{code} x {n}" for code, n in sorted(given.items()))
                    lines.append(f"{name:7}{stage:20}{given.total():6}  {counts}")
        return "\n".join(lines)


def hear_again() -> None:
    """A shell's background jobs ignore Ctrl-C, and what they start inherits it."""
    for number, usual in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGTERM, signal.SIG_DFL),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)


def campaign(
    folder: Path,
    times: int,
    seed: int,
    signals: tuple[str, ...],
    jobs: int = 1,
    minutes: float = math.inf,
) -> Campaign:
    """Kills so many times, or for so long; jobs: runs at once."""
    hear_again()
    done = Campaign(folder, signals, seed, times, time.monotonic() + 60 * minutes)
    numbers = itertools.count(1)

    def work() -> None:
        while done.goes_on:
            done.run(next(numbers))

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for job in [pool.submit(work) for _ in range(jobs)]:
            job.result()
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=50, help="signals that are sent in all")
    parser.add_argument("--seed", type=int, default=None, help="of the moments; drawn if not given")
    parser.add_argument("--signals", default="KILL,TERM,INT", help=f"of {', '.join(CODES)}")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="after which none is killed"
    )
    asked = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if asked.seed is None else asked.seed
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        signals = tuple(asked.signals.split(","))
        done = campaign(Path(folder), asked.times, seed, signals, asked.jobs, asked.minutes)
    print(f"\n{done.table()}\n")
    for fault in done.faults:
        print(f"FAULT: {fault}\n")
    print(f"seed {seed}: {len(done.kills)} kills, {len(done.faults)} faults")
    return 1 if done.faults else 0


if __name__ == "__main__":
    sys.exit(main())
