"""A weight as the sum of two on grids of their own: large central taps, and all the rest.

Branches of a network that were merged into one kernel leave a few huge central taps among small ones, and one scale
for both wipes the small ones out. ``coarse`` holds the central taps rounded to a grid; what is left of the weight,
with what that rounding left of the centre, is ``fine``, on a grid that is as much finer as the rest is smaller. Both
are symmetric, and round as ``floor(x + 0.5)``: with another rule in one place, ties would not add up to the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hfq.errors import QuantizationError
from hfq.formats import Codes, QuantSpec, affine

__all__ = ["Split", "gain", "nearest_symmetric", "split"]

# Scales of zero: every number of the group is, and any scale decodes it exactly.
_NO_SCALE = 1.0


@dataclass
class Split:
    """Two parts of a weight ``[O, I, kh, kw]``: ``fine`` over the whole kernel, ``coarse`` over its central taps.

    ``fine`` is ``[O, I * kh * kw]``, ``coarse`` ``[O, I * taps]``; scales are float32, one an output channel.
    """

    fine: Codes
    coarse: Codes
    taps: tuple[int, int]

    def weight(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight that both stand for together."""
        whole = affine.dequantize(self.fine, torch.float64).view(shape)
        rows, columns = centre_of(shape[2:], self.taps)
        part = affine.dequantize(self.coarse, torch.float64)
        whole[:, :, rows, columns] += part.view(shape[0], shape[1], *self.taps)
        return whole.to(dtype)


def centre_of(kernel: tuple[int, ...], taps: tuple[int, int]) -> tuple[slice, slice]:
    """Where the central taps are in a kernel.

    Raises:
        QuantizationError: the kernel has no such centre.
    """
    if any(t < 1 or t > k or (k - t) % 2 for k, t in zip(kernel, taps, strict=True)):
        raise QuantizationError(f"a kernel {tuple(kernel)} has no centre of {taps} taps")
    first, second = ((k - t) // 2 for k, t in zip(kernel, taps, strict=True))
    return slice(first, first + taps[0]), slice(second, second + taps[1])


def split(weight: torch.Tensor, taps: tuple[int, int] = (1, 1), *, bits: int = 8, per_channel: bool = True) -> Split:
    """Split ``weight`` ``[O, I, kh, kw]``; with ``taps`` the whole kernel, fine is what its rounding leaves.

    Args:
        per_channel: each output channel has a coarse step of its own, else the largest serves all (stored for each).

    Raises:
        QuantizationError: the kernel has no such centre, or the weight is not finite.
    """
    if not torch.isfinite(weight).all():
        raise QuantizationError("the tensor to quantize has NaN or infinite elements")
    rows, columns = centre_of(tuple(weight.shape[2:]), taps)
    rest = weight.detach().double().clone()
    centre = rest[:, :, rows, columns].flatten(1)
    top = (1 << bits - 1) - 1
    reach = centre.abs().amax(1, keepdim=True)
    step = _scale(reach if per_channel else reach.amax().expand_as(reach), top)
    whole = (centre / step.double() + 0.5).floor().clamp_(-top, top)
    rest[:, :, rows, columns] -= (whole * step.double()).view(*weight.shape[:2], *taps)
    spec = QuantSpec(bits, symmetric=True, scale_dtype="float32")
    coarse = Codes((whole + spec.middle).to(torch.uint8), step, None, spec)
    return Split(nearest_symmetric(rest.flatten(1), bits), coarse, taps)


def nearest_symmetric(matrix: torch.Tensor, bits: int) -> Codes:
    """Codes of ``[rows, columns]`` with the step ``max|row| / (2**(bits-1) - 1)``, float32, ``floor(x + 0.5)``."""
    matrix, top = matrix.detach().double(), (1 << bits - 1) - 1
    spec = QuantSpec(bits, symmetric=True, scale_dtype="float32")
    scale = _scale(matrix.abs().amax(1, keepdim=True), top)
    codes = (matrix / scale.double() + 0.5).floor().clamp_(-spec.middle, top) + spec.middle
    return Codes(codes.to(torch.uint8), scale, None, spec)


def _scale(reach: torch.Tensor, top: int) -> torch.Tensor:
    scale = torch.where(reach == 0, torch.full_like(reach, _NO_SCALE), (reach / top).clamp(min=2.0**-100))
    return scale.float()


def gain(weight: torch.Tensor, taps: tuple[int, int] = (1, 1), *, bits: int = 8) -> float:
    """How many times finer the fine grid is than one grid for all: median over the output channels, at least one."""
    found = split(weight, taps, bits=bits)
    shape = weight.shape
    rest = affine.dequantize(found.fine, torch.float64).view(shape).flatten(1).abs().amax(1)
    plain = weight.detach().double().flatten(1).abs().amax(1)
    return float(torch.where(rest > 0, plain / rest.clamp(min=1e-300), torch.full_like(plain, torch.inf)).median())
