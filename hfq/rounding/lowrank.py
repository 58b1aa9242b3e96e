"""Rounding up or down, learned: ``W_hat = s * clamp(floor(W / s) + gate, low, high)`` with a gate in [0, 1] per weight.

The gate is a stretched sigmoid of a number per weight. These numbers are a full matrix, or a low-rank product that
needs ``rank * (rows + columns)`` parameters; either may be added to a frozen start at which the gate is the fractional
part of ``W / s``. A penalty drives the gates to 0 and 1. The step ``s`` is learned too. What is exported is an ordinary
uniform code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hfq.errors import ConfigError
from hfq.formats import PER_TENSOR, Codes, QuantSpec, affine

__all__ = ["HIGH", "LOW", "Bank", "GatedRounding", "Hardening", "gate", "gate_start", "sharpness"]

# The sigmoid is stretched to [LOW, HIGH] and cut at [0, 1], so that gates can reach both ends.
LOW, HIGH = -0.1, 1.1


def gate(logits: torch.Tensor) -> torch.Tensor:
    """The stretched sigmoid, cut to [0, 1]."""
    return torch.sigmoid(logits).mul_(HIGH - LOW).add_(LOW).clamp_(0, 1)


def gate_start(fraction: torch.Tensor) -> torch.Tensor:
    """Logits whose gate is ``fraction`` (in [0, 1])."""
    return -torch.log((HIGH - LOW) / (fraction - LOW) - 1)


def sharpness(
    step: int, steps: int, *, start: float = 20.0, end: float = 2.0, warmup: float = 0.2, linear: bool = False
) -> float | None:
    """Exponent of the penalty in optimiser step ``step`` (from 0): ``None`` (no penalty) in the first part of the
    steps, then from ``start`` to ``end`` on half a cosine, or on a line."""
    begin = warmup * steps
    if step < begin:
        return None
    share = min((step - begin) / max(steps - begin, 1), 1.0)
    return end + (start - end) * (1 - share if linear else 0.5 * (1 + math.cos(math.pi * share)))


@dataclass(frozen=True)
class Hardening:
    """The penalty that drives gates to 0 and 1 over the steps of a course.

    Attributes:
        steps: of the course.
        weight: of the penalty, a sum over weights.
        sharp: its exponent, first and last, on a line.
        warmup: share of the steps without it.
    """

    steps: int
    weight: float
    sharp: tuple[float, float]
    warmup: float

    def over(self, gates: Iterable[Any]) -> Callable[[int], torch.Tensor | None]:
        """The penalty of a step (from 0) over roundings with gates; ``None`` for none."""
        kept = list(gates)

        def value(step: int) -> torch.Tensor | None:
            beta = sharpness(step, self.steps, start=self.sharp[0], end=self.sharp[1], warmup=self.warmup, linear=True)
            if beta is None or not kept:
                return None
            return self.weight * torch.stack([one.penalty(beta) for one in kept]).sum()

        return value


class _GatedRound(torch.autograd.Function):
    """``scale * clamp(floor(w / scale) + gate(logits), low, high)`` on ``[rows, groups, length]``.

    One function instead of a dozen recorded operations: only inputs are kept for the backward pass. The floor is
    straight through, the clamps block. Without ``logits`` the quotient is rounded to the nearest integer. ``hard``
    rounds the gate in the value and keeps the soft gate's gradient.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, w: torch.Tensor, scale: torch.Tensor, logits: torch.Tensor | None, low: torch.Tensor,
        high: torch.Tensor, hard: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(w, scale, logits, low, high)
        ctx.hard = hard
        return _clamped(_integers(w / scale, logits, hard), low, high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        w, scale, logits, low, high = ctx.saved_tensors
        quotient = w / scale
        q = _integers(quotient, logits, ctx.hard)
        clamped = _clamped(q, low, high)
        outside = clamped != q
        grad_scale = grad_logits = None
        if ctx.needs_input_grad[1]:
            # d/ds of s * (floor(w/s) + gate): the straight-through quotient takes its own part away.
            moving = quotient.masked_fill_(outside, 0)
            grad_scale = clamped.sub_(moving).mul_(grad).sum_to_size(scale.shape)
        if logits is not None and ctx.needs_input_grad[2]:
            grad_logits = _slope(logits).mul_(scale).mul_(grad).masked_fill_(outside, 0)
        return None, grad_scale, grad_logits, None, None, None


class _Penalty(torch.autograd.Function):
    """``sum(1 - |2 gate - 1| ** beta)``."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, beta: float) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(logits)
        ctx.beta = beta
        return logits.numel() - (gate(logits).mul_(2).sub_(1).abs_() ** beta).sum()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None]:  # type: ignore[override]
        (logits,) = ctx.saved_tensors
        side = gate(logits).mul_(2).sub_(1)
        slope = side.sign() * (side.abs_() ** (ctx.beta - 1))
        return slope.mul_(_slope(logits)).mul_(-2 * ctx.beta * grad), None


def _integers(quotient: torch.Tensor, logits: torch.Tensor | None, hard: bool) -> torch.Tensor:
    if logits is None:
        return quotient.round()
    return quotient.floor() + ((logits >= 0).to(quotient.dtype) if hard else gate(logits))


def _clamped(q: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return torch.maximum(torch.minimum(q, high), low)


def _slope(logits: torch.Tensor) -> torch.Tensor:
    """Derivative of :func:`gate`, zero where it is cut."""
    s = torch.sigmoid(logits)
    cut = (s <= -LOW / (HIGH - LOW)) | (s >= (1 - LOW) / (HIGH - LOW))
    return (s * (1 - s)).mul_(HIGH - LOW).masked_fill_(cut, 0)


class GatedRounding(nn.Module):
    """A weight whose rounding up or down is learned. Calling it gives the fake-quantized weight.

    Args:
        weight: ``[rows, columns]`` or a convolution weight ``[rows, in_channels, *kernel]`` (quantized as the matrix
            ``[rows, in_channels * kernel]``); kept as a float32 copy that never gets a gradient.
        spec: integer zero points; per tensor, per channel or groups (one learned step each).
        rank: of the product ``left @ right``; ``None`` learns the full matrix, 0 no gates at all (round to nearest, so
            that only the step is learned).
        anchored: start from the fractional part, which makes the first output the weight itself (up to clamping) and
            its hardened form round to nearest. Otherwise every gate starts at one half.
        learn_scale: learn the step; otherwise the grid stays as it starts.
        straight: use hardened gates in the output and pass gradients through the soft ones.
        grid: ``(scale, zero_point)`` to start from; default the min-max grid.
        codes: start from these codes (and their grid) instead of round to nearest; anchored gates only.
        generator: random numbers of ``left``.

    Attributes:
        step: learned factor of the initial scale, ``spec.parameter_shape``.
        left, right: ``[rows, rank]`` and ``[rank, columns]`` of the low-rank form; ``full`` the full matrix.

    Raises:
        ConfigError: float zero points, a negative rank, or a grid of another shape.
    """

    def __init__(
        self, weight: torch.Tensor, spec: QuantSpec, *, rank: int | None = 5, anchored: bool = True,
        learn_scale: bool = True, straight: bool = False, spread: float = 0.01,
        grid: tuple[torch.Tensor, torch.Tensor | None] | None = None, codes: Codes | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if spec.zero_point == "float":
            raise ConfigError("learned rounding needs integer zero points: use zero_point='int'")
        if rank is not None and rank < 0:
            raise ConfigError(f"rank={rank}: None (full), 0 (no gates) or a positive integer")
        if codes is not None and not anchored:
            raise ConfigError("a start from given codes needs anchored gates")
        matrix = weight.detach().float().reshape(weight.shape[0], -1).contiguous().clone()
        self.shape, self.spec, self.rank, self.straight = weight.shape, spec, rank, straight
        self.rows, self.columns = matrix.shape
        scale, zero = (codes.scale, codes.zero_point) if codes is not None else grid or affine.fit(matrix, spec)
        expected = spec.parameter_shape(self.rows, self.columns)
        if tuple(scale.shape) != expected:
            raise ConfigError(f"a grid of {tuple(scale.shape)} for a matrix that needs {expected}")
        low = torch.full(expected, -float(spec.middle), device=matrix.device) if zero is None else -zero.float()
        self.zero_point = zero
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("start", scale.float().clone(), persistent=False)
        # In the layout of the grid once and for all.
        self.register_buffer("matrix", matrix, persistent=False)
        self.step = nn.Parameter(torch.ones(expected, device=matrix.device), requires_grad=learn_scale)
        self.hard = False
        self.left = self.right = self.full = None
        self._make_gates(spread, generator)
        anchor = self._fractions(codes) if anchored and rank != 0 else None
        self.register_buffer("anchor", anchor, persistent=False)

    def _make_gates(self, spread: float, generator: torch.Generator | None) -> None:
        device = self.matrix.device
        if self.rank is None:
            self.full = nn.Parameter(torch.zeros(self.rows, self.columns, device=device))
        elif self.rank:
            left = torch.empty(self.rows, self.rank).normal_(0, spread, generator=generator)
            self.left = nn.Parameter(left.to(device))
            self.right = nn.Parameter(torch.zeros(self.rank, self.columns, device=device))

    def _fractions(self, codes: Codes | None) -> torch.Tensor:
        """Frozen logits of the start: from the fractional parts, or such that hardening gives ``codes``."""
        scale = self.scale().detach()
        quotient = self.matrix / affine.expand(scale, self.columns, self.spec)
        floor = quotient.floor()
        if codes is None:
            return gate_start(quotient - floor)
        up = codes.codes.float() + affine.expand(self.low, self.columns, self.spec) > floor
        # A code further away than the two neighbours cannot be reached: the closer neighbour takes its place.
        part = quotient - floor
        return gate_start(torch.where(up, part.clamp(min=0.55), part.clamp(max=0.45)))

    def scale(self) -> torch.Tensor:
        """The step in float32 with the value it is stored with; straight-through gradient."""
        scale = (self.start * self.step).clamp(min=affine.smallest_scale(self.spec))
        return scale + (scale.detach().to(self.spec.torch_scale_dtype).float() - scale.detach())

    def logits(self) -> torch.Tensor | None:
        """What the gates are computed from, ``[rows, columns]``; ``None`` without gates."""
        if self.rank == 0:
            return None
        if self.full is not None:
            return self.full if self.anchor is None else self.anchor + self.full
        assert self.left is not None and self.right is not None
        return self.left @ self.right if self.anchor is None else torch.addmm(self.anchor, self.left, self.right)

    def _operands(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Weight, scale, logits, lowest and highest code as ``[rows, groups, length]``."""
        logits, low = self.logits(), self.low[..., None]
        if self.spec.group_size == PER_TENSOR or self.spec.groups(self.columns) == 1:
            parts = self.matrix[:, None], None if logits is None else logits[:, None]
        else:
            parts = (
                affine.grouped(self.matrix, self.spec),
                None if logits is None else affine.grouped(logits, self.spec),
            )
        return parts[0], self.scale()[..., None], parts[1], low, low + self.spec.max_code

    def _flat(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(self.rows, -1)[:, : self.columns]

    def forward(self) -> torch.Tensor:
        """The fake-quantized weight, float32, in the shape of the original."""
        with torch.autocast(self.matrix.device.type, enabled=False):
            out = _GatedRound.apply(*self._operands(), self.hard or self.straight)
            return self._flat(out).reshape(self.shape)

    def penalty(self, beta: float) -> torch.Tensor:
        """``sum(1 - |2 gate - 1| ** beta)`` over the weights: zero when all gates are 0 or 1."""
        logits = self.logits()
        return self.step.new_zeros(()) if logits is None else _Penalty.apply(logits, beta)

    @property
    def weights(self) -> int:
        """How many weights have a gate."""
        return 0 if self.rank == 0 else self.rows * self.columns

    def harden(self) -> None:
        """From now on every gate is 0 or 1: the output is what :meth:`codes` stands for."""
        self.hard = True

    @torch.no_grad()
    def codes(self) -> Codes:
        """What is stored, hardened: codes ``[rows, columns]`` on the learned grid."""
        w, scale, logits, low, high = self._operands()
        q = _clamped(_integers(w / scale, logits, True), low, high) - low
        scale = self.scale().to(self.spec.torch_scale_dtype)
        return Codes(self._flat(q).to(torch.uint8), scale, self.zero_point, self.spec)

    @torch.no_grad()
    def statistics(self) -> dict[str, float]:
        """Shares for a report: codes that differ from round to nearest on the initial grid, gates still between."""
        start = self.start.to(self.spec.torch_scale_dtype)
        nearest = affine.encode(self.matrix, start, self.zero_point, self.spec)
        moved = (self.codes().codes != nearest).float().mean()
        found = {"moved_share": float(moved), "step_change": float((self.step - 1).abs().mean())}
        logits = self.logits()
        if logits is not None:
            soft = gate(logits)
            found["soft_share"] = float(((soft > 0.05) & (soft < 0.95)).float().mean())
        return {key: round(value, 6) for key, value in found.items()}


class Bank(nn.Module):
    """Roundings of the matrices of a bank of experts; calling it gives ``[experts, rows, columns]``."""

    def __init__(self, members: Iterable[GatedRounding]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self) -> torch.Tensor:
        return torch.stack([member() for member in self.members])

    def penalty(self, beta: float) -> torch.Tensor:
        return torch.stack([member.penalty(beta) for member in self.members]).sum()

    @property
    def weights(self) -> int:
        return sum(member.weights for member in self.members)

    def harden(self) -> None:
        for member in self.members:
            member.harden()

    def codes(self) -> list[Codes]:
        """The codes of every expert."""
        return [member.codes() for member in self.members]

    def statistics(self) -> dict[str, float]:
        """Means over the experts."""
        rows = [member.statistics() for member in self.members]
        return {key: round(sum(row[key] for row in rows) / len(rows), 6) for key in rows[0]}
