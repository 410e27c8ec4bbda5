"""Signals end a process in order, with their own exit code, wherever they come."""

import os
import subprocess
import sys
import textwrap

import pytest

from tests.runs import ROOT

ENTRY = """
import gc, os, signal, sys, threading, time
from launch import signals

def send(name):
    os.kill(os.getpid(), getattr(signal, name))

interruption = signals.Interruption()
try:
{body}
except BaseException as error:
    interruption.close()
    print(type(error).__name__, "at the end")  # flushed by leave
    signals.leave(interruption.code)
print("not interrupted")
"""
CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}


def ended(body: str, before: str = "") -> tuple[int, list[str]]:
    """Exit code and output of a process that does this; before: words of the shell around it."""
    entry = ENTRY.format(body=textwrap.indent(textwrap.dedent(body), "    "))
    result = subprocess.run(
        ["sh", "-c", f'{before} exec "$0" -c "$1"', sys.executable, entry],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in result.stderr, result.stderr
    return result.returncode, result.stdout.splitlines()


@pytest.mark.parametrize("name", CODES)
def test_each_ends_the_process_with_its_code(name: str):
    body = f"""
        send({name!r})
        time.sleep(60)
    """
    assert ended(body) == (CODES[name], ["KeyboardInterrupt at the end"])


@pytest.mark.parametrize("name", CODES)
def test_one_that_was_ignored_from_the_start_stays_so(name: str):
    """As nohup and a shell's background jobs have it."""
    assert ended(f"send({name!r})", f"trap '' {name[3:]};") == (0, ["not interrupted"])


def test_the_same_request_once_more_does_not_disturb_the_end():
    """A terminal that closes sends SIGHUP twice; systemd sends SIGTERM and then SIGHUP."""
    body = """
        try:
            send("SIGTERM")
        finally:
            send("SIGHUP")
            send("SIGTERM")
            time.sleep(0.1)
            print("all is written")
    """
    assert ended(body) == (143, ["all is written", "KeyboardInterrupt at the end"])


def test_a_later_one_ends_an_end_that_takes_long():
    body = """
        signals.SAME = 0.1
        try:
            send("SIGINT")
        finally:
            time.sleep(0.2)
            send("SIGINT")
            time.sleep(60)
    """
    assert ended(body) == (130, ["KeyboardInterrupt at the end"])


DROPPED = """
    def callback(phase, info):
        gc.callbacks.remove(callback)
        send("SIGTERM")

    gc.callbacks.append(callback)
    gc.collect()
"""


@pytest.mark.parametrize("seconds", [0.0, 0.02, 0.049, 0.05, 0.051, 0.1])
def test_one_that_was_dropped_comes_again_whatever_the_main_thread_does(seconds: float):
    """It comes while another thread has the interpreter's lock, or a call in C that does not give
    it back; what follows is a call that waits for a long time."""
    held = f"""
    end = time.monotonic() + {seconds}
    while time.monotonic() < end:
        sum(range(300_000))
    sum(range(3_000_000))
    time.sleep(60)
    """
    assert ended(DROPPED + held) == (143, ["KeyboardInterrupt at the end"])


def test_one_that_was_dropped_comes_again_on_a_busy_machine():
    """Many threads that wait for the interpreter's lock, one after the other."""
    busy = """
    def spin():
        while True:
            sum(range(100_000))

    for _ in range(8):
        threading.Thread(target=spin, daemon=True).start()
    """
    assert ended(busy + DROPPED + "    threading.Event().wait(60)\n") == (
        143,
        ["KeyboardInterrupt at the end"],
    )


def test_one_that_is_dropped_twice_comes_a_third_time():
    slow = """
    class Slow:
        def __del__(self):
            time.sleep(0.5)  # in which it comes the second time

    Slow()
    time.sleep(60)
    """
    assert ended(DROPPED + slow) == (143, ["KeyboardInterrupt at the end"])


def test_other_errors_that_nobody_can_raise_are_shown_as_ever():
    body = """
    class Broken:
        def __del__(self):
            raise ValueError("words")

    broken = Broken()
    sys.unraisablehook.__self__._other_hook = lambda lost: print(lost.exc_value)
    del broken
    """
    assert ended(body) == (0, ["words", "not interrupted"])
