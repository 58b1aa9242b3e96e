"""One mean width shared between two groups of layers that are scored by different metrics, and a scan over the shares.

Scores of different metrics cannot be added, so each group has an integer program of its own; how much of the budget it
gets is one number, the ratio of the groups' mean widths, which is scanned: results judge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from hfq.allocation.cost import Scores
from hfq.allocation.program import allocate_within
from hfq.errors import ConfigError

__all__ = ["Group", "Plan", "best", "line", "plans", "split"]


@dataclass(frozen=True)
class Group:
    """Layers of one metric.

    Attributes:
        scores: name → bits → loss.
        sizes: what a name counts in the mean.
        least, most: mean widths that the group may get.
    """

    scores: Scores
    sizes: Mapping[str, float]
    least: float = 2.0
    most: float = 8.0

    @property
    def total(self) -> float:
        return float(sum(self.sizes[name] for name in self.scores))


@dataclass(frozen=True)
class Plan:
    """Widths by name, with the mean over all and the ratio that led there."""

    bits: Mapping[str, int]
    mean: float
    ratio: float


def split(mean: float, ratio: float, share: float) -> tuple[float, float]:
    """Mean widths ``(first, second)`` of two groups.

    Args:
        mean: over both: ``(second + share * first) / (1 + share)``.
        ratio: ``first / second``.
        share: size of the first group over that of the second.
    """
    second = mean * (1 + share) / (1 + ratio * share)
    return ratio * second, second


def plans(
    first: Group, second: Group, means: Sequence[float], ratios: Sequence[float], tolerance: float = 0.02
) -> Iterator[Plan]:
    """Every different plan of the scan; combinations that are out of the groups' bounds, or that no widths have, are
    passed over."""
    known: set[tuple[tuple[str, int], ...]] = set()
    for mean in means:
        for ratio in ratios:
            if not first.scores or not second.scores:  # nothing to share
                targets = (mean, mean)
            else:
                targets = split(mean, ratio, first.total / second.total)
            chosen: dict[str, int] = {}
            try:
                for group, target in zip((first, second), targets, strict=True):
                    if group.scores:
                        if not group.least - 1e-9 <= target <= group.most + 1e-9:
                            raise ConfigError("out of the group's bounds")
                        chosen |= allocate_within(group.scores, group.sizes, target, tolerance)
            except ConfigError:  # of this combination; `best` says if there is none at all
                continue
            if (key := tuple(sorted(chosen.items()))) not in known:
                known.add(key)
                yield Plan(chosen, mean, ratio)


def best(found: Sequence[Plan], loss: Callable[[Plan], float], what: str, target: float) -> Plan:
    """The plan of least loss, of equal ones the first.

    Raises:
        ConfigError: there is none to choose from.
    """
    if not found:
        raise ConfigError(f"{what}: no widths have a mean of {target:g} bits with any ratio of the groups that was "
                          "tried: change the target, or raise the tolerance")
    losses = [loss(plan) for plan in found]
    return found[losses.index(min(losses))]


def line(low: float, high: float, points: int) -> list[float]:
    """``points`` numbers from ``low`` to ``high``, both included; one is the upper end."""
    return [high if points == 1 else low + (high - low) * i / (points - 1) for i in range(points)]


