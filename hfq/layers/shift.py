"""A fixed vector that is added to the input of a product, and whose effect the layer's bias takes out again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hfq.errors import QuantizationError
from hfq.layers.parts import OnlinePart

__all__ = ["ChannelShift"]


class ChannelShift(OnlinePart):
    """``y = x + shift`` on the last axis: the same vector for every token. Float16, whatever the model is cast to.

    No weight undoes a shift: the layer's bias holds ``-W shift``, with ``W`` as the layer multiplies it.

    Args:
        shift: ``[n]``, finite in float16; or ``n`` itself for a parameter that is filled later.
        device: of an empty vector.
    """

    def __init__(self, shift: torch.Tensor | int, *, device: Any = None) -> None:
        super().__init__()
        if isinstance(shift, int):
            shift = torch.empty(shift, dtype=torch.float16, device=device)
        elif shift.dim() != 1 or (not shift.is_meta and not torch.isfinite(shift.half()).all()):
            raise QuantizationError(f"a shift of shape {tuple(shift.shape)}: a vector of numbers that float16 can hold")
        self.n = shift.shape[0]
        self.shift = nn.Parameter(shift.detach().to(torch.float16, copy=True), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., n]`` to the same shape and dtype."""
        return (x + self.shift.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)

    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        return (y - self.shift.to(torch.promote_types(y.dtype, torch.float32))).to(y.dtype)

    def fold(self, weight: torch.Tensor) -> torch.Tensor:
        return weight

    def unfold(self, weight: torch.Tensor) -> torch.Tensor:
        return weight

    def describe(self) -> dict[str, Any]:
        return {"kind": "channel_shift", "size": self.n}

    def _apply(self, fn: Any, recurse: bool = True) -> ChannelShift:
        data = self.shift.detach()
        self.shift = nn.Parameter(fn(data.view(torch.int16)).view(torch.float16), requires_grad=False)
        return self

    def extra_repr(self) -> str:
        return str(self.n)
