"""What the entry points share: progress bars, log lines, and errors as one message."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from absl import app, flags, logging

from launch import signals


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

    stopped: what to say after Ctrl-C and other signals that end it. The exit code is theirs then
    (130, 143, 129), 2 after an error of the project, 1 after one that nobody expected.
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

    interruption = signals.Interruption()
    try:
        app.run(guarded, argv=arguments, flags_parser=parsed)
    except SystemExit:  # done, or the flags were wrong: nothing is at work
        interruption.close()
        raise
    except BaseException as error:
        interruption.close()
        code = 2
        with contextlib.suppress(OSError):  # of a terminal that is gone
            if interruption.numbers or isinstance(error, KeyboardInterrupt):
                code = interruption.code
                by = "" if code == 130 else f" by {interruption.name}"
                print(f"\nInterrupted{by}. {stopped}".rstrip(), file=sys.stderr)
            elif _says_what_to_do(error):  # a trace would bury it
                print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
            else:
                code = 1
                sys.excepthook(type(error), error, error.__traceback__)
        signals.leave(code)


def _says_what_to_do(error: BaseException) -> bool:
    """Whether it is an error of the project, or of the flags."""
    own = type(error).__module__.startswith("jax_refusal")
    return isinstance(error, flags.Error) or (own and isinstance(error, ValueError))


def settings(config_flag: flags.FlagHolder, schema: type | None = None) -> Any:
    """The config of a --config flag, with its overrides; a RunConfig where no schema is given."""
    from jax_refusal import config

    config.check_kind(config_flag.value, schema or config.RunConfig)
    return config.empty_optional(config_flag.value, sys.argv)
