"""Files that are there whole or not at all, and hashes of values."""

import contextlib
import hashlib
import json
from typing import Any

from etils import epath


def atomic_write(path: epath.PathLike, content: bytes) -> None:
    """The whole file or none of it: written under another name, then renamed into place."""
    path = epath.Path(path)
    # One name for all processes: what a killed one left is overwritten by the next.
    unfinished = path.parent / f".{path.name}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(content)
        unfinished.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def content_hash(value: Any) -> str:
    """sha256 of a JSON value."""
    return sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode())
