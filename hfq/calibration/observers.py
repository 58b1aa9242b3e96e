"""Ranges of activations over a stream: minimum and maximum, largest magnitude, percentile, least squared error, least
divergence of what is quantized from what was seen.

Every observer takes tensors one at a time (``update``), merges over processes once (``reduce``), and answers with
``range() -> (low, high)``, tensors of the observed shape (a scalar, or one number a channel of ``axis``).
"""

from __future__ import annotations

import torch

from hfq.calibration import ranks
from hfq.errors import DataError

__all__ = ["AbsMax", "Histogram", "Kl", "MinMax", "Mse", "Observer", "Percentile", "divergence", "masked_divergence"]


class Observer:
    """Base: refuses what is not finite and what was never fed."""

    def update(self, x: torch.Tensor) -> None:
        if x.numel() == 0:
            return
        if not torch.isfinite(x).all():
            raise DataError("an observed activation has NaN or infinite elements")
        self._update(x.detach().float())

    def _update(self, x: torch.Tensor) -> None:
        raise NotImplementedError

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    def reduce(self) -> None:
        """Merge over all processes; to be called once, by every process."""


class MinMax(Observer):
    """Smallest and largest element, of the tensor (``axis=None``) or of each channel along ``axis``."""

    def __init__(self, axis: int | None = None) -> None:
        self.axis = axis
        self.low: torch.Tensor | None = None
        self.high: torch.Tensor | None = None

    def _update(self, x: torch.Tensor) -> None:
        rows = x.reshape(-1, 1) if self.axis is None else x.movedim(self.axis, -1).reshape(-1, x.shape[self.axis])
        low, high = rows.amin(0), rows.amax(0)
        if self.axis is None:
            low, high = low[0], high[0]
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.low is None or self.high is None:
            raise DataError("an observer was asked for a range before it saw data")
        return self.low, self.high

    def reduce(self) -> None:
        own = None if self.low is None else tuple(self.low.shape)
        shapes = [shape for shape in ranks.gather(own) if shape is not None]
        if not shapes:
            return
        # A process without data takes part with what changes nothing.
        low = torch.full(shapes[0], torch.inf) if self.low is None else self.low.clone()
        high = torch.full(shapes[0], -torch.inf) if self.high is None else self.high.clone()
        self.low, self.high = -ranks.max_(-low), ranks.max_(high)


class AbsMax(MinMax):
    """Largest magnitude: a range symmetric around zero."""

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = super().range()
        top = torch.maximum(-low, high)
        return -top, top


class Histogram(Observer):
    """Counts in equal bins over ``[-2**k, 2**k]``; ``k`` grows as needed by merging pairs of bins, so that the order of
    the data does not change the result."""

    def __init__(self, bins: int = 8192) -> None:
        if bins < 4 or bins % 4:
            raise DataError(f"bins={bins}: a multiple of 4 is needed")
        self.bins = bins
        self.exponent: int | None = None
        self.counts = torch.zeros(bins, dtype=torch.float64)
        self.exact = MinMax()

    def _update(self, x: torch.Tensor) -> None:
        self.exact._update(x)
        top = float(x.abs().max())
        self._grow(max(-40, int(torch.tensor(max(top, 1e-30)).log2().ceil())))
        assert self.exponent is not None
        limit = 2.0**self.exponent
        self.counts += torch.histc(x, self.bins, -limit, limit).double().cpu()

    def _grow(self, exponent: int) -> None:
        if self.exponent is None:
            self.exponent = exponent
        while self.exponent < exponent:
            half = self.bins // 4
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts = torch.nn.functional.pad(merged, (half, half))
            self.exponent += 1

    def reduce(self) -> None:
        self.exact.reduce()
        exponents = [exponent for exponent in ranks.gather(self.exponent) if exponent is not None]
        if not exponents:
            return
        self._grow(max(exponents))
        ranks.sum_(self.counts)

    @property
    def centers(self) -> torch.Tensor:
        self.exact.range()
        limit = 2.0 ** (self.exponent or 0)
        return (torch.arange(self.bins, dtype=torch.float64) + 0.5) * (2 * limit / self.bins) - limit

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.exact.range()

    def _clip(self, low: float, high: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Never wider than what was seen: a bin's edge may lie outside."""
        exact = self.exact.range()
        return torch.tensor(low).clamp(min=exact[0].cpu()), torch.tensor(high).clamp(max=exact[1].cpu())


class Percentile(Histogram):
    """The range that leaves ``100 - percent`` percent of the elements outside, half on each side."""

    def __init__(self, percent: float = 99.9, bins: int = 8192) -> None:
        super().__init__(bins)
        if not 50 < percent <= 100:
            raise DataError(f"percent={percent}: above 50 and at most 100")
        self.percent = percent

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.percent == 100:
            return self.exact.range()
        centers, cumulative = self.centers, self.counts.cumsum(0) / self.counts.sum()
        tail = (1 - self.percent / 100) / 2
        half = float(centers[1] - centers[0]) / 2
        low = centers[int((cumulative <= tail).sum().clamp(max=self.bins - 1))] - half
        high = centers[int((cumulative < 1 - tail).sum().clamp(max=self.bins - 1))] + half
        return self._clip(float(low), float(high))


class Mse(Histogram):
    """The range whose grid of ``2**bits`` points has the least squared error on what was seen."""

    def __init__(self, bits: int, symmetric: bool = False, bins: int = 8192, grid: int = 100) -> None:
        super().__init__(bins)
        self.bits, self.symmetric, self.grid = bits, symmetric, grid

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = (float(v) for v in self.exact.range())
        low, high = min(low, 0.0), max(high, 0.0)
        if self.symmetric:
            high = max(-low, high)
            low = -high
        centers, levels = self.centers, 2**self.bits - (2 if self.symmetric and self.bits > 1 else 1)
        best = (float("inf"), low, high)
        for step in range(self.grid):
            shrink = 1 - step / self.grid
            scale = (high - low) * shrink / levels or 1.0
            zero = round(-low * shrink / scale)
            error = centers - ((centers / scale).round() + zero).clamp(0, levels).sub(zero) * scale
            loss = float((error.square() * self.counts).sum())
            if loss < best[0]:
                best = (loss, low * shrink, high * shrink)
        return self._clip(best[1], best[2]) if not self.symmetric else (torch.tensor(best[1]), torch.tensor(best[2]))


def _clipped(counts: torch.Tensor, stop: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts with all from ``stop`` on added to the last bin before it; the same without them, on ``groups`` levels.

    A level spreads its counts evenly over those of its bins that are not empty.
    """
    inside = counts[:stop]
    p = inside.clone()
    p[-1] += counts[stop:].sum()
    level = torch.arange(stop, device=counts.device) * groups // stop
    filled = (inside != 0).to(counts.dtype)
    total = counts.new_zeros(groups).index_add_(0, level, inside)
    bins = counts.new_zeros(groups).index_add_(0, level, filled)
    return p, (total / bins.clamp(min=1))[level] * filled


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """Kullback-Leibler divergence of the normalised ``q`` from the normalised ``p``; infinite where only ``q`` is 0."""
    p, q = p / p.sum(), q / q.sum()
    held = p != 0
    return float((p[held] * (p[held] / q[held]).log()).sum())


def masked_divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """``sum P (ln(sum(P) P) - ln(sum(Q) Q)) / sum(P)`` over the bins where both are there, with the sums over all.

    With ``p`` and ``q`` normalised it is ``sum p ln(p / q) + 2 ln(sum(P) / sum(Q)) sum p`` over those bins: what was
    clipped (the sum of ``Q`` is the smaller one) costs, and empty bins are passed over.
    """
    held = (p != 0) & (q != 0)
    whole = p.sum()
    return float((p[held] * ((whole * p[held]).log() - (q.sum() * q[held]).log())).sum() / whole)


class Kl(Observer):
    """The range at which the histogram of what is quantized diverges least from the one that was seen.

    Counts magnitudes in equal bins over ``[0, 2**k]``; the largest one lies in the upper half, so that at least
    ``bins / 2`` are in use. Every threshold from ``2**(bits-1)`` bins on is a candidate.

    Args:
        bits: of the grid; it has ``2**(bits-1)`` levels of magnitude, all ``2**bits`` of them for an asymmetric one
            without negative numbers.
        symmetric: the range reaches as far to both sides; else to no side farther than what was seen.
        masked: by :func:`masked_divergence`, else by :func:`divergence`.
        positive: count positive numbers only (a ReLU follows).
        stride: bins between two candidates.
        bins: of the histogram.
    """

    def __init__(
        self, bits: int = 8, symmetric: bool = True, *, masked: bool = True, positive: bool = False, stride: int = 4,
        bins: int = 4096,
    ) -> None:
        if bins < 4 << bits or bins % 2:
            raise DataError(f"bins={bins}: an even number of at least {4 << bits} is needed for {bits} bits")
        if stride < 1:
            raise DataError(f"stride={stride}: at least 1 is needed")
        self.bits, self.symmetric, self.masked, self.positive = bits, symmetric, masked, positive
        self.stride, self.bins = stride, bins
        self.exponent: int | None = None
        self.counts = torch.zeros(bins, dtype=torch.float64)
        self.exact = MinMax()

    def _update(self, x: torch.Tensor) -> None:
        x = x.clamp(min=0) if self.positive else x
        self.exact._update(x)
        x = x.abs()
        # Zeros are exact at every scale; as the first bin, often the fullest, they would draw the threshold to them.
        x = x[x > 0]
        if not x.numel():
            return
        self._grow(max(-60, int(x.max().double().log2().ceil())))
        self.counts += torch.histc(x, self.bins, 0, 2.0 ** (self.exponent or 0)).double().cpu()

    def _grow(self, exponent: int) -> None:
        self.exponent = exponent if self.exponent is None else self.exponent
        while self.exponent < exponent:
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts = torch.nn.functional.pad(merged, (0, self.bins // 2))
            self.exponent += 1

    def reduce(self) -> None:
        self.exact.reduce()
        exponents = [exponent for exponent in ranks.gather(self.exponent) if exponent is not None]
        if exponents:
            self._grow(max(exponents))
            ranks.sum_(self.counts)

    def curve(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Thresholds and their divergences, float64 ``[candidates]``."""
        top = float(self._top())
        width = 2.0 ** (self.exponent or 0) / self.bins
        used = min(self.bins, int(top / width) + 1)  # with the bin of the largest one, also where that is an edge
        one_sided = not self.symmetric and float(self.exact.range()[0]) >= 0
        counts, levels = self.counts[:used].clone(), 1 << self.bits - (0 if one_sided else 1)
        counts[0] = 0
        stops = sorted({*range(levels, used, self.stride), used})
        found = []
        for stop in stops:
            p, q = _clipped(counts, stop, min(levels, stop))
            measure = masked_divergence if self.masked else divergence
            found.append(measure(p, q) if float(q.sum()) else float("inf"))
        values = torch.tensor(found, dtype=torch.float64)
        return torch.tensor(stops, dtype=torch.float64) * width, values

    def _top(self) -> torch.Tensor:
        low, high = self.exact.range()
        return torch.maximum(-low, high).cpu()

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        reach = top = self._top()
        if float(top) and float(self.counts[1:].sum()):
            thresholds, values = self.curve()
            reach = thresholds[int(values.argmin())].float().clamp(max=float(top))
        if self.symmetric:
            return -reach, reach
        low, high = (value.cpu() for value in self.exact.range())
        return torch.maximum(-reach, low.clamp(max=0)), torch.minimum(reach, high.clamp(min=0))
