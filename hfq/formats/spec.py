"""What a quantized tensor is: its grid (``QuantSpec``) and its content (``Codes``)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from hfq.errors import ConfigError

__all__ = ["PER_CHANNEL", "PER_TENSOR", "Codes", "QuantSpec"]

PER_CHANNEL = -1
PER_TENSOR = 0

_SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class QuantSpec:
    """An affine integer grid: ``value = scale * (code - zero_point)`` with ``0 <= code < 2**bits``.

    Args:
        bits: width of a code, 1 to 8.
        group_size: elements along the last axis that share a scale; ``-1`` one scale a row (per channel),
            ``0`` one scale for the tensor. The last group of a row may be shorter than the others.
        symmetric: the zero point is ``2**(bits-1)`` everywhere and is not stored.
        zero_point: ``"int"`` stores one uint8 a group; ``"float"`` stores it in ``scale_dtype``.
        scale_dtype: the dtype in which scales are stored *and* used, so that what was fitted is what is run.
    """

    bits: int
    group_size: int = PER_CHANNEL
    symmetric: bool = False
    zero_point: Literal["int", "float"] = "int"
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 1 <= self.bits <= 8:
            raise ConfigError(f"bits={self.bits!r}: an integer from 1 to 8 is needed")
        if isinstance(self.group_size, bool) or not isinstance(self.group_size, int) or self.group_size < PER_CHANNEL:
            raise ConfigError(f"group_size={self.group_size!r}: -1 (per channel), 0 (per tensor) or a positive integer")
        if self.zero_point not in ("int", "float"):
            raise ConfigError(f"zero_point={self.zero_point!r}: 'int' or 'float'")
        if self.symmetric and self.zero_point == "float":
            raise ConfigError("symmetric=True has no stored zero point: use zero_point='int'")
        if self.scale_dtype not in _SCALE_DTYPES:
            raise ConfigError(f"scale_dtype={self.scale_dtype!r}: one of {sorted(_SCALE_DTYPES)}")

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid; codes reach from ``-middle`` to ``middle - 1`` around it."""
        return 1 << (self.bits - 1)

    @property
    def torch_scale_dtype(self) -> torch.dtype:
        return _SCALE_DTYPES[self.scale_dtype]

    def group_length(self, in_features: int) -> int:
        """Elements of a row that share a scale (the last group may have fewer)."""
        return in_features if self.group_size <= 0 else min(self.group_size, in_features)

    def groups(self, in_features: int) -> int:
        """Number of scales along a row of ``in_features`` elements (at least one element)."""
        return -(-in_features // self.group_length(in_features))

    def parameter_shape(self, rows: int, in_features: int) -> tuple[int, int]:
        """Shape of the scale (and zero point) of a ``[rows, in_features]`` matrix."""
        return (1, 1) if self.group_size == PER_TENSOR else (rows, self.groups(in_features))

    def with_bits(self, bits: int) -> QuantSpec:
        return replace(self, bits=bits)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> QuantSpec:
        unknown = set(data) - set(cls.__dataclass_fields__)
        if unknown:
            known = sorted(cls.__dataclass_fields__)
            raise ConfigError(f"unknown fields {sorted(unknown)} of a weight format; known: {known}")
        return cls(**data)


@dataclass
class Codes:
    """A quantized matrix: what a rounding method hands to a layer.

    Attributes:
        codes: uint8 ``[rows, in_features]``, each in ``[0, 2**bits)``.
        scale: ``spec.scale_dtype``, ``spec.parameter_shape(rows, in_features)``.
        zero_point: same shape; uint8 (``"int"``) or the scale's dtype (``"float"``); ``None`` when symmetric.
        spec: the grid.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    spec: QuantSpec

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def bits_per_weight(self) -> float:
        """Stored bits per element, with scales and zero points, after packing."""
        from hfq.formats.bitpack import packed_bytes

        rows, in_features = self.codes.shape
        stored = rows * packed_bytes(in_features, self.spec.bits) + self.scale.nbytes
        stored += 0 if self.zero_point is None else self.zero_point.nbytes
        return 8 * stored / self.codes.numel()
