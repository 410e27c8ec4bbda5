"""Files of a run: written whole or not at all, listed in one manifest with their hashes.

A stage is complete when the manifest lists its files. A run that stops anywhere leaves either the
old file or the new one, and the next run goes on after the last complete stage.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

import jax
import numpy as np
from etils import epath

MANIFEST = "manifest.json"
PACKAGES = ("jax-refusal", "jax", "jaxlib", "flax", "transformers", "tokenizers", "numpy")


class WorkdirError(ValueError):
    """The workdir belongs to another run, or cannot be written."""


class Workdir:
    """The folder of one run; only process 0 writes."""

    def __init__(self, root: str | os.PathLike[str], identity: Mapping[str, Any]):
        """identity: what the results depend on (config fields, hashes), JSON values.

        Raises WorkdirError naming every field in which an existing manifest differs.
        """
        self.root = epath.Path(root)
        self.identity = json.loads(json.dumps(dict(identity)))
        path = self.root / MANIFEST
        if path.exists():
            self.manifest = self._read_manifest(path)
            self._match(self.manifest["identity"])
        else:
            if self.root.exists() and any(self.root.iterdir()):
                raise WorkdirError(
                    f"{self.root} holds files and no {MANIFEST}: it is not the workdir of a run. "
                    "Choose an empty or new folder."
                )
            versions = {name: _version(name) for name in PACKAGES}
            self.manifest = {
                "format": 1,
                "identity": self.identity,
                "versions": versions,
                "stages": {},
            }

    def done(self, stage: str) -> bool:
        """Whether the stage is listed and its files are all there, unchanged."""
        files = self.manifest["stages"].get(stage, {}).get("files")
        if files is None:
            return False
        for name, digest in files.items():
            path = self.root / name
            if not path.exists() or _sha256(path.read_bytes()) != digest:
                return False
        return True

    def finish(self, stage: str, files: Iterable[str], seconds: float) -> None:
        """Lists a stage's files in the manifest: from now on it is complete."""
        hashes = {name: _sha256((self.root / name).read_bytes()) for name in files}
        self.manifest["stages"][stage] = {"files": hashes, "seconds": round(seconds, 2)}
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
        """Writes a file whole: under another name first, then renamed into place."""
        if jax.process_index() != 0:
            return
        path = self._inside(name)
        unfinished = path.parent / f".{path.name}.{os.getpid()}.tmp"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_bytes(content)
            unfinished.replace(path)
        except OSError as error:
            raise WorkdirError(
                f"Could not write {path} ({error.strerror or error}). What was complete is kept: "
                "make room or choose another --workdir, and run the same command again."
            ) from error
        finally:
            if unfinished.exists():
                unfinished.unlink()

    def read_json(self, name: str) -> Any:
        return json.loads(self._inside(name).read_text())

    def read_jsonl(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._inside(name).read_text().splitlines()]

    def read_tensors(self, name: str) -> dict[str, np.ndarray]:
        from safetensors.numpy import load

        return load(self._inside(name).read_bytes())

    def _inside(self, name: str) -> epath.Path:
        if os.path.isabs(name) or ".." in name.split("/"):
            raise WorkdirError(f"{name} would lie outside the workdir.")
        return self.root / name

    def _read_manifest(self, path: epath.Path) -> dict[str, Any]:
        try:
            manifest = json.loads(path.read_text())
            if manifest["format"] == 1:
                return manifest
        except (json.JSONDecodeError, KeyError, TypeError):
            pass
        raise WorkdirError(f"{path} is not a manifest of this program. Choose another --workdir.")

    def _match(self, stored: Mapping[str, Any], now: Mapping[str, Any] | None = None) -> None:
        now = self.identity if now is None else now
        differ = [
            f"{k}: there {stored.get(k)!r}, now {now[k]!r}"
            for k in sorted(now)
            if k in stored and stored[k] != now[k]
        ]
        if differ:
            raise WorkdirError(
                f"{self.root} holds a run of another kind ({'; '.join(differ)}). "
                "Choose another --workdir, or use the settings that are there."
            )


class Timer:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start


def content_hash(value: Any) -> str:
    """sha256 of a JSON value."""
    return _sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
