"""CPU layout for 5 to 8 bits with one scale a row: int8 ``code - zero``, read by torch's int8 weight operator.

The offset is the row's zero point when every ``code - zero_point`` fits int8 (always up to 7 bits, and for symmetric
8 bits), so that nothing is left to correct after the product.
"""

from __future__ import annotations

import torch

from hfq.formats import bitpack
from hfq.formats.affine import expand
from hfq.kernels import dispatch, reference
from hfq.kernels.cpu_int4 import lost
from hfq.kernels.isa import float_compute, isa
from hfq.kernels.packed import Layout, PackedWeight, Runtime, register
from hfq.kernels.workspace import scratch

__all__ = ["offset_fits"]

_mm = torch.ops.aten._weight_int8pack_mm.default

# The operator reads K in steps of a vector register without a tail (sizes off this grid read out of bounds).
STEP = 64
CHUNK = 1 << 20  # weights that are converted at once


def offset_fits(packed: PackedWeight) -> bool:
    """Whether ``code - zero_point`` of every possible code fits int8."""
    if packed.spec.zero_point == "float":
        return False
    if packed.zero_point is None:
        return True
    if not packed.zero_point.numel():
        return True
    low, high = (int(v) for v in packed.zero_point.aminmax())
    return high <= 128 and packed.spec.max_code - low <= 127


def _padded(size: int) -> int:
    return -(-size // STEP) * STEP


def _offset(scale: torch.Tensor, zero_point: torch.Tensor | None, middle: int, rows: int) -> torch.Tensor:
    if zero_point is None:
        return torch.full((rows, 1), middle, dtype=torch.int16)
    return zero_point[:, :1].to(torch.int16).expand(rows, 1)


def _make(packed: PackedWeight, dtype: torch.dtype) -> Runtime:
    rows, cols = packed.out_features, packed.in_features
    codes = bitpack.unpack(packed.qweight, packed.spec.bits, cols).to(torch.int16)
    weight = torch.zeros(_padded(rows), _padded(cols), dtype=torch.int8)
    weight[:rows, :cols] = codes - _offset(packed.scale, packed.zero_point, packed.spec.middle, rows)
    row_scale = torch.zeros(weight.shape[0], dtype=torch.bfloat16)
    row_scale[:rows] = packed.scale[:, 0]
    tensors = {"weight8": weight, "row_scale": row_scale, "scale": packed.scale}
    if packed.zero_point is not None:
        tensors["zero_point"] = packed.zero_point
    note = f"{packed.spec.bits}-bit codes as int8; row scales again in bfloat16"
    if tuple(weight.shape) != (rows, cols):
        note += f"; padded to {weight.shape[0]} x {weight.shape[1]}"
    return Runtime("int8", tensors, packed.spec, cols, rows, dtype, note, packed.name)


def _codes(runtime: Runtime) -> torch.Tensor:
    weight = runtime.tensors["weight8"][: runtime.out_features, : runtime.in_features].to(torch.int16)
    return (weight + _offset(runtime.scale, runtime.zero_point, runtime.spec.middle, weight.shape[0])).to(torch.uint8)


def _canonical(runtime: Runtime) -> torch.Tensor:
    return bitpack.pack(_codes(runtime), runtime.spec.bits)


def _input(x: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    x = x.to(dtype) if x.dtype != dtype else x
    if x.shape[-1] != width:
        return torch.nn.functional.pad(x, (0, width - x.shape[-1]))
    return x if x.is_contiguous() else x.contiguous()


@dispatch.backend("wna16", "int8pack")
def int8pack(x: torch.Tensor, runtime: Runtime, bias: torch.Tensor | None) -> torch.Tensor:
    """Small M: the fused operator."""
    weight = runtime.tensors["weight8"]
    y = _mm(_input(x, weight.shape[1], torch.bfloat16), weight, runtime.tensors["row_scale"])
    if y.shape[-1] != runtime.out_features:
        y = y[:, : runtime.out_features]
    if runtime.extra is None:
        runtime.extra = lost(runtime)
    if runtime.extra != 1.0:
        y = y.float().mul_(runtime.extra)
    if y.dtype != x.dtype or not y.is_contiguous():
        y = y.to(x.dtype).contiguous()
    return y if bias is None else y.add_(bias)


@dispatch.backend("wna16", "int8_dequant")
def int8_dequant(x: torch.Tensor, runtime: Runtime, bias: torch.Tensor | None) -> torch.Tensor:
    """Large M: the integers are converted by row blocks, which bfloat16 holds exactly; the scale comes after."""
    weight = runtime.tensors["weight8"]
    dtype = float_compute(isa())
    xc = _input(x, weight.shape[1], dtype)
    rows = runtime.out_features
    scale = expand(runtime.scale.t().float(), rows, runtime.spec) if runtime.scale.shape[0] == 1 else runtime.scale.t()
    y = torch.empty(x.shape[0], rows, dtype=x.dtype)
    step = max(CHUNK // max(weight.shape[1], 1), 16)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        block = scratch("rows", (stop - start, weight.shape[1]), dtype)
        block.copy_(weight[start:stop])
        part = torch.nn.functional.linear(xc, block)
        torch.mul(part, scale[:, start:stop].float() if dtype == torch.float32 else scale[:, start:stop], out=part)
        y[:, start:stop].copy_(part)
    return y if bias is None else y.add_(bias)


def _dequantize(runtime: Runtime, dtype: torch.dtype) -> torch.Tensor:
    return reference.dequantize(runtime.packed(), dtype)


register("int8", Layout(make=_make, canonical=_canonical, dequantize=_dequantize))
