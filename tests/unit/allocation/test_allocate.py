"""Allocations against enumeration, and the promises about budgets and order."""

from __future__ import annotations

import importlib.util
import itertools
import random
from typing import Any

import pytest

from hfq.allocation import cost, greedy, program
from hfq.errors import ConfigError
from hfq.formats import QuantSpec


def problem(seed: int, names: int = 5, widths: tuple[int, ...] = (2, 3, 4)) -> tuple[dict, dict]:
    draw = random.Random(seed)
    scores, costs = {}, {}
    for i in range(names):
        size, loss = draw.choice([100, 100, 300, 40]), draw.random() * 10
        scores[f"l{i}"] = {b: loss * 4.0**-b * draw.uniform(0.5, 2) for b in widths}
        costs[f"l{i}"] = {b: float(size * b) for b in widths}
    return scores, costs


def best(scores: dict, costs: dict, budget: float) -> float:
    rows = [[(scores[n][b], costs[n][b]) for b in scores[n]] for n in scores]
    return min(sum(s for s, _ in pick) for pick in itertools.product(*rows) if sum(c for _, c in pick) <= budget)


@pytest.mark.parametrize("seed", range(25))
def test_program_is_optimal(seed: int) -> None:
    scores, costs = problem(seed)
    low, high = (sum(f(row.values()) for row in costs.values()) for f in (min, max))
    for share in (0.0, 0.2, 0.5, 0.77, 1.0):
        budget = low + share * (high - low)
        chosen = program.allocate(scores, costs, budget)
        assert cost.total(costs, chosen) <= budget
        assert sum(scores[n][b] for n, b in chosen.items()) == pytest.approx(best(scores, costs, budget), rel=1e-6)


@pytest.mark.parametrize("seed", range(25))
def test_greedy_is_close_and_within_the_budget(seed: int) -> None:
    scores, costs = problem(seed)
    low, high = (sum(f(row.values()) for row in costs.values()) for f in (min, max))
    for share in (0.0, 0.2, 0.5, 0.77, 1.0):
        budget = low + share * (high - low)
        chosen = greedy.allocate(scores, costs, budget)
        loss = sum(scores[n][b] for n, b in chosen.items())
        assert cost.total(costs, chosen) <= budget
        assert best(scores, costs, budget) * (1 - 1e-9) <= loss <= sum(row[2] for row in scores.values()) + 1e-12
        for name, now in chosen.items():  # nothing is left that would still fit and help
            for bits in costs[name]:
                if cost.total(costs, chosen | {name: bits}) <= budget:
                    assert scores[name][bits] >= scores[name][now]


def test_greedy_is_optimal_for_equal_sizes_and_convex_losses() -> None:
    for seed in range(10):
        draw = random.Random(seed)
        sizes = [draw.uniform(0, 10) for _ in range(6)]
        scores = {f"l{i}": {b: size * 4.0**-b for b in (2, 3, 4)} for i, size in enumerate(sizes)}
        costs = {name: {b: 10.0 * b for b in (2, 3, 4)} for name in scores}
        for budget in range(120, 250, 10):
            chosen = greedy.allocate(scores, costs, budget)
            assert sum(scores[n][b] for n, b in chosen.items()) == pytest.approx(best(scores, costs, budget))


@pytest.mark.parametrize("solver", [program.allocate, greedy.allocate])
def test_impossible_tables(solver: Any) -> None:
    scores, costs = problem(0)
    with pytest.raises(ConfigError, match="least possible cost"):
        solver(scores, costs, 1.0)
    with pytest.raises(ConfigError, match="different things"):
        solver(scores, {"l0": costs["l0"]}, 1e9)
    with pytest.raises(ConfigError, match="l0: scores for"):
        solver(scores, costs | {"l0": {2: 1.0}}, 1e9)
    with pytest.raises(ConfigError, match="not a number"):
        solver(scores | {"l0": {2: float("nan"), 3: 0.0, 4: 0.0}}, costs, 1e9)
    assert solver({}, {}, 0.0) == {}


def test_program_with_equal_losses_takes_the_cheaper_width() -> None:
    scores = {"a": {2: 1.0, 4: 1.0}, "b": {2: 1.0, 4: 0.5}}
    costs = {"a": {2: 2.0, 4: 4.0}, "b": {2: 2.0, 4: 4.0}}
    assert program.allocate(scores, costs, 100.0) == greedy.allocate(scores, costs, 100.0) == {"a": 2, "b": 4}


def test_program_is_the_same_in_other_units() -> None:
    scores, costs = problem(3)
    budget = 0.6 * sum(row[4] for row in costs.values())
    expected = program.allocate(scores, costs, budget)
    small = {n: {b: v * 1e-9 for b, v in row.items()} for n, row in scores.items()}
    large = {n: {b: v * 1e9 for b, v in row.items()} for n, row in costs.items()}
    assert program.allocate(small, large, budget * 1e9) == expected


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "scipy" else find(name, *a))
    with pytest.raises(ConfigError, match=r"hfq\[allocation\]"):
        program.allocate(*problem(0), 1e9)


def equal(count: int = 40, widths: tuple[int, ...] = (2, 3, 4, 8)) -> tuple[dict[str, float], dict]:
    draw = random.Random(0)
    importance = {f"h.{i}": draw.random() for i in range(count)}
    return importance, {name: {b: 1000.0 * b for b in widths} for name in importance}


def test_two_levels_of_forty_equal_blocks() -> None:
    importance, costs = equal()
    chosen = greedy.two_level(importance, costs, 4, 2, 3.5 * 40 * 1000)
    assert sum(b == 4 for b in chosen.values()) == 30
    threshold = sorted(importance.values(), reverse=True)[29]
    assert all((importance[name] >= threshold) == (b == 4) for name, b in chosen.items())


def test_two_levels_are_nested_and_never_above_the_target() -> None:
    importance, costs = equal(17)
    importance = {name: round(value, 1) for name, value in importance.items()}  # ties
    for name in list(costs)[::3]:
        costs[name] = {b: 2.5 * c for b, c in costs[name].items()}
    sizes = {name: int(costs[name][2] // 2) for name in costs}
    before: set[str] = set()
    for step in range(101):
        target = 2 + 2 * step / 100
        chosen = greedy.two_level(importance, costs, 4, 2, target * sum(sizes.values()))
        high = {name for name, b in chosen.items() if b == 4}
        assert before <= high
        assert cost.average(sizes, chosen) <= target + 1e-9
        before = high
    assert len(before) == 17
    assert not any(b == 4 for b in greedy.two_level(importance, costs, 4, 2, 2.0 * sum(sizes.values())).values())


def test_ties_go_to_the_smaller_index() -> None:
    importance = dict.fromkeys([f"h.{i}" for i in range(12)], 0.5)
    costs = {name: {2: 2.0, 4: 4.0} for name in importance}
    assert greedy.ranking(importance) == list(importance)
    chosen = greedy.two_level(importance, costs, 4, 2, 30.0)
    assert [b for b in chosen.values()] == [4] * 3 + [2] * 9
    assert list(greedy.lowest(importance, 2, 4, 2).values()) == [4] * 10 + [2] * 2


def test_a_prefix_stops_at_the_first_that_does_not_fit() -> None:
    importance = {"a": 3.0, "b": 2.0, "c": 1.0}
    costs = {"a": {2: 2.0, 4: 4.0}, "b": {2: 200.0, 4: 400.0}, "c": {2: 2.0, 4: 4.0}}
    assert greedy.two_level(importance, costs, 4, 2, 250.0) == {"a": 4, "b": 2, "c": 2}


def test_several_levels_are_monotone() -> None:
    importance, costs = equal(11)
    order = greedy.ranking(importance)
    last = dict.fromkeys(importance, 0)
    for budget in range(22_000, 88_001, 500):
        chosen = greedy.walk(importance, costs, (8, 4, 3, 2), float(budget))
        assert cost.total(costs, chosen) <= budget
        assert [chosen[name] for name in order] == sorted(chosen.values(), reverse=True)
        assert all(chosen[name] >= last[name] for name in chosen)
        last = chosen
    assert set(last.values()) == {8}
    assert greedy.walk(importance, costs, [3], 1.0) == dict.fromkeys(importance, 3)


def test_impossible_walks() -> None:
    importance, costs = equal(4)
    with pytest.raises(ConfigError, match="2 bits everywhere"):
        greedy.two_level(importance, costs, 4, 2, 100.0)
    with pytest.raises(ConfigError, match="larger"):
        greedy.two_level(importance, costs, 2, 4, 1e9)
    with pytest.raises(ConfigError, match="there are 4"):
        greedy.lowest(importance, 5, 4, 2)
    with pytest.raises(ConfigError, match="h.1"):
        greedy.ranking(importance | {"h.1": float("nan")})


@pytest.mark.parametrize(
    "spec", [QuantSpec(4, 64), QuantSpec(3, 24, True), QuantSpec(5, 0), QuantSpec(2, 16, zero_point="float")]
)
def test_costs_are_what_codes_take(spec: QuantSpec) -> None:
    import torch

    from hfq.formats import affine

    codes = affine.quantize(torch.randn(6, 100), spec)
    assert cost.stored_bits(6, 100, spec) == pytest.approx(codes.bits_per_weight() * 600)
    assert cost.table({"a": (6, 100)}, spec, [spec.bits])["a"][spec.bits] == cost.stored_bits(6, 100, spec)


def test_joined_costs() -> None:
    costs = {"a": {2: 1.0, 4: 2.0}, "b": {2: 10.0, 4: 20.0, 8: 40.0}}
    assert cost.join(costs, {"block": ["a", "b"]}) == {"block": {2: 11.0, 4: 22.0}}


def several(seed: int) -> tuple[dict, dict]:
    """Sizes and products with very different proportions: some names cost only the one, some only the other."""
    draw = random.Random(seed)
    scores, costs = {}, {"size": {}, "macs": {}}
    for i in range(5):
        weights, macs = draw.choice([0, 10, 40]), draw.choice([1, 7, 30])
        loss = draw.random() * 10
        scores[f"l{i}"] = {b: -loss * b for b in (2, 3, 4)}
        costs["size"][f"l{i}"] = {b: float(weights * b) for b in (2, 3, 4)}
        costs["macs"][f"l{i}"] = {b: float(macs * b * b) for b in (2, 3, 4)}
    return scores, costs


@pytest.mark.parametrize("seed", range(20))
def test_several_budgets_hold_at_once_and_the_program_is_optimal(seed: int) -> None:
    scores, costs = several(seed)
    budget = {what: sum(row[3] for row in table.values()) for what, table in costs.items()}
    chosen = program.allocate(scores, costs, budget)
    for what, table in costs.items():
        assert cost.total(table, chosen) <= budget[what]
    rows = [[(scores[n][b], *(costs[w][n][b] for w in costs)) for b in scores[n]] for n in scores]
    feasible = [pick for pick in itertools.product(*rows)
                if all(sum(p[1 + i] for p in pick) <= limit for i, limit in enumerate(budget.values()))]
    wanted = min(sum(p[0] for p in pick) for pick in feasible)
    assert sum(scores[n][b] for n, b in chosen.items()) == pytest.approx(wanted, rel=1e-6)


def test_an_impossible_budget_says_the_smallest_feasible_one() -> None:
    scores, costs = several(1)
    least = {what: sum(row[2] for row in table.values()) for what, table in costs.items()}
    with pytest.raises(ConfigError, match=f"budget of macs .* least possible cost {least['macs']:.6g}"):
        program.allocate(scores, costs, {"size": 1e9, "macs": least["macs"] - 1})
    with pytest.raises(ConfigError, match="same resources"):
        program.allocate(scores, costs, {"size": 1e9})
    # Each alone can be met, both together cannot: what is small is slow.
    scores = {"a": {2: 0.0, 4: 1.0}}
    opposed = {"size": {"a": {2: 2.0, 4: 4.0}}, "time": {"a": {2: 9.0, 4: 3.0}}}
    with pytest.raises(ConfigError, match=r"smallest feasible ones in this proportion are 1.6 times.*size 4, time 3"):
        program.allocate(scores, opposed, {"size": 2.5, "time": 5.0})
    assert program.allocate(scores, opposed, {"size": 4.0, "time": 5.0}) == {"a": 4}


def test_equal_scores_widen_the_earlier_names() -> None:
    scores = {f"l{i}": {b: -float(b) for b in (3, 4, 5)} for i in range(4)}
    costs = {name: {b: 10.0 * b for b in (3, 4, 5)} for name in scores}
    found = list(program.allocate(scores, costs, 170.0).values())
    assert sum(found) == 17 and found == sorted(found, reverse=True)
