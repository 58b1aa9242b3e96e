"""A weight whose input channels are in two halves, each rounded on a grid of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hfq.formats import Codes, QuantSpec
from hfq.rounding.lowrank import GatedRounding

__all__ = ["HalvedRounding"]


class HalvedRounding(nn.Module):
    """Two :class:`GatedRounding` side by side. Calling it gives the fake-quantized weight in its original shape.

    Args:
        weight: ``[rows, in_channels, ...]``.
        at: input channels of the first half.
        grids: of the halves; default their min-max grids.
        options: of both roundings.
    """

    def __init__(
        self, weight: torch.Tensor, spec: QuantSpec, at: int, *, grids: tuple[Any, Any] = (None, None), **options: Any
    ) -> None:
        super().__init__()
        self.at, self.spec = at, spec
        self.first = GatedRounding(weight[:, :at], spec, grid=grids[0], **options)
        self.second = GatedRounding(weight[:, at:], spec, grid=grids[1], **options)

    @property
    def halves(self) -> tuple[GatedRounding, GatedRounding]:
        return self.first, self.second

    @property
    def weights(self) -> int:
        """How many weights have a gate."""
        return self.first.weights + self.second.weights

    def forward(self) -> torch.Tensor:
        return torch.cat([self.first(), self.second()], 1)

    def penalty(self, beta: float) -> torch.Tensor:
        return self.first.penalty(beta) + self.second.penalty(beta)

    def harden(self) -> None:
        for half in self.halves:
            half.harden()

    def codes(self) -> tuple[Codes, Codes]:
        """What is stored, half by half."""
        return self.first.codes(), self.second.codes()

    def statistics(self) -> dict[str, float]:
        """Means over the weights of both halves."""
        share = self.first.weights / self.weights if self.weights else 0.5
        one, other = self.first.statistics(), self.second.statistics()
        return {key: round(share * one[key] + (1 - share) * other[key], 6) for key in one}
