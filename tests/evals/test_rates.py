"""Rates and their intervals, by hand."""

import math

import pytest

from jax_refusal.evals.rates import by_category, rate

Z = 1.959963984540054  # 97.5% of the normal distribution


def wilson(k: int, n: int) -> tuple[float, float]:
    centre = (k + Z**2 / 2) / (n + Z**2)
    half = Z / (n + Z**2) * math.sqrt(k * (n - k) / n + Z**2 / 4)
    return centre - half, centre + half


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        (0, 4, 0.0, 0.4899),  # z^2 / (n + z^2)
        (1, 1, 0.2065, 1.0),
        (5, 10, 0.2366, 0.7634),
        (93, 100, 0.8625, 0.9657),
    ],
)
def test_wilson_interval(k, n, low, high):
    result = rate([True] * k + [False] * (n - k))
    assert (result.count, result.n, result.rate) == (k, n, k / n)
    assert (result.low, result.high) == pytest.approx((low, high), abs=6e-5)
    assert (result.low, result.high) == pytest.approx(wilson(k, n), abs=1e-9)


def test_a_rate_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no outcomes"):
        rate([])


def test_rates_by_category():
    rows = [("b", True), ("a", False), ("b", False), ("", True)]
    assert {name: (r.count, r.n) for name, r in by_category(rows).items()} == {
        "": (1, 1),
        "a": (0, 1),
        "b": (1, 2),
    }
