"""The paper's choice among candidates: on the published tables, and on random ones."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from jax_refusal.study.selection import Candidate, Rule, SelectionError, choose, find, select
from tests import shared

Cells = Sequence[tuple[int, int]]


class Tables:
    """A scorer that reads tables [P, L] and remembers what it was asked."""

    def __init__(self, bypass: np.ndarray, induce: np.ndarray, kl: np.ndarray):
        self.tables = {"bypass": bypass, "induce": induce, "kl": kl}
        names = (*self.tables, "kl_at_least")
        self.asked: dict[str, list[tuple[int, int]]] = {name: [] for name in names}

    def read(self, name: str, cells: Cells) -> list[float]:
        self.asked[name] += cells
        return [float(self.tables[name][cell]) for cell in cells]

    def bypass(self, cells: Cells) -> list[float]:
        return self.read("bypass", cells)

    def induce(self, cells: Cells) -> list[float]:
        return self.read("induce", cells)

    def kl_at_least(self, cells: Cells) -> list[float]:
        self.asked["kl_at_least"] += cells
        return [float(self.tables["kl"][cell]) / 2 for cell in cells]

    def kl(self, cells: Cells) -> list[float]:
        return self.read("kl", cells)


def scorer(bypass, induce, kl) -> Tables:
    return Tables(*(np.array(table, np.float64) for table in (bypass, induce, kl)))


def directions(P: int, L: int) -> np.ndarray:
    """[P, L, 2], every cell another vector."""
    return np.arange(1.0, 2 * P * L + 1).reshape(P, L, 2)


@pytest.mark.parametrize("run", shared.RUNS)
def test_published_runs(run):
    rows = shared.published(run, "select_direction/direction_evaluations")
    metadata = shared.published(run, "direction_metadata")
    passing = shared.published(run, "select_direction/direction_evaluations_filtered")
    P, L = -min(row["position"] for row in rows), 1 + max(row["layer"] for row in rows)
    assert len(rows) == P * L
    rule, table = Rule(L), [Candidate(**row) for row in rows]

    # The rule on the whole table: their winner, and the same cells that pass.
    chosen = choose(table, rule)
    assert chosen is not None
    assert (chosen.position, chosen.layer) == (metadata["pos"], metadata["layer"])
    kept = {(c.position, c.layer) for c in table if not rule.reason(c)}
    assert kept == {(row["position"], row["layer"]) for row in passing}

    # The lazy sweep over the same figures: the same winner, for fewer scores.
    grids = {name: np.zeros((P, L)) for name in ("refusal_score", "steering_score", "kl_div_score")}
    for row in rows:
        for name, grid in grids.items():
            grid[row["position"], row["layer"]] = row[name]
    lazy = Tables(*grids.values())
    found = select(directions(P, L), lazy, rule)
    assert (found.position, found.layer) == (metadata["pos"], metadata["layer"])
    assert {(c.position, c.layer) for c in found.table if c.kept} == kept
    assert sorted(lazy.asked["bypass"]) == sorted((p + P, layer) for p, layer in kept)
    assert len(lazy.asked["kl_at_least"]) == P * rule.end
    assert len(kept) <= len(lazy.asked["kl"]) < len(lazy.asked["induce"]) <= P * rule.end


def test_least_bypass_wins_and_its_own_vector_is_returned():
    scores = scorer([[1, -3, -2, 0]], [[1, 1, 1, 1]], [[0, 0, 0, 0]])
    found = select(directions(1, 4), scores, Rule(4))
    assert (found.position, found.layer, found.fallback) == (-1, 1, False)
    np.testing.assert_array_equal(found.direction, [3.0, 4.0])
    assert found.direction.dtype == np.float32
    assert found.chosen.refusal_score == -3 and found.chosen.kept


def test_thresholds_are_inclusive():
    scores = scorer([[-1, -2, -3]], [[0.0, 0.0, -1e-9]], [[0.1, 0.1 + 1e-9, 0.0]])
    found = select(directions(1, 3), scores, Rule(3, prune_layers=0.0))
    assert found.layer == 0
    assert found.table[1].reason.startswith("KL") and found.table[2].reason.startswith("induce")


def test_prune_boundary_is_the_papers():
    assert [Rule(L).end for L in range(1, 130)] == [int(L * 0.8) for L in range(1, 130)]
    assert (Rule(18).end, Rule(32).end, Rule(80).end) == (14, 25, 64)


def test_pruned_layers_are_not_even_scored():
    scores = scorer(np.full((2, 10), -1.0), np.ones((2, 10)), np.zeros((2, 10)))
    scores.tables["bypass"][:, 8:] = -9
    found = select(directions(2, 10), scores, Rule(10))
    assert found.layer < 8
    assert all(layer < 8 for cells in scores.asked.values() for _, layer in cells)
    assert find(found.table, -1, 8).reason == "layer 8 >= 8 (pruned)"


@pytest.mark.parametrize("full_grid", [False, True])
def test_ties_go_to_the_first_position_then_the_first_layer(full_grid):
    scores = scorer([[0, -1, -1], [-1, 0, 0]], np.ones((2, 3)), np.zeros((2, 3)))
    rule = Rule(3, prune_layers=0.0)
    found = select(directions(2, 3), scores, rule, full_grid=full_grid)
    assert (found.position, found.layer) == (-2, 1)


@pytest.mark.parametrize("table", ["bypass", "induce", "kl"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("full_grid", [False, True])
def test_a_score_that_is_not_finite_cannot_win(table, value, full_grid):
    scores = scorer([[-5, -1]], [[1, 1]], [[0, 0]])
    scores.tables[table][0, 0] = value
    rule = Rule(2, prune_layers=0.0)
    found = select(directions(1, 2), scores, rule, full_grid=full_grid)
    assert found.layer == 1
    assert found.table[0].reason == "a score is not finite" and not found.table[0].kept


@pytest.mark.parametrize("vector", [[0, 0], [math.nan, 1], [math.inf, 1]])
def test_a_direction_without_a_length_is_never_scored(vector):
    candidates = directions(1, 2)
    candidates[0, 0] = vector
    scores = scorer([[-5, -1]], [[1, 1]], [[0, 0]])
    found = select(candidates, scores, Rule(2, prune_layers=0.0), full_grid=True)
    assert found.layer == 1
    assert all((0, 0) not in cells for cells in scores.asked.values())
    assert found.table[0].reason == "zero difference of means"


def test_nothing_passes_and_the_error_counts_and_names_the_nearest():
    scores = scorer(np.zeros((1, 5)), [[-2, 1, -1, 1, 1]], [[0.0, 0.4, 0.0, math.nan, 0]])
    with pytest.raises(SelectionError) as error:
        select(directions(1, 5), scores, Rule(5))
    text = str(error.value)
    for words in (
        "None of 5 candidates passes: 2 have induce < 0, 1 have KL > 0.1",
        "1 lie in the pruned layers (>= 4), 0 have a zero difference of means, 1 a score that is",
        "nearest is position -1, layer 1: induce 1.000, KL 0.400, short by 0.300 nats",
        'selection.fallback="least_bad"',
    ):
        assert words in text


def test_least_bad_takes_the_one_that_misses_by_the_least():
    scores = scorer([[-1, -9, -3]], [[-2, 1, -0.2]], [[0.0, 0.4, 0.2]])
    rule = Rule(3, prune_layers=0.0)
    found = select(directions(1, 3), scores, rule, fallback="least_bad")
    assert (found.layer, found.fallback) == (2, True)
    assert found.chosen.refusal_score == -3 and not found.chosen.kept
    assert scores.asked["bypass"] == [(0, 2)]


def test_least_bad_needs_finite_scores():
    scores = scorer([[math.nan, -9]], [[1, -2]], [[0.0, 0.0]])
    rule = Rule(2, prune_layers=0.0)
    found = select(directions(1, 2), scores, rule, fallback="least_bad")
    assert found.layer == 1
    scores.tables["bypass"][0, 1] = math.nan
    with pytest.raises(SelectionError):
        select(directions(1, 2), scores, rule, fallback="least_bad")


def test_all_layers_pruned_is_a_selection_error():
    scores = scorer([[0]], [[1]], [[0]])
    with pytest.raises(SelectionError, match=r"1 lie in the pruned layers \(>= 0\)"):
        select(directions(1, 1), scores, Rule(1), fallback="least_bad")


def brute_force(candidates: np.ndarray, scores: Tables, rule: Rule) -> tuple[int, int] | None:
    """The winner by the definition, or the nearest; (position, layer)."""
    P, L, _ = candidates.shape
    passing, missing = [], []
    for p in range(P):
        for layer in range(int(L * (1 - rule.prune_layers))):
            bypass, induce, kl = (float(t[p, layer]) for t in scores.tables.values())
            norm = float(np.linalg.norm(candidates[p, layer]))
            if not norm or not all(map(math.isfinite, (norm, bypass, induce, kl))):
                continue
            gap = max(kl - rule.kl_threshold, rule.induce_threshold - induce)
            if kl <= rule.kl_threshold and induce >= rule.induce_threshold:
                passing.append((bypass, p - P, layer))
            missing.append((gap, p - P, layer))
    best = min(passing or missing, default=None)
    return best and best[1:]


def test_lazy_and_full_grid_and_brute_force_agree():
    """On coarse random tables: ties, NaN, infinities, zero directions, nothing passing."""
    outcomes = [winners(seed) for seed in range(300)]
    wrong = {seed: found for seed, found in enumerate(outcomes) if len(set(found)) > 1}
    assert not wrong
    assert any(found[0] is None for found in outcomes)  # the tables are varied enough


def winners(seed: int) -> list[tuple[int, int] | None]:
    """By definition, by the lazy sweep, by the full grid."""
    random = np.random.default_rng(seed)
    P, L = random.integers(1, 5), random.integers(1, 9)
    rule = Rule(int(L), float(random.choice([0.0, 0.25, 1.0])), 0.5, 0.2)
    tables = [random.integers(-4, 5, (P, L)) / 2 for _ in range(2)]
    tables.append(random.integers(0, 8, (P, L)) / 8 + random.choice([0, 1]))
    for table in tables:
        table[random.random((P, L)) < 0.1] = random.choice([math.nan, math.inf, -math.inf])
    candidates = directions(P, L)
    candidates[random.random((P, L)) < 0.1] = 0
    answers = [brute_force(candidates, Tables(*tables), rule)]
    for full_grid in (False, True):
        try:
            options = {"full_grid": full_grid, "fallback": "least_bad"}
            found = select(candidates, Tables(*tables), rule, **options)
            answers.append((found.position, found.layer))
        except SelectionError:
            answers.append(None)
    return answers
