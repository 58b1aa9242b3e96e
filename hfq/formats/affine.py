"""The affine integer format, 1 to 8 bits: fit a grid to numbers, encode, decode, fake-quantize.

All functions take the matrix as ``[rows, in_features]`` and group along the last axis. Scales are rounded to the dtype
in which they are stored before any code is computed, so that decoding gives exactly what was optimised.
"""

from __future__ import annotations

import torch

from hfq.errors import QuantizationError
from hfq.formats.spec import PER_TENSOR, Codes, QuantSpec

__all__ = [
    "SMALLEST_SCALE", "decode", "dequantize", "encode", "expand", "fake", "fit", "fit_range", "grouped", "quantize",
    "smallest_scale",
]  # fmt: skip

# The smallest normal float16: below it a stored scale loses precision, and zero would divide by zero.
SMALLEST_SCALE = 2.0**-14


def smallest_scale(spec: QuantSpec) -> float:
    """The least scale that the grid can store in full precision, with room for ``1 / scale`` and for products."""
    return SMALLEST_SCALE if spec.torch_scale_dtype == torch.float16 else 2.0**-100


def grouped(x: torch.Tensor, spec: QuantSpec, pad: float = 0.0) -> torch.Tensor:
    """View ``[rows, in_features]`` as ``[rows, groups, length]``; a ragged last group is filled with ``pad``."""
    rows, in_features = x.shape
    length, groups = spec.group_length(in_features), spec.groups(in_features)
    if groups * length != in_features:
        x = torch.nn.functional.pad(x, (0, groups * length - in_features), value=pad)
    return x.reshape(rows, groups, length)


def expand(parameter: torch.Tensor, in_features: int, spec: QuantSpec) -> torch.Tensor:
    """Repeat one number a group (``[rows, groups]``) to one number an element (``[rows, in_features]``)."""
    if parameter.shape[-1] == 1:
        return parameter.expand(*parameter.shape[:-1], in_features)
    return parameter.repeat_interleave(spec.group_length(in_features), dim=-1)[..., :in_features]


def extremes(w: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest element of each group, zero included; shape ``spec.parameter_shape``."""
    g = grouped(w, spec)  # padding with zero is harmless: zero is in every range
    low, high = g.amin(-1).clamp(max=0), g.amax(-1).clamp(min=0)
    if spec.group_size == PER_TENSOR:
        low, high = low.amin().reshape(1, 1), high.amax().reshape(1, 1)
    return low, high


def fit_range(low: torch.Tensor, high: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero point of the grid that covers ``[low, high]``, which must contain zero.

    Symmetric grids use ``scale = max|w| / (2**(bits-1) - 1)`` (at one bit: ``max|w|``); asymmetric grids
    ``(high - low) / (2**bits - 1)``. A group that is all zero gets scale 1, so that its codes decode to exact zeros.
    """
    dtype = spec.torch_scale_dtype
    reach = torch.maximum(-low, high) if spec.symmetric else high - low
    scale = reach / (max(spec.middle - 1, 1) if spec.symmetric else spec.max_code)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale.clamp(min=smallest_scale(spec))).to(dtype)
    if not torch.isfinite(scale).all():
        largest = float(reach.max())
        raise QuantizationError(f"a range of {largest:.3g} does not fit {spec.scale_dtype} scales: use 'float32'")
    if spec.symmetric:
        return scale, None
    zero = -low / scale.to(low.dtype)
    if spec.zero_point == "float":
        return scale, zero.to(dtype)
    return scale, zero.round().clamp(0, spec.max_code).to(torch.uint8)


def fit(w: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Min-max grid of each group of ``w`` ``[rows, in_features]``: ``(scale, zero_point)``.

    Raises:
        QuantizationError: ``w`` is not a non-empty matrix, is not finite, or a scale does not fit its dtype.
    """
    if w.dim() != 2 or not w.numel():
        raise QuantizationError(f"a tensor of shape {tuple(w.shape)}: a non-empty matrix [rows, in_features] is needed")
    if not torch.isfinite(w).all():
        raise QuantizationError("the tensor to quantize has NaN or infinite elements")
    return fit_range(*extremes(w.detach().float(), spec), spec)


def _element_grid(
    scale: torch.Tensor, zero_point: torch.Tensor | None, in_features: int, spec: QuantSpec, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | float]:
    s = expand(scale.to(dtype), in_features, spec)
    z = float(spec.middle) if zero_point is None else expand(zero_point.to(dtype), in_features, spec)
    return s, z


def encode(w: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, spec: QuantSpec) -> torch.Tensor:
    """Codes (uint8) of the nearest grid points of a finite ``w`` ``[rows, in_features]``; halves round to even."""
    dtype = torch.float64 if w.dtype == torch.float64 else torch.float32
    s, z = _element_grid(scale, zero_point, w.shape[-1], spec, dtype)
    # An integer zero point is added after rounding, as the integer kernels do; a fractional one shifts the grid itself.
    q = (w.to(dtype) / s + z).round() if spec.zero_point == "float" else (w.to(dtype) / s).round() + z
    return q.clamp_(0, spec.max_code).to(torch.uint8)


def decode(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, spec: QuantSpec,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """``scale * (code - zero_point)``, computed in float32 (float64 if asked for) and rounded once to ``dtype``."""
    working = torch.float64 if dtype == torch.float64 else torch.float32
    s, z = _element_grid(scale, zero_point, codes.shape[-1], spec, working)
    return (codes.to(working) - z).mul_(s).to(dtype)


def fake(w: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, spec: QuantSpec) -> torch.Tensor:
    """Quantize and dequantize with a straight-through gradient: 1 inside the range, 0 where the code is clamped."""
    s, z = _element_grid(scale, zero_point, w.shape[-1], spec, torch.float32)
    x = w.float() / s
    q = x + (x.round() - x).detach() + z if spec.zero_point == "int" else (x + z) + ((x + z).round() - (x + z)).detach()
    return ((q.clamp(0, spec.max_code) - z) * s).to(w.dtype)


def quantize(w: torch.Tensor, spec: QuantSpec) -> Codes:
    """Round to nearest on the min-max grid."""
    scale, zero_point = fit(w, spec)
    return Codes(encode(w, scale, zero_point, spec), scale, zero_point, spec)


def dequantize(codes: Codes, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The matrix that ``codes`` stands for, ``[rows, in_features]``."""
    return decode(codes.codes, codes.scale, codes.zero_point, codes.spec, dtype)
