"""The rows of the dispatch table for the CPU, the float copy, and the backends that serve every format."""

from __future__ import annotations

import torch

from hfq.formats import affine, bitpack
from hfq.kernels import cpu_int4, dispatch, reference
from hfq.kernels.dispatch import ANY_BITS, FLOATS, Case, Row
from hfq.kernels.isa import float_compute, isa
from hfq.kernels.packed import LAYOUTS, Runtime

__all__ = ["float_copy"]


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


def _int4_groups(case: Case) -> bool:
    return case.isa != "default" and (case.per_row or cpu_int4.group_of(case.group) > 0)


def _slabs(case: Case) -> bool:
    return _int4_groups(case) and cpu_int4.nibble_block()[1]


def _int8_rows(case: Case) -> bool:
    return case.isa != "default" and case.per_row and case.shift_fits


def _cached(case: Case) -> bool:
    return case.cached


def _always(case: Case) -> bool:
    return True


_GROUPS = (
    "groups of {group} along K={K} are not multiples of 32, which torch's int4 operator needs (or this CPU, {isa}, has "
    "no vectorised one): use group_size 32, 64, 128, 256 or -1"
)
_ROWS = "needs one scale a row (group {group}, K={K}) and codes less zero points that fit int8"
_COPY = "no float copy is kept (memory='cached')"
_LOW, _HIGH = (1, 2, 3, 4), (5, 6, 7, 8)

dispatch.add_rows([
    Row("wna16", "cpu", FLOATS, _LOW, "*", _cached, "copy", _COPY, above="copy4"),
    Row("wna16", "cpu", FLOATS, _HIGH, "*", _cached, "copy", _COPY, above="copy8"),
    Row("wna16", "cpu", FLOATS, _LOW, "int4pack", _int4_groups, "int4pack", _GROUPS, constraint=True, at_most="int4"),
    Row("wna16", "cpu", FLOATS, _LOW, "int4pack", _slabs, "int4pack_dequant", _GROUPS, constraint=True),
    Row("wna16", "cpu", FLOATS, _HIGH, "int8", _int8_rows, "int8pack", _ROWS, at_most="int8"),
    Row("wna16", "cpu", FLOATS, _HIGH, "int8", _int8_rows, "int8_dequant", _ROWS),
    Row("wna16", "cpu", FLOATS, _HIGH, "nibbles", _int4_groups, "int4pack", _GROUPS, constraint=True,
        at_most="nibbles"),
    Row("wna16", "cpu", FLOATS, _HIGH, "nibbles", _slabs, "int4pack_dequant", _GROUPS, constraint=True),
    Row("wna16", "cpu", FLOATS, ANY_BITS, "*", _cached, "copy", _COPY),
    Row("wna16", "*", FLOATS, ANY_BITS, "*", _always, "dequant", "serves every format", slow=True),
    Row("wna16", "*", (), ANY_BITS, "*", _always, "reference", "serves every format", slow=True),
])
