"""What the entry points share: progress bars, log lines, and errors as one message."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from absl import app, flags, logging


def progress(items: Iterable[Any], title: str) -> Iterable[Any]:
    """A progress bar on a terminal, nothing elsewhere."""
    from tqdm import tqdm

    return tqdm(items, desc=title, leave=False, disable=not sys.stderr.isatty())


@contextlib.contextmanager
def bar(title: str) -> Iterator[Callable[[int, int, float], None]]:
    """A progress bar of training steps with the loss: call it with (step, of, loss)."""
    from tqdm import tqdm

    with tqdm(desc=title, disable=not sys.stderr.isatty()) as shown:

        def update(step: int, steps: int, loss: float) -> None:
            shown.total = steps
            shown.set_postfix(loss=f"{loss:.3f}", refresh=False)
            shown.update(step - shown.n)

        yield update


def log(message: str) -> None:
    print(f"[{message}]" if not message.endswith(".") else message, file=sys.stderr, flush=True)


GOES_ON = "What was complete is kept: the same command goes on from there."


def start(
    main: Callable[[list[str]], None],
    arguments: list[str],
    schema: type | None = None,
    stopped: str = "",
) -> None:
    """Runs an entry point: checks the flags, keeps compiled programs, words the errors.

    stopped: what to say after Ctrl-C.
    """

    def parsed(given: list[str]) -> list[str]:
        from jax_refusal import config

        return config.parsed(flags.FLAGS, given, schema or config.RunConfig)

    # transformers would warn that there is no PyTorch; none is needed.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

    def guarded(rest: list[str]) -> None:
        from jax_refusal.runtime import startup

        logging.set_verbosity(logging.WARNING)  # JAX says which backends it did not find
        startup.keep_compiled_programs()
        startup.give_back_after_compiling()
        main(rest)

    interrupted = interrupts()
    try:
        app.run(guarded, argv=arguments, flags_parser=parsed)
    except SystemExit:
        raise
    except BaseException as error:
        if interrupted or isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # one that is raised again comes late
            print(f"\nInterrupted. {stopped}".rstrip(), file=sys.stderr)
            sys.exit(130)
        if not isinstance(error, ValueError | flags.Error):
            raise
        # The project's own errors say what to do; a trace would bury it.
        own = type(error).__module__.startswith("jax_refusal")
        if not own and not isinstance(error, flags.Error):
            raise
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)


def interrupts() -> list[int]:
    """The signals of Ctrl-C from now on, as they come; each is still raised as KeyboardInterrupt.

    Code in C that is interrupted while it calls back may raise an error of its own instead, such
    as a SystemError: an error after Ctrl-C is an interruption whatever its type. In a finalizer
    or a callback of the garbage collector, Python drops what is raised: the signal is sent again
    shortly after.
    """
    come: list[int] = []
    dropped = sys.unraisablehook

    def again(lost: Any) -> None:
        if lost.exc_type is not KeyboardInterrupt:
            return dropped(lost)
        main = threading.main_thread().ident
        later = threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT))
        later.daemon = True
        later.start()

    def note(number: int, _: object) -> None:
        come.append(number)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nohup's choice stands
        signal.signal(signal.SIGINT, note)
        sys.unraisablehook = again
    return come


def settings(config_flag: flags.FlagHolder, schema: type | None = None) -> Any:
    """The config of a --config flag, with its overrides; a RunConfig where no schema is given."""
    from jax_refusal import config

    config.check_kind(config_flag.value, schema or config.RunConfig)
    return config.empty_optional(config_flag.value, sys.argv)
