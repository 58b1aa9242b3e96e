"""Grids whose step, or whose range, is learned together with what they round.

A :class:`LearnedStep` is the step of a stored activation grid: the zero point stays. A :class:`LearnedRange` is the
reach ``R`` and the lower end ``m`` of a grid of ``Q + 1`` points, ``s = R / Q`` and ``z = clip(round(-m / s), 0, Q)``:
both are learned, and zero is a point of the grid whatever they become. :class:`RangedWeight` rounds a weight that is
itself free to move on such a grid. :func:`weight_grid` is for weights whose scale itself is learned, and with it the
zero point if that is a float. Rounding passes gradients straight through, a clamp stops them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hfq.errors import ConfigError
from hfq.formats import ActivationSpec, Codes, QuantSpec, affine
from hfq.formats.activation import SMALLEST_RANGE, Parameters

__all__ = ["LARGEST", "LearnedRange", "LearnedStep", "RangedWeight", "straight", "weight_codes", "weight_grid"]

LARGEST = 1e5  # of a range


class _Straight(torch.autograd.Function):
    """``value``, exactly, with the gradient of ``x``."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return grad, None


straight = _Straight.apply


class LearnedStep(nn.Module):
    """The step of a static activation grid; calling it gives ``(scale [1], zero point [1] or None)``.

    Args:
        spec: static.
        params: where it starts.
        floor: the step never gets smaller; below it, gradients still pass.
    """

    def __init__(self, spec: ActivationSpec, params: Parameters, floor: float = 1e-6) -> None:
        super().__init__()
        self.spec, self.floor = spec, floor
        self.scale = nn.Parameter(params[0].detach().float().reshape(1).clone())
        zero = None if params[1] is None else params[1].detach().float().reshape(1).clone()
        self.register_buffer("zero_point", zero, persistent=False)

    def forward(self) -> Parameters:
        return straight(self.scale, self.scale.detach().clamp(min=self.floor)), self.zero_point

    @torch.no_grad()
    def params(self) -> Parameters:
        """What is stored."""
        scale, zero = self()
        return scale.detach().clone(), zero


class LearnedRange(nn.Module):
    """Reach and lower end of a static activation grid; calling it gives ``(scale [1], zero point [1] or None)``.

    Args:
        spec: static. A symmetric grid has its reach alone.
        params: where it starts.
    """

    def __init__(self, spec: ActivationSpec, params: Parameters) -> None:
        super().__init__()
        self.spec = spec
        scale, zero = params[0].detach().float().reshape(1), params[1]
        self.reach = nn.Parameter(scale * spec.max_code)
        self.low = None if zero is None else nn.Parameter(-zero.detach().float().reshape(1) * scale)

    def forward(self) -> Parameters:
        return _grid(self.reach, self.low, self.spec.max_code)

    @torch.no_grad()
    def params(self) -> Parameters:
        """What is stored."""
        scale, zero = self()
        return scale.detach().clone(), None if zero is None else zero.detach().clone()


def _grid(
    reach: torch.Tensor, low: torch.Tensor | None, levels: int, smallest: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    scale = (reach.clamp(SMALLEST_RANGE, LARGEST) / levels).clamp(min=smallest)
    if low is None:
        return scale, None
    zero = (-low / scale).clamp(0, levels)
    return scale, straight(zero, zero.detach().round())


class RangedWeight(nn.Module):
    """A weight that moves freely, rounded to a grid whose ranges are learned. Calling it gives the rounded weight.

    Args:
        weight: ``[rows, columns]`` or a convolution weight ``[rows, in_channels, *kernel]`` (rounded as the matrix
            ``[rows, in_channels * kernel]``).
        spec: integer zero points, or symmetric; any groups.

    Attributes:
        matrix: ``[rows, columns]``, float32; starts as ``weight``.
        reach, low: of each group's grid, ``spec.parameter_shape``; they start at minimum and maximum, zero included.
    """

    def __init__(self, weight: torch.Tensor, spec: QuantSpec) -> None:
        super().__init__()
        if spec.zero_point == "float":
            raise ConfigError("learned ranges need integer zero points: use zero_point='int'")
        self.shape, self.spec = weight.shape, spec
        matrix = weight.detach().float().flatten(1)
        scale, zero = affine.fit(matrix, spec)
        scale = scale.float()
        self.matrix = nn.Parameter(matrix.clone())
        self.reach = nn.Parameter(scale * spec.max_code)
        self.low = None if zero is None else nn.Parameter(-zero.float() * scale)

    def grid(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale (with the value that is stored) and zero point, float32."""
        scale, zero = _grid(self.reach, self.low, self.spec.max_code, affine.smallest_scale(self.spec))
        return straight(scale, scale.detach().to(self.spec.torch_scale_dtype).float()), zero

    def forward(self) -> torch.Tensor:
        scale, zero = self.grid()
        return affine.fake(self.matrix, scale, zero, self.spec).reshape(self.shape)

    @torch.no_grad()
    def codes(self) -> Codes:
        """What is stored; decoding gives :meth:`forward`."""
        scale, zero = self.grid()
        zero = None if zero is None else zero.to(torch.uint8)
        scale = scale.to(self.spec.torch_scale_dtype)
        return Codes(affine.encode(self.matrix, scale, zero, self.spec), scale, zero, self.spec)


def weight_grid(
    scale: torch.Tensor, zero_point: torch.Tensor | None, spec: QuantSpec, damping: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The grid that a weight is rounded to, for :func:`hfq.formats.affine.fake`: with the values that are stored.

    Args:
        scale: learned, float32, ``spec.parameter_shape``; below the least that can be stored it counts as that.
        zero_point: learned where ``spec.zero_point == "float"``, float32; ``None`` for symmetric grids.
        damping: factor of the gradients of both (LSQ: ``1 / sqrt(weights a scale * highest code)``); values stay.
    """
    stored = scale.detach().clamp(min=affine.smallest_scale(spec)).to(spec.torch_scale_dtype).float()
    used = straight(scale * damping, stored)
    if zero_point is None or spec.zero_point == "int":
        return used, None if zero_point is None else zero_point.detach()
    return used, straight(zero_point * damping, zero_point.detach().to(spec.torch_scale_dtype).float())


@torch.no_grad()
def weight_codes(
    matrix: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, spec: QuantSpec
) -> Codes:
    """What is stored of a ``matrix`` ``[rows, columns]``; decoding gives ``affine.fake`` on :func:`weight_grid`."""
    scale, zero = weight_grid(scale.detach(), None if zero_point is None else zero_point.detach(), spec)
    dtype = torch.uint8 if spec.zero_point == "int" else spec.torch_scale_dtype
    scale, zero = scale.to(spec.torch_scale_dtype), None if zero is None else zero.to(dtype)
    return Codes(affine.encode(matrix, scale, zero, spec), scale, zero, spec)
