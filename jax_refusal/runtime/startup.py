"""What a process does for all its work: keep compiled programs, give memory back."""

import ctypes
import functools
import sys

import jax

from jax_refusal.data.prompts import cache_directory


def keep_compiled_programs() -> None:
    """Turns on JAX's persistent compilation cache, in the user's cache directory, unless set."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@functools.cache  # one listener a process
def give_back_after_compiling() -> None:
    """From now on memory goes back after every compilation of a second or more: what it took does
    not add to what the program takes."""

    def compiled(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and duration_secs >= 1:
            _trim()

    jax.monitoring.register_event_duration_secs_listener(compiled)


def end_stage() -> None:
    """Gives back what a stage of a run leaves behind: freed memory, and all compiled programs of
    the process where there is a persistent cache: those that took long come back from it."""
    known = jax.config.values
    if known["jax_enable_compilation_cache"] and known["jax_compilation_cache_dir"] is not None:
        jax.clear_caches()
    _trim()


def _trim() -> None:
    """Hands freed memory back to the system, where the C library is glibc.

    It keeps what compiling and past activations took, more than the weights of a small model, and
    most later arrays do not fit into the gaps.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
