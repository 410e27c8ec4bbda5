"""How tests have XLA compile. It aborts on a flag that it does not know; newer jax knows fewer."""

import jax

# Tiny models compile for longer than they run: compiled carelessly they take a quarter of the time.
CARELESS = ["--xla_backend_optimization_level=0"]
# For a single program that must be compiled as in a run.
FULLY_OPTIMISED: dict[str, bool | int] = {"xla_backend_optimization_level": 3}

if jax.__version_info__ < (0, 11):  # from 0.11.2 on there are no other emitters
    CARELESS.append("--xla_cpu_use_fusion_emitters=false")
    FULLY_OPTIMISED["xla_cpu_use_fusion_emitters"] = True
