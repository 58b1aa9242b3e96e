"""Quantized numbers whose step depends on token and channel at once; computed in floats, in front of a product.

A step for each element on the axis of the sum cannot be taken out of an integer product, so this part gives the
dequantized numbers. The range of a channel is that of all tokens of the call: what a token becomes then depends on the
others. That is for analysis; with stored columns, every token stands alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from hfq.errors import QuantizationError
from hfq.layers.parts import OnlinePart

__all__ = ["FLOOR", "JointRange", "only_rows"]

FLOOR = 1e-5
_ROWS: ContextVar[torch.Tensor | None] = ContextVar("hfq_rows", default=None)


@contextmanager
def only_rows(mask: torch.Tensor | None) -> Iterator[None]:
    """Inside the block the ranges of channels count the rows where ``mask`` (bool ``[B, T]``) is true: no padding."""
    token = _ROWS.set(mask)
    try:
        yield
    finally:
        _ROWS.reset(token)


class JointRange(OnlinePart):
    """``round(x / step) * step`` with ``step = t ** exponent * c ** (1 - exponent) / (2 ** (bits - 1) - 1)``.

    ``t`` is the largest magnitude of the token, ``c`` that of the channel in the call, both at least 1e-5.

    Args:
        n: size of the last axis.
        bits: width of the signed codes.
        exponent: share of the token in the step, 0 to 1.
        columns: ``[n]``, stored ``c ** (1 - exponent)``, or ``True`` for a parameter that is filled later. Codes are
            then clamped and the output is that of ``x / columns``, whose counterpart is in the weight.
    """

    def __init__(
        self, n: int, bits: int, exponent: float, columns: torch.Tensor | bool | None = None, *, device: Any = None
    ) -> None:
        super().__init__()
        if not 2 <= bits <= 8 or not 0 <= exponent <= 1:
            raise QuantizationError(f"joint ranges of {bits} bits with exponent {exponent}: 2 to 8, and 0 to 1")
        self.n, self.bits, self.exponent = n, bits, float(exponent)
        if columns is None or columns is False:
            self.register_parameter("columns", None)
        elif columns is True:
            self.columns = nn.Parameter(torch.empty(n, dtype=torch.float32, device=device), requires_grad=False)
        elif tuple(columns.shape) != (n,) or (not columns.is_meta and not (columns > 0).all()):
            raise QuantizationError(f"column factors of {tuple(columns.shape)}: {n} numbers above zero are needed")
        else:
            self.columns = nn.Parameter(columns.detach().to(torch.float32, copy=True), requires_grad=False)

    @property
    def max_code(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def codes(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``(codes, step)`` of ``x`` ``[rows, n]``: whole numbers, not clamped, in float32; with them ``codes * step``
        is the quantized input."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        token = x.abs().amax(-1, keepdim=True).clamp(min=FLOOR)
        if self.columns is not None:
            step = token.pow(self.exponent) / self.max_code
            x = x / self.columns.to(x.dtype)
        else:
            keep = _ROWS.get()
            seen = x if keep is None or keep.numel() != x.shape[0] else x[keep.reshape(-1).to(x.device)]
            channel = seen.abs().amax(0).clamp(min=FLOOR) if seen.shape[0] else x.new_full((self.n,), FLOOR)
            step = token.pow(self.exponent) * channel.pow(1 - self.exponent) / self.max_code
        value = x / step
        return value + (value.detach().round() - value.detach()), step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., n]`` to the same shape and dtype; gradients pass the rounding."""
        if not x.numel():
            return x
        codes, step = self.codes(x.reshape(-1, self.n))
        if self.columns is not None or _ROWS.get() is not None:
            codes = codes.clamp(-self.max_code, self.max_code)
        return (codes * step).to(x.dtype).view(x.shape)

    def signature(self) -> None:  # ranges of a call depend on which of its rows count
        return None

    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        return y if self.columns is None else (y * self.columns.to(y.dtype)).to(y.dtype)

    def fold(self, weight: torch.Tensor) -> torch.Tensor:
        return self.inverse(weight)

    def unfold(self, weight: torch.Tensor) -> torch.Tensor:
        return weight if self.columns is None else weight / self.columns.to(weight.dtype)

    def describe(self) -> dict[str, Any]:
        stored = self.columns is not None
        return {"kind": "joint_range", "size": self.n, "bits": self.bits, "exponent": self.exponent, "stored": stored}

    def _apply(self, fn: Any, recurse: bool = True) -> JointRange:
        if self.columns is not None:
            moved = fn(self.columns.detach().view(torch.int32)).view(torch.float32)
            self.columns = nn.Parameter(moved, requires_grad=False)
        return self

    def extra_repr(self) -> str:
        stored = ", stored columns" if self.columns is not None else ""
        return f"{self.n}, {self.bits} bits, exponent {self.exponent:g}{stored}"
