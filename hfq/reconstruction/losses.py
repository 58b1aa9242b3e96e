"""How far an output is from its target. Every loss is a mean over samples (axis 0), so that parts of a mini-batch add
up, and leaves out padded positions.

Shapes: ``pred`` and ``target`` ``[B, ...]`` alike, ``mask`` bool ``[B, T]`` (true where data is) or ``None``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hfq.errors import ConfigError

__all__ = [
    "LOSSES", "Loss", "divergence", "get", "mse", "powers", "relative", "sum_of_squares", "token_relative", "unit_mean",
    "unit_means", "unit_rms", "weighted",
]  # fmt: skip

Loss = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]


def _squares(pred: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared difference in float32, zero where padded, and the number of elements that count in each sample."""
    square = (pred.float() - target.float()).square()
    per_sample = square[0].numel()
    counts = torch.full((len(square),), float(per_sample), device=square.device)
    if mask is not None:
        wide = mask.reshape(*mask.shape, *(1,) * (square.ndim - mask.ndim)).to(square.device)
        square = square * wide
        counts = mask.flatten(1).sum(1).to(square.device) * (per_sample / mask[0].numel())
    return square, counts.clamp(min=1)


def mse(pred: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared error."""
    square, counts = _squares(pred, target, mask)
    return (square.reshape(len(square), -1).sum(1) / counts).mean()


def sum_of_squares(pred: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Squared error summed over axis 1 (tokens, or channels of an image) and averaged over the others."""
    square, _ = _squares(pred, target, mask)
    return square.sum(1).mean() if square.ndim > 1 else square.mean()


def powers(exponent: float, *, over_axis: bool = True) -> Loss:
    """A loss: ``|difference| ** exponent``, summed over axis 1 and averaged over the others (or averaged over all)."""

    def loss(pred: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        square, counts = _squares(pred, target, mask)
        # The root of zero has no slope.
        power = square.clamp(min=1e-30) ** (exponent / 2)
        if over_axis and power.ndim > 1:
            return power.sum(1).mean()
        return (power.reshape(len(power), -1).sum(1) / counts).mean()

    return loss


def relative(pred: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Squared error over the squared target, sample by sample."""
    square, _ = _squares(pred, target, mask)
    size, _ = _squares(target, torch.zeros_like(target), mask)
    return (square.flatten(1).sum(1) / size.flatten(1).sum(1).clamp(min=1e-12)).mean()


def token_relative(pred: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Squared error of each vector (last axis) over its own squared target.

    A few positions with massive activations then weigh no more than any other; with a plain sum they can be all of it.
    """
    square, _ = _squares(pred, target, mask)
    ratio = square.sum(-1) / target.float().square().sum(-1).clamp(min=1e-12)
    if mask is None or ratio.ndim == 1:
        return ratio.mean()
    return (ratio.flatten(1).sum(1) / mask.flatten(1).sum(1).to(ratio.device).clamp(min=1)).mean()


def divergence(pred: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Kullback-Leibler divergence of ``softmax(pred)`` from ``softmax(target)`` over the last axis, in float32; mean
    over tokens."""
    log_target, log_pred = (t.float().log_softmax(-1) for t in (target, pred))
    each = (log_target.exp() * (log_target - log_pred)).sum(-1)
    if mask is None or each.ndim == 1:
        return each.mean()
    kept = mask.to(each.device)
    return ((each * kept).flatten(1).sum(1) / kept.flatten(1).sum(1).clamp(min=1)).mean()


def weighted(weight: torch.Tensor | None = None, *, over_tokens: bool = False) -> Loss:
    """A loss: squared error of every element times a weight (a second derivative), averaged over all elements.

    Args:
        weight: ``[1, ...]`` for all samples alike; ``None``: every sample has weights of its own, and a target holds
            both side by side in its last axis, ``[B, ..., 2 C]``.
        over_tokens: sum over axis 1 and average over the others.
    """

    def loss(pred: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        factor = weight
        if factor is None:
            target, factor = target.chunk(2, -1)
        square, counts = _squares(pred, target, mask)
        square = square * factor.to(square)
        if over_tokens:
            return square.sum(1).mean()
        return (square.reshape(len(square), -1).sum(1) / counts).mean()

    return loss


def unit_rms(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` scaled to a mean square of one; all zeros become ones."""
    size = weight.double().square().mean().sqrt()
    return torch.ones_like(weight) if not size > 0 else (weight.double() / size).to(weight.dtype)


def unit_mean(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` (not negative) scaled to a mean of one; all zeros become ones."""
    return unit_means([weight])[0]


def unit_means(weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """:func:`unit_mean` of several tensors together."""
    size = sum(float(w.double().sum()) for w in weights) / max(sum(w.numel() for w in weights), 1)
    return [torch.ones_like(w) if not size > 0 else (w.double() / size).to(w.dtype) for w in weights]


LOSSES: dict[str, Loss] = {
    "mse": mse,
    "sum": sum_of_squares,
    "relative": relative,
    "token_relative": token_relative,
    "divergence": divergence,
}


def get(loss: str | Loss) -> Loss:
    """A loss by name, or the function itself."""
    if callable(loss):
        return loss
    if loss not in LOSSES:
        raise ConfigError(f"loss={loss!r}: one of {sorted(LOSSES)}, or a function of (pred, target, mask)")
    return LOSSES[loss]
