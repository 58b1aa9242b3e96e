"""Distillation into the biases of packed layers alone: codes and ranges stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hfq.calibration import gradients
from hfq.calibration.capture import quiet
from hfq.errors import QuantizationError
from hfq.layers.conv import QConv2d
from hfq.layers.swap import packed_modules
from hfq.training import loop

__all__ = ["tune"]


class _Biases:
    """An objective of :func:`hfq.training.loop.fit`: divergence from wanted predictions, averaged over the classes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def start(self) -> None:
        """Nothing is prepared."""

    def finish(self) -> None:
        """Gradients are where they belong."""

    def add(self, batch: Mapping[str, Any]) -> tuple[float, int]:
        with torch.enable_grad():
            inputs = {key: value for key, value in batch.items() if key != "wanted"}
            logits = gradients.logits_of(self.model, inputs).float()
            wanted = batch["wanted"].flatten(0, -2).to(logits.device)
            loss = nn.functional.kl_div(logits.log_softmax(-1), wanted, reduction="sum", log_target=True)
            loss = loss / logits.shape[-1]
            loss.backward()
        return float(loss.detach()), logits.shape[0]


def tune(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], wanted: Sequence[torch.Tensor], *, steps: int, lr: float,
    batch_size: int = 50, seed: int = 0,
) -> list[float]:
    """Move the biases of all packed layers so that the model predicts ``wanted``; plain gradient descent.

    Args:
        wanted: log-probabilities of each batch (of :func:`hfq.calibration.gradients.predictions`).
        lr: falls to a tenth in the second half and to a hundredth in the last quarter of the steps.

    Returns:
        The loss of every step. If it did not fall over the data, the biases are what they were.
    """
    layers = {name: layer for name, layer in packed_modules(model).items() if layer._parameters.get("bias") is not None}
    if not layers or not steps:
        return []
    deltas = {name: nn.Parameter(torch.zeros_like(layer.bias, dtype=torch.float32)) for name, layer in layers.items()}
    before = gradients.divergence(model, batches, wanted)
    rows = [{**batch, "wanted": _rows(one, batch)} for batch, one in zip(batches, wanted, strict=True)]
    optimizer = torch.optim.SGD(deltas.values(), lr=lr)
    curve: list[float] = []
    with _added(layers, deltas), quiet(model):
        objective = _Biases(model)
        parts = [(steps // 2, 1.0), (steps // 4, 0.1), (steps - steps // 2 - steps // 4, 0.01)]
        for number, (count, factor) in enumerate(parts):
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            curve += loop.fit(objective, optimizer, rows, steps=count, batch_size=batch_size, micro_batch=batch_size,
                              schedule="constant", seed=seed + number, where="biases")
        after = gradients.divergence(model, batches, wanted)
    if not after < float("inf"):
        raise QuantizationError(f"the loss of tuning biases is {after}: use a smaller learning rate")
    if after < before:
        with torch.no_grad():
            for name, layer in layers.items():
                layer.bias.add_(deltas[name].detach().to(layer.bias.dtype))
    return curve


def _rows(predictions: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
    """Predictions with the samples along axis 0: ``[rows, tokens, classes]``."""
    count = next(v.shape[0] for v in batch.values() if isinstance(v, torch.Tensor))
    return predictions.reshape(count, -1, predictions.shape[-1])


@contextmanager
def _added(layers: Mapping[str, Any], deltas: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Inside, every layer adds its delta to its channels."""
    def hook(layer: Any, delta: nn.Parameter) -> Callable[..., torch.Tensor]:
        def after(_: nn.Module, __: Any, out: torch.Tensor) -> torch.Tensor:
            shape = (-1, *(1,) * (out.ndim - 2)) if isinstance(layer, QConv2d) else (-1,)
            return out + delta.reshape(shape).to(out.dtype)

        return after

    handles = [layer.register_forward_hook(hook(layer, deltas[name])) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
