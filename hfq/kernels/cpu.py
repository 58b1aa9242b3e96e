"""The rows of the dispatch table for the CPU, with the thresholds that the benchmark measured, and the slow backends.

Thresholds are rows of M (tokens): above them dequantizing once and multiplying in floating point is faster than the
fused operators, whose time grows with M. They were measured with ``hfq bench kernels`` on one machine with AMX; the
other sets on the same machine with the operators capped to that set.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hfq.formats import affine, bitpack
from hfq.kernels import cpu_int4, dispatch, reference
from hfq.kernels.dispatch import ANY_BITS, FLOATS, Case, Row
from hfq.kernels.isa import float_compute, isa
from hfq.kernels.packed import LAYOUTS, Runtime

__all__ = ["THRESHOLDS", "Thresholds", "float_copy"]


@dataclass(frozen=True)
class Thresholds:
    """Largest M for which a fused operator wins, for one instruction set."""

    int4: int
    nibbles: int
    int8: int
    copy4: int  # the same against a float copy, where one is kept
    copy8: int


THRESHOLDS = {
    "amx": Thresholds(int4=40, nibbles=24, int8=8, copy4=8, copy8=4),
    "avx512_bf16": Thresholds(int4=40, nibbles=24, int8=16, copy4=24, copy8=16),
    "avx512": Thresholds(int4=56, nibbles=24, int8=24, copy4=32, copy8=24),
    "avx2": Thresholds(int4=56, nibbles=24, int8=24, copy4=32, copy8=24),
    "default": Thresholds(int4=0, nibbles=0, int8=0, copy4=0, copy8=0),
}

CHUNK = 1 << 20  # weights that are dequantized at once from the canonical form


def float_copy(runtime: Runtime) -> torch.Tensor:
    """The expanded copy of ``memory="cached"``: ``[out, in]`` in the dtype that multiplies fastest here."""
    return LAYOUTS[runtime.layout].dequantize(runtime, float_compute(isa()))


@dispatch.backend("wna16", "copy")
def copy(x: torch.Tensor, runtime: Runtime, bias: torch.Tensor | None) -> torch.Tensor:
    """A float product with the expanded copy."""
    weight = runtime.tensors["copy"]
    y = torch.nn.functional.linear(x if x.dtype == weight.dtype else x.to(weight.dtype), weight)
    y = y if y.dtype == x.dtype else y.to(x.dtype)
    return y if bias is None else y.add_(bias)


@dispatch.backend("wna16", "dequant")
def dequant(x: torch.Tensor, runtime: Runtime, bias: torch.Tensor | None) -> torch.Tensor:
    """Dequantize and multiply: any layout and device; from the canonical form on a CPU by blocks of rows."""
    if x.device.type != "cpu" or runtime.layout != "canonical":
        dtype = x.dtype if x.device.type != "cpu" else float_compute(isa())
        weight = LAYOUTS[runtime.layout].dequantize(runtime, dtype)
        y = torch.nn.functional.linear(x.to(dtype), weight).to(x.dtype)
        return y if bias is None else y.add_(bias)
    dtype, rows = float_compute(isa()), runtime.out_features
    xc = x.to(dtype)
    y = torch.empty(x.shape[0], rows, dtype=x.dtype)
    step = max(CHUNK // max(runtime.in_features, 1), 16)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        y[:, part] = torch.nn.functional.linear(xc, _rows(runtime, part).to(dtype))
    return y if bias is None else y.add_(bias)


def _rows(runtime: Runtime, part: slice) -> torch.Tensor:
    """Rows of the canonical form as float32, ``[rows, in_features]``."""
    spec, zero = runtime.spec, runtime.zero_point
    one = runtime.scale.shape[0] == 1
    codes = bitpack.unpack(runtime.tensors["qweight"][part], spec.bits, runtime.in_features)
    zero = zero if zero is None or one else zero[part]
    scale = runtime.scale if one else runtime.scale[part]
    length = spec.group_length(runtime.in_features)
    if runtime.in_features % length:
        return affine.decode(codes, scale, zero, spec)
    values = codes.to(torch.float32).view(codes.shape[0], -1, length)
    values -= spec.middle if zero is None else zero.float()[..., None]
    values *= scale.float()[..., None]
    return values.view(codes.shape)


@dispatch.backend("wna16", "reference")
def reference_linear(x: torch.Tensor, runtime: Runtime, bias: torch.Tensor | None) -> torch.Tensor:
    """The definition, in float32 (float64 for float64 x)."""
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    return reference.linear(x, runtime.packed(), bias, accumulate=accumulate)


def _limit(case: Case) -> Thresholds:
    return THRESHOLDS[case.isa]


def _int4_groups(case: Case) -> bool:
    return case.isa != "default" and (case.per_row or cpu_int4.group_of(case.group) > 0)


def _int8_rows(case: Case) -> bool:
    return case.isa != "default" and case.per_row and case.shift_fits


_GROUPS = (
    "groups of {group} along K={K} are not multiples of 32, which torch's int4 operator needs (or this CPU, {isa}, has "
    "no vectorised one): use group_size 32, 64, 128, 256 or -1"
)
_LOW, _HIGH = (1, 2, 3, 4), (5, 6, 7, 8)
_COPY = "no float copy is kept (memory='cached'), or M={M} is few enough rows for the packed operator"

dispatch.add_rows([
    Row("wna16", "cpu", FLOATS, _LOW, "*", lambda c: c.cached and _limit(c).copy4 < c.M, "copy", _COPY),
    Row("wna16", "cpu", FLOATS, _HIGH, "*", lambda c: c.cached and _limit(c).copy8 < c.M, "copy", _COPY),
    Row("wna16", "cpu", FLOATS, _LOW, "int4pack", lambda c: _int4_groups(c) and _limit(c).int4 >= c.M, "int4pack",
        "needs groups that are multiples of 32 and few rows: M={M} is above the measured threshold"),
    Row("wna16", "cpu", FLOATS, _LOW, "int4pack", _int4_groups, "int4pack_dequant", _GROUPS, constraint=True),
    Row("wna16", "cpu", FLOATS, _HIGH, "int8", lambda c: _int8_rows(c) and _limit(c).int8 >= c.M, "int8pack",
        "needs one scale a row, codes less zero points that fit int8, and few rows: M={M}"),
    Row("wna16", "cpu", FLOATS, _HIGH, "int8", _int8_rows, "int8_dequant",
        "needs one scale a row (group {group}, K={K}) and codes less zero points that fit int8"),
    Row("wna16", "cpu", FLOATS, _HIGH, "nibbles", lambda c: _int4_groups(c) and _limit(c).nibbles >= c.M, "int4pack",
        "needs groups that are multiples of 32 and few rows: M={M} is above the measured threshold"),
    Row("wna16", "cpu", FLOATS, _HIGH, "nibbles", _int4_groups, "int4pack_dequant", _GROUPS, constraint=True),
    Row("wna16", "cpu", FLOATS, ANY_BITS, "*", lambda c: c.cached, "copy", "no float copy is kept (memory='cached')"),
    Row("wna16", "*", FLOATS, ANY_BITS, "*", lambda c: True, "dequant", "serves every format", slow=True),
    Row("wna16", "*", (), ANY_BITS, "*", lambda c: True, "reference", "serves every format", slow=True),
])
