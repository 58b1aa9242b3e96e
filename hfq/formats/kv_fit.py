"""Fitting the stored parts of a cache format to calibration tokens: ranges of channels, tables of levels.

Tokens are rows ``[tokens, channels]``, channels counted over all heads.
"""

from __future__ import annotations

import torch

from hfq.formats import codebook
from hfq.formats.kv import SideSpec

__all__ = ["ends", "normalised", "tables"]


def ends(x: torch.Tensor, outliers: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Ends of the range of each channel (float16): all but a share ``outliers / 2`` of the tokens on each side."""
    ordered = x.float().sort(0).values
    place = (len(ordered) - 1) * outliers / 2
    below, share = int(place), place - int(place)
    above = min(below + 1, len(ordered) - 1)
    low = ordered[below].lerp(ordered[above], share)
    high = ordered[-1 - below].lerp(ordered[-1 - above], share)
    return low.clamp(-65504, 65504).half(), high.clamp(-65504, 65504).half()


def normalised(
    x: torch.Tensor, spec: SideSpec, low: torch.Tensor | None, high: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers scaled as they are before their code is chosen, the scales ``[tokens or 1, channels or 1]``, and which
    numbers a code is chosen for: not outliers.

    Args:
        low, high: ends of the channels; ``None``: each token has its own range.
    """
    x = x.float()
    if low is None or high is None:
        n = spec.side_slots(x.shape[1])
        low, high = x.topk(n + 1, dim=1, largest=False).values[:, n:], x.topk(n + 1, dim=1).values[:, n:]
    scale = ((high.float() - low.float()) / 2).clamp(min=1e-8).expand_as(x)
    scaled = (x - (high.float() + low.float()) / 2) / scale
    return scaled, scale, scaled.abs() <= 1 if spec.outliers else torch.ones_like(scaled, dtype=torch.bool)


def tables(
    values: torch.Tensor, weights: torch.Tensor | None, bits: int, *, learned: bool, seed: int, iterations: int,
    keep_moments: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels to choose codes with, and levels that codes stand for (other ones with ``keep_moments``).

    Args:
        values, weights: numbers in ``[-1, 1]`` (beyond it they count for the ends), and how much an error counts.
        learned: k-means; else the quantiles of a normal distribution.
    """
    values = values.clamp(-1, 1)
    table = codebook.fit(values, bits, weights, seed=seed, iterations=iterations) if learned else codebook.normal(bits)
    return table, codebook.corrected(values, table) if keep_moments else table
