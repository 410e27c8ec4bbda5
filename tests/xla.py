"""How tests have XLA compile: it aborts on a flag that it does not know, and newer jax knows fewer."""

import jax

_HAS_OLD_EMITTERS = jax.__version_info__ < (0, 11)  # later ones have the fusion emitters only

# Tiny models compile for longer than they run: carelessly takes a quarter of the time.
CARELESS = ["--xla_backend_optimization_level=0"]
# What a single program is compiled with where it must be as a run's.
FULLY_OPTIMISED: dict[str, bool | int] = {"xla_backend_optimization_level": 3}

if _HAS_OLD_EMITTERS:
    CARELESS.append("--xla_cpu_use_fusion_emitters=false")
    FULLY_OPTIMISED["xla_cpu_use_fusion_emitters"] = True
