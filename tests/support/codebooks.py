"""What a codebook costs on numbers."""

from __future__ import annotations

import torch

from hfq.formats.codebook import decode, encode


def weighted_error(values: torch.Tensor, table: torch.Tensor, weights: torch.Tensor | None = None) -> float:
    """Mean of ``weights * (value - level)**2``, in float64."""
    wrong = (values.double() - decode(encode(values, table), table).double()).square()
    return float(wrong.mean() if weights is None else (wrong * weights.double()).sum() / weights.double().sum())
