"""Groups of the indices of an axis with like ranges: k-means on (minimum, maximum), and the grid of every group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from hfq.errors import ConfigError
from hfq.formats import groups
from hfq.formats.groups import LARGEST_ZERO, Axis

__all__ = ["Ends", "Grouping", "choose_axis", "group", "kmeans", "spread"]

# Smallest and largest number of every index, ``[n]`` each.
Ends = tuple[torch.Tensor, torch.Tensor]
_STEPS = 300


@dataclass(frozen=True)
class Grouping:
    """A bank: labels int64 ``[n]`` (none for one grid), scale and whole zero point ``[groups]`` float32."""

    axis: Axis
    labels: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor


def kmeans(points: torch.Tensor, clusters: int, seed: int = 0) -> torch.Tensor:
    """Labels int64 ``[n]`` of ``points`` ``[n, d]``: Lloyd's iterations from one k-means++ start, in float64.

    With fewer distinct points than clusters, some clusters stay empty.
    """
    points = points.double().cpu()
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    for _ in range(min(clusters, len(points)) - 1):
        distance = _squares(points, centres).amin(1)
        if not float(distance.sum()) > 0:
            break
        centres = torch.cat([centres, points[torch.multinomial(distance, 1, generator=generator)]])
    labels = _squares(points, centres).argmin(1)
    for _ in range(_STEPS):
        counts = torch.bincount(labels, minlength=len(centres)).clamp(min=1)[:, None]
        means = torch.zeros_like(centres).index_add_(0, labels, points) / counts
        present = torch.bincount(labels, minlength=len(centres)) > 0
        centres = torch.where(present[:, None], means, centres)
        moved = _squares(points, centres).argmin(1)
        if torch.equal(moved, labels):
            break
        labels = moved
    return labels


def _squares(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    return (points[:, None] - centres[None]).square().sum(-1)


def spread(ends: Ends) -> float:
    """How far the ranges of an axis lie apart: ``max M - min M + max m - min m``."""
    return float(sum(part.double().max() - part.double().min() for part in ends))


def choose_axis(first: tuple[Axis, Grouping, Ends], second: tuple[Axis, Grouping, Ends], how: str) -> Grouping:
    """One of two groupings of a tensor; ``first`` has to be better, ``second`` wins a tie.

    Args:
        how: "spread" takes the axis whose ranges lie further apart, as published; "step" the one with the smaller mean
            square of the step, which is the error to be expected; "rows" or "columns" that one.

    Raises:
        ConfigError: any other.
    """
    if how in ("rows", "columns"):
        return first[1] if first[0] == how else second[1]
    if how == "spread":
        return first[1] if spread(first[2]) > spread(second[2]) else second[1]
    if how == "step":
        errors = [float(one.scale[one.labels].double().square().mean()) for _, one, _ in (first, second)]
        return first[1] if errors[0] < errors[1] else second[1]
    raise ConfigError(f"axis={how!r}: 'spread', 'step', 'rows' or 'columns'")


def group(
    axis: Axis, ends: Ends, count: int, bits: int, *, how: Literal["minmax", "mean"] = "minmax", seed: int = 0,
    largest: int = LARGEST_ZERO,
) -> Grouping:
    """``count`` groups of the indices of an axis and their grids; an empty one has the range ``[0, 1]``.

    Args:
        how: the range of a group: "minmax" covers all of its members, "mean" is from the mean of their minima to the
            mean of their maxima.
        largest: zero point, see :func:`hfq.formats.groups.grid`.
    """
    low, high = (part.detach().double().cpu().reshape(-1) for part in ends)
    if count == 1 or len(low) == 1:
        labels = torch.zeros(len(low), dtype=torch.int64)
    else:
        labels = kmeans(torch.stack([low, high], 1), count, seed)
    amount = torch.bincount(labels, minlength=count)
    if how == "minmax":
        lows = torch.full((count,), torch.inf, dtype=low.dtype).scatter_reduce_(0, labels, low, "amin")
        highs = torch.full((count,), -torch.inf, dtype=low.dtype).scatter_reduce_(0, labels, high, "amax")
    elif how == "mean":
        lows, highs = (torch.zeros(count, dtype=low.dtype).index_add_(0, labels, part) / amount.clamp(min=1)
                       for part in (low, high))  # fmt: skip
    else:
        raise ConfigError(f"range of a group {how!r}: 'minmax' or 'mean'")
    empty = amount == 0
    lows, highs = lows.masked_fill(empty, 0.0), highs.masked_fill(empty, 1.0)
    scale, zero = groups.grid(lows, highs, bits, largest)
    return Grouping(axis, labels, scale, zero)
