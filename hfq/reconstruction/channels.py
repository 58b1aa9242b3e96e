"""Grids of single channels in front of a product: learned bounds, the weight fitted to what the grids leave."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hfq.calibration import ranges

__all__ = ["Bounds", "channel_error", "clip_channels", "fake_channels", "learn_bounds", "refit"]

_LEAST = 1e-5  # of a range


@dataclass(frozen=True)
class Bounds:
    """Grids ``(scale, zero_point)`` float64 ``[K]`` and the error of the product before and after learning."""

    scale: torch.Tensor
    zero_point: torch.Tensor
    before: float
    after: float


def fake_channels(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """``x`` ``[N, K]`` on the grids of its columns; rounding passes gradients, also those of ``scale`` and ``zero``."""
    v = x / scale
    q = v + (v.round() - v).detach() + zero
    return (q.clamp(0, (1 << bits) - 1) - zero) * scale


def channel_error(
    rows: torch.Tensor, gram: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int
) -> torch.Tensor:
    """``||(Q(X) - X) W^T||^2`` a row, with ``gram = W^T W`` of all readers."""
    error = fake_channels(rows, scale, zero, bits) - rows
    return ((error @ gram) * error).sum() / max(rows.shape[0], 1)


def clip_channels(
    rows: torch.Tensor, weights: Sequence[torch.Tensor], bits: int, shares: Sequence[float], *,
    symmetric: bool = False, cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Grids of the columns after their outliers are cut off: ``(scale [K], zero_point [K], share)``.

    Of ``shares`` the one is taken whose grids leave the least error in the products: columns are clipped to their
    quantiles ``1 - share`` and ``share``, and what is left gets its grids by ``ranges.fit_channels``.
    A share of one clips nothing.

    Args:
        rows: ``[N, K]``.
        weights: of all readers, floats, ``[out, K]`` each.
        symmetric: all zero points in the middle.
        cap: a column's range is at most this many times the median range; both ends shrink alike.
    """
    x, weights = rows.float().cpu(), [w.detach().float().cpu() for w in weights]
    gram = sum((w.t() @ w for w in weights), torch.zeros(x.shape[1], x.shape[1]))
    ordered = x.sort(dim=0).values
    best: tuple[float, Any] = (math.inf, None)
    for share in sorted(shares, reverse=True):  # of equal ones the one that clips least
        low, high = ranges.quantiles(ordered, [1 - share]), ranges.quantiles(ordered, [share])
        scale, zero = ranges.fit_channels(x if share == 1 else x.clamp(low, high), bits, symmetric=symmetric)
        if cap is not None:
            scale = scale * (cap * scale.median() / scale).clamp(max=1)
        error = float(channel_error(x, gram, scale.float(), zero.float(), bits))
        if error < best[0]:
            best = (error, (scale, zero, share))
    return best[1]  # type: ignore[no-any-return]


def learn_bounds(
    rows: torch.Tensor, weights: Sequence[torch.Tensor], scale: torch.Tensor, zero_point: torch.Tensor, bits: int, *,
    steps: int = 500, lr: float = 5e-3, start: float = 0.98, batch: int = 2048, symmetric: bool = False,
    generator: torch.Generator | None = None,
) -> Bounds:
    """Learn a lower and an upper bound for every column, independently, for the least error of the products.

    ``low = m - sigmoid(p) (m - min)`` and ``high = m + sigmoid(r) (max - m)`` around the median ``m``; they start at
    the given grids, at most ``start`` of the way to the extremes. The best iterate is kept, measured on all rows; if
    none is better than the given grids, those are.

    Args:
        rows: ``[N, K]``.
        weights: of all readers, ``[out, K]`` each.
        scale, zero_point: the grids to start from and to compare with, ``[K]``.
        batch: rows a step.
        symmetric: one bound a column and the zero point in the middle.
        generator: draws the rows.
    """
    x, weights = rows.float().cpu(), [w.detach().float().cpu() for w in weights]
    gram = sum((w.t() @ w for w in weights), torch.zeros(x.shape[1], x.shape[1]))
    top, middle = (1 << bits) - 1, x.median(0).values
    low, high = x.amin(0), x.amax(0)
    if symmetric:
        middle, high = torch.zeros_like(middle), torch.maximum(-low, high)
        low = -high

    def grid(p: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        upper = middle + r.sigmoid() * (high - middle)
        if symmetric:
            s = upper.clamp(min=_LEAST) / ((1 << (bits - 1)) - 1)
            return s, torch.full_like(s, float(1 << (bits - 1)))
        lower = middle - p.sigmoid() * (middle - low)
        s = (upper - lower).clamp(min=_LEAST) / top
        z = -lower / s
        return s, z + (z.round() - z).detach()

    given = scale.float(), zero_point.float()
    before = float(channel_error(x, gram, *given, bits))
    ends = -given[1] * given[0], (top - given[1]) * given[0]
    p = _logit((middle - ends[0]) / (middle - low).clamp(min=_LEAST), start).requires_grad_()
    r = _logit((ends[1] - middle) / (high - middle).clamp(min=_LEAST), start).requires_grad_()
    optimizer = torch.optim.Adam([r] if symmetric else [p, r], lr=lr)
    best = (before, scale.double(), zero_point.double())
    for number in range(steps + 1):
        if number % max(1, steps // 20) == 0 or number == steps:
            with torch.no_grad():
                s, z = grid(p, r)
                s, z = s.double(), z.round().double()
                error = float(channel_error(x, gram, s.float(), z.float(), bits))
            best = (error, s, z) if error < best[0] else best
        if number == steps:
            break
        drawn = x if x.shape[0] <= batch else x[torch.randint(x.shape[0], (batch,), generator=generator)]
        optimizer.zero_grad()
        with torch.enable_grad():  # whatever mode the caller is in
            channel_error(drawn, gram, *grid(p, r), bits).backward()
        optimizer.step()
    return Bounds(best[1], best[2], before, best[0])


def _logit(share: torch.Tensor, most: float) -> torch.Tensor:
    share = share.clamp(0.02, most)
    return torch.log(share / (1 - share)) if most < 1 else torch.full_like(share, math.inf)


@torch.no_grad()
def refit(weight: torch.Tensor, rows: torch.Tensor, coded: torch.Tensor, share: float) -> torch.Tensor:
    """The weight ``[out, K]`` that gives on ``coded`` rows what ``weight`` gives on ``rows``, by least squares.

    Minimises ``||X W^T - C V^T||^2 + mu ||V - W||^2`` with ``mu = share * mean(diag(C^T C))``, in float64.
    """
    x, c, w = (t.detach().double().cpu() for t in (rows, coded, weight))
    second = c.t() @ c
    mu = share * float(second.diagonal().mean())
    damped = second + mu * torch.eye(second.shape[0], dtype=torch.float64)
    return torch.linalg.solve(damped, (w @ (x.t() @ c) + mu * w).t()).t().to(weight.device, weight.dtype)
