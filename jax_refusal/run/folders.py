"""A folder that is there whole or not at all."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from jax_refusal.checkpoints.export import ExportError


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its name at the end, on disk by then, or is gone.

    It is made exclusively: a link or a file in its place is refused. What a killed process left
    there is removed; a living one holds a lock on its own. Raises ExportError.
    """
    out = out.absolute()
    unfinished = out.parent / f".{out.name}.tmp"
    made, lock = False, None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftover(unfinished, out)
        unfinished.mkdir()
        made, lock = True, _lock(unfinished)
        if lock is None:
            raise _busy(out)
        yield unfinished
        _flush(unfinished)
        os.replace(unfinished, out)  # an empty folder of that name may be there
        made = False
        _sync(out.parent)
    except OSError as error:
        raise ExportError(
            f"{out} could not be written ({error.strerror or error}); nothing was left behind."
        ) from error
    finally:
        if made:
            shutil.rmtree(unfinished, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """A lock on a folder, for as long as this process lives; None where another holds it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # a file system without locks
        pass
    return descriptor


def _remove_leftover(unfinished: Path, out: Path) -> None:
    """Removes the folder of a process that was killed; ExportError where it is something else."""
    if not os.path.lexists(unfinished):
        return
    if unfinished.is_symlink() or not unfinished.is_dir():
        raise ExportError(
            f"{unfinished} is where {out.name} is made, and it is there already as a link or a "
            "file. Look where it is from, and remove it; or give another --out."
        )
    lock = _lock(unfinished)
    if lock is None:
        raise _busy(out)
    shutil.rmtree(unfinished)
    os.close(lock)


def _busy(out: Path) -> ExportError:
    return ExportError(f"Another process is writing {out}. Wait for it, or give another --out.")


def _flush(folder: Path) -> None:
    """To the disk: all that is in a folder, then the folder itself."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    # Of a folder that is more than some file systems do, and than its permissions may allow.
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
