"""Lowering widths one step at a time: order, budgets, and how little has to be measured."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest

from hfq.allocation import lowering
from hfq.errors import ConfigError, QuantizationError

WIDTHS = range(3, 9)


def tables(sizes: Mapping[str, float]) -> dict[str, dict[int, float]]:
    return {name: {b: size * b for b in WIDTHS} for name, size in sizes.items()}


def problem(seed: int, count: int = 8) -> tuple[dict[str, float], Any]:
    draw = random.Random(seed)
    sizes = {f"l{i}": draw.choice([1.0, 2.0, 5.0]) for i in range(count)}
    weight = {name: draw.uniform(0.1, 10) for name in sizes}
    return sizes, lambda bits: sum(weight[n] * 4.0 ** -b for n, b in bits.items())


def run(sizes: Mapping[str, float], loss: Any, average: float, **more: Any) -> lowering.Lowered:
    widths = {name: WIDTHS for name in sizes}
    return lowering.lower(dict.fromkeys(sizes, 8), widths, loss, tables(sizes), average * sum(sizes.values()), **more)


@pytest.mark.parametrize("seed", range(10))
def test_lazy_measuring_finds_what_full_measuring_does(seed: int) -> None:
    sizes, loss = problem(seed)
    lazy, full = run(sizes, loss, 5), run(sizes, loss, 5, lazy=False)
    assert lazy.bits == full.bits and [m.name for m in lazy.moves] == [m.name for m in full.moves]
    assert lazy.evaluations < 0.5 * full.evaluations and lazy.evaluations <= 9 * len(sizes)


def test_bits_only_fall_and_stop_at_the_target() -> None:
    sizes, loss = problem(3)
    found = run(sizes, loss, 4.5)
    bits, spent = dict.fromkeys(sizes, 8), []
    for move in found.moves:
        assert move.bits == bits[move.name] - 1 >= 3
        bits[move.name] = move.bits
        spent.append(sum(sizes[n] * b for n, b in bits.items()) / sum(sizes.values()))
        assert move.loss == pytest.approx(loss(bits))
    assert bits == found.bits and spent[-1] <= 4.5 < spent[-2]
    assert run(sizes, loss, 8) == lowering.Lowered(dict.fromkeys(sizes, 8), [], 0)


def test_equal_losses_move_what_saves_most_and_gains_from_noise_count_as_none() -> None:
    sizes = {"a": 1.0, "b": 5.0, "c": 2.0}
    assert run(sizes, lambda bits: 1.0, 7.5).moves[0].name == "b"
    falling = run(sizes, lambda bits: sum(bits.values()), 7.0)  # losses that fall: clipped at zero
    assert [m.name for m in falling.moves] == ["b"] * len(falling.moves)
    assert all(m.metric == 0 for m in falling.moves)


def test_two_budgets_stop_each_for_itself() -> None:
    names = {"w": ["w0", "w1"], "a": ["a0", "a1"]}
    sizes = {"w0": 3.0, "w1": 1.0, "a0": 1.0, "a1": 1.0}
    costs = {what: tables({n: sizes[n] for n in members}) for what, members in names.items()}
    budget = {"w": 5 * 4.0, "a": 8 * 2.0}
    found = lowering.lower(dict.fromkeys(sizes, 8), {n: WIDTHS for n in sizes}, lambda bits: 0.0, costs, budget)
    assert found.bits["a0"] == found.bits["a1"] == 8
    assert 3 * found.bits["w0"] + found.bits["w1"] <= 20


def test_impossible_budgets_and_losses() -> None:
    sizes, loss = problem(0)
    with pytest.raises(ConfigError, match=f"least possible cost {3 * sum(sizes.values()):.6g}"):
        run(sizes, loss, 2.5)
    with pytest.raises(QuantizationError, match="not a number"):
        run(sizes, lambda bits: float("nan"), 5)
    with pytest.raises(ConfigError, match="missing widths"):
        lowering.lower({"a": 8}, {"a": [7, 8]}, lambda bits: 0.0, {"a": {8: 1.0}}, 0.5)
