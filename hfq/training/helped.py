"""A weight that is trained with a low-rank helper beside its rounded form: ``Q(W) + (gamma o L) R``.

The helper is added after the quantizer, starts as the error of rounding and loses its rank in phases
(:mod:`hfq.training.decay`) while ``W`` takes over its part. It is never merged: ``Q(W + L R)`` is another weight than
``Q(W) + L R``, and the latter has no codes.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from hfq.calibration import ranks
from hfq.errors import QuantizationError
from hfq.formats import Codes, QuantSpec, affine
from hfq.rounding.learned_step import weight_codes, weight_grid
from hfq.training.decay import Decay, factorise, refactorise

__all__ = ["Grid", "HelpedWeight", "cross", "effective", "first_grid"]

Grid = tuple[torch.Tensor, "torch.Tensor | None"]


def first_grid(matrix: torch.Tensor, spec: QuantSpec) -> Grid:
    """Scale and zero point, float32, of the shrunken range with the least error ``|W - Q(W)| ** 2.4``."""
    from hfq.rounding import nearest  # loading a packed model imports this file, and needs no solver

    scale, zero = nearest.grid_of(matrix, spec, clip="mse", norm=2.4)
    return scale.float(), None if zero is None else zero.float()


def effective(
    latent: torch.Tensor, grid: Grid | None, spec: QuantSpec | None, helper: torch.Tensor | None = None
) -> torch.Tensor:
    """``Q(W) + helper`` ``[rows, columns]``, differentiable in all of them; without a grid nothing is rounded.

    The gradients of scale and zero point are damped by ``1 / sqrt(weights a scale * highest code)`` (LSQ+).
    """
    rounded = latent
    if spec is not None and grid is not None:
        damping = 1 / math.sqrt(spec.group_length(latent.shape[1]) * spec.max_code)
        rounded = affine.fake(latent, *weight_grid(*grid, spec, damping), spec)
    return rounded if helper is None else rounded + helper


@torch.no_grad()
def cross(left: torch.Tensor, right: torch.Tensor, decay: Decay, now: int, then: int) -> None:
    """Take the factors ``L`` and ``R`` in place from phase ``now`` to ``then``: at the start of each phase what is left
    is factorised anew. Components that are gone become zeros."""
    for phase in range(now + 1, then + 1):
        # Singular vectors have no sign of their own: every process takes those of the first.
        for part, new in zip((left, right), ranks.broadcast(refactorise(left, right, decay.ranks[phase])), strict=True):
            part.copy_(new)


class HelpedWeight(nn.Module):
    """A free copy of a weight, its learned grid and its helper; calling it gives what the layer computes with.

    Attributes:
        latent: ``W`` ``[rows, columns]``, float32; starts as ``matrix``.
        scale, zero_point: ``spec.parameter_shape``, float32.
        left, right: ``L`` ``[rows, rank]`` and ``R`` ``[rank, columns]``; ``None`` without a helper.
        alone: compute as if there were no helper.

    Args:
        matrix: ``[rows, columns]``.
        spec: its grid; float zero points are learned.
        decay: of the helper; ``None`` has none.
    """

    def __init__(self, matrix: torch.Tensor, spec: QuantSpec, decay: Decay | None = None) -> None:
        super().__init__()
        matrix = matrix.detach().float()
        self.spec, self.decay, self.alone = spec, decay, False
        scale, zero = first_grid(matrix, spec)
        self.latent, self.scale = nn.Parameter(matrix.clone()), nn.Parameter(scale.clone())
        self.zero_point = None if zero is None else nn.Parameter(zero.clone())
        self.freeze(False)
        self.left = self.right = None
        if decay is not None:
            error = matrix - effective(matrix, (scale, zero), spec)
            self.left, self.right = map(nn.Parameter, factorise(error, decay.rank))
            self.register_buffer("factors", decay.factors(0).to(matrix.device), persistent=False)

    def freeze(self, frozen: bool) -> None:
        """Whether the weight and its grid stay as they are, and only the helper learns. Whole zero points always do."""
        for p in (self.latent, self.scale):
            p.requires_grad_(not frozen)
        if self.zero_point is not None:
            self.zero_point.requires_grad_(not frozen and self.spec.zero_point == "float")

    @property
    def rank(self) -> int:
        """Components that are left."""
        return 0 if self.left is None else int(self.factors.count_nonzero())

    def helper(self) -> torch.Tensor | None:
        """``(gamma o L) R``, or ``None``."""
        if self.alone or not self.rank:
            return None
        return (self.left * self.factors) @ self.right  # type: ignore[operator]

    def forward(self) -> torch.Tensor:
        """``[rows, columns]``, float32."""
        return effective(self.latent, (self.scale, self.zero_point), self.spec, self.helper())

    def advance(self, step: int) -> None:
        """Prepare optimiser step ``step``; a function of that number, called for one after the other.

        Factors that are gone stay as zeros: the parameters of an optimiser keep their shapes.
        """
        if self.decay is None or self.left is None:
            return
        before, now = self.decay.phase(max(step - 1, 0)), self.decay.phase(step)
        if self.decay.ranks[now]:
            cross(self.left, self.right, self.decay, before, now)  # type: ignore[arg-type]
        self.fade(step)

    def fade(self, step: int) -> None:
        """Set the factors of a step, and leave ``L`` and ``R`` as they are (a run that goes on)."""
        if self.decay is not None:
            self.factors.copy_(self.decay.factors(step))

    @torch.no_grad()
    def codes(self) -> Codes:
        """What is stored; decoding gives :meth:`forward`.

        Raises:
            QuantizationError: the helper is not gone.
        """
        if self.rank:
            raise QuantizationError(f"a helper of rank {self.rank} has no codes: train on to step {self.decay.steps}")  # type: ignore[union-attr]
        return weight_codes(self.latent, self.scale, self.zero_point, self.spec)
