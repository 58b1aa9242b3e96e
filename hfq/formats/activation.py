"""Activations on integer grids: one scale a token (or a part of it) or one for the tensor, dynamic or stored.

Codes of an asymmetric grid are unsigned, ``x = scale * (code - zero_point)`` with ``0 <= code < 2**bits`` and an
integer zero point; every range contains zero, so that zero is exact. Codes of a symmetric grid are signed,
``-(2**(bits-1) - 1) <= code <= 2**(bits-1) - 1``, without a zero point. Halves round to even, and the quotient is
``x * (1 / scale)``, as kernels compute it. A token that has a NaN or an infinity gets a scale that is not finite
either, and so do the numbers computed from it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from hfq.errors import ConfigError, QuantizationError

__all__ = [
    "SMALLEST_RANGE", "ActivationCodes", "ActivationSpec", "Parameters", "check_parameters", "dequantize", "fake",
    "quantize", "range_parameters", "row_parameters",
]  # fmt: skip

# Ranges below it are widened to it: a token of zeros (or of noise far below any signal) must not divide by zero.
SMALLEST_RANGE = 1e-6

Parameters = tuple[torch.Tensor, "torch.Tensor | None"]


@dataclass(frozen=True)
class ActivationSpec:
    """How an activation tensor ``[..., features]`` is quantized.

    Args:
        bits: width of a code, 2 to 8.
        symmetric: signed codes without a zero point.
        granularity: "token" one scale (or one a group) for each position of the leading axes, "tensor" one for all.
        group_size: elements of the last axis that share a scale, the last group may be shorter; -1 all of them.
        dynamic: the range comes from the tensor itself; else it is stored (one pair a tensor).
        factor: stored positive numbers that the dynamic range is multiplied with: ``True`` for one, 2 for one for its
            lower and one for its upper end (of asymmetric grids; what lies outside is clamped).
    """

    bits: int = 8
    symmetric: bool = False
    granularity: Literal["token", "tensor"] = "token"
    group_size: int = -1
    dynamic: bool = True
    factor: bool | int = False

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ConfigError(f"activation bits={self.bits!r}: an integer from 2 to 8 is needed")
        if self.granularity not in ("token", "tensor"):
            raise ConfigError(f"granularity={self.granularity!r}: 'token' or 'tensor'")
        size = self.group_size
        if isinstance(size, bool) or not isinstance(size, int) or size < -1 or size == 0:
            raise ConfigError(f"activation group_size={size!r}: -1 (the whole token) or a positive integer")
        for name in ("symmetric", "dynamic", "factor"):
            if not isinstance(getattr(self, name), bool) and (name, getattr(self, name)) != ("factor", 2):
                raise ConfigError(f"{name}={getattr(self, name)!r}: true or false" + (", or 2" * (name == "factor")))
        if self.factor == 2 and self.symmetric:
            raise ConfigError("factor=2: the ends of a symmetric range are one number")
        if self.granularity == "tensor" and size != -1:
            raise ConfigError("one scale for the tensor has no groups: use granularity='token' with group_size")
        if not self.dynamic and (self.granularity != "tensor" or self.factor):
            raise ConfigError("a stored range is one for the tensor (granularity='tensor') and takes no factor")

    @property
    def max_code(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1

    @property
    def min_code(self) -> int:
        return -self.max_code if self.symmetric else 0

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.int8 if self.symmetric else torch.uint8

    def groups(self, features: int) -> int:
        """Number of scales of one token (or of the tensor)."""
        return 1 if self.group_size == -1 else -(-features // self.group_size)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ActivationSpec:
        known = sorted(cls.__dataclass_fields__)
        if not isinstance(data, dict) or set(data) - set(known):
            found = sorted(set(data) - set(known)) if isinstance(data, dict) else data
            raise ConfigError(f"unknown fields {found} of an activation format; known: {known}")
        return cls(**data)


@dataclass
class ActivationCodes:
    """Quantized activations.

    Attributes:
        codes: shape of ``x``; uint8 (asymmetric) or int8 (symmetric).
        scale: float32 (float64 of float64 ``x``), ``[..., groups]`` per token, ``[1]`` per tensor.
        zero_point: like ``scale``, whole numbers in a float dtype; ``None`` when symmetric.
        spec: the grid.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    spec: ActivationSpec


def range_parameters(
    low: torch.Tensor, high: torch.Tensor, spec: ActivationSpec, factor: torch.Tensor | None = None
) -> Parameters:
    """Scale and zero point of the grid over ``[low, high]``, zero included: any shape, float32 or float64.

    Args:
        low, high: smallest and largest number; they are floats of one dtype.
        factor: positive number that the range is multiplied with, or two ``[2]`` for its lower and its upper end.

    Returns:
        ``(scale, zero_point)``; the zero point is a whole number in the dtype of the scale, ``None`` when symmetric.
        Differentiable in ``low``, ``high`` and ``factor`` by the scale; with two factors, whose ends move by
        themselves, by the zero point as well (rounding passes gradients straight through).
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    if spec.factor == 2:
        assert factor is not None
        return _clipped(low * factor[0].to(low.dtype), high.clamp(min=SMALLEST_RANGE) * factor[1].to(low.dtype), spec)
    if spec.symmetric:
        reach, steps = torch.maximum(-low, high).clamp(min=SMALLEST_RANGE), spec.max_code
    else:
        high = high.clamp(min=SMALLEST_RANGE)
        reach, steps = high - low, spec.max_code
    if factor is not None:
        reach = reach * factor.to(reach.dtype)
        low = low * factor.to(low.dtype)
    scale = reach / steps
    if spec.symmetric:
        return scale, None
    with torch.no_grad():
        zero = (-low * (1 / scale)).round_().clamp_(0, spec.max_code)
    return scale, zero


def _clipped(low: torch.Tensor, high: torch.Tensor, spec: ActivationSpec) -> Parameters:
    scale = (high - low) / spec.max_code
    zero = (-low * (1 / scale)).clamp(0, spec.max_code)
    return scale, zero + (zero.detach().round() - zero.detach()) if zero.requires_grad else zero.round()


def row_parameters(x: torch.Tensor, spec: ActivationSpec, factor: torch.Tensor | None = None) -> Parameters:
    """Scale and zero point of ``x`` ``[..., features]`` itself, computed in float32 (float64 of float64).

    Args:
        factor: number of one element (two if ``spec.factor == 2``), needed if and only if ``spec.factor``.

    Returns:
        ``(scale, zero_point)``: ``[..., groups]`` for tokens, ``[1]`` for the tensor; ``zero_point`` is ``None`` for
        symmetric grids.

    Raises:
        QuantizationError: the format is static, or ``factor`` and the format do not agree.
    """
    if not spec.dynamic:
        raise QuantizationError("a static activation format has stored parameters: pass params=(scale, zero_point)")
    if bool(spec.factor) != (factor is not None):
        raise QuantizationError("factor is needed if and only if the activation format has one")
    return range_parameters(*_extremes(_grouped(x.to(_working(x)), spec), spec), spec, factor)


def check_parameters(params: Parameters, spec: ActivationSpec, where: str = "activation", count: int = 1) -> None:
    """Refuse stored parameters that no tensor could have; ``count`` of them.

    Raises:
        QuantizationError: a scale that is not finite and positive, a zero point off the grid, or a wrong shape.
    """
    scale, zero = params
    if scale.numel() != count or (zero is None) != spec.symmetric or (zero is not None and zero.numel() != count):
        number = "one" if count == 1 else str(count)
        raise QuantizationError(f"{where}: a static {spec.bits}-bit format needs {number} scale and, unless symmetric, "
                                f"{number} zero point")
    if scale.is_meta:
        return
    if not (torch.isfinite(scale).all() and (scale > 0).all()):
        wrong = float(scale[~(torch.isfinite(scale) & (scale > 0))][0])
        raise QuantizationError(f"{where}: activation scale {wrong}: a finite number above zero is needed")
    if zero is not None:
        off = (zero < 0) | (zero > spec.max_code) | (zero != zero.float().round())
        if bool(off.any()):
            wrong = float(zero[off][0])
            raise QuantizationError(f"{where}: activation zero point {wrong}: an integer in 0..{spec.max_code}")


def quantize(
    x: torch.Tensor, spec: ActivationSpec, params: Parameters | None = None, factor: torch.Tensor | None = None
) -> ActivationCodes:
    """Nearest codes of ``x`` ``[..., features]``; ``params`` are needed if and only if the format is static."""
    with torch.no_grad():
        scale, zero = _parameters(x, spec, params, factor)
        q = (_grouped(x.to(scale.dtype), spec) * _column(1 / scale, spec)).round_()
        if zero is not None:
            q += _column(zero, spec)
        q = _flat(q.clamp_(spec.min_code, spec.max_code), x, spec)
        return ActivationCodes(q.to(spec.code_dtype), scale, zero, spec)


def dequantize(codes: ActivationCodes, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``scale * (code - zero_point)``: the shape of the codes, rounded once to ``dtype``."""
    q = _grouped(codes.codes.to(codes.scale.dtype), codes.spec)
    if codes.zero_point is not None:
        q = q - _column(codes.zero_point, codes.spec)
    return _flat(q * _column(codes.scale, codes.spec), codes.codes, codes.spec).to(dtype)


def fake(
    x: torch.Tensor, spec: ActivationSpec, params: Parameters | None = None, factor: torch.Tensor | None = None
) -> torch.Tensor:
    """Quantize and dequantize ``x`` ``[..., features]``: same shape and dtype, computed in float32.

    Differentiable: rounding passes gradients straight through, a clamp stops them, and they reach the scale (of a
    dynamic range: the extreme elements), ``params`` and ``factor``. The zero point of a range is constant, unless its
    ends have factors of their own.
    """
    scale, zero = _parameters(x, spec, params, factor)
    v = _grouped(x.to(scale.dtype), spec) * _column(1 / scale, spec)
    q = v + (v.detach().round() - v.detach()) if v.requires_grad else v.round_()
    if zero is None:
        q = q.clamp(spec.min_code, spec.max_code)
    else:
        z = _column(zero, spec)
        q = (q + z).clamp(0, spec.max_code) - z
    return _flat(q * _column(scale, spec), x, spec).to(x.dtype)


def _working(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _parameters(
    x: torch.Tensor, spec: ActivationSpec, params: Parameters | None, factor: torch.Tensor | None
) -> Parameters:
    if params is None:
        return row_parameters(x, spec, factor)
    if spec.dynamic and factor is not None:
        raise QuantizationError("given parameters take no factor")
    scale, zero = params
    dtype = _working(x)
    if (zero is None) != spec.symmetric:
        raise QuantizationError("a zero point is needed if and only if the activation format is asymmetric")
    return scale.to(dtype), None if zero is None else zero.to(dtype)


def _grouped(x: torch.Tensor, spec: ActivationSpec) -> torch.Tensor:
    """``[..., features]`` as ``[..., groups, length]``, filled with zeros; without groups as it is."""
    if spec.group_size == -1:
        return x
    length, missing = spec.group_size, -x.shape[-1] % spec.group_size
    if missing:  # zero is in every range
        x = torch.nn.functional.pad(x, (0, missing))
    return x.unflatten(-1, (-1, length))


def _flat(q: torch.Tensor, like: torch.Tensor, spec: ActivationSpec) -> torch.Tensor:
    return q if spec.group_size == -1 else q.flatten(-2)[..., : like.shape[-1]]


def _column(parameter: torch.Tensor, spec: ActivationSpec) -> torch.Tensor:
    """Parameters in the shape that goes with :func:`_grouped`."""
    return parameter if spec.group_size == -1 else parameter[..., None]


def _extremes(g: torch.Tensor, spec: ActivationSpec) -> tuple[torch.Tensor, torch.Tensor]:
    if not g.numel():  # no token: nothing to quantize, but shapes must fit
        shape = (1,) if spec.granularity == "tensor" else (*g.shape[:-1], *((1,) if spec.group_size == -1 else ()))
        return g.new_zeros(shape), g.new_zeros(shape)
    if spec.granularity == "tensor":
        return g.amin().reshape(1), g.amax().reshape(1)
    if spec.group_size != -1:
        if spec.symmetric:
            high = g.abs().amax(-1)
            return -high, high
        return g.amin(-1), g.amax(-1)
    if spec.symmetric:
        high = g.abs().amax(-1, keepdim=True)
        return -high, high
    return g.amin(-1, keepdim=True), g.amax(-1, keepdim=True)
