"""What the entry points share: progress bars, log lines, and errors as one message."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

from absl import app, logging


def progress(items: Iterable[Any], title: str) -> Iterable[Any]:
    """A progress bar on a terminal, nothing elsewhere."""
    from tqdm import tqdm

    return tqdm(items, desc=title, leave=False, disable=not sys.stderr.isatty())


def log(message: str) -> None:
    print(f"[{message}]" if not message.endswith(".") else message, file=sys.stderr, flush=True)


def start(main: Callable[[list[str]], None], arguments: list[str]) -> None:
    """Runs an entry point: checks the overrides, keeps compiled programs, words the errors."""
    from jax_refusal import config

    def guarded(rest: list[str]) -> None:
        from jax_refusal.runtime.startup import keep_compiled_programs

        logging.set_verbosity(logging.WARNING)  # JAX says which backends it did not find
        keep_compiled_programs()
        try:
            main(rest)
        except KeyboardInterrupt:
            print(
                "\nInterrupted. What was complete is kept: the same command goes on from there.",
                file=sys.stderr,
            )
            sys.exit(130)
        except ValueError as error:
            # The project's own errors say what to do; a trace would bury it.
            if not type(error).__module__.startswith("jax_refusal"):
                raise
            print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
            sys.exit(2)

    try:
        config.check_overrides(arguments)
    except config.ConfigError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
    app.run(guarded, argv=arguments)
