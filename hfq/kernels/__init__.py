"""How packed weights multiply: one entry point an operation, the fastest backend that can serve it behind it."""

from __future__ import annotations

from typing import Literal

import torch

from hfq.formats import affine, bitpack
from hfq.kernels.layouts import LAYOUTS
from hfq.kernels.packed import PackedWeight, Runtime

__all__ = ["PackedWeight", "Runtime", "dequantize", "embedding", "linear", "prepare"]


def prepare(packed: PackedWeight, *, dtype: torch.dtype, memory: Literal["compact", "cached"] = "compact") -> Runtime:
    """The runtime form of ``packed`` on the device where it lies."""
    packed.check()
    return LAYOUTS["canonical"].make(packed, dtype)


def _runtime(weight: PackedWeight | Runtime, dtype: torch.dtype) -> Runtime:
    return weight if isinstance(weight, Runtime) else LAYOUTS["canonical"].make(weight, dtype)


def linear(x: torch.Tensor, weight: PackedWeight | Runtime, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ W.T + bias`` on packed codes: ``x`` ``[..., in_features]`` to ``[..., out_features]``, dtype of ``x``."""
    runtime = _runtime(weight, x.dtype)
    return LAYOUTS[runtime.layout].linear(x, runtime, bias)


def dequantize(weight: PackedWeight | Runtime, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The matrix ``[out_features, in_features]`` that the codes stand for."""
    runtime = _runtime(weight, dtype)
    return LAYOUTS[runtime.layout].dequantize(runtime, dtype)


def embedding(ids: torch.Tensor, packed: PackedWeight, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Rows ``ids`` of the matrix, unpacking only those: ``[...]`` to ``[..., in_features]`` (default: scale dtype)."""
    flat = ids.reshape(-1)
    codes = bitpack.unpack(packed.qweight[flat], packed.spec.bits, packed.in_features)
    per_tensor = packed.scale.shape[0] == 1 and packed.out_features != 1
    scale = packed.scale if per_tensor else packed.scale[flat]
    zero = packed.zero_point if packed.zero_point is None or per_tensor else packed.zero_point[flat]
    rows = affine.decode(codes, scale, zero, packed.spec, torch.float32)
    return rows.to(dtype or packed.scale.dtype).reshape(*ids.shape, packed.in_features)
