"""What every kernel must compute, in plain torch: unpack, dequantize, multiply in float32 (float64 where asked).

Written from the definition, without a thought for speed; it serves every shape and every device.
"""

from __future__ import annotations

import torch

from hfq.formats import affine, bitpack
from hfq.kernels.packed import Layout, PackedWeight, Runtime, register

__all__ = ["dequantize", "embedding", "linear"]


def dequantize(weight: PackedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``scale * (code - zero_point)``, ``[out_features, in_features]``: in float32 (or float64), then cast."""
    codes = bitpack.unpack(weight.qweight, weight.spec.bits, weight.in_features)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    return affine.decode(codes, weight.scale, weight.zero_point, weight.spec, working).to(dtype)


def linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, *, accumulate: torch.dtype = torch.float32
) -> torch.Tensor:
    """``x @ W.T + bias``: ``x`` ``[..., in_features]`` to ``[..., out_features]`` of the dtype of ``x``.

    Args:
        accumulate: dtype of the dequantized weight and of the product; tests pass float64.
    """
    y = torch.nn.functional.linear(x.to(accumulate), dequantize(weight, accumulate))
    if bias is not None:
        y = y + bias.to(accumulate)
    return y.to(x.dtype)


def embedding(ids: torch.Tensor, weight: PackedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows ``ids`` (any shape ``[...]``) of the dequantized matrix: ``[..., in_features]``."""
    return dequantize(weight, dtype)[ids]


def _make(packed: PackedWeight, dtype: torch.dtype) -> Runtime:
    tensors = {"qweight": packed.qweight, "scale": packed.scale}
    if packed.zero_point is not None:
        tensors["zero_point"] = packed.zero_point
    return Runtime(
        "canonical", tensors, packed.spec, packed.in_features, packed.out_features, dtype, "canonical codes",
        packed.name,
    )


# The canonical form as a layout: for backends that read the codes as they are stored.
register("canonical", Layout(
    make=_make,
    canonical=lambda runtime: runtime.tensors["qweight"],
    dequantize=lambda runtime, dtype: dequantize(runtime.packed(), dtype),
))
