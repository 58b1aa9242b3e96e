"""A frozen weight and an update, usually of low rank, that is added before it is rounded: ``Q(W + B A)``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from hfq.formats import Codes, QuantSpec, affine
from hfq.rounding.learned_step import weight_codes, weight_grid

__all__ = ["UpdatedWeight", "rounded", "start"]


def start(
    rows: int, columns: int, r: int, device: Any = None, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the factors of an update start: ``A`` ``[r, columns]`` (Kaiming-uniform with a = sqrt 5) and ``B``
    ``[rows, r]`` (zero), float32."""
    down = torch.empty(r, columns, device="cpu" if generator is not None else device)
    if r:
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
    return down.to(device), torch.zeros(rows, r, device=device)


def rounded(
    latent: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, spec: QuantSpec
) -> torch.Tensor:
    """``latent`` ``[rows, columns]`` as it is decoded once its codes are stored; gradients reach it and the scale."""
    scale, zero = weight_grid(scale, zero_point, spec)
    return affine.fake(latent, scale, zero, spec)


class UpdatedWeight(nn.Module):
    """``Q(W + B A)`` with factors and scales that learn, and ``W`` and the zero points as they are.

    Attributes:
        update: what the change of the weight is made of: ``A`` ``[r, columns]`` and ``B`` ``[rows, r]``, or the change.
        scale: ``spec.parameter_shape``, float32.

    Args:
        matrix: ``W`` ``[rows, columns]``; it is not copied if it is float32.
        spec: its grid. Zero points are integers, or there are none.
        grid: scale and zero point where the grid starts.
        r: rank; 0: the scales alone learn. ``None``: a change of full rank, every weight moves by itself.
        codes: ``W`` is what its codes on the first grid stand for, and is held as those: one byte a weight. They keep
            that grid, whatever the scales become.
        generator: of the factor ``A``.
    """

    def __init__(
        self, matrix: torch.Tensor, spec: QuantSpec, grid: tuple[torch.Tensor, torch.Tensor | None], r: int | None,
        *, codes: bool = False, generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.spec, matrix = spec, matrix.detach().float()
        factors = (torch.zeros_like(matrix),) if r is None else start(*matrix.shape, r, matrix.device, generator)
        self.update = nn.ParameterList([] if r == 0 else [nn.Parameter(factor) for factor in factors])
        scale, zero = grid
        self.scale = nn.Parameter(scale.detach().float().clone())
        self.register_buffer("zero_point", None if zero is None else zero.detach().clone(), persistent=False)
        self._matrix = None if codes else matrix
        self._base = Codes(affine.encode(matrix, scale, zero, spec), scale, zero, spec) if codes else None

    @property
    def matrix(self) -> torch.Tensor:
        """``W``, float32."""
        return affine.dequantize(self._base) if self._base is not None else self._matrix  # type: ignore[return-value]

    def latent(self) -> torch.Tensor:
        """``W + B A``."""
        if not len(self.update):
            return self.matrix
        return self.matrix + (self.update[0] if len(self.update) == 1 else self.update[1] @ self.update[0])

    def forward(self) -> torch.Tensor:
        """``[rows, columns]``, float32."""
        return rounded(self.latent(), self.scale, self.zero_point, self.spec)

    @torch.no_grad()
    def codes(self) -> Codes:
        """What is stored; decoding gives :meth:`forward`."""
        return weight_codes(self.latent(), self.scale, self.zero_point, self.spec)
