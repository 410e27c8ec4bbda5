"""Files of a run: written whole or not at all, listed in one manifest with their hashes.

A stage is complete when the manifest lists its files. A run that stops anywhere leaves either the
old file or the new one, and the next run goes on after the last complete stage, or with what the
next one had made so far. A stage that is made again takes the later ones off the list.
"""

import contextlib
import json
import os
import time
from collections.abc import Collection, Iterable, Mapping
from importlib import metadata
from typing import Any

import jax
import numpy as np
from etils import epath

from jax_refusal.files import atomic_write, content_hash, sha256

MANIFEST = "manifest.json"
FORMAT = 2  # of the manifest and of the files that it lists
PACKAGES = ("jax-refusal", "jax", "jaxlib", "flax", "transformers", "tokenizers", "numpy")


class WorkdirError(ValueError):
    """The workdir belongs to another run, or cannot be written."""


class Workdir:
    """The folder of one run; only process 0 writes."""

    def __init__(
        self,
        root: str | os.PathLike[str],
        identity: Mapping[str, Any],
        first_use: Mapping[str, str] | None = None,
        remade: Mapping[str, Collection[str]] | None = None,
    ):
        """identity: what the results depend on (config fields, hashes), JSON values.

        first_use: names of identity fields -> the first stage that depends on them; all stages
        depend on the others. remade: names of identity fields that may change at any time -> the
        stages that are made again then. Raises WorkdirError naming every other field in which an
        existing manifest differs and on which a stage that it lists depends.
        """
        self.root = epath.Path(root)
        self.first_use, self.remade = dict(first_use or {}), dict(remade or {})
        self.identity = json.loads(json.dumps(dict(identity)))
        path = self.root / MANIFEST
        if path.exists():
            self.manifest = self._read_manifest(path)
            self._match(self.manifest["identity"], self.identity)
            self._take_off_what_changed()
            self.manifest["identity"] |= self.identity
        else:
            if self.root.exists() and not self.root.is_dir():
                raise WorkdirError(f"{self.root} is a file: a folder is needed.")
            if self.root.exists() and any(p.suffix != ".tmp" for p in self.root.iterdir()):
                raise WorkdirError(
                    f"{self.root} holds files and no {MANIFEST}: it is not the workdir of a run. "
                    "Choose an empty or new folder."
                )
            self.manifest = {
                "format": FORMAT,
                "identity": dict(self.identity),
                "versions": versions(),
                "stages": {},
            }

    @classmethod
    def existing(cls, root: str | os.PathLike[str]) -> "Workdir":
        """The workdir of an earlier run, as it is; WorkdirError where there is none."""
        if not (epath.Path(root) / MANIFEST).exists():
            raise WorkdirError(f"{root} has no {MANIFEST}: it is not the workdir of a run.")
        return cls(root, {})

    def done(self, stage: str) -> bool:
        """Whether the stage is listed and its files are all there, unchanged."""
        files = self.manifest["stages"].get(stage, {}).get("files")
        if files is None:
            return False
        for name, digest in files.items():
            path = self.root / name
            if not path.exists() or sha256(path.read_bytes()) != digest:
                return False
        return True

    def finish(
        self,
        stage: str,
        files: Iterable[str],
        seconds: float,
        earlier: Collection[str] | None = None,
    ) -> None:
        """Lists a stage's files in the manifest: from now on it is complete.

        Where the `earlier` stages are named, all others are taken off: what they hold was made from
        older files.
        """
        hashes = {name: sha256((self.root / name).read_bytes()) for name in files}
        listed = self.manifest["stages"]
        retained = {k: v for k, v in listed.items() if earlier is None or k in earlier}
        done = {"files": hashes, "seconds": round(seconds, 2)}
        self.manifest["stages"] = retained | {stage: done}
        self.write_json(MANIFEST, self.manifest)

    def note(self, **identity: Any) -> None:
        """Adds facts found while running (hashes of what was loaded), or checks them."""
        facts = json.loads(json.dumps(identity))
        known = self.manifest["identity"]
        self.identity |= facts
        self._match({k: v for k, v in known.items() if k in facts}, facts)
        if not facts.items() <= known.items():
            known |= facts
            self.write_json(MANIFEST, self.manifest)

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")

    def write_jsonl(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        self.write(name, "".join(line + "\n" for line in lines).encode())

    def write_tensors(self, name: str, tensors: Mapping[str, np.ndarray]) -> None:
        from safetensors.numpy import save

        self.write(name, save({k: np.ascontiguousarray(v) for k, v in tensors.items()}))

    def write(self, name: str, content: bytes) -> None:
        if jax.process_index() != 0:
            return
        path = self._inside(name)
        try:
            atomic_write(path, content)
        except OSError as error:
            raise WorkdirError(
                f"Could not write {path} ({error.strerror or error}). What was complete is kept: "
                "make room or choose another --workdir, and run the same command again."
            ) from error

    def delete(self, name: str) -> None:
        if jax.process_index() == 0:
            self._inside(name).unlink(missing_ok=True)

    def read_json(self, name: str) -> Any:
        return json.loads(self._inside(name).read_bytes())

    def read_jsonl(self, name: str) -> list[dict[str, Any]]:
        # Of bytes: those of a str end at U+2028 and U+0085 too, which JSON may hold as they are.
        return [json.loads(line) for line in self._inside(name).read_bytes().splitlines()]

    def read_tensors(self, name: str) -> dict[str, np.ndarray]:
        from safetensors.numpy import load

        return load(self._inside(name).read_bytes())

    def _inside(self, name: str) -> epath.Path:
        if os.path.isabs(name) or ".." in name.split("/"):
            raise WorkdirError(f"{name} would lie outside the workdir.")
        return self.root / name

    def _read_manifest(self, path: epath.Path) -> dict[str, Any]:
        try:
            manifest = json.loads(path.read_bytes())
            parts, layout = (manifest["identity"], manifest["stages"]), manifest["format"]
        except (ValueError, KeyError, TypeError):
            parts, layout = (None,), None
        if not isinstance(layout, int) or not all(isinstance(part, dict) for part in parts):
            raise WorkdirError(
                f"{path} is not a manifest of this program. Choose another --workdir."
            )
        if layout != FORMAT:
            age = "an older" if layout < FORMAT else "a newer"
            raise WorkdirError(
                f"{self.root} was written by {age} version of this program: its files have layout "
                f"{layout}, and this version reads and writes layout {FORMAT} alone. Choose "
                "another --workdir, or use that version."
            )
        return manifest

    def _match(self, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        differ = [
            f"{k}: there {stored.get(k)!r}, now {now[k]!r}"
            for k in sorted(now)
            if k in stored and stored[k] != now[k] and self._used(k) and k not in self.remade
        ]
        if differ:
            raise WorkdirError(
                f"{self.root} holds a run of another kind ({'; '.join(differ)}). "
                "Choose another --workdir, or use the settings that are there."
            )

    def _take_off_what_changed(self) -> None:
        """Takes the stages off the list that are made again for what is changed now."""
        stored = self.manifest["identity"]
        for field, stages in self.remade.items():
            if field in self.identity and stored.get(field) != self.identity[field]:
                for stage in stages:
                    self.manifest["stages"].pop(stage, None)

    def _used(self, field: str) -> bool:
        """Whether a complete stage depends on an identity field."""
        stages = self.manifest["stages"]
        return self.first_use[field] in stages if field in self.first_use else bool(stages)


class PartialResults:
    """What a stage that takes long has made so far, for the next run should this one be stopped.

    A context: written at times and in the end, whatever ends it. Once the results are written
    elsewhere, `Workdir.delete` removes its file.
    """

    every = 30.0  # seconds between two times

    def __init__(self, workdir: Workdir, name: str, of: Any):
        """of: a JSON value, what the items are made of; those of anything else are dropped."""
        self.workdir, self.name, self.of = workdir, name, content_hash(of)
        self.items: dict[int, Any] = {}
        self._timer = Timer()

    def __enter__(self) -> "PartialResults":
        # A file that is damaged is as good as none: what it held is made again.
        damaged = (ValueError, KeyError, TypeError, AttributeError)
        with contextlib.suppress(FileNotFoundError, *damaged):
            there = self.workdir.read_json(self.name)
            if there["of"] == self.of:
                self.items = {int(number): item for number, item in there["items"].items()}
        return self

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


class Timer:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start


def versions() -> dict[str, str]:
    """Package -> installed version, of those that results may depend on."""
    return {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
