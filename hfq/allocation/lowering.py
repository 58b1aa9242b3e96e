"""Bits by lowering: from wide everywhere, one step at a time where it costs least for what it saves, measured.

A move lowers one unit by one width. What it costs is measured on the model as it would be then, so scores are not
additive and need no table; a heap of what was measured before decides which few moves are measured again.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from hfq.allocation.cost import Costs, fits, resources, total
from hfq.errors import ConfigError, QuantizationError

__all__ = ["Lowered", "Taken", "lower"]


@dataclass(frozen=True)
class Taken:
    """A move that was made: the unit, its new width, the loss after it, and what it cost for what it saved."""

    name: str
    bits: int
    loss: float
    metric: float


@dataclass(frozen=True)
class Lowered:
    """The widths, how they came about, and how many allocations were measured."""

    bits: dict[str, int]
    moves: list[Taken] = field(default_factory=list)
    evaluations: int = 0


def lower(
    start: Mapping[str, int], widths: Mapping[str, Sequence[int]], loss: Callable[[Mapping[str, int]], float],
    costs: Costs | Mapping[str, Costs], budget: float | Mapping[str, float], *, lazy: bool = True,
) -> Lowered:
    """Lower widths until every cost is within its budget.

    The next move is the one of least ``max(loss after - loss before, 0) / share``, where ``share`` is what it saves of
    the resources whose budgets do not hold yet, each as a share of its total at the start; of equal ones that of the
    larger share, then of the earlier unit. A move that saves nothing of those is not made.

    Args:
        start: unit → width.
        widths: unit → the widths that it may have; the largest one below the present one is the next.
        loss: of an allocation; called once for ``start`` and once for each move that is measured.
        costs, budget: as for :func:`hfq.allocation.program.allocate`; a table holds only the units that cost there.
        lazy: measure a move again only when it comes up; else all of them after every step.

    Raises:
        ConfigError: a budget is below the cost of the least widths, which the message gives.
        QuantizationError: a loss is not a number.
    """
    tables = resources(costs, budget)
    run = _Run(dict(start), {name: sorted(widths[name]) for name in start}, loss, tables)
    run.check()
    found = run.lazily() if lazy else run.fully()
    return Lowered(run.bits, found, run.evaluations)


class _Run:
    def __init__(
        self, bits: dict[str, int], widths: dict[str, list[int]], loss: Callable[[Mapping[str, int]], float],
        tables: dict[str, tuple[Costs, float]],
    ) -> None:
        self.bits, self.widths, self.measure, self.tables = bits, widths, loss, tables
        self.order = {name: i for i, name in enumerate(bits)}
        self.totals = {what: max(self._cost(what, bits), 1e-300) for what in tables}
        self.evaluations, self.now = 0, 0.0

    def _cost(self, what: str, bits: Mapping[str, int]) -> float:
        table = self.tables[what][0]
        return total(table, {name: width for name, width in bits.items() if name in table})

    def check(self) -> None:
        """Refuse what cannot be met."""
        for name, width in self.bits.items():
            if width not in self.widths[name]:
                raise ConfigError(f"{name} starts at {width} bits, which are not among {self.widths[name]}")
        for what, (table, limit) in self.tables.items():
            unknown = set(table) - set(self.bits)
            missing = [(name, bits) for name in table if name in self.bits for bits in self.widths[name]
                       if bits not in table[name]]
            if unknown or missing:
                raise ConfigError(f"costs{f' of {what}' if what else ''}: unknown units {sorted(unknown)[:5]}, missing "
                                  f"widths {missing[:5]}")
            # Only widths up to the start are ever reached.
            least = sum(min(table[n][b] for b in self.widths[n] if b <= self.bits[n]) for n in table)
            if not fits(least, limit):
                raise ConfigError(f"budget{f' of {what}' if what else ''} {limit:.6g} is below the least possible cost "
                                  f"{least:.6g}: raise it or allow smaller widths")

    def unmet(self) -> list[str]:
        return [what for what, (_, limit) in self.tables.items() if not fits(self._cost(what, self.bits), limit)]

    def next(self, name: str) -> int | None:
        below = [width for width in self.widths[name] if width < self.bits[name]]
        return below[-1] if below else None

    def share(self, name: str, unmet: Sequence[str]) -> float:
        """What lowering ``name`` by one width saves of the resources that are still too large."""
        width = self.next(name)
        if width is None:
            return 0.0
        found = 0.0
        for what in unmet:
            row = self.tables[what][0].get(name)
            found += 0.0 if row is None else max(row[self.bits[name]] - row[width], 0.0) / self.totals[what]
        return found

    def loss_of(self, bits: Mapping[str, int]) -> float:
        self.evaluations += 1
        value = float(self.measure(bits))
        if value != value:
            raise QuantizationError("the loss of an allocation is not a number: check the calibration data")
        return value

    def score(self, name: str, unmet: Sequence[str]) -> tuple[float, float, int, str] | None:
        """``(metric, -share, order, name)`` of the move of ``name`` now; ``None`` if there is none that helps."""
        share = self.share(name, unmet)
        if not share > 0:
            return None
        after = self.loss_of({**self.bits, name: self.next(name)})  # type: ignore[dict-item]
        self.after[name] = after
        return max(after - self.now, 0.0) / share, -share, self.order[name], name

    def take(self, entry: tuple[float, float, int, str]) -> Taken:
        name = entry[3]
        width = self.next(name)
        assert width is not None
        self.bits[name], self.now = width, self.after[name]
        return Taken(name, width, self.now, entry[0])

    def begin(self) -> list[str]:
        self.after: dict[str, float] = {}
        unmet = self.unmet()
        if unmet:
            self.now = self.loss_of(self.bits)
        return unmet

    def fully(self) -> list[Taken]:
        moves: list[Taken] = []
        unmet = self.begin()
        while unmet:
            entries = [entry for name in self.bits if (entry := self.score(name, unmet)) is not None]
            moves.append(self.take(min(entries)))
            unmet = self.unmet()
        return moves

    def lazily(self) -> list[Taken]:
        moves: list[Taken] = []
        unmet = self.begin()
        heap = [entry for name in self.bits if (entry := self.score(name, unmet)) is not None] if unmet else []
        heapq.heapify(heap)
        fresh = set(self.bits)  # measured in the present state
        while unmet:
            entry = heapq.heappop(heap)
            name = entry[3]
            if name not in fresh:
                again = self.score(name, unmet)
                fresh.add(name)
                if again is not None:
                    heapq.heappush(heap, again)
                continue
            moves.append(self.take(entry))
            met, unmet = unmet, self.unmet()
            fresh = set()
            if unmet != met:  # what a move saves has changed for all: metrics that were measured are scaled anew
                heap = [self._rescaled(old, met, unmet) for old in heap if self.share(old[3], unmet) > 0]
                heapq.heapify(heap)
            if unmet and self.share(name, unmet) > 0:
                heapq.heappush(heap, (entry[0], -self.share(name, unmet), self.order[name], name))
        return moves

    def _rescaled(
        self, entry: tuple[float, float, int, str], met: Sequence[str], unmet: Sequence[str]
    ) -> tuple[float, float, int, str]:
        metric, share, order, name = entry
        now = self.share(name, unmet)
        return metric * -share / now, -now, order, name
