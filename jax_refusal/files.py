"""Files that are there whole or not at all, and hashes of values."""

import contextlib
import errno
import hashlib
import json
import os
import secrets
from typing import Any

from etils import epath

UNFINISHED = ".tmp"  # how the names of files end that are being written; they begin with a dot
# Of file systems that cannot flush a folder.
CANNOT = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


def atomic_write(path: epath.PathLike, content: bytes) -> None:
    """The whole file or none of it, should the process or the machine stop: written under another
    name, flushed to the disk, then renamed into place.

    That name is random and must be new: two writers never share a file, and no link that was
    planted is followed. What a killed process leaves is in nobody's way (see `is_unfinished`).
    """
    path = epath.Path(path)
    unfinished = path.parent / f".{path.name}.{secrets.token_hex(4)}{UNFINISHED}"
    try:
        if is_local(path):
            _make_folder(os.fspath(path.parent))
            with open(unfinished, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
            _flush_folder(os.fspath(path.parent))
        else:  # an object of a bucket is there once it is complete, and stays
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_bytes(content)
            unfinished.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def is_unfinished(name: str) -> bool:
    """Whether it is the name of a file that was being written."""
    return name.startswith(".") and name.endswith(UNFINISHED)


def is_local(path: epath.PathLike) -> bool:
    """Whether it lies on this machine's disks, not on a bucket."""
    return "://" not in os.fspath(path)


def read_file(path: epath.PathLike) -> bytes:
    """The content of a file; OSError for a folder, a pipe or a device too."""
    if is_local(path) and os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "it is no file", os.fspath(path))
    return epath.Path(path).read_bytes()


def _make_folder(folder: str) -> None:
    """With those above it; their names are flushed, as a file's is."""
    if os.path.isdir(folder):
        return
    above = os.path.dirname(os.path.abspath(folder))
    _make_folder(above)
    os.makedirs(folder, exist_ok=True)
    _flush_folder(above)


def _flush_folder(folder: str) -> None:
    with contextlib.suppress(PermissionError):  # one that may be written and not read
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in CANNOT:
                raise
        finally:
            os.close(descriptor)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def content_hash(value: Any) -> str:
    """sha256 of a JSON value."""
    return sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode())
