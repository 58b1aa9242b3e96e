"""Learned maps of channels with their inverse: one scale a channel, small blocks, or a full matrix that opens slowly.

A map ``A`` acts on what flows between two sides: what is read becomes ``x A^-1``, the reading weight ``W A^T``. A full
matrix starts on its diagonal; a gradual mask opens it from there, damped by a stability factor, and the masked matrix
is the map everywhere: in the product, in the inverse and in what is stored.
"""

from __future__ import annotations

import torch
from torch import nn

from hfq.errors import ConfigError, QuantizationError

__all__ = ["LEAST", "Diagonal", "MaskedMatrix", "RotaryBlocks", "bandwidth", "gradual_mask", "truncate_"]

# Entries that are not zero are kept at least this far from it.
LEAST = 1e-2


@torch.no_grad()
def truncate_(entries: torch.Tensor, least: float = LEAST) -> torch.Tensor:
    """Lift every entry with ``0 < |a| < least`` to ``sign(a) * least``, in place; exact zeros stay."""
    small = (entries != 0) & (entries.abs() < least)
    return entries.copy_(torch.where(small, torch.sign(entries) * least, entries))


def bandwidth(size: int, epoch: int, epochs: int) -> int:
    """How far from the diagonal (exclusive) a matrix of ``size`` is open in ``epoch`` 0..epochs-1: 1 to ``size``."""
    if not 0 <= epoch < epochs:
        raise ConfigError(f"epoch {epoch} of {epochs}")
    return size if epochs == 1 else (size - 1) * epoch // (epochs - 1) + 1


def gradual_mask(size: int, width: int, factor: float, **options: object) -> torch.Tensor:
    """``[size, size]``: 1 on the diagonal, ``factor`` less than ``width`` away from it, 0 elsewhere."""
    index = torch.arange(size, device=options.get("device"))  # type: ignore[arg-type]
    away = (index[:, None] - index).abs()
    dtype = options.get("dtype", torch.float32)
    mask = torch.where(away < width, factor, 0.0).to(dtype)  # type: ignore[arg-type]
    return mask.masked_fill_(away == 0, 1.0)


class Diagonal(nn.Module):
    """One scale a channel: ``A = diag(scale)``, ``[n]``."""

    def __init__(self, start: torch.Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(start.detach().float().clone())

    def truncate_(self) -> None:
        truncate_(self.scale)

    def open(self, epoch: int, epochs: int) -> None:
        """Nothing opens."""

    def effective(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.scale.to(dtype)

    def pair(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """``(A, A^-1)`` as vectors ``[n]``."""
        scale = self.effective(dtype)
        return scale, 1 / scale

    def condition(self) -> float:
        """Ratio of the largest and the smallest scale."""
        size = self.scale.detach().double().abs()
        return float(size.max() / size.min())


class MaskedMatrix(nn.Module):
    """A bank of full matrices under one gradual mask: ``A = raw * mask``, ``[banks, n, n]``.

    Args:
        start: diagonal ``[banks, n]``; off it the raw matrices start at zero.
        factor: what entries off the diagonal are damped with (the stability factor).

    A matrix starts with its diagonal open only; :meth:`open` sets the band of an epoch.
    """

    width: torch.Tensor

    def __init__(self, start: torch.Tensor, factor: float) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.diag_embed(start.detach().float()))
        self.factor = float(factor)
        self.size = start.shape[-1]
        # A buffer, so that a snapshot of the best epoch has the mask that belongs to it.
        self.register_buffer("width", torch.tensor(1))
        self._mask: tuple[object, torch.Tensor] | None = None

    def truncate_(self) -> None:
        truncate_(self.raw)

    def open(self, epoch: int, epochs: int) -> None:
        """Open the band of ``epoch``."""
        self.width.fill_(bandwidth(self.size, epoch, epochs))

    def mask(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The mask that holds now, ``[n, n]``."""
        key = (int(self.width), self.factor, dtype, self.raw.device)
        if self._mask is None or self._mask[0] != key:
            self._mask = key, gradual_mask(self.size, key[0], self.factor, dtype=dtype, device=self.raw.device)
        return self._mask[1]

    def effective(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """``A``, never the raw matrix."""
        return self.raw.to(dtype) * self.mask(dtype)

    def pair(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """``(A, A^-1)``, ``[banks, n, n]``.

        Raises:
            QuantizationError: a matrix is singular.
        """
        matrix = self.effective(dtype)
        try:
            return matrix, torch.linalg.inv(matrix)
        except torch.linalg.LinAlgError as error:
            raise QuantizationError(f"a learned matrix cannot be inverted: {error}") from error

    @torch.no_grad()
    def condition(self) -> float:
        """Largest condition number over the bank (infinite where it is singular or not finite)."""
        matrix = self.effective(torch.float64)
        if not torch.isfinite(matrix).all():
            return float("inf")
        values = torch.linalg.svdvals(matrix)
        return float((values[..., 0] / values[..., -1]).max())


class RotaryBlocks(nn.Module):
    """One 2 x 2 block ``[[a, -b], [b, a]]`` a rotary pair: it commutes with the rotation of the pair.

    ``start`` ``[n]`` is ``a``; ``b`` starts at zero.
    """

    opened: torch.Tensor

    def __init__(self, start: torch.Tensor, factor: float) -> None:
        super().__init__()
        self.a = nn.Parameter(start.detach().float().clone())
        self.b = nn.Parameter(torch.zeros_like(self.a))
        self.factor = float(factor)
        self.register_buffer("opened", torch.tensor(False))

    def truncate_(self) -> None:
        truncate_(self.a)
        truncate_(self.b)

    def open(self, epoch: int, epochs: int) -> None:
        """The one entry off the diagonal opens with the second column of a gradual mask of two."""
        self.opened.fill_(bandwidth(2, epoch, epochs) > 1)

    def effective(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """``[n, 2, 2]``."""
        a, b = self.a.to(dtype), self.b.to(dtype) * (self.factor if bool(self.opened) else 0.0)
        return torch.stack((torch.stack((a, -b), -1), torch.stack((b, a), -1)), -2)

    def pair(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """``(A, A^-1)``: the inverse of such a block is its transpose over ``a^2 + b^2``."""
        matrix = self.effective(dtype)
        size = matrix[:, 0, 0] ** 2 + matrix[:, 0, 1] ** 2
        return matrix, matrix.mT / size[:, None, None]

    @torch.no_grad()
    def condition(self) -> float:
        """Ratio of the largest and the smallest stretch."""
        matrix = self.effective(torch.float64)
        size = (matrix[:, 0, 0] ** 2 + matrix[:, 0, 1] ** 2).sqrt()
        return float(size.max() / size.min())
