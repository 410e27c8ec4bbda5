"""Ctrl-C, SIGTERM and SIGHUP: each ends a run in order, by a KeyboardInterrupt where it works."""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from typing import Any, NoReturn

# And what a signal does where nobody has chosen otherwise: nohup and a shell's background ignore
# some, and that stands.
ENDS = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}
SAME = 1.0  # seconds in which several are one request: a terminal that closes sends SIGHUP twice
AGAIN, MOST = 0.05, 1.0  # seconds between two tries to deliver one: at first, and at most


class Interruption:
    """The signals of this process that end it, from now on; each is raised as KeyboardInterrupt.

    Code in C that is interrupted while it calls back may raise an error of its own instead, such
    as a SystemError: an error after a signal is an interruption whatever its type.

    In a finalizer or a callback of the garbage collector, Python drops what is raised. The signal
    is then sent again, until it was raised again: once may not do. Where it comes while the main
    thread waits for the interpreter's lock, it is heard behind the next call, and that may be one
    that blocks; it is one that comes inside such a call that wakes it.
    """

    def __init__(self) -> None:
        self.numbers: list[int] = []  # of the signals, as they came
        self._raised_at: float | None = None  # None while none is on its way up
        self._in_hook = False
        self._main = threading.main_thread().ident or 0
        for number, untouched in ENDS.items():
            if signal.getsignal(number) is untouched:
                signal.signal(number, self._note)
        self._other_hook, sys.unraisablehook = sys.unraisablehook, self._dropped

    def _note(self, number: int, _: object) -> None:
        on_its_way = self._raised_at is not None and time.monotonic() - self._raised_at < SAME
        if on_its_way or self._in_hook:  # what is raised in the hook would be dropped for good
            return
        self.numbers.append(number)
        self._raised_at = time.monotonic()
        raise KeyboardInterrupt

    def _dropped(self, lost: Any) -> None:
        if lost.exc_type is not KeyboardInterrupt or not self.numbers:
            return self._other_hook(lost)
        self._in_hook = True
        try:
            self._raised_at = None
            threading.Thread(target=self._insist, args=self.numbers[-1:], daemon=True).start()
        finally:
            self._in_hook = False

    def _insist(self, number: int) -> None:
        pause = AGAIN
        time.sleep(pause)
        while self._raised_at is None:
            signal.pthread_kill(self._main, number)
            time.sleep(pause)
            pause = min(2 * pause, MOST)

    def close(self) -> None:
        """Whatever comes from now on is ignored: the end has begun."""
        for number in ENDS:
            if signal.getsignal(number) == self._note:
                signal.signal(number, signal.SIG_IGN)
        self._raised_at = time.monotonic()  # nobody insists any more

    @property
    def code(self) -> int:
        """How a process ends, to a shell, that a signal has ended."""
        return 128 + (self.numbers[0] if self.numbers else signal.SIGINT)

    @property
    def name(self) -> str:
        return signal.Signals(self.code - 128).name


def leave(code: int) -> NoReturn:
    """Ends the process at once, when all that was said is out.

    For an end in the middle of work: XLA's own threads go on with what was dispatched, and an
    interpreter that is torn down under them ends in a segmentation fault in place of the code.
    Waiting for them would be no way out: nobody holds the results of what is in flight, and it may
    take minutes. Nothing is lost: every `with` has been left by now, so files are whole and locks
    given back, and what is at work in other threads is for nobody.
    """
    with contextlib.suppress(Exception):  # a terminal that is gone
        logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)
