"""Groups of an optimiser with a learning rate for each layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

__all__ = ["by_scale"]


def by_scale(
    layers: Iterable[tuple[str, Sequence[torch.Tensor], torch.Tensor | None]], factor: float, weight_decay: float
) -> list[dict[str, Any]]:
    """A group for each layer, whose learning rate is ``factor * mean(scale)``.

    A change of a weight matters once it exceeds half a step of the weight's grid, and steps differ between layers. Adam
    does not see a constant factor of the gradient, so the factor belongs to the rate.

    Args:
        layers: ``(name, parameters, scale)``; without a scale it counts as one.
    """
    return [
        {"params": list(parameters), "lr": factor * (1.0 if scale is None else float(scale.detach().mean())),
         "weight_decay": weight_decay, "layer": name}
        for name, parameters, scale in layers
    ]  # fmt: skip
