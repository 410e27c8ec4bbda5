"""Selecting one direction among all (position, layer) candidates (Arditi et al. 2024, appendix C).

Letters: P post-instruction tokens, L layers, D residual width. The paper's three scores of a
candidate: bypass (`refusal_score`: mean refusal score on harmful prompts with the direction
ablated), induce (`steering_score`: the same on harmless prompts with the vector added at its layer)
and KL (`kl_div_score`: how far ablation moves the next-token distribution on harmless prompts). A
candidate passes with KL <= kl_threshold, induce >= induce_threshold and layer <
int(L (1 - prune_layers)); the least bypass wins.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np


class SelectionError(ValueError):
    """No candidate passes; the message says which failed by what, and names the nearest."""


@dataclasses.dataclass
class Candidate:
    """One (position, layer) and its scores in nats; a score is None where it was not needed."""

    position: int  # negative, -1 is the last prompt token
    layer: int
    refusal_score: float | None = None  # bypass
    steering_score: float | None = None  # induce
    kl_div_score: float | None = None
    kl_at_least: float | None = None  # what a few prompts show of KL
    kept: bool = False
    reason: str = ""  # why it is not kept


@dataclasses.dataclass(frozen=True)
class Rule:
    """The paper's thresholds."""

    layers: int  # L
    kl_threshold: float = 0.1
    induce_threshold: float = 0.0
    prune_layers: float = 0.2

    @property
    def end(self) -> int:
        """The first layer that is pruned."""
        return int(self.layers * (1.0 - self.prune_layers))

    def reason(self, c: Candidate) -> str:
        """Why a candidate is discarded, from the scores it has so far; empty if nothing speaks
        against it."""
        scores = (c.refusal_score, c.steering_score, c.kl_div_score, c.kl_at_least)
        if c.reason == ZERO:
            return ZERO
        if any(s is not None and not math.isfinite(s) for s in scores):
            return "a score is not finite"
        if c.layer >= self.end:
            return f"layer {c.layer} >= {self.end} (pruned)"
        if c.steering_score is not None and c.steering_score < self.induce_threshold:
            return f"induce {c.steering_score:.3f} < {self.induce_threshold:g}"
        if c.kl_div_score is not None and c.kl_div_score > self.kl_threshold:
            return f"KL {c.kl_div_score:.3f} > {self.kl_threshold:g}"
        if c.kl_div_score is None and (c.kl_at_least or 0.0) > self.kl_threshold:
            return f"KL at least {c.kl_at_least:.3f} > {self.kl_threshold:g}"
        return ""

    def shortfall(self, c: Candidate) -> float:
        """By how many nats the worse of the two thresholds is missed, or at least so far as the
        scores are known; infinite if not eligible."""
        if c.layer >= self.end or c.reason == ZERO:
            return math.inf
        if c.refusal_score is not None and not math.isfinite(c.refusal_score):
            return math.inf
        kl = c.kl_at_least if c.kl_div_score is None else c.kl_div_score
        gaps = [] if kl is None else [kl - self.kl_threshold]
        if c.steering_score is not None:
            gaps.append(self.induce_threshold - c.steering_score)
        return max(gaps, default=-math.inf) if all(map(math.isfinite, gaps)) else math.inf


ZERO = "zero difference of means"
AT_ONCE = 16  # candidates scored together in the search for the nearest


@dataclasses.dataclass(frozen=True)
class Selection:
    """The chosen direction, and how every candidate did."""

    position: int
    layer: int
    direction: np.ndarray  # [D] the difference of means, not normalised
    table: list[Candidate]  # position-major, P * L
    fallback: bool = False  # whether no candidate passed and the nearest was taken

    @property
    def chosen(self) -> Candidate:
        return find(self.table, self.position, self.layer)


class Scorer(Protocol):
    """Scores candidates, given as (position index 0..P-1, layer) pairs: a float for each."""

    def induce(self, candidates: Sequence[tuple[int, int]]) -> list[float]: ...
    def kl_at_least(self, candidates: Sequence[tuple[int, int]]) -> list[float]:
        """Lower bounds of KL that cost little."""
        ...

    def kl(self, candidates: Sequence[tuple[int, int]]) -> list[float]: ...
    def bypass(self, candidates: Sequence[tuple[int, int]]) -> list[float]: ...


def select(
    directions: np.ndarray,  # [P, L, D] differences of means
    scorer: Scorer,
    rule: Rule,
    *,
    full_grid: bool = False,
    fallback: str = "error",
    log: Callable[[str], None] = lambda message: None,
) -> Selection:
    """Picks the paper's candidate, scoring in order of cost and only what is still in question.

    A candidate that fails a threshold cannot win, so its later scores are not computed. First
    comes what a few prompts show: that the KL of many is too high. The winner is that of the
    full grid, and so is the nearest where none passes: fallback="least_bad" takes that one, the
    candidate that misses the thresholds by the least; "error" raises SelectionError.
    """
    P, L, _ = directions.shape
    table = [Candidate(p - P, layer) for p in range(P) for layer in range(L)]
    norms = np.linalg.norm(directions, axis=-1)
    for c in table:
        norm = norms[c.position + P, c.layer]
        if norm == 0 or not np.isfinite(norm):
            c.reason = ZERO

    def fill(score: str, measure: Callable, candidates: list[Candidate]) -> None:
        todo = [c for c in candidates if getattr(c, score) is None and c.reason != ZERO]
        if todo:
            log(f"{score}: {len(todo)} of {len(table)} candidates")
            values = measure([(c.position + P, c.layer) for c in todo])
            for c, value in zip(todo, values, strict=True):
                setattr(c, score, float(value))

    def open_() -> list[Candidate]:
        return table if full_grid else [c for c in table if not rule.reason(c)]

    eligible = [c for c in table if full_grid or c.layer < rule.end]
    if not full_grid:
        fill("kl_at_least", scorer.kl_at_least, open_())
    fill("steering_score", scorer.induce, open_())
    fill("kl_div_score", scorer.kl, open_())
    fill("refusal_score", scorer.bypass, open_())
    for c in table:
        c.reason = rule.reason(c)
        c.kept = not c.reason
    kept = [c for c in table if c.kept]
    if kept:
        return _selection(min(kept, key=_bypass), table, directions)

    while True:
        # What is known bounds every shortfall from below: the nearest is the one whose bound, once
        # it is scored in full, is still the least.
        order = sorted(eligible, key=rule.shortfall)
        nearest = order[0] if order else table[0]
        if rule.shortfall(nearest) < math.inf and not known(nearest):
            some = [c for c in order[:AT_ONCE] if rule.shortfall(c) < math.inf]
            fill("kl_div_score", scorer.kl, some)
            fill("steering_score", scorer.induce, some)
            continue
        if fallback != "least_bad" or math.isinf(rule.shortfall(nearest)):
            raise SelectionError(_diagnosis(table, nearest, rule))
        fill("refusal_score", scorer.bypass, [nearest])
        if not math.isinf(rule.shortfall(nearest)):
            return _selection(nearest, table, directions, fallback=True)


def known(c: Candidate) -> bool:
    """Whether both scores that have thresholds were measured."""
    return c.kl_div_score is not None and c.steering_score is not None


def choose(table: Sequence[Candidate], rule: Rule) -> Candidate | None:
    """The paper's rule on a table that is scored in full; None where nothing passes."""
    kept = [c for c in table if not rule.reason(c)]
    return min(kept, key=_bypass) if kept else None


def find(table: Sequence[Candidate], position: int, layer: int) -> Candidate:
    return next(c for c in table if (c.position, c.layer) == (position, layer))


def _bypass(c: Candidate) -> float:
    assert c.refusal_score is not None
    return c.refusal_score


def _selection(
    c: Candidate, table: list[Candidate], directions: np.ndarray, fallback: bool = False
) -> Selection:
    direction = directions[c.position, c.layer].astype(np.float32)
    return Selection(c.position, c.layer, direction, table, fallback)


def _diagnosis(table: list[Candidate], nearest: Candidate, rule: Rule) -> str:
    def count(word: str) -> int:
        return sum(c.reason.startswith(word) for c in table)

    text = (
        f"None of {len(table)} candidates passes: {count('induce')} have induce < "
        f"{rule.induce_threshold:g}, {count('KL')} have KL > {rule.kl_threshold:g}, "
        f"{count('layer')} lie in the pruned layers (>= {rule.end}), {count(ZERO)} have a zero "
        f"difference of means, {count('a score')} a score that is not finite. "
    )
    if math.isfinite(rule.shortfall(nearest)):
        text += (
            f"The nearest is position {nearest.position}, layer {nearest.layer}: induce "
            f"{nearest.steering_score:.3f}, KL {nearest.kl_div_score:.3f}, short by "
            f"{rule.shortfall(nearest):.3f} nats. "
        )
    return text + (
        'Set selection.fallback="least_bad" to take it, move selection.kl_threshold or '
        "selection.induce_threshold, or check that the model refuses (completions, refusal tokens)."
    )
