"""Bits by an integer program: exactly one width a name, least total loss, cost within the budget (scipy's HiGHS)."""

from __future__ import annotations

import importlib.util
from typing import Any

from hfq.allocation.cost import Costs, Scores, checked, fits, total
from hfq.errors import ConfigError, QuantizationError

__all__ = ["allocate"]


def allocate(scores: Scores, costs: Costs, budget: float, *, gap: float = 0.0, seconds: float = 60.0) -> dict[str, int]:
    """The allocation of least total score whose cost is within ``budget``.

    Args:
        scores: name → bits → loss (additive, lower is better).
        costs: name → bits → cost (additive).
        gap: relative distance to the optimum at which the solver may stop.
        seconds: time limit; the best allocation found by then is returned.

    Raises:
        ConfigError: tables or budget are impossible, or scipy is not installed (extra ``allocation``).
        QuantizationError: the solver found nothing in its time.
    """
    checked(scores, costs, budget)
    if not scores:
        return {}
    np, optimize, sparse = _scipy()
    choices = [(name, bits) for name, row in scores.items() for bits in sorted(row)]
    loss = np.array([scores[name][bits] for name, bits in choices], dtype=float)
    cost = np.array([costs[name][bits] for name, bits in choices], dtype=float)
    # Both are scaled to order 1: the solver's tolerances are absolute.
    loss_scale = max(float(np.abs(loss - loss.min()).max()), 1e-300)
    cost_scale = max(float(np.abs(cost).max()), 1e-300)
    names = {name: i for i, name in enumerate(scores)}
    one_each = sparse.csr_array(
        (np.ones(len(choices)), ([names[name] for name, _ in choices], range(len(choices)))),
        shape=(len(names), len(choices)),
    )
    # Equal losses: the cheaper choice.
    tie = 1e-9 * cost / cost_scale / len(names)
    result = optimize.milp(
        (loss - loss.min()) / loss_scale + tie,
        constraints=[
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint(cost[None] / cost_scale, -np.inf, budget / cost_scale),
        ],
        integrality=np.ones(len(choices)),
        bounds=optimize.Bounds(0, 1),
        options={"mip_rel_gap": gap, "time_limit": seconds},
    )
    if result.x is None:
        raise QuantizationError(f"the integer program was not solved: {result.message}")
    chosen = {name: bits for (name, bits), x in zip(choices, result.x, strict=True) if x > 0.5}
    # The solver accepts violations up to its tolerance; the promise is exact.
    return chosen if fits(total(costs, chosen), budget) else _repaired(scores, costs, budget, chosen)


def _repaired(scores: Scores, costs: Costs, budget: float, chosen: dict[str, int]) -> dict[str, int]:
    """Step down where it hurts least until the budget holds."""
    while not fits(total(costs, chosen), budget):
        moves = [
            ((scores[name][bits] - scores[name][now]) / (costs[name][now] - costs[name][bits]), name, bits)
            for name, now in chosen.items()
            for bits in costs[name]
            if costs[name][bits] < costs[name][now]
        ]
        _, name, bits = min(moves)
        chosen[name] = bits
    return chosen


def _scipy() -> tuple[Any, Any, Any]:
    if importlib.util.find_spec("scipy") is None:
        raise ConfigError(
            "the integer program needs scipy: pip install 'hfq[allocation]', or use the greedy allocation"
        )
    import numpy
    from scipy import optimize, sparse

    return numpy, optimize, sparse
