"""Bits without a solver: greedy by loss saved per cost, and prefixes of a ranking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hfq.allocation.cost import Costs, Scores, checked, fits
from hfq.errors import ConfigError

__all__ = ["allocate", "lowest", "ranking", "two_level", "walk"]


def allocate(scores: Scores, costs: Costs, budget: float) -> dict[str, int]:
    """Start at the cheapest widths; take the upgrade that saves most loss for its cost while one fits.

    For each name only the widths on the lower convex hull of (cost, loss) are steps, so savings per cost fall and
    greedy is exact whenever a budget is met exactly; a last pass spends what is left on any upgrade that fits.

    Raises:
        ConfigError: as :func:`hfq.allocation.cost.checked`.
    """
    checked(scores, costs, budget)
    chosen = {
        name: min(row, key=lambda bits, name=name: (row[bits], scores[name][bits])) for name, row in costs.items()
    }
    spent = sum(costs[name][bits] for name, bits in chosen.items())
    steps = []
    for order, name in enumerate(scores):
        hull = _hull(scores[name], costs[name])
        for now, then in zip(hull, hull[1:], strict=False):
            saved = scores[name][now] - scores[name][then]
            steps.append((-saved / (costs[name][then] - costs[name][now]), order, name, now, then))
    for _, _, name, now, then in sorted(steps):
        extra = costs[name][then] - costs[name][now]
        if chosen[name] == now and fits(spent + extra, budget):
            chosen[name], spent = then, spent + extra
    return _spend(scores, costs, budget, chosen, spent)


def _hull(losses: Mapping[int, float], prices: Mapping[int, float]) -> list[int]:
    """Widths on the lower convex hull of (cost, loss), by rising cost."""
    hull: list[int] = []
    for bits in sorted(losses, key=lambda b: (prices[b], losses[b])):
        if hull and losses[bits] >= losses[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            before = (losses[a] - losses[b]) / (prices[b] - prices[a])
            if before > (losses[b] - losses[bits]) / (prices[bits] - prices[b]):
                break
            hull.pop()
        hull.append(bits)
    return hull


def _spend(scores: Scores, costs: Costs, budget: float, chosen: dict[str, int], spent: float) -> dict[str, int]:
    while True:
        best = None
        for name, now in chosen.items():
            for bits, price in costs[name].items():
                saved = scores[name][now] - scores[name][bits]
                if saved > 0 and fits(spent + price - costs[name][now], budget) and (best is None or saved > best[0]):
                    best = (saved, name, bits)
        if best is None:
            return chosen
        _, name, bits = best
        spent += costs[name][bits] - costs[name][chosen[name]]
        chosen[name] = bits


def ranking(importance: Mapping[str, float]) -> list[str]:
    """Names by falling importance; equal ones in the order in which they come.

    Raises:
        ConfigError: an importance is not a number.
    """
    bad = [name for name, value in importance.items() if value != value]
    if bad:
        raise ConfigError(f"the importance of {bad[:5]} is not a number")
    return sorted(importance, key=lambda name: -importance[name])


def two_level(importance: Mapping[str, float], costs: Costs, high: int, low: int, budget: float) -> dict[str, int]:
    """The longest prefix of the ranking that can have ``high`` bits while the rest has ``low``.

    A larger budget only promotes names: the sets at ``high`` are nested.

    Raises:
        ConfigError: even ``low`` everywhere exceeds the budget, or the widths are not ordered.
    """
    if not high > low:
        raise ConfigError(f"widths {high} and {low}: the first has to be the larger one")
    spent = sum(costs[name][low] for name in importance)
    if not fits(spent, budget):
        raise ConfigError(f"budget {budget:.6g} is below the cost {spent:.6g} of {low} bits everywhere")
    chosen = dict.fromkeys(importance, low)
    for name in ranking(importance):
        spent += costs[name][high] - costs[name][low]
        if not fits(spent, budget):
            break
        chosen[name] = high
    return chosen


def walk(importance: Mapping[str, float], costs: Costs, widths: Sequence[int], budget: float) -> dict[str, int]:
    """:func:`two_level` over several widths: between the two neighbours that the budget lies between.

    With falling ``widths`` w0 > w1 > ...: the first pair (w0, w1) whose lower width fits everywhere is walked. The
    result never gives a less important name more bits, and a larger budget never takes bits away.
    """
    ordered = sorted(set(widths), reverse=True)
    if len(ordered) == 1:
        return dict.fromkeys(importance, ordered[0])
    for high, low in zip(ordered, ordered[1:], strict=False):
        if fits(sum(costs[name][low] for name in importance), budget):
            return two_level(importance, costs, high, low, budget)
    return two_level(importance, costs, ordered[-2], ordered[-1], budget)


def lowest(importance: Mapping[str, float], count: int, high: int, low: int) -> dict[str, int]:
    """The ``count`` least important names get ``low`` bits, the others ``high``."""
    if not 0 <= count <= len(importance):
        raise ConfigError(f"{count} names at {low} bits: there are {len(importance)}")
    order = ranking(importance)
    chosen = dict.fromkeys(importance, high)
    chosen.update(dict.fromkeys(order[len(order) - count :], low))
    return chosen
