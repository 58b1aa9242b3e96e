"""How far a model's answers are from the float model's, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hfq.errors import DataError
from hfq.evaluation.perplexity import Model, logits_of, window_batches

__all__ = ["Agreement", "agreement"]


@dataclass(frozen=True)
class Agreement:
    """Means over all positions of all windows.

    Attributes:
        kl: KL(reference || model) of the next-token distributions, in nats.
        top1: share of positions where both name the same most likely token.
        max_abs: largest absolute difference of two logits.
        tokens: positions compared.
    """

    kl: float
    top1: float
    max_abs: float
    tokens: int


def agreement(
    reference: Model, model: Model, windows: Sequence[Sequence[int]] | Tensor, *, batch_size: int = 1
) -> Agreement:
    """Compare two models on the same windows ``[W, T]``.

    Raises:
        DataError: no window, windows of different length, or vocabularies of different size.
    """
    kl, same, largest, count = 0.0, 0, 0.0, 0
    for ids in window_batches(windows, batch_size):
        wanted = logits_of(reference, ids).float()
        found = logits_of(model, ids).float().to(wanted.device)
        if wanted.shape != found.shape:
            raise DataError(f"logits of shapes {tuple(wanted.shape)} and {tuple(found.shape)} cannot be compared")
        log_p, log_q = wanted.log_softmax(-1), found.log_softmax(-1)
        kl += (log_p.exp() * (log_p - log_q)).sum(-1).double().sum().item()
        same += int((wanted.argmax(-1) == found.argmax(-1)).sum())
        largest = max(largest, torch.max((wanted - found).abs()).item())
        count += ids.numel()
    return Agreement(kl / count, same / count, largest, count)
