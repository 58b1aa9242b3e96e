"""A weight that is tuned after its rounding was learned: directions stay as they were decided, the weight moves.

``W_hat = s * (clamp(floor(W / s) + up + z, 0, Q) - z)`` with ``up`` 0 or 1 a weight, frozen like scale and zero point;
the floor passes gradients straight through, the clamp stops them.
"""

from __future__ import annotations

import torch
from torch import nn

from hfq.errors import ConfigError
from hfq.formats import Codes, affine

__all__ = ["STARTS", "FrozenRounding"]

STARTS = ("weight", "grid")


class _Whole(torch.autograd.Function):
    """Floor (or nearest integer) with the gradient of its argument."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, nearest: bool) -> torch.Tensor:  # type: ignore[no-untyped-def, override]
        return x.round() if nearest else x.floor()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[no-untyped-def, override]
        return grad, None


class FrozenRounding(nn.Module):
    """A weight with frozen directions of rounding. Calling it gives the rounded weight, in float32.

    Args:
        weight: the float weight ``[rows, columns]``, or of a convolution ``[rows, in_channels, *kernel]``.
        codes: what was learned for it; every code is one of the two neighbours of its weight, or at an end of the grid.
        start: where the tuned weight begins: "weight" at the float weight, with the frozen directions; "grid" at the
            points that ``codes`` stand for, rounded to nearest from there on (directions that are frozen move the codes
            of a weight that went far by half a step).

    Attributes:
        latent: the tuned weight, float32 ``[rows, columns]``.
        up: 0 or 1 a weight (of "grid": nothing).

    Raises:
        ConfigError: zero points are floats, or a code is no neighbour of its weight.
    """

    def __init__(self, weight: torch.Tensor, codes: Codes, start: str = "weight") -> None:
        super().__init__()
        if start not in STARTS or codes.spec.zero_point == "float":
            raise ConfigError(f"start={start!r} (one of {STARTS}), and integer zero points, not {codes.spec}")
        self.shape, self.spec, self.nearest = weight.shape, codes.spec, start == "grid"
        self.stored = (codes.scale, codes.zero_point)
        device = weight.device
        matrix = affine.dequantize(codes).to(device) if self.nearest else weight.detach().float().flatten(1)

        def wide(parameter: torch.Tensor) -> torch.Tensor:
            return affine.expand(parameter.to(device, torch.float32), matrix.shape[1], codes.spec).expand_as(matrix)

        middle = torch.full_like(codes.scale, float(codes.spec.middle), dtype=torch.float32)
        scale, zero = wide(codes.scale), wide(middle if codes.zero_point is None else codes.zero_point)
        self.latent = nn.Parameter(matrix.clone())
        self.register_buffer("scale", scale.contiguous(), persistent=False)
        self.register_buffer("zero", zero.contiguous(), persistent=False)
        held = codes.codes.to(device)
        up = torch.zeros(0, device=device) if self.nearest else held.float() - zero - (matrix / scale).floor()
        self.register_buffer("up", up.clamp_(0, 1), persistent=False)
        if not torch.equal(self.codes().codes, held):
            raise ConfigError("the codes are not those of this weight: some are no neighbours of it")

    def _codes(self) -> torch.Tensor:
        q = _Whole.apply(self.latent / self.scale, self.nearest)
        return (q + self.zero if self.nearest else q + self.up + self.zero).clamp(0, self.spec.max_code)

    def forward(self) -> torch.Tensor:
        """The rounded weight in the shape of the original."""
        return ((self._codes() - self.zero) * self.scale).reshape(self.shape)

    @torch.no_grad()
    def codes(self) -> Codes:
        """What is stored; decoding gives :meth:`forward`."""
        return Codes(self._codes().to(torch.uint8), *self.stored, self.spec)
