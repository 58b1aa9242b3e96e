"""Logarithmic codes of numbers in ``[0, scale]``: what softmax gives, where most elements are near zero.

Code ``q`` stands for ``scale * 2**(-q / r)`` with ``r = 1`` (base 2) or ``r = 2`` (base sqrt(2)). With base sqrt(2) an
even code is ``scale`` shifted right, an odd one ``scale * sqrt(2)`` shifted right by one more, so that a product with
integers is a few sums of shifted integers and one multiplication for each (:func:`planes`). Zero has no logarithm: with
``zero="reserve"`` the last code is exactly zero and what lies closer to zero than to the smallest magnitude takes it;
with ``"none"`` the smallest magnitude stands for zero too; ``"repo"`` keeps all magnitudes *and* a zero, which is one
state more than the bits hold, so it can be simulated and not stored.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from hfq.errors import ConfigError, QuantizationError

__all__ = ["LogSpec", "Plane", "decode", "encode", "fake", "planes", "table"]


@dataclass(frozen=True)
class LogSpec:
    """A grid of powers below one stored scale a tensor.

    Args:
        bits: width of a code, 2 to 8.
        base: ratio of neighbouring magnitudes: "2" or "sqrt2".
        zero: "reserve" (the last code is zero), "none", or "repo" (one state too many; simulation only, up to 7 bits).
    """

    bits: int = 4
    base: Literal["2", "sqrt2"] = "sqrt2"
    zero: Literal["reserve", "none", "repo"] = "reserve"

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ConfigError(f"bits={self.bits!r} of a logarithmic format: an integer from 2 to 8 is needed")
        if self.base not in ("2", "sqrt2"):
            raise ConfigError(f"base={self.base!r}: '2' or 'sqrt2'")
        if self.zero not in ("reserve", "none", "repo"):
            raise ConfigError(f"zero={self.zero!r}: 'reserve', 'none' or 'repo'")
        if self.zero == "repo" and self.bits == 8:
            raise ConfigError("zero='repo' has 2**bits + 1 states: at 8 bits they do not fit a byte")

    @property
    def steps(self) -> int:
        """Magnitudes from one power of two to the next."""
        return 2 if self.base == "sqrt2" else 1

    @property
    def last(self) -> int:
        """The code of the smallest magnitude."""
        return (1 << self.bits) - (2 if self.zero == "reserve" else 1)

    @property
    def zero_code(self) -> int | None:
        """The code of zero, ``None`` if there is none."""
        return None if self.zero == "none" else self.last + 1

    @property
    def max_code(self) -> int:
        """The largest code; above ``2**bits - 1`` only for ``zero="repo"``."""
        return self.last if self.zero == "none" else self.last + 1

    @property
    def storable(self) -> bool:
        """Whether every code fits ``bits``."""
        return self.max_code < 1 << self.bits

    def to_dict(self) -> dict[str, Any]:
        return {"form": "log", **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LogSpec:
        known = sorted(cls.__dataclass_fields__)
        given = {key: value for key, value in data.items() if key != "form"} if isinstance(data, dict) else data
        if not isinstance(given, dict) or data.get("form", "log") != "log" or set(given) - set(known):
            raise ConfigError(f"{data!r} is no logarithmic format; known fields: {known}")
        return cls(**given)


def table(spec: LogSpec, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What each code stands for with scale one, ``[max_code + 1]``."""
    values = torch.exp2(-torch.arange(spec.last + 1, dtype=torch.float64) / spec.steps)
    if spec.zero_code is not None:
        values = torch.cat([values, values.new_zeros(1)])
    return values.to(dtype)


def encode(x: torch.Tensor, scale: torch.Tensor | float, spec: LogSpec, *, check: bool = True) -> torch.Tensor:
    """Codes uint8 of ``x`` (any shape, not below zero; computed in float32, float64 of float64).

    Args:
        check: look for elements below zero; a caller that has just taken a softmax need not.

    Raises:
        QuantizationError: an element is below zero.
    """
    if check:
        _not_negative(x)
    ratio, exponent = _exponent(x.detach(), scale, spec)
    q = exponent.round().clamp_(0, spec.last)
    if spec.zero == "reserve":
        q = torch.where(ratio < _threshold(spec), float(spec.last + 1), q)
    elif spec.zero == "repo":
        q = torch.where(exponent.round() > spec.last, float(spec.last + 1), q)
    return q.to(torch.uint8)


def decode(
    codes: torch.Tensor, scale: torch.Tensor | float, spec: LogSpec, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """``scale * 2**(-q / steps)``, zero for the code of zero; rounded once to ``dtype``."""
    working = torch.float64 if dtype == torch.float64 else torch.float32
    found = table(spec, working).to(codes.device)[codes.long()]
    return (found * torch.as_tensor(scale).to(codes.device, working)).to(dtype)


def fake(x: torch.Tensor, scale: torch.Tensor | float, spec: LogSpec) -> torch.Tensor:
    """Encode and decode: same shape and dtype.

    Differentiable: the rounding of the exponent passes gradients straight through, so that ``x`` and ``scale`` have the
    gradient of ``scale * 2**(-e)`` at the rounded exponent; clamped elements and zeros have none in ``x``.
    """
    working = torch.promote_types(x.dtype, torch.float32)
    s = torch.as_tensor(scale).to(x.device, working)
    ratio, exponent = _exponent(x, s, spec)
    rounded = exponent + (exponent.round() - exponent).detach()
    value = torch.exp2(-rounded.clamp(0, spec.last) / spec.steps)
    if spec.zero == "reserve":
        value = torch.where(ratio < _threshold(spec), torch.zeros_like(value), value)
    elif spec.zero == "repo":
        value = torch.where(exponent.detach().round() > spec.last, torch.zeros_like(value), value)
    return (value * s).to(x.dtype)


@dataclass(frozen=True)
class Plane:
    """A share of the codes as small integers: the code is ``scale * factor * integers[code]`` where that is not zero.

    Attributes:
        integers: of each code, powers of two from 1 to 128 or zero.
        factor: what the sum over this plane is multiplied with.
    """

    integers: tuple[int, ...]
    factor: float

    def of(self, codes: torch.Tensor) -> torch.Tensor:
        """uint8, shape of ``codes``."""
        return torch.tensor(self.integers, dtype=torch.uint8, device=codes.device)[codes.long()]


def planes(spec: LogSpec) -> list[Plane]:
    """The codes as a sum of planes: ``value(code) == sum(plane.factor * plane.integers[code])``, exactly.

    Shifts to the right become shifts to the left by what is missing to seven, so that sums stay integers; shifts beyond
    seven are planes of their own, and so are the odd codes of base sqrt(2).
    """
    found = []
    for odd in range(spec.steps):
        deepest = -(-spec.last // spec.steps)
        for first in range(odd, deepest + 1, 8):  # an odd code shifts by at least one
            integers = [0] * (spec.max_code + 1)
            for q in range(spec.last + 1):
                shift = -(-q // spec.steps)
                if q % spec.steps == odd and first <= shift < first + 8:
                    integers[q] = 1 << (first + 7 - shift)
            if any(integers):
                factor = 2.0 ** -(first + 7) * (math.sqrt(2) if odd else 1.0)
                found.append(Plane(tuple(integers), factor))
    return found


def _exponent(x: torch.Tensor, scale: torch.Tensor | float, spec: LogSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """``x / scale`` and its exponent before rounding; elements under the smallest magnitude count as half of it."""
    working = torch.promote_types(x.dtype, torch.float32)
    ratio = x.to(working) / torch.as_tensor(scale).to(x.device, working)
    least = spec.last / spec.steps + 2
    floor = max(2.0**-least, torch.finfo(working).tiny)
    exponent = -spec.steps * torch.log2(ratio.clamp(min=floor))
    if 2.0**-least < floor:  # magnitudes that this dtype does not have: no logarithm of zero is to be taken
        exponent = torch.where(ratio < floor, least * spec.steps, exponent)
    return ratio, exponent


def _not_negative(x: torch.Tensor) -> None:
    if x.numel() and bool((x.detach() < 0).any()):
        raise QuantizationError("a logarithmic format has no numbers below zero")


def _threshold(spec: LogSpec) -> float:
    """Under half of the smallest magnitude zero is nearer."""
    return 0.5 * 2.0 ** (-spec.last / spec.steps)
