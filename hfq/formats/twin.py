"""Two uniform grids side by side, one fine and one coarse: for tensors with many small numbers and few large ones.

The top bit of a code says which grid, the others hold the magnitude ``q``. The coarse step is the fine step shifted by
``shift`` bits, so a product is two sums of integers, ``fine + (coarse << shift)``, under one scale.

- ``regions="signed"`` (what GELU gives): numbers up to zero on the fine grid, ``-q * step``, numbers above it on the
  coarse one, ``q * step * 2**shift``.
- ``regions="magnitude"`` (what softmax gives): small numbers on the fine grid, ``q * step``, those that lie beyond it
  on the coarse one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from hfq.errors import ConfigError

__all__ = ["TwinSpec", "decode", "encode", "fake", "parts", "scale_of"]


@dataclass(frozen=True)
class TwinSpec:
    """Two uniform grids with one stored step a tensor.

    Args:
        bits: width of a code, 2 to 8; one of them says which grid.
        shift: the coarse step is the fine one times ``2**shift``, 0 to 15.
        regions: "signed" or "magnitude".
    """

    bits: int = 8
    shift: int = 4
    regions: Literal["signed", "magnitude"] = "signed"

    # What layers ask of any format of their inputs.
    dynamic = False
    factor = False
    symmetric = True
    granularity = "tensor"
    group_size = -1

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ConfigError(f"bits={self.bits!r} of a format with two grids: an integer from 2 to 8 is needed")
        if isinstance(self.shift, bool) or not isinstance(self.shift, int) or not 0 <= self.shift <= 15:
            raise ConfigError(f"shift={self.shift!r}: an integer from 0 to 15 is needed")
        if self.regions not in ("signed", "magnitude"):
            raise ConfigError(f"regions={self.regions!r}: 'signed' or 'magnitude'")

    @property
    def top(self) -> int:
        """The largest magnitude on each grid."""
        return (1 << (self.bits - 1)) - 1

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    def to_dict(self) -> dict[str, Any]:
        return {"form": "twin", **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TwinSpec:
        known = sorted(cls.__dataclass_fields__)
        given = {key: value for key, value in data.items() if key != "form"} if isinstance(data, dict) else data
        if not isinstance(given, dict) or data.get("form", "twin") != "twin" or set(given) - set(known):
            raise ConfigError(f"{data!r} is no format with two grids; known fields: {known}")
        return cls(**given)


def scale_of(high: torch.Tensor, spec: TwinSpec) -> torch.Tensor:
    """The fine step with which the coarse grid ends at ``high`` (any shape, above zero)."""
    return high / (spec.top << spec.shift)


def encode(x: torch.Tensor, scale: torch.Tensor, spec: TwinSpec) -> torch.Tensor:
    """Nearest codes, uint8, of ``x`` on the grids with fine step ``scale`` ``[1]``; halves round to even."""
    fine, coarse = _quotients(x.detach(), scale, spec)
    q_fine = fine.round().clamp_(0, spec.top)
    q_coarse = coarse.round().clamp_(0, spec.top)
    return torch.where(_on_coarse(fine, coarse, spec), q_coarse + (spec.top + 1), q_fine).to(torch.uint8)


def parts(codes: torch.Tensor, spec: TwinSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """``(fine, coarse)``, int8 and zero where the other grid holds: ``fine + (coarse << shift)`` is the number."""
    magnitude, coarse = codes & spec.top, codes > spec.top
    fine = magnitude.masked_fill(coarse, 0).to(torch.int8)
    return -fine if spec.regions == "signed" else fine, magnitude.masked_fill(~coarse, 0).to(torch.int8)


def decode(
    codes: torch.Tensor, scale: torch.Tensor, spec: TwinSpec, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """``scale * (fine + (coarse << shift))``: the shape of the codes, rounded once to ``dtype``."""
    fine, coarse = parts(codes, spec)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    whole = fine.to(torch.int32) + (coarse.to(torch.int32) << spec.shift)
    return (whole.to(working) * scale.to(codes.device, working)).to(dtype)


def fake(x: torch.Tensor, scale: torch.Tensor, spec: TwinSpec) -> torch.Tensor:
    """Encode and decode: same shape and dtype; rounding passes gradients straight through, a clamp stops them."""
    fine, coarse = _quotients(x, scale, spec)
    on_coarse = _on_coarse(fine.detach(), coarse.detach(), spec)
    q_fine, q_coarse = (_straight(q).clamp(0, spec.top) for q in (fine, coarse))
    s = scale.to(fine)
    sign = -1.0 if spec.regions == "signed" else 1.0
    return torch.where(on_coarse, q_coarse * (s * 2.0**spec.shift), q_fine * (s * sign)).to(x.dtype)


def _straight(x: torch.Tensor) -> torch.Tensor:
    return x + (x.detach().round() - x.detach()) if x.requires_grad else x.round()


def _quotients(x: torch.Tensor, scale: torch.Tensor, spec: TwinSpec) -> tuple[torch.Tensor, torch.Tensor]:
    working = torch.promote_types(x.dtype, torch.float32)
    inverse = 1 / scale.to(x.device, working)
    fine = x.to(working) * inverse
    return (-fine if spec.regions == "signed" else fine), fine * 2.0**-spec.shift


def _on_coarse(fine: torch.Tensor, coarse: torch.Tensor, spec: TwinSpec) -> torch.Tensor:
    """Above zero; or where the fine grid ends and the coarse one is nearer."""
    if spec.regions == "signed":
        return coarse > 0
    beyond = (fine - spec.top).abs()
    nearer = (coarse.round().clamp(0, spec.top) - coarse).abs() * 2.0**spec.shift
    return (fine > spec.top) & (nearer < beyond)
