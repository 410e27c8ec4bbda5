"""What a stage has made so far, kept for the next run."""

import contextlib
import json
from collections.abc import Callable
from typing import Any

from jax_refusal.files import content_hash
from jax_refusal.run.manifest import MISREAD
from jax_refusal.run.workdir import Timer, Workdir, WorkdirError


class PartialResults:
    """What a stage that takes long has made so far, for the next run should this one be stopped.

    A context: written at times and in the end, whatever ends it. Once the results are written
    elsewhere, `Workdir.delete` removes its file.
    """

    every = 30.0  # seconds between two times

    def __init__(
        self,
        workdir: Workdir,
        name: str,
        of: Any,
        valid: Callable[[Any], bool] = lambda item: True,
        log: Callable[[str], None] = lambda message: None,
    ):
        """of: a JSON value, what the items are made of; those of anything else are dropped. valid:
        whether a value that was read is an item."""
        self.workdir, self.name, self.of = workdir, name, content_hash(of)
        self.valid, self.log = valid, log
        self.items: dict[int, Any] = {}
        self._timer = Timer()

    def __enter__(self) -> "PartialResults":
        if self.workdir.has(self.name):
            try:
                self.items = self._read()
            except MISREAD:  # it is as good as none
                self.log(f"{self.name} is damaged: what it held is made again")
        return self

    def _read(self) -> dict[int, Any]:
        there = self.workdir.read_json(self.name)
        if there["of"] != self.of:
            return {}
        items = {int(number): item for number, item in there["items"].items()}
        if not all(map(self.valid, items.values())):
            raise ValueError("an item is none")
        return items

    def add(self, number: int, item: Any) -> None:
        self.items[number] = item
        if self._timer.seconds >= self.every:
            self._write()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # What ended it is not hidden by a disk that is full.
        with contextlib.suppress(WorkdirError) if kind else contextlib.nullcontext():
            self._write()

    def _write(self) -> None:
        if self.items:
            content = {"of": self.of, "items": self.items}
            self.workdir.write(self.name, json.dumps(content).encode())  # quick: no indentation
        self._timer = Timer()
