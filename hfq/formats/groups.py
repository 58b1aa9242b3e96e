"""Inputs in groups: every index of one axis belongs to a group with a scale and a zero point of its own.

An input of a product is seen as ``[..., rows, columns]``: columns are what the product sums over (features, head
dimensions, taps of a convolution), rows what it is done for (tokens, output positions). A *bank* is the groups of one
noise level of a denoiser: the axis, a scale and a zero point a group, a label an index. ``x = scale * (code - zero)``
with ``0 <= code < 2**bits``; the range of a group need not contain zero, so the zero point is any whole number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from hfq.errors import ConfigError
from hfq.formats.bitpack import packed_bytes

__all__ = ["AXES", "LARGEST_ZERO", "Axis", "GroupSpec", "encode", "grid", "largest_zero"]

Axis = Literal["tensor", "rows", "columns"]
AXES: tuple[Axis, ...] = ("tensor", "rows", "columns")
# Zero points are stored as int16.
LARGEST_ZERO = (1 << 15) - 1
# As published: no step is smaller.
SMALLEST_STEP = 1e-8
_LARGEST_AXIS = 1 << 26


@dataclass(frozen=True)
class GroupSpec:
    """The form of the banks of one input.

    Args:
        bits: width of a code, 2 to 8.
        groups: of a bank, 1 to 256.
        axes: of each bank: which axis is in groups; "tensor" has one scale, that of group 0.
        rows, columns: lengths of the axes; rows may be 0 where no bank groups them.
    """

    bits: int = 8
    groups: int = 8
    axes: tuple[Axis, ...] = ("tensor",)
    rows: int = 0
    columns: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (("bits", 2, 8), ("groups", 1, 256), ("rows", 0, _LARGEST_AXIS),
                                ("columns", 0, _LARGEST_AXIS)):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ConfigError(f"{name}={value!r} of inputs in groups: an integer from {low} to {high} is needed")
        if not isinstance(self.axes, tuple) or not self.axes or set(self.axes) - set(AXES):
            raise ConfigError(f"axes={self.axes!r} of inputs in groups: one of {AXES} for every bank")
        if any(axis != "tensor" and not self.length(axis) for axis in self.axes):
            raise ConfigError(f"inputs in groups along {set(self.axes)} need the length of that axis: {self}")

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    @property
    def label_bits(self) -> int:
        """Width of a stored label."""
        return max(1, (self.groups - 1).bit_length())

    @property
    def label_bytes(self) -> int:
        """Bytes of all labels, packed bank after bank as one row of codes."""
        return packed_bytes(sum(map(self.length, self.axes)), self.label_bits)

    def length(self, axis: Axis) -> int:
        """Labels of a bank along ``axis``."""
        return {"tensor": 0, "rows": self.rows, "columns": self.columns}[axis]

    def start(self, index: int) -> int:
        """Where the labels of bank ``index`` begin."""
        return sum(map(self.length, self.axes[:index]))

    def to_dict(self) -> dict[str, Any]:
        """JSON only; the axes as one letter a bank."""
        letters = "".join(axis[0] for axis in self.axes)
        return {"form": "groups", "bits": self.bits, "groups": self.groups, "axes": letters, "rows": self.rows,
                "columns": self.columns}  # fmt: skip

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> GroupSpec:
        """Inverse of :meth:`to_dict`.

        Raises:
            ConfigError: it is none.
        """
        known = {"form", "bits", "groups", "axes", "rows", "columns"}
        if not isinstance(data, dict) or set(data) - {"form"} != known - {"form"} or not isinstance(data["axes"], str):
            raise ConfigError(f"{data!r} is no format of inputs in groups; its fields: {sorted(known)}")
        names: dict[str, Axis] = {axis[0]: axis for axis in AXES}
        if set(data["axes"]) - set(names):
            raise ConfigError(f"axes={data['axes']!r} of inputs in groups: letters {''.join(names)} are known")
        axes = tuple(names[letter] for letter in data["axes"])
        return cls(data["bits"], data["groups"], axes, data["rows"], data["columns"])


def largest_zero(columns: int, bits: int) -> int:
    """The largest zero point with which sums over ``columns`` products with signed bytes fit 32 bits."""
    return max(1, min(LARGEST_ZERO, (1 << 31) // (128 * max(columns, 1)) - (1 << bits)))


def grid(
    low: torch.Tensor, high: torch.Tensor, bits: int, largest: int = LARGEST_ZERO
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point over ``[low, high]``, any shape: ``scale = (high - low) / (2**bits - 1)``, ``zero =
    round(-low / scale)``. Zero is not forced into the range.

    A range that is far from zero and narrow is widened until its zero point is at most ``largest``; one number alone is
    exact (its scale is its size).

    Returns:
        ``(scale, zero_point)`` float32, the latter whole.
    """
    low, high = low.float(), high.float()
    far = torch.maximum(low.abs(), high.abs())
    scale = ((high - low) / ((1 << bits) - 1)).clamp(min=SMALLEST_STEP)
    scale = torch.maximum(scale, far / max(largest - 1, 1))
    single = low == high
    scale = torch.where(single, torch.where(far > 0, far, torch.ones_like(far)), scale)
    zero = (-low * (1 / scale)).round_()
    return scale, torch.where(single, (low < 0).to(zero.dtype), zero)


def encode(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 of ``x``, ``clamp(round(x / scale) + zero, 0, 2**bits - 1)``; the parameters broadcast to ``x``.

    Computed in float32 (float64 of float64), the quotient as ``x * (1 / scale)``.
    """
    working = torch.promote_types(x.dtype, torch.float32)
    q = (x.to(working) * (1 / scale.to(working))).round_()
    return q.add_(zero.to(working)).clamp_(0, (1 << bits) - 1).to(torch.uint8)
