"""Bits by an integer program: exactly one width a name, least total loss, every cost within its budget (HiGHS)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from hfq.allocation.cost import Costs, Scores, checked, fits, resources, total
from hfq.errors import ConfigError, QuantizationError

__all__ = ["allocate", "allocate_within"]

Tables = dict[str, tuple[Costs, float]]


def allocate(
    scores: Scores, costs: Costs | Mapping[str, Costs], budget: float | Mapping[str, float], *, gap: float = 0.0,
    seconds: float = 60.0,
) -> dict[str, int]:
    """The allocation of least total score whose costs are within their budgets.

    Among allocations of equal score the cheapest one; among those, the one with the larger widths at earlier names.

    Args:
        scores: name → bits → loss (additive, lower is better).
        costs: name → bits → cost (additive); for several budgets, resource → such a table.
        budget: a number, or resource → number: all of them hold.
        gap: relative distance to the optimum at which the solver may stop.
        seconds: time limit; the best allocation found by then is returned.

    Raises:
        ConfigError: tables or budgets are impossible (the message has the smallest feasible ones), or scipy is not
            installed (extra ``allocation``).
        QuantizationError: the solver found nothing in its time.
    """
    tables = resources(costs, budget)
    for what, (table, limit) in tables.items():
        checked(scores, table, limit, what)
    if not scores:
        return {}
    solver = _Solver(scores, tables, seconds)
    chosen, status = solver.least_loss(gap)
    if chosen is None:
        if status != 2:  # neither solved nor shown to be impossible
            raise QuantizationError(f"the integer program was not solved in {seconds:g} seconds")
        raise ConfigError(_impossible(solver, tables))
    # The solver accepts violations up to its tolerance; the promise is exact.
    return _repaired(scores, tables, chosen)


def allocate_within(
    scores: Scores, sizes: Mapping[str, float], target: float, tolerance: float = 0.02, *, seconds: float = 60.0
) -> dict[str, int]:
    """The allocation of least total score whose mean width is ``target``, up to ``tolerance`` on both sides.

    Args:
        scores: name → bits → loss.
        sizes: what a name counts in the mean (weights, or elements of activations).
        target, tolerance: in bits.

    Raises:
        ConfigError: no allocation has such a mean; the message has the nearest means that there are.
    """
    total_size = sum(sizes[name] for name in scores)
    costs = {name: {bits: bits * sizes[name] / total_size for bits in row} for name, row in scores.items()}
    low, high = (sum(pick(row.values()) for row in costs.values()) for pick in (min, max))
    if not low - tolerance <= target <= high + tolerance:
        raise ConfigError(f"a mean of {target:.4g} bits: these widths have means from {low:.4g} to {high:.4g}")
    negative = {name: {bits: -cost for bits, cost in row.items()} for name, row in costs.items()}
    solver = _Solver(scores, {"most": (costs, target + tolerance), "least": (negative, tolerance - target)}, seconds)
    chosen, status = solver.least_loss(0.0)
    if chosen is None:
        if status != 2:
            raise QuantizationError(f"the integer program was not solved in {seconds:g} seconds")
        raise ConfigError(f"no allocation has a mean of {target:.4g} bits up to {tolerance:g}: the layers are too few, "
                          "or too unlike in size; raise the tolerance, or change the target")
    mean = total(costs, chosen)
    if not (fits(mean, target + tolerance) and fits(-mean, tolerance - target)):
        raise QuantizationError(f"the solver's allocation has a mean of {mean:.6g} bits, beside {target:.6g} by more "
                                f"than {tolerance:g}: its own tolerance exceeds the one asked for")
    return chosen


class _Solver:
    """One binary variable a name and width; rows of constraints scaled to order 1, as tolerances are absolute."""

    def __init__(self, scores: Scores, tables: Tables, seconds: float) -> None:
        self.np, self.optimize, self.sparse = _scipy()
        np = self.np
        self.scores, self.tables, self.seconds = scores, tables, seconds
        self.choices = [(name, bits) for name, row in scores.items() for bits in sorted(row)]
        self.loss = self._row(scores)
        self.loss = (self.loss - self.loss.min()) / max(float(np.abs(self.loss - self.loss.min()).max()), 1e-300)
        self.costs, self.limits = [], []
        for table, limit in tables.values():
            row = self._row(table)
            scale = max(float(np.abs(row).max()), 1e-300)
            self.costs.append(row / scale)
            self.limits.append(limit / scale)
        self.names = {name: i for i, name in enumerate(scores)}

    def _row(self, table: Costs) -> Any:
        return self.np.array([table[name][bits] for name, bits in self.choices], dtype=float)

    def least_loss(self, gap: float) -> tuple[dict[str, int] | None, int]:
        """The best allocation, ties resolved; ``(None, status)`` if there is none."""
        np = self.np
        limits = [(cost, limit) for cost, limit in zip(self.costs, self.limits, strict=True)]
        x, status = self._solve(self.loss, limits, gap)
        if x is None:
            return None, status
        best = float(self.loss @ x)
        # A second program among the best: cheap, and then wide at the front. It counts only if it is as good.
        order = np.array([self.names[name] for name, _ in self.choices]) / max(len(self.names), 1)
        width = np.array([bits for _, bits in self.choices], dtype=float)
        cheap = sum((cost for cost in self.costs), np.zeros(len(self.choices)))
        tie = cheap / max(float(np.abs(cheap).max()), 1e-300) + 1e-2 * order * width / max(float(width.max()), 1.0)
        y, _ = self._solve(tie, [*limits, (self.loss, best)], 0.0)
        slack = 1e-9 * max(abs(best), 1e-3)
        inside = y is not None and all(float(c @ y) <= limit + 1e-9 * max(abs(limit), 1.0) for c, limit in limits)
        return self._read(y if inside and float(self.loss @ y) <= best + slack else x), status

    def smallest(self) -> tuple[float, dict[str, float]] | None:
        """The least common factor of all budgets with which something fits, and the costs of what fits then."""
        np = self.np
        if any(limit <= 0 for limit in self.limits):
            return None
        rows = [self.sparse.csr_array(np.append(cost, -limit)[None])
                for cost, limit in zip(self.costs, self.limits, strict=True)]  # fmt: skip
        count = len(self.choices)
        result = self.optimize.milp(
            np.append(np.zeros(count), 1.0),
            constraints=[self.optimize.LinearConstraint(self._one_each(1), 1, 1),
                         *(self.optimize.LinearConstraint(row, -np.inf, 0) for row in rows)],
            integrality=np.append(np.ones(count), 0), options={"time_limit": self.seconds},
            bounds=self.optimize.Bounds(np.zeros(count + 1), np.append(np.ones(count), np.inf)),
        )  # fmt: skip
        if result.x is None:
            return None
        chosen = self._read(result.x[:count])
        return float(result.x[-1]), {what: total(table, chosen) for what, (table, _) in self.tables.items()}

    def _one_each(self, more: int = 0) -> Any:
        np, count = self.np, len(self.choices)
        places = ([self.names[name] for name, _ in self.choices], range(count))
        return self.sparse.csr_array((np.ones(count), places), shape=(len(self.names), count + more))

    def _solve(self, objective: Any, limits: list[tuple[Any, float]], gap: float) -> tuple[Any, int]:
        np = self.np
        result = self.optimize.milp(
            objective,
            constraints=[self.optimize.LinearConstraint(self._one_each(), 1, 1),
                         *(self.optimize.LinearConstraint(row[None], -np.inf, limit) for row, limit in limits)],
            integrality=np.ones(len(self.choices)), bounds=self.optimize.Bounds(0, 1),
            options={"mip_rel_gap": gap, "time_limit": self.seconds},
        )  # fmt: skip
        return (None if result.x is None else result.x.round()), result.status

    def _read(self, x: Any) -> dict[str, int]:
        return {name: bits for (name, bits), taken in zip(self.choices, x, strict=True) if taken > 0.5}


def _impossible(solver: _Solver, tables: Tables) -> str:
    given = ", ".join(f"{what} {limit:.6g}" for what, (_, limit) in tables.items())
    found = solver.smallest()
    if found is None:
        return f"no allocation meets the budgets {given} together: raise them or allow smaller widths"
    costs = ", ".join(f"{what} {value:.6g}" for what, value in found[1].items())
    return (f"no allocation meets the budgets {given} together, although each can be met alone; the smallest feasible "
            f"ones in this proportion are {found[0]:.4g} times as large ({costs})")  # fmt: skip


def _repaired(scores: Scores, tables: Tables, chosen: dict[str, int]) -> dict[str, int]:
    """Step to other widths where it hurts least until every budget holds."""

    def excess(picked: Mapping[str, int]) -> float:
        over = ((total(table, picked), limit) for table, limit in tables.values())
        return sum((cost - limit) / max(abs(limit), 1e-300) for cost, limit in over if not fits(cost, limit))

    while (now := excess(chosen)) > 0:
        moves = []
        for name, bits in ((name, bits) for name, row in scores.items() for bits in row if bits != chosen[name]):
            saved = now - excess({**chosen, name: bits})
            if saved > 0:
                moves.append(((scores[name][bits] - scores[name][chosen[name]]) / saved, name, bits))
        if not moves:
            raise QuantizationError("the solver's allocation exceeds a budget by its tolerance, and no single change "
                                    "mends it: raise the budgets slightly")
        _, name, bits = min(moves)
        chosen = {**chosen, name: bits}
    return chosen


def _scipy() -> tuple[Any, Any, Any]:
    if importlib.util.find_spec("scipy") is None:
        raise ConfigError(
            "the integer program needs scipy: pip install 'hfq[allocation]', or use the greedy allocation"
        )
    import numpy
    from scipy import optimize, sparse

    return numpy, optimize, sparse
