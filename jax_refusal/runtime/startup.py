"""What a process does once: keep compiled programs between runs."""

import jax

from jax_refusal.data.prompts import cache_directory


def keep_compiled_programs() -> None:
    """Turns on JAX's persistent compilation cache, in the user's cache directory, unless set."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
