"""Losses of a part of a model whose errors count by how sharply the prediction bends at its output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hfq.calibration.perturbation import Probe
from hfq.reconstruction import losses
from hfq.reconstruction.samples import SideBySide

__all__ = ["FORMS", "loss_at"]

FORMS = ("average", "sample", "squared", "none")
_SCALE = 10.0  # of the sum over tokens, as published


def loss_at(
    probe: Probe, module: nn.Module, outputs: Sequence[torch.Tensor], form: str = "average", *,
    over_tokens: bool = False,
) -> tuple[losses.Loss, Sequence[torch.Tensor]]:
    """The loss for the output of ``module`` (of the probe's model), and the targets that go with it.

    Args:
        outputs: what it gives, call by call.
        form: of :class:`hfq.calibration.perturbation.Probe`, or "none" for the plain mean square.
        over_tokens: "average" only: sum over tokens and divide by ten, instead of the mean over all elements.

    Weights have a mean of one; where the probe finds no difference at all, every element counts alike.
    """
    if form == "none":
        return losses.mse, outputs
    if form != "average":
        return losses.weighted(), SideBySide(outputs, losses.unit_means(probe.samples(module, form)))
    weight = losses.unit_mean(probe.average(module))
    if not over_tokens:
        return losses.weighted(weight), outputs
    whole = losses.weighted(weight, over_tokens=True)

    def loss(pred: torch.Tensor, target: torch.Tensor, mask: Any = None) -> torch.Tensor:
        return whole(pred, target, mask) / _SCALE

    return loss, outputs
