"""Perplexity over windows of tokens: the comparison protocol, so that numbers from anywhere can be put side by side."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hfq.errors import DataError

__all__ = ["logits_of", "perplexity", "window_batches"]

Model = nn.Module | Callable[..., Any]


def perplexity(
    model: Model, windows: Sequence[Sequence[int]] | Tensor, *, batch_size: int = 1,
    progress: Callable[[int, str], Any] | None = None,
) -> float:
    """``exp`` of the mean next-token loss inside the windows; no token is predicted across a border.

    Args:
        model: a module, or a function from ``input_ids [B, T]`` to logits ``[B, T, V]`` or to an object with
            ``.logits``.
        windows: token ids ``[W, T]``, all of one length, at least two tokens each.
        batch_size: windows a forward.
        progress: ``progress(total, description)`` opens a bar with ``update()`` and ``close()``.

    Returns:
        The perplexity; losses are computed in float32 and summed in float64, whatever the model computes in.

    Raises:
        DataError: no window, windows of different or too small length, or logits that are not finite.
    """
    batches = window_batches(windows, batch_size)
    total, count = 0.0, 0
    bar = None if progress is None else progress(len(batches), "perplexity")
    for ids in batches:
        logits = logits_of(model, ids)[:, :-1].float()
        targets = ids[:, 1:].to(logits.device)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        if not torch.isfinite(losses).all():
            raise DataError("the model's logits are not finite: a layer overflowed, or its weights are damaged")
        total += losses.double().sum().item()
        count += losses.numel()
        if bar is not None:
            bar.update()
    if bar is not None:
        bar.close()
    mean = total / count
    return math.exp(mean) if mean < 700 else math.inf


@torch.no_grad()
def logits_of(model: Model, ids: Tensor) -> Tensor:
    """Logits ``[B, T, V]`` of ``ids [B, T]``, without a key-value cache, in evaluation mode."""
    if not isinstance(model, nn.Module):
        result = model(ids)
        return result if isinstance(result, Tensor) else result.logits
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    training = model.training
    model.eval()
    try:
        result = model(ids.to(_device(model)), **options)
    finally:
        model.train(training)
    return result if isinstance(result, Tensor) else result.logits


def window_batches(windows: Sequence[Sequence[int]] | Tensor, batch_size: int) -> list[Tensor]:
    """``[B, T]`` batches of the windows.

    Raises:
        DataError: no window, or windows of different or too small length.
    """
    lengths = {len(window) for window in windows}
    if not lengths:
        raise DataError("no window of tokens to evaluate on")
    if len(lengths) > 1 or min(lengths) < 2:
        raise DataError(f"windows have lengths {sorted(lengths)[:5]}: all must have one length of at least 2 tokens")
    ids = torch.as_tensor(windows, dtype=torch.long)
    return list(ids.split(batch_size))


def _device(model: nn.Module) -> torch.device:
    """Where the inputs go: the first parameter that has data."""
    for parameter in model.parameters():
        if not parameter.is_meta:
            return parameter.device
    return torch.device("cpu")
