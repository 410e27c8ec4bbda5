"""Shares of outcomes, with their intervals."""

import collections
import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Rate:
    """A share of n with its 95% Wilson interval."""

    count: int
    n: int
    rate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.rate:.2f} [{self.low:.2f}, {self.high:.2f}]"


def rate(outcomes: Iterable[bool]) -> Rate:
    from scipy.stats import binomtest

    outcomes = list(outcomes)
    if not outcomes:
        raise ValueError("A rate of no outcomes is not defined.")
    result = binomtest(sum(outcomes), len(outcomes))
    interval = result.proportion_ci(0.95, method="wilson")
    return Rate(sum(outcomes), len(outcomes), result.statistic, interval.low, interval.high)


def by_category(outcomes: Iterable[tuple[str, bool]]) -> dict[str, Rate]:
    """The rate of each category, from (category, outcome) pairs."""
    groups = collections.defaultdict(list)
    for category, outcome in outcomes:
        groups[category].append(outcome)
    return {name: rate(groups[name]) for name in sorted(groups)}
