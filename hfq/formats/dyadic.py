"""Dyadic numbers: integers with a scale ``mantissa / 2**shift``, and the integer arithmetic that keeps them.

A tensor is ``value = (data - zero_point) * mantissa / 2**shift``. Every function here takes and returns integer tensors
(the fits at the end read float scales once, offline), and there is one rounding rule, frozen:

* ``floor_div`` rounds towards minus infinity, for every sign;
* ``round_div`` rounds to the nearest integer, halves away from zero;
* ``rshift_round(a, k)`` is ``(a + 2**(k-1)) >> k`` with an arithmetic shift: halves towards plus infinity.

Integer arithmetic has no order of summation: results are the same bits on every device and for every batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hfq.errors import QuantizationError

__all__ = [
    "Dyadic", "bit_length", "decode", "fit", "fit_shared", "floor_div", "from_ratio", "isqrt", "round_div",
    "round_div_positive", "rshift_round", "saturate", "shifted",
]

_powers: dict[torch.device, Tensor] = {}


@dataclass(frozen=True)
class Dyadic:
    """An integer tensor with its scale: ``value = (data - zero_point) * mantissa / 2**shift``.

    Attributes:
        data: integer tensor ``[..., C]``.
        mantissa: int64, broadcasts against ``data`` (``[..., 1]`` for one a row); positive.
        shift: int64, as ``mantissa``; may be negative.
        zero_point: integer tensor, or ``None`` for zero.
    """

    data: Tensor
    mantissa: Tensor
    shift: Tensor
    zero_point: Tensor | None = None

    def centred(self) -> Tensor:
        """``data - zero_point`` as int32."""
        data = self.data.to(torch.int32)
        return data if self.zero_point is None else data - self.zero_point.to(torch.int32)


def floor_div(a: Tensor, b: Tensor | int) -> Tensor:
    """``a / b`` rounded towards minus infinity; ``b`` must not be zero."""
    return torch.div(a, b, rounding_mode="floor")


def round_div(a: Tensor, b: Tensor | int) -> Tensor:
    """``a / b`` rounded to nearest, halves away from zero; ``b`` positive, ``|a| + b / 2`` in range of the dtype."""
    half = b // 2 if isinstance(b, int) else b >> 1
    return torch.div(a + a.sign() * half, b, rounding_mode="trunc")


def round_div_positive(a: Tensor, b: Tensor | int) -> Tensor:
    """:func:`round_div` for ``a >= 0``, without the sign."""
    half = b // 2 if isinstance(b, int) else b >> 1
    return torch.div(a + half, b, rounding_mode="trunc")


def rshift_round(a: Tensor, k: Tensor | int) -> Tensor:
    """``(a + 2**(k-1)) >> k`` for ``0 <= k < 63``; ``k = 0`` gives ``a``."""
    if isinstance(k, int):
        return (a + (1 << k - 1)) >> k if k else a
    return (a + ((1 << k) >> 1)) >> k


def shifted(a: Tensor, k: Tensor | int) -> Tensor:
    """``a / 2**k`` for a shift of either sign: :func:`rshift_round`, or an exact left shift.

    A right shift beyond the width gives 0 (or rounds a single half up as the rule says); left shifts must fit.
    """
    if isinstance(k, int):
        return rshift_round(a, min(k, 62)) if k >= 0 else a << -k
    right = k.clamp(0, 62)
    return ((a << (right - k).clamp(0, 62)) + ((1 << right) >> 1)) >> right


def bit_length(a: Tensor) -> Tensor:
    """Bits of ``a >= 0`` without leading zeros, 0 for 0; int64."""
    powers = _powers.get(a.device)
    if powers is None:
        # Never an inference tensor, and on this device whatever the default is: it outlives the block that made it.
        with torch.inference_mode(False):
            powers = torch.tensor([1 << i for i in range(63)], dtype=torch.int64, device=a.device)
        _powers[a.device] = powers
    return torch.bucketize(a.to(torch.int64), powers, right=True)


def isqrt(n: Tensor) -> Tensor:
    """Largest ``r`` with ``r * r <= n`` for int64 ``0 <= n < 2**62``; Newton from above, which only falls."""
    positive = n.clamp_min(1)
    root = 1 << ((bit_length(positive) + 1) >> 1)
    for _ in range(4):  # from at most twice too much; the relative error squares and halves, and stays positive
        root = (root + torch.div(positive, root, rounding_mode="trunc")) >> 1
    root = (root + torch.div(positive, root, rounding_mode="trunc")) >> 1
    return root - (root * root > n).to(n.dtype)


def saturate(a: Tensor, bits: int, signed: bool = True) -> Tensor:
    """``a`` limited to ``bits`` bits: ``-(2**(bits-1) - 1) ... 2**(bits-1) - 1``, or ``0 ... 2**bits - 1``."""
    top = (1 << (bits - 1)) - 1 if signed else (1 << bits) - 1
    return a.clamp(-top if signed else 0, top)


def from_ratio(
    numerator: Tensor, denominator: Tensor | int, shift: Tensor | int, bits: int = 8
) -> tuple[Tensor, Tensor]:
    """``numerator / (denominator * 2**shift)`` as mantissa of ``bits`` bits and shift.

    The mantissa is normalised to ``[2**(bits-1), 2**bits - 1]``.

    Args:
        numerator: int64, positive, below ``2**61``.
        denominator: positive, below ``2**(56 - bits)``.
        shift: of either sign.
        bits: of the mantissa, at most 16.

    Returns:
        ``(mantissa, shift)``, int64.
    """
    high = (1 << bits) - 1
    length = bit_length(numerator)
    raised = numerator << (61 - length)
    if isinstance(denominator, int):
        lift: Tensor | int = 57 - bits - denominator.bit_length()
    else:
        lift = 57 - bits - bit_length(denominator)
    quotient = torch.div(raised, denominator << lift, rounding_mode="trunc")  # 2**(bits+3) to 2**(bits+5)
    over = (quotient > (high << 4) + 7).to(torch.int64) + 4
    mantissa = ((quotient + ((1 << over) >> 1)) >> over).clamp_max(high)
    return mantissa, shift - length - over + (61 - lift)


def decode(number: Dyadic) -> Tensor:
    """The values in float64 (for people and tests: nothing in a model calls it before the output)."""
    data = number.data.double()
    if number.zero_point is not None:
        data = data - number.zero_point.double()
    return data * number.mantissa.double() * torch.exp2(-number.shift.double())


def fit(scale: float, bits: int = 8) -> tuple[int, int]:
    """The nearest dyadic number with a normalised mantissa of ``bits`` bits: ``(mantissa, shift)``.

    Raises:
        QuantizationError: the number is not positive and finite.
    """
    mantissa, shift = fit_shared(torch.tensor([scale], dtype=torch.float64), bits)
    return int(mantissa[0]), shift


def fit_shared(values: Tensor, bits: int = 15, *, up: bool = False) -> tuple[Tensor, int]:
    """Float numbers of either sign as integer mantissas of ``bits`` bits with one shift for all of them.

    The largest has a normalised mantissa; the others as many bits as that leaves, and a nonzero one at least 1.
    Rounded to nearest, or with ``up`` away from zero (a step that must not clip its range).

    Returns:
        ``(mantissas int64, shift)`` with ``values ~ mantissas / 2**shift``.

    Raises:
        QuantizationError: a number is not finite, or all are zero.
    """
    values = values.detach().double().cpu()
    largest = float(values.abs().max()) if values.numel() else 0.0
    if not 0 < largest < float("inf") or not torch.isfinite(values).all():
        raise QuantizationError(f"no dyadic scale for numbers whose largest magnitude is {largest}")
    shift = bits - 1 - int(torch.frexp(torch.tensor(largest, dtype=torch.float64)).exponent) + 1
    rounded = math.ceil(largest * 2.0**shift) if up else math.floor(largest * 2.0**shift + 0.5)
    if rounded > (1 << bits) - 1:
        shift -= 1
    scaled = (values * 2.0**shift).abs()
    mantissa = (scaled.ceil() if up else (scaled + 0.5).floor()).clamp_min(1.0) * values.sign()
    return mantissa.to(torch.int64), shift
