"""Channels made symmetric around zero and smoothed into the weights behind them: what a symmetric grid wants to see."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hfq.errors import ConfigError, DataError

__all__ = ["FLOOR", "centre", "smooth"]

# Of scales and of the magnitudes that they come from.
FLOOR = 1e-5


def centre(rows: torch.Tensor, tail: float = 0.0) -> torch.Tensor:
    """The middle of each column's range, float64 ``[K]``.

    Args:
        rows: ``[N, K]``.
        tail: share of the elements that is left out at either end.
    """
    if not 0 <= tail < 0.5:
        raise ConfigError(f"tail={tail}: from 0 to below 0.5")
    if not rows.numel():
        raise DataError("no calibration rows were seen: no channel has a middle")
    x = rows.double()
    if not tail:
        return (x.amax(0) + x.amin(0)) / 2
    ends = torch.quantile(x, torch.tensor([tail, 1 - tail], dtype=x.dtype), dim=0)
    return ends.mean(0)


def smooth(rows: torch.Tensor, weights: Sequence[torch.Tensor], middle: torch.Tensor, alpha: float) -> torch.Tensor:
    """``max |x - middle| ** alpha / max |w| ** (1 - alpha)`` of each column, at least 1e-5; float64 ``[K]``.

    Args:
        rows: ``[N, K]``.
        weights: of all readers, ``[out, K]`` each.
        middle: ``[K]``.
        alpha: 0 to 1: how much of the size of a channel goes into the weights.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha={alpha}: from 0 to 1")
    reach = (rows.double() - middle).abs().amax(0)
    largest = torch.stack([w.detach().double().cpu().abs().amax(0) for w in weights]).amax(0).clamp(min=FLOOR)
    return (reach**alpha / largest ** (1 - alpha)).clamp(min=FLOOR)
