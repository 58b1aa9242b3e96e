"""Group scales on two levels: a step for each row, and a small whole number for each group.

``scale[row, group] = step[row] * multiple[row, group]`` with ``1 <= multiple <= levels``. The product with integer
activations then needs one sum of integers a row, with ``(code - zero_point) * multiple`` as the weight, where free
scales need one a group. The stored scales are the products, exact in their dtype, so that nothing in the format
changes: :func:`split` finds the two levels again.
"""

from __future__ import annotations

import torch

from hfq.formats.spec import Codes, QuantSpec

__all__ = ["LEVELS", "levels_for", "snap", "split"]

LEVELS = 16


def levels_for(spec: QuantSpec) -> int:
    """The largest multiple with which every ``(code - zero_point) * multiple`` of the grid fits a signed byte."""
    return min(LEVELS, 127 // (spec.middle if spec.symmetric else spec.max_code))


def snap(scale: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """The nearest scales with two levels: ``[rows, groups]``, same dtype.

    The step is a ``levels``-th of the row's largest scale, rounded up to so few binary digits that its multiples are
    exact. Scales of one group, or of codes too wide for a multiple, come back as they are.
    """
    levels = levels_for(spec)
    if scale.shape[1] < 2 or levels < 2:
        return scale
    digits = {torch.float16: 11, torch.bfloat16: 8}.get(scale.dtype, 24) - (levels - 1).bit_length()
    mantissa, exponent = torch.frexp(scale.double().amax(1, keepdim=True) / levels)
    # Steps below the dtype's normal numbers have fewer digits: there the smallest one is the unit.
    step = torch.ldexp(torch.ceil(torch.ldexp(mantissa, torch.tensor(digits))), exponent - digits)
    unit = torch.finfo(scale.dtype).smallest_normal * torch.finfo(scale.dtype).eps
    step = torch.ceil(step / unit) * unit
    return (step * (scale.double() / step).round().clamp(1, levels)).to(scale.dtype)


def split(scale: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor] | None:
    """``(step float32 [rows], multiple int8 [rows, groups])`` of scales that have two levels, else ``None``."""
    levels = levels_for(spec)
    if scale.dim() != 2 or scale.shape[1] < 2 or levels < 2 or not scale.numel():
        return None
    s = scale.double()
    # As whole numbers of a unit that is small enough for every digit of the row's scales, if their spread allows it.
    _, exponent = torch.frexp(s.amax(1, keepdim=True))
    whole = torch.ldexp(s, 48 - exponent)
    if not torch.isfinite(whole).all() or (whole != whole.round()).any() or (whole < 1).any():
        return None
    numbers = whole.long()
    common = numbers[:, 0].clone()
    for column in numbers.unbind(1)[1:]:
        common = torch.gcd(common, column)
    multiple = numbers // common[:, None]
    if int(multiple.max()) > levels:
        return None
    step = torch.ldexp(common.double(), exponent[:, 0] - 48)
    return step.float(), multiple.to(torch.int8)


def requantize(weight: torch.Tensor, codes: Codes) -> Codes:
    """Codes of ``weight`` on the two-level grid nearest to the grid of ``codes``; round to nearest."""
    from hfq.formats import affine

    scale = snap(codes.scale, codes.spec)
    new = affine.encode(weight.detach().float(), scale, codes.zero_point, codes.spec)
    return Codes(new, scale, codes.zero_point, codes.spec)
