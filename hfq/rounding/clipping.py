"""Round to nearest on a range that is learned: two factors a group cut the largest and the smallest weight.

The weight may be another one at every call (a transformed weight, on its way to being learned itself): gradients flow
to it, through the rounding and through its extremes.
"""

from __future__ import annotations

import torch
from torch import nn

from hfq.errors import ConfigError, QuantizationError
from hfq.formats import Codes, QuantSpec, affine
from hfq.formats.spec import PER_TENSOR

__all__ = ["ClippedRounding", "round_clamped"]


class _RoundClamped(torch.autograd.Function):
    """``scale * clamp(round(w / scale), low, high)``; one function, so that only the quotient is kept."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx, w: torch.Tensor, scale: torch.Tensor, low: torch.Tensor, high: torch.Tensor
    ) -> torch.Tensor:
        quotient = w / scale
        ctx.save_for_backward(quotient, scale, low, high)
        return torch.maximum(torch.minimum(quotient.round(), high), low).mul_(scale)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        quotient, scale, low, high = ctx.saved_tensors
        rounded = quotient.round()
        clamped = torch.maximum(torch.minimum(rounded, high), low)
        inside = clamped == rounded
        grad_w = grad * inside if ctx.needs_input_grad[0] else None
        grad_scale = None
        if ctx.needs_input_grad[1]:
            grad_scale = (grad * (clamped - quotient * inside)).sum_to_size(scale.shape)
        return grad_w, grad_scale, None, None


def round_clamped(w: torch.Tensor, scale: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """``scale * clamp(round(w / scale), low, high)``, all broadcastable to ``w``.

    The rounding is straight through: the gradient of ``w`` is 1 inside the range and 0 where the code is clamped; that
    of ``scale`` is ``q - w / scale`` inside and ``q`` where clamped. ``low`` and ``high`` are constants.
    """
    return _RoundClamped.apply(w, scale, low, high)


class ClippedRounding(nn.Module):
    """A weight on the grid of a learned range: ``sigmoid(upper) * max(W)`` to ``sigmoid(lower) * min(W)``.

    Args:
        weight: ``[rows, columns]``; used where a call gives no other one.
        spec: integer zero points. Ranges contain zero, as everywhere in this format.
        init: where both factors start; 4.0 keeps 98.2 percent of the range.
        learn: ``False``: the factors are fixed at one (the min-max range) and there is nothing to learn.

    Calling it gives the fake-quantized weight in float32. Scales are rounded to the dtype in which they are stored
    inside the forward pass (straight-through), so what is optimised is what :meth:`codes` exports, bit by bit.

    Raises:
        ConfigError: float zero points, or a weight that is no matrix.
    """

    matrix: torch.Tensor

    def __init__(self, weight: torch.Tensor, spec: QuantSpec, init: float = 4.0, *, learn: bool = True) -> None:
        super().__init__()
        if spec.zero_point != "int":
            raise ConfigError("a learned range needs integer zero points: zero_point='int'")
        if weight.ndim != 2 or not weight.numel():
            raise ConfigError(f"a weight of shape {tuple(weight.shape)}: a non-empty matrix is needed")
        self.spec = spec
        self.register_buffer("matrix", weight.detach().float(), persistent=False)
        shape = spec.parameter_shape(*weight.shape)
        start = torch.full(shape, float(init), device=weight.device)
        self.upper = nn.Parameter(start) if learn else None
        self.lower = nn.Parameter(start.clone()) if learn else None

    def _grid(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale ``[rows, groups]`` (as stored, straight through) and zero point (no gradient)."""
        spec = self.spec
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        if spec.group_size == PER_TENSOR:
            low, high = low.amin().reshape(1, 1), high.amax().reshape(1, 1)
        if self.upper is not None and self.lower is not None:
            low, high = low * self.lower.sigmoid(), high * self.upper.sigmoid()
        reach = torch.maximum(high, -low) if spec.symmetric else high - low
        scale = reach / (max(spec.middle - 1, 1) if spec.symmetric else spec.max_code)
        # A group that is all zero has scale 1, as in the format.
        scale = torch.where(scale == 0, torch.ones_like(scale), scale.clamp(min=affine.smallest_scale(spec)))
        stored = scale.detach().to(spec.torch_scale_dtype).float()
        scale = scale + (stored - scale.detach())
        if spec.symmetric:
            return scale, None
        return scale, (-low.detach() / scale.detach()).round().clamp(0, spec.max_code)

    def _operands(self, weight: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Weight, scale, lowest and highest integer as ``[rows, groups, length]``."""
        groups = affine.grouped(self.matrix if weight is None else weight.float(), self.spec)
        scale, zero = self._grid(groups)
        low = torch.full_like(scale.detach(), -float(self.spec.middle)) if zero is None else -zero
        return groups, scale[..., None], low[..., None], low[..., None] + self.spec.max_code

    def forward(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The fake-quantized ``weight`` ``[rows, columns]`` (default: the one of the constructor), float32."""
        with torch.autocast(self.matrix.device.type, enabled=False):
            rows, columns = self.matrix.shape
            return round_clamped(*self._operands(weight)).reshape(rows, -1)[:, :columns]

    @torch.no_grad()
    def codes(self, weight: torch.Tensor | None = None) -> Codes:
        """What is stored; decoding it gives :meth:`forward` bit by bit.

        Raises:
            QuantizationError: a range does not fit the dtype of the scales.
        """
        groups, scale, low, high = self._operands(weight)
        if not torch.isfinite(scale).all():
            raise QuantizationError(f"a range of the weight does not fit {self.spec.scale_dtype} scales")
        rows, columns = self.matrix.shape
        numbers = torch.maximum(torch.minimum((groups / scale).round(), high), low) - low
        codes = numbers.reshape(rows, -1)[:, :columns].to(torch.uint8)
        zero = None if self.spec.symmetric else (-low[..., 0]).to(torch.uint8)
        return Codes(codes, scale[..., 0].to(self.spec.torch_scale_dtype), zero, self.spec)
