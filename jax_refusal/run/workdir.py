"""Files of a run: written whole or not at all, listed in one manifest with their hashes.

A stage is complete when the manifest lists its files. A run that stops anywhere leaves either the
old file or the new one, and the next run goes on after the last complete stage, or with what the
next one had made so far. A stage that is made again takes the later ones off the list.

Only who holds the lock writes. What is read is what was written, by its hash, and lies inside.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from importlib import metadata
from typing import Any

import jax
import numpy as np
from etils import epath

from jax_refusal.files import atomic_write, is_local, is_unfinished, read_file, sha256
from jax_refusal.run import lock, manifest
from jax_refusal.run.manifest import FORMAT, MANIFEST, MISREAD, WorkdirError

PACKAGES = ("jax-refusal", "jax", "jaxlib", "flax", "transformers", "tokenizers", "numpy")
AGAIN = (
    "Delete it and run the command that made this workdir again: it is made anew, with all that "
    "follows from it."
)


class Workdir:
    """The folder of one run. Whoever holds its lock writes, and of its processes number 0 alone."""

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
        self._written: dict[str, str] = {}  # file -> the hash of what this process wrote
        self._check_lock: Callable[[], None] | None = None  # while it is held
        self.manifest = self._load()

    def _load(self) -> dict[str, Any]:
        path = self.inside(MANIFEST)
        if path.exists():
            there = manifest.read(path)
            self._match(there, self.identity)
            self._take_off_what_changed(there)
            there["identity"] |= self.identity
            return there
        if self.root.exists() and not self.root.is_dir():
            raise WorkdirError(f"{self.root} is a file: a folder is needed.")
        if self.root.exists() and any(not _passing(p.name) for p in self.root.iterdir()):
            raise WorkdirError(
                f"{self.root} holds files and no {MANIFEST}: it is not the workdir of a run. "
                "Choose an empty or new folder."
            )
        return {
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

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """While it lasts this process may write here, and no other run may.

        Reads the manifest again, since another run may have gone on with it, and removes what
        killed ones left unfinished. Raises WorkdirError naming who works here.
        """
        with contextlib.ExitStack() as stack:
            self._check_lock = lambda: None
            stack.callback(setattr, self, "_check_lock", None)
            if jax.process_index() == 0:
                if not self.root.exists():  # it goes again where nothing comes to be written
                    stack.callback(self._remove_empty)
                with self._said_well(self.root / lock.LOCK):
                    self.root.mkdir(parents=True, exist_ok=True)
                    self._check_lock = stack.enter_context(lock.held(self.root))
                    self._remove_unfinished()
                    for path in self.root.iterdir():
                        self.inside(path.name)  # what leads outside is refused before any work
            self.manifest = self._load()
            yield

    def _remove_empty(self) -> None:
        with contextlib.suppress(OSError):
            if is_local(self.root):
                os.rmdir(self.root)

    def _remove_unfinished(self) -> None:
        """What was being written when a process was killed. No file lies deeper than a folder."""
        folders = [self.root]
        folders += [p for p in self.root.iterdir() if p.is_dir() and not os.path.islink(p)]
        for path in [path for folder in folders for path in folder.iterdir()]:
            if is_unfinished(path.name):
                with contextlib.suppress(OSError):  # it is in nobody's way
                    path.unlink(missing_ok=True)

    def done(self, stage: str, files: Iterable[str] = ()) -> bool:
        """Whether the stage is listed with these files at least, all there and unchanged."""
        listed = self.manifest["stages"].get(stage, {}).get("files")
        if listed is None or not set(files) <= listed.keys():
            return False
        return all(self._digest(name) == digest for name, digest in listed.items())

    def _digest(self, name: str) -> str | None:
        with contextlib.suppress(OSError):
            return sha256(read_file(self.inside(name)))
        return None

    def finish(
        self,
        stage: str,
        files: Iterable[str],
        seconds: float,
        earlier: Collection[str] | None = None,
    ) -> None:
        """Lists a stage's files in the manifest: from now on it is complete.

        The hashes are those of what was written, whatever lies there by now. Where the `earlier`
        stages are named, all others are taken off: what they hold was made from older files.
        """
        hashes = {name: self._written[name] for name in files}
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
        self._match(self.manifest, facts)
        if not facts.items() <= known.items():
            known |= facts
            if self._check_lock is not None:  # a run that is only read stays as it is
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
        assert self._check_lock is not None, "only who holds the lock may write"
        path = self.inside(name)
        if jax.process_index() == 0:
            self._check_lock()
            with self._said_well(path):
                atomic_write(path, content)
        self._written[name] = sha256(content)

    def delete(self, name: str) -> None:
        assert self._check_lock is not None, "only who holds the lock may delete"
        if jax.process_index() == 0:
            self.inside(name).unlink(missing_ok=True)

    def has(self, name: str) -> bool:
        return self.inside(name).exists()

    def read(self, name: str) -> bytes:
        """A file as the run wrote it; WorkdirError where it is anything else."""
        path = self.inside(name)
        try:
            content = read_file(path)
        except OSError as error:
            raise WorkdirError(
                f"{path} cannot be read ({error.strerror or error}). {AGAIN}"
            ) from error
        if sha256(content) != self._expected().get(name, sha256(content)):
            raise WorkdirError(f"{path} is not as the run wrote it. {AGAIN}")
        return content

    def read_json(self, name: str) -> Any:
        content = self.read(name)
        with self.reading(name):
            return json.loads(content)

    def read_jsonl(self, name: str) -> list[dict[str, Any]]:
        # Of bytes: those of a str end at U+2028 and U+0085 too, which JSON may hold as they are.
        lines = self.read(name).splitlines()
        with self.reading(name):
            return [json.loads(line) for line in lines]

    def read_tensors(self, name: str) -> dict[str, np.ndarray]:
        from safetensors import SafetensorError
        from safetensors.numpy import load

        content = self.read(name)
        with self.reading(name, SafetensorError):
            return load(content)

    @contextlib.contextmanager
    def reading(self, name: str, *errors: type[Exception]) -> Iterator[None]:
        """For code that takes a file for what a run writes: where it is not, a WorkdirError."""
        try:
            yield
        except WorkdirError:
            raise
        except (*MISREAD, *errors) as error:
            why = f"{type(error).__name__}: {error}"[:300]
            raise WorkdirError(
                f"{self.root / name} does not hold what a run writes ({why}). {AGAIN}"
            ) from error

    def _expected(self) -> dict[str, str]:
        """File -> hash, of those that are listed, and of what was written since."""
        stages = self.manifest["stages"].values()
        return {k: v for stage in stages for k, v in stage["files"].items()} | self._written

    @contextlib.contextmanager
    def _said_well(self, path: epath.Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise WorkdirError(
                f"Could not write {path} ({error.strerror or error}). What was complete is kept: "
                "make room or choose another --workdir, and run the same command again."
            ) from error

    def inside(self, name: str) -> epath.Path:
        """The place of a file; WorkdirError where it is not in this folder."""
        path = self.root / name
        if not manifest.is_inside(name):
            raise WorkdirError(f"{name[:300]!r} would lie outside the workdir.")
        if is_local(path):
            place = os.path.realpath(path)
            if os.path.commonpath([place, root := os.path.realpath(self.root)]) != root:
                raise WorkdirError(
                    f"{path} is a link that leads outside the workdir, to {place}. Nothing is "
                    "read or written there: remove the link, or choose another --workdir."
                )
        return path

    def _match(self, there: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Raises WorkdirError where a manifest is of a run of another kind."""
        stored = there["identity"]
        differ = [
            f"{k}: there {stored.get(k)!r:.200}, now {now[k]!r:.200}"
            for k in sorted(now)
            if k in stored
            and stored[k] != now[k]
            and self._used(k, there["stages"])
            and k not in self.remade
        ]
        if differ:
            raise WorkdirError(
                f"{self.root} holds a run of another kind ({'; '.join(differ)}). "
                "Choose another --workdir, or use the settings that are there."
            )

    def _take_off_what_changed(self, there: Mapping[str, Any]) -> None:
        """Takes the stages off the list that are made again for what is changed now."""
        for field, stages in self.remade.items():
            if field in self.identity and there["identity"].get(field) != self.identity[field]:
                for stage in stages:
                    there["stages"].pop(stage, None)

    def _used(self, field: str, stages: Collection[str]) -> bool:
        """Whether a complete stage depends on an identity field."""
        return self.first_use[field] in stages if field in self.first_use else bool(stages)


def _passing(name: str) -> bool:
    """Whether a file of this name says nothing of a folder: a lock, or one that was not ready."""
    return name == lock.LOCK or is_unfinished(name)


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
