"""What the functions for a notebook refuse before they do anything."""

import math
from typing import Any

import numpy as np
import pytest

import jax_refusal as jr
from jax_refusal.config import ConfigError

NOTHING: Any = None  # a model and a chat that nobody looks at
WRONG = {
    "generate": {
        "max_new_tokens": [0, -1, 1.5, math.nan, 10**400],
        "temperature": [-1, 1e-9, math.nan, math.inf, "hot"],
        "seed": [-1, 2**32, None],
        "batch_size": [0, -3, math.inf],
    },
    "select": {
        "kl_threshold": [-0.1, math.nan, math.inf],
        "induce_threshold": [math.nan, -math.inf, 1e39],
        "prune_layers": [1, -0.1, math.nan],
        "fallback": ["least-bad", None],
        "full_grid": ["no", 1],
        "batch_tokens": [0, math.nan],
    },
    "mean_activations": {"batch_tokens": [0, -1, math.inf]},
    "capture": {"batch_tokens": [0, -1, math.inf]},
}
CASES = [
    (function, name, value)
    for function, options in WRONG.items()
    for name, values in options.items()
    for value in values
]


@pytest.mark.parametrize(("function", "name", "value"), CASES)
def test_a_value_that_is_not_allowed(function: str, name: str, value: Any):
    given: list[Any] = [NOTHING, NOTHING, ["a"]]
    if function == "select":
        given = [NOTHING, NOTHING, np.zeros((1, 1, 1)), ["a"], ["b"]]
    with pytest.raises(ConfigError, match=rf"^This cannot be: {name}=.* \("):
        getattr(jr, function)(*given, **{name: value})
