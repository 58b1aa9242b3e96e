"""Rounding learned through division: ``W_hat = s1 * round(W / (s1 * S))`` with a positive divisor ``S`` per weight.

The logarithm of ``S`` is a full matrix plus a row term (and, for convolutions, an input-channel term), or a low-rank
matrix plus a row and a column term. The grid ``s1`` is learned with it. What is exported is an ordinary uniform code:
``S`` is gone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from hfq.errors import ConfigError
from hfq.formats import Codes, QuantSpec, affine
from hfq.rounding import nearest

__all__ = ["DivisorRounding", "Stack", "divide_and_round", "initial_grid"]


class _DivideAndRound(torch.autograd.Function):
    """``scale * clamp(round(w / (scale * exp(log_divisor))), low, high)`` on ``[rows, groups, length]``.

    One function instead of ten recorded operations: only the quotient is kept for the backward pass. ``w``, ``low`` and
    ``high`` are constants; ``scale``, ``low`` and ``high`` are ``[rows or 1, groups, 1]``. The rounding is straight
    through, the clamp blocks.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx, w: torch.Tensor, scale: torch.Tensor, log_divisor: torch.Tensor, low: torch.Tensor, high: torch.Tensor
    ) -> torch.Tensor:
        quotient = torch.div(w, log_divisor.exp().mul_(scale))
        ctx.save_for_backward(quotient, scale, low, high)
        return _clamped(quotient, low, high).mul_(scale)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        quotient, scale, low, high = ctx.saved_tensors
        rounded = quotient.round()
        clamped = torch.maximum(torch.minimum(rounded, high), low)
        moving = quotient.masked_fill(clamped != rounded, 0).mul_(grad)  # grad * w / divisor, inside the range
        grad_scale = (grad * clamped).sub_(moving).sum_to_size(scale.shape) if ctx.needs_input_grad[1] else None
        grad_log = moving.mul_(scale).neg_() if ctx.needs_input_grad[2] else None
        return None, grad_scale, grad_log, None, None


def _clamped(quotient: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return torch.maximum(torch.minimum(quotient.round(), high), low)


def divide_and_round(
    w: torch.Tensor, scale: torch.Tensor, log_divisor: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> torch.Tensor:
    """``scale * q`` with ``q = clamp(round(w / (scale * exp(log_divisor))), low, high)``; all float32, broadcastable.

    Gradients, with ``D = scale * exp(log_divisor)``: for ``log_divisor`` ``-scale * w / D`` inside the range and 0
    where ``q`` is clamped; for ``log(scale)`` ``scale * (q - w / D)`` inside and ``scale * q`` where clamped.
    """
    return _DivideAndRound.apply(w, scale, log_divisor.expand_as(w), low, high)


def initial_grid(
    weight: torch.Tensor, spec: QuantSpec, *, clipping: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Where the grid starts: the min-max range (symmetric: ``s1 = 2 max|W| / (2**bits - 1)``), or with ``clipping`` the
    range width and zero point of least ``|W - Q(W)|**2.4``; shapes ``spec.parameter_shape``."""
    if clipping:
        return nearest.grid_of(weight, spec, clip="mse2d", max_shrink=0.99)
    scale, zero = affine.fit(weight, spec)
    if spec.symmetric:
        empty = ~(affine.extremes(weight.detach().abs().float(), spec)[1] > 0)
        narrow = scale.float() * (max(spec.middle - 1, 1) * 2 / spec.max_code)
        scale = torch.where(empty, scale.float(), narrow.clamp(min=affine.smallest_scale(spec))).to(scale.dtype)
    return scale, zero


def _rounding_to(weight: torch.Tensor, codes: Codes) -> torch.Tensor:
    """The matrix nearest to ``weight`` whose nearest grid points are ``codes``."""
    exact = affine.dequantize(codes)
    # Short of half a step, so that no rounding of the quotient crosses over.
    reach = 0.499 * affine.expand(codes.scale.float(), weight.shape[1], codes.spec)
    return exact + torch.minimum(torch.maximum(weight - exact, -reach), reach)


class DivisorRounding(nn.Module):
    """A weight whose rounding is learned by element-wise division. Calling it gives the fake-quantized weight.

    Args:
        weight: ``[rows, columns]`` or a convolution weight ``[rows, in_channels, *kernel]``; kept as a float32 copy.
        spec: integer zero points; per tensor, per channel or groups (one learned scale each). A convolution weight
            is quantized as the matrix ``[rows, in_channels * kernel]``.
        grid: ``(scale, zero_point)`` to start from; default :func:`initial_grid`.
        rank: ``None`` learns a full matrix of divisors; an integer the low-rank form ``exp(L U + r + c)``.
        learn_scale: learn ``s1``; otherwise the grid stays as it starts.
        row_factor: learn one factor per output channel (and, for convolutions, per input channel) on top of the full
            matrix. The low-rank form always has its row and column terms.
        generator: random numbers of the low-rank start.
        codes: start from these codes on their grid (any solver's) instead of from round-to-nearest. The constant that
            is divided is then the point nearest to ``weight`` that rounds to them.

    At the start every divisor is exactly 1, so the output is round-to-nearest on the initial grid. Scales are
    rounded to the dtype in which they are stored inside the forward pass (straight-through), so what is optimised is
    what :meth:`codes` exports.

    Raises:
        ConfigError: float zero points, a rank below 1, or a grid of another shape.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        spec: QuantSpec,
        *,
        grid: tuple[torch.Tensor, torch.Tensor | None] | None = None,
        rank: int | None = None,
        learn_scale: bool = True,
        row_factor: bool = True,
        generator: torch.Generator | None = None,
        codes: Codes | None = None,
    ) -> None:
        super().__init__()
        if spec.zero_point != "int":
            raise ConfigError("learned divisors need integer zero points: zero_point='int'")
        if weight.ndim < 2:
            raise ConfigError(f"a weight of at least two axes is needed, got shape {tuple(weight.shape)}")
        self.spec, self.shape, self.rank = spec, weight.shape, rank
        matrix = weight.detach().float().flatten(1)
        self.rows, self.columns = matrix.shape
        if codes is not None:
            grid = (codes.scale, codes.zero_point)
            matrix = _rounding_to(matrix, codes)
        scale, zero = initial_grid(matrix, spec) if grid is None else grid
        expected = spec.parameter_shape(self.rows, self.columns)
        if tuple(scale.shape) != expected:
            raise ConfigError(f"a grid of shape {tuple(scale.shape)} does not fit the weight: {expected} is needed")
        self.zero_point = zero
        self.register_buffer("matrix", matrix.clone(), persistent=False)
        self.register_buffer("start", scale.float(), persistent=False)
        low = torch.full_like(self.start, -float(spec.middle)) if zero is None else -zero.float()
        self.register_buffer("low", low, persistent=False)
        device = matrix.device
        # The logarithm of s1 relative to its start: zero at the start, so that the start is exact in every dtype.
        self.log_scale = nn.Parameter(torch.zeros(expected, device=device), requires_grad=learn_scale)
        if rank is None:
            self._full(weight, row_factor, device)
        else:
            self._low_rank(rank, generator, device)

    def _full(self, weight: torch.Tensor, row_factor: bool, device: torch.device) -> None:
        self.log_divisor = nn.Parameter(torch.zeros(self.shape, device=device))
        ones = (1,) * (weight.ndim - 2)
        self.log_row = nn.Parameter(torch.zeros(self.rows, 1, *ones, device=device)) if row_factor else None
        # With one input channel (depthwise) the factor would be one scalar for all of the weight.
        with_inputs = row_factor and weight.ndim > 2 and weight.shape[1] > 1
        self.log_input = nn.Parameter(torch.zeros(1, weight.shape[1], *ones, device=device)) if with_inputs else None

    def _low_rank(self, rank: int, generator: torch.Generator | None, device: torch.device) -> None:
        if rank < 1:
            raise ConfigError(f"rank={rank}: at least 1")
        self.log_left = nn.Parameter(torch.zeros(self.rows, rank, device=device))
        # Kaiming-uniform with a = sqrt(5): bound 1 / sqrt(fan_in).
        bound = 1 / math.sqrt(self.columns)
        start = torch.empty(rank, self.columns).uniform_(-bound, bound, generator=generator)
        self.log_right = nn.Parameter(start.to(device))
        self.log_row = nn.Parameter(torch.zeros(self.rows, 1, device=device))
        self.log_input = nn.Parameter(torch.zeros(1, self.columns, device=device))

    def log_divisors(self) -> torch.Tensor:
        """``log S`` as a matrix ``[rows, columns]``; ``S`` is what a weight is divided by besides its scale."""
        if self.rank is not None:
            return torch.addmm(self.log_row + self.log_input, self.log_left, self.log_right)
        total = self.log_divisor
        for factor in (self.log_row, self.log_input):
            total = total if factor is None else total + factor
        return total.reshape(self.rows, self.columns)

    def scale(self) -> torch.Tensor:
        """``s1`` in float32 with the value it is stored with; straight-through gradient."""
        scale = (self.start * self.log_scale.exp()).clamp(min=affine.smallest_scale(self.spec))
        return scale + (scale.detach().to(self.spec.torch_scale_dtype).float() - scale.detach())

    def _operands(self) -> tuple[torch.Tensor, ...]:
        """Weight, scale, log divisor, lowest and highest code as ``[rows, groups, length]``."""
        if self.spec.groups(self.columns) == 1:
            parts = (self.matrix[:, None], self.scale()[..., None], self.log_divisors()[:, None])
        else:
            parts = (
                affine.grouped(self.matrix, self.spec),
                self.scale()[..., None],
                affine.grouped(self.log_divisors(), self.spec),
            )
        low = self.low[..., None]
        return (*parts, low, low + self.spec.max_code)

    def forward(self) -> torch.Tensor:
        """The fake-quantized weight, float32, in the shape of the original."""
        with torch.autocast(self.matrix.device.type, enabled=False):
            out = divide_and_round(*self._operands())
            return out.reshape(self.rows, -1)[:, : self.columns].reshape(self.shape)

    @torch.no_grad()
    def _integers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``q`` and ``q`` before the clamp, ``[rows, columns]`` float32."""
        w, scale, log_divisor, low, high = self._operands()
        quotient = torch.div(w, log_divisor.exp().mul_(scale))
        pair = (_clamped(quotient, low, high), quotient.round())
        clamped, rounded = (q.reshape(self.rows, -1)[:, : self.columns] for q in pair)
        return clamped, rounded

    @torch.no_grad()
    def codes(self) -> Codes:
        """What is stored: codes ``[rows, columns]``; decoding them gives :meth:`forward` bit by bit."""
        clamped, _ = self._integers()
        low = affine.expand(self.low, self.columns, self.spec)
        codes = (clamped - low).to(torch.uint8)
        return Codes(codes, self.scale().to(self.spec.torch_scale_dtype), self.zero_point, self.spec)

    def clamped_share(self) -> float:
        """Share of the weights whose code lies at the end of its range because it was cut off."""
        clamped, rounded = self._integers()
        return float((clamped != rounded).float().mean())

    @torch.no_grad()
    def shifts(self) -> torch.Tensor:
        """How many grid steps each code lies from round-to-nearest on the initial grid, int ``[rows, columns]``."""
        clamped, _ = self._integers()
        scale = self.start.to(self.spec.torch_scale_dtype)
        nearest_codes = affine.encode(self.matrix, scale, self.zero_point, self.spec).float()
        return (clamped - affine.expand(self.low, self.columns, self.spec) - nearest_codes).int()


class Stack(nn.Module):
    """Roundings of the matrices of a bank of experts; calling it gives ``[experts, rows, columns]``."""

    def __init__(self, members: Iterable[DivisorRounding]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self) -> torch.Tensor:
        return torch.stack([member() for member in self.members])

    def codes(self) -> list[Codes]:
        """The codes of every expert."""
        return [member.codes() for member in self.members]
