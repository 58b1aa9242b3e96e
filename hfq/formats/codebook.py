"""Non-uniform grids: a sorted table of ``2**bits`` levels in ``[-1, 1]``, shared by numbers that are scaled into it.

A number is ``scale * table[code] + offset``. Tables are learned by weighted one-dimensional k-means, or fixed: the
quantiles of a normal distribution, or evenly spaced.
"""

from __future__ import annotations

import math

import torch

from hfq.errors import QuantizationError

__all__ = ["corrected", "decode", "encode", "even", "fit", "kmeans", "normal"]

ITERATIONS = 50


def even(bits: int) -> torch.Tensor:
    """Evenly spaced levels from -1 to 1, float32 ``[2**bits]``."""
    return torch.linspace(-1, 1, 1 << bits)


def normal(bits: int) -> torch.Tensor:
    """Levels at the quantiles of a normal distribution, scaled to ``[-1, 1]``, one of them zero (NormalFloat)."""
    half = 1 << (bits - 1)
    last = 1 - 0.5 * (1 / (4 * half) + 1 / (4 * half - 2))  # the quantile that stands for the largest number
    quantiles = torch.linspace(last, 0.5, half + 1, dtype=torch.float64)[:-1]
    high = math.sqrt(2) * torch.erfinv(2 * quantiles - 1)
    quantiles = torch.linspace(last, 0.5, half, dtype=torch.float64)[:-1]
    low = -math.sqrt(2) * torch.erfinv(2 * quantiles - 1)
    levels = torch.cat([low, high, torch.zeros(1, dtype=torch.float64)]).sort().values
    return (levels / levels.abs().max()).float()


def encode(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Codes (uint8) of the nearest levels; numbers beyond the ends get the end codes, a tie gets the lower level."""
    edges = (table[1:] + table[:-1]) / 2
    return torch.bucketize(values.contiguous(), edges).to(torch.uint8)


def decode(codes: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The levels of ``codes`` (any shape), in the dtype of the table."""
    return table.index_select(0, codes.reshape(-1).int()).view(codes.shape)


class _Sorted:
    """Sorted values with running sums: what a k-means step costs does not depend on their number."""

    def __init__(self, values: torch.Tensor, weights: torch.Tensor | None) -> None:
        flat = values.detach().reshape(-1).double()
        w = torch.ones_like(flat) if weights is None else weights.detach().reshape(-1).double()
        keep = w > 0
        if not bool(keep.any()):
            w, keep = torch.ones_like(flat), torch.ones_like(keep)
        if not bool(torch.isfinite(flat).all() and torch.isfinite(w).all()):
            raise QuantizationError("the values or weights of a codebook are not finite")
        self.values, order = flat[keep].sort()
        self.weights = w[keep][order]
        self.mass = self._sums(self.weights)
        self.first = self._sums(self.weights * self.values)
        self.second = self._sums(self.weights * self.values.square())

    @staticmethod
    def _sums(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x.cumsum(0), (1, 0))

    def parts(self, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mass, first and second moment of what is nearest to each level."""
        # right=True: a value on an edge counts for the lower level, as in `encode`
        inner = torch.searchsorted(self.values, (table[1:] + table[:-1]) / 2, right=True)
        ends = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), len(self.values))])
        mass, first, second = (sums[ends].diff() for sums in (self.mass, self.first, self.second))
        return mass, first, second

    def lloyd(self, table: torch.Tensor, iterations: int) -> tuple[torch.Tensor, float]:
        """Levels moved to the means of what is nearest to them until nothing moves; the levels and their error."""
        table = table.double()
        for _ in range(iterations):
            mass, first, _ = self.parts(table)
            moved = torch.where(mass > 0, first / mass.clamp(min=1e-300), table).sort().values
            if torch.equal(moved, table):
                break
            table = moved
        mass, first, second = self.parts(table)
        return table, float((second - 2 * table * first + table.square() * mass).sum() / self.mass[-1])

    def plus_plus(self, size: int, seed: int) -> torch.Tensor:
        """``size`` of the values, each drawn in proportion to its squared distance from those drawn before."""
        generator = torch.Generator().manual_seed(seed)
        distance = torch.full_like(self.values, math.inf)
        chance, drawn = self.weights, []
        for _ in range(size):
            total = chance.cumsum(0)
            if float(total[-1]) <= 0:  # fewer different values than levels
                break
            at = torch.searchsorted(total, torch.rand(1, generator=generator, dtype=torch.float64) * total[-1])
            drawn.append(self.values[at.clamp(max=len(total) - 1)])
            distance = torch.minimum(distance, (self.values - drawn[-1]).square())
            chance = self.weights * distance
        drawn += [drawn[-1]] * (size - len(drawn))
        return torch.cat(drawn).sort().values


def kmeans(
    values: torch.Tensor, size: int, weights: torch.Tensor | None = None, *, seed: int = 0,
    iterations: int = ITERATIONS,
) -> torch.Tensor:
    """``size`` sorted means (float32) of weighted one-dimensional k-means, from one k-means++ start.

    Args:
        values: any shape; finite.
        weights: same shape, not negative; ``None`` counts each value once.

    Raises:
        QuantizationError: nothing to fit, or values that are not finite.
    """
    if not values.numel():
        raise QuantizationError("a codebook needs values to be fitted to")
    data = _Sorted(values, weights)
    return data.lloyd(data.plus_plus(size, seed), iterations)[0].float()


def fit(
    values: torch.Tensor, bits: int, weights: torch.Tensor | None = None, *, seed: int = 0,
    iterations: int = ITERATIONS,
) -> torch.Tensor:
    """The learned table (float32, sorted, in ``[-1, 1]``) of numbers in ``[-1, 1]``.

    The best of three k-means runs: from a k-means++ start as :func:`kmeans`, and from the two fixed tables, so that the
    result is never worse than those on the data that it was fitted to.
    """
    if not values.numel():
        raise QuantizationError("a codebook needs values to be fitted to")
    data = _Sorted(values, weights)
    starts = [data.plus_plus(1 << bits, seed), normal(bits), even(bits)]
    table, _ = min((data.lloyd(start, iterations) for start in starts), key=lambda found: found[1])
    return table.clamp(-1, 1).float()


def corrected(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The table to decode with so that decoded ``values`` have the mean and the spread of the values themselves.

    Codes are still chosen with ``table``.
    """
    exact, rounded = values.reshape(-1).double(), decode(encode(values.reshape(-1), table), table).double()
    spread = rounded.std(correction=0)
    ratio = exact.std(correction=0) / spread if float(spread) > 0 else torch.ones_like(spread)
    return (table.double() * ratio + exact.mean() - rounded.mean() * ratio).float()
