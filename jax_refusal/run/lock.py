"""One run at a time in a workdir.

On a disk the system keeps the lock (flock) and drops it with its process, however that ends.

On a bucket, and on a disk that has no flock, it is a lease: an object that its holder writes anew
every BEAT seconds, and that is anybody's once it is LAPSE seconds old. It promises that a run which
is started while another works is refused, where the clocks of their hosts differ by less than a
minute. Of two that are started within one moment both may begin; all but one find out SETTLE
seconds later, or at the next BEAT, and stop before they write again.
"""

import contextlib
import errno
import json
import os
import secrets
import shlex
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from jax_refusal.files import atomic_write, is_local
from jax_refusal.run.manifest import WorkdirError

try:
    import fcntl
except ImportError:  # a system without it has the lease
    fcntl = None

LOCK = ".lock"
BEAT, LAPSE, SETTLE = 20.0, 120.0, 2.0  # seconds
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # of file systems without flock
MOST = 4096  # bytes that say who holds a lock


@contextlib.contextmanager
def held(folder: epath.Path) -> Iterator[Callable[[], None]]:
    """Holds the lock of a folder, which has to exist.

    Yields a function that raises WorkdirError where the lock was lost since. Raises WorkdirError
    naming who holds it, and OSError where nothing can be written there.
    """
    path = folder / LOCK
    descriptor = _flock(path) if fcntl and is_local(path) else None
    if descriptor is None:
        with _lease(path) as check:
            yield check
        return
    try:
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, _about(), 0)
        yield lambda: None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)  # while it is held: who has opened it by now looks whether it is there
        os.close(descriptor)


def _flock(path: epath.Path) -> int | None:
    """The descriptor of the locked file; None where the file system has no locks."""
    assert fcntl is not None
    while True:
        # A link that was planted is refused, be it a symbolic one or a second name.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.fstat(descriptor)
            if os.path.samestat(ours, os.stat(path)):
                if not stat.S_ISREG(ours.st_mode) or ours.st_nlink != 1:
                    raise OSError(errno.EEXIST, "it is a link or no file", os.fspath(path))
                return descriptor
        except FileNotFoundError:
            pass  # whoever held it was just done: once more
        except BlockingIOError:
            there = _parsed(os.pread(descriptor, MOST, 0))
            os.close(descriptor)
            raise _in_use(path, there) from None
        except OSError as error:
            os.close(descriptor)
            if error.errno in NO_LOCKS:
                return None
            raise
        os.close(descriptor)


class _Lease:
    """An object that says who works here, and that they still do."""

    def __init__(self, path: epath.Path):
        self.path, self.token = path, secrets.token_hex(8)
        self.renewed, self.lost, self.over = 0.0, False, threading.Event()

    def renew(self) -> None:
        now = time.time()
        atomic_write(self.path, _about(token=self.token, time=now))
        self.renewed = now

    def keep(self) -> None:
        """Renews it, unless somebody else has it by now."""
        if not self.lost and _there(self.path).get("token") == self.token:
            self.renew()
        else:
            self.lost = True

    def check(self) -> None:
        if time.time() - self.renewed > LAPSE / 2:  # this machine slept, or the net was away
            self.keep()
        if self.lost:
            raise _in_use(self.path, _there(self.path))

    def beat(self) -> None:
        while not self.over.wait(BEAT):
            with contextlib.suppress(Exception):  # of the net; `check` sees when it lasts
                self.keep()


@contextlib.contextmanager
def _lease(path: epath.Path) -> Iterator[Callable[[], None]]:
    there = _there(path)
    if there and time.time() - there["time"] < LAPSE:
        raise _in_use(path, there)
    lease = _Lease(path)
    lease.renew()
    time.sleep(SETTLE)  # whoever saw the old one as we did has written by now
    lease.keep()
    lease.check()
    beats = threading.Thread(target=lease.beat, daemon=True)
    beats.start()
    try:
        yield lease.check
    finally:
        lease.over.set()
        beats.join(BEAT)
        with contextlib.suppress(Exception):  # of the net: it lapses
            if _there(path).get("token") == lease.token:
                path.unlink(missing_ok=True)


def _about(**more: Any) -> bytes:
    """Who holds it."""
    return json.dumps(
        {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "command": shlex.join(sys.orig_argv)[:1000],
        }
        | more
    ).encode()


def _there(path: epath.Path) -> dict[str, Any]:
    """What a lease says; empty where there is none. One that nobody can read has lapsed."""
    try:
        return {"time": 0.0} | _parsed(path.read_bytes()[:MOST])
    except FileNotFoundError:
        return {}


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        there = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(there, dict) or not isinstance(there.get("time", 0.0), int | float):
        return {}
    return there


def _in_use(path: epath.Path, there: dict[str, Any]) -> WorkdirError:
    def said(name: str) -> str:
        return "".join(c if c.isprintable() else "?" for c in str(there.get(name, "?"))[:300])

    who = "another run"
    if "pid" in there:
        who += f": process {said('pid')} on {said('host')} since {said('since')}, {said('command')}"
    gone = f" A run that was killed gives it back {LAPSE:.0f} s later." * ("time" in there)
    return WorkdirError(
        f"{path.parent} is in use by {who}. Wait for its end, stop it, or choose another "
        f"--workdir.{gone}"
    )
