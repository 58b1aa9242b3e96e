"""The table of runtime layouts: how a backend stores a weight and gives the canonical form back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hfq.kernels import reference
from hfq.kernels.packed import PackedWeight, Runtime

__all__ = ["LAYOUTS", "Layout", "register"]


@dataclass(frozen=True)
class Layout:
    """One way to hold a weight.

    Attributes:
        make: ``(packed, dtype) -> Runtime``.
        canonical: ``runtime -> qweight`` uint8 ``[out_features, bytes]``, bit exact.
        dequantize: ``(runtime, dtype) -> [out_features, in_features]``.
    """

    make: Callable[[PackedWeight, torch.dtype], Runtime]
    canonical: Callable[[Runtime], torch.Tensor]
    dequantize: Callable[[Runtime, torch.dtype], torch.Tensor]


LAYOUTS: dict[str, Layout] = {}


def register(name: str, layout: Layout) -> None:
    """Add a layout; a name is taken once."""
    if name in LAYOUTS:
        raise ValueError(f"layout {name!r} is already registered")
    LAYOUTS[name] = layout


def _make_canonical(packed: PackedWeight, dtype: torch.dtype) -> Runtime:
    tensors = {"qweight": packed.qweight, "scale": packed.scale}
    if packed.zero_point is not None:
        tensors["zero_point"] = packed.zero_point
    return Runtime(
        "canonical", tensors, packed.spec, packed.in_features, packed.out_features, dtype, "canonical codes",
        packed.name,
    )


register("canonical", Layout(
    make=_make_canonical,
    canonical=lambda runtime: runtime.tensors["qweight"],
    dequantize=lambda runtime, dtype: reference.dequantize(runtime.packed(), dtype),
))
