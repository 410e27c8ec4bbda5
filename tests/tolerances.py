"""Every tolerance of the tests, written once and never relaxed: a test that misses one found a bug.

Unless a line says otherwise, a tolerance is a share of the largest value that is expected.
"""

from typing import Any

import numpy as np

PARITY = 1e-5  # float32 logits and module outputs against Hugging Face's
BFLOAT16 = 5e-2  # root mean square: bfloat16 logits against Hugging Face's, steps of 2^-8 added up
BFLOAT16_LOSS = 1.25  # a ratio: what bfloat16 costs here over what it costs in Hugging Face
SMOLLM2 = 5e-3  # absolute: float32 logits of the real SmolLM2 against Hugging Face's
INVARIANCE = 1e-5  # float32 results by another route: cache, packing, padding, batch size, mesh
MEANS = 1e-5  # means of activations against the oracle's
SCORES = 1e-4  # absolute, nats: bypass, induce and KL against the oracle's
ROUNDING = 1e-6  # float32 arithmetic in which only a few operations round
GRADIENT = 1e-2  # a derivative against a central difference in float32


def largest(x: Any) -> float:
    return float(np.max(np.abs(np.asarray(x, np.float64))))


def assert_close(actual: Any, expected: Any, tolerance: float, name: str = "") -> None:
    """max |actual - expected| <= tolerance * max |expected|, and the shapes are the same."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{name}: {actual.shape} is not {expected.shape}"
    error, scale = largest(actual - expected), largest(expected)
    assert error <= tolerance * scale, f"{name}: off by {error:.3g} where the scale is {scale:.3g}"
