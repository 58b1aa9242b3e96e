"""CPU backends of the integer product: sums of integers by torch's byte product, ``_int_mm``.

Where that product is not exact (:mod:`hfq.kernels.byte_mm`), codes of 8 bits are taken in two steps, their upper seven
bits and the last one, unless the weight's codes are so small that nothing saturates.

Scales in many groups that do not fold need a sum each. For few tokens all of them come from one product, of inputs
that are laid out along a diagonal; for many, the scaling would take longer than the sums, and the same codes, exact in
float32, are multiplied in floating point with the scaled weight, some rows at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hfq.formats import ActivationCodes, ActivationSpec, activation
from hfq.kernels import cpu_bytes, dispatch
from hfq.kernels.byte_mm import exact_in_steps, exact_signed, exact_unsigned
from hfq.kernels.cpu_bytes import UNPACKED, Form, form_of
from hfq.kernels.dispatch import ANY_BITS, FLOATS, Case, Row
from hfq.kernels.packed import Runtime
from hfq.kernels.workspace import scratch

# Sums of one part of the output (rows of x times columns): they stay in the second-level cache.
CHUNK = 1 << 16
# Rows of x that are worked on at once.
ROWS = 512
# Outputs of this size are made in one part: fewer operations count more.
SMALL = 1 << 18
# Up to so many groups an integer sum for each is faster than a float product. (Measured: 8 of 512, not 16 of 256.)
MOST_SUMS = 8
# Up to so many rows, tokens times groups, a product along the diagonal is.
DIAGONAL = 256
# Up to so many rows unsigned codes multiply faster than signed ones on some CPUs, and the shift costs nothing.
FEW = 2


# The product


@dataclass(frozen=True)
class _Operand:
    """Codes as this CPU multiplies them exactly.

    ``low`` holds their last bits where they are taken in two steps; ``zero`` is the zero point of the codes: int32
    ``[M, groups]`` or ``[1]``, one number, or none.
    """

    codes: torch.Tensor
    low: torch.Tensor | None
    zero: torch.Tensor | int | None


def _operand(x: ActivationCodes, runtime: Runtime) -> _Operand:
    zero: torch.Tensor | int | None = None if x.zero_point is None else x.zero_point.to(torch.int32)
    if zero is not None and x.spec.granularity == "tensor":
        zero = int(zero)
    codes = x.codes if x.codes.is_contiguous() else x.codes.contiguous()
    if exact_unsigned():
        if zero is not None:
            return _Operand(codes, None, zero)
        if codes.shape[0] > FEW and exact_signed():
            return _Operand(codes, None, None)
        return _Operand(codes.view(torch.uint8).bitwise_xor(128), None, 128)
    if zero is None:
        codes = codes.view(torch.uint8).bitwise_xor(128)
    number = 128 if zero is None else zero
    narrow = runtime.spec.bits <= 4 and "multiple" not in runtime.tensors
    if narrow or (zero is not None and x.spec.bits < 8):
        return _Operand(codes, None, number)
    return _Operand(codes >> 1, codes & 1, number)


Segments = list[tuple[int, int, int, int]]


def _segments(form: Form, spec: ActivationSpec, columns: int) -> Segments:
    """K ranges over which both scales are constant: ``(start, stop, group of the weight, group of x)``."""
    known = form.segments.get(spec.group_size)
    if known is not None:
        return known
    own = columns if form.folded else form.length
    length = columns if spec.group_size == -1 else spec.group_size
    edges = sorted({0, columns, *range(0, columns, length), *range(0, columns, own)})
    found = [(a, b, a // own, a // length) for a, b in zip(edges, edges[1:], strict=False)]
    form.segments[spec.group_size] = found
    return found


def _segment_sums(runtime: Runtime, segments: Segments) -> torch.Tensor:
    sums = runtime.tensors["sums"]
    if sums.shape[0] != len(segments):  # groups of x cut those of the weight: found out once
        sums = runtime.tensors["sums"] = cpu_bytes.sums(runtime, [(a, b) for a, b, _, _ in segments])
    return sums


def _column(values: torch.Tensor, group: int) -> torch.Tensor:
    """Parameters of ``x`` for one group: ``[M, 1]`` of tokens, ``[1]`` of the tensor."""
    return values if values.dim() < 2 or values.shape[1] == 1 else values[:, group : group + 1]


def _of_rows(values: torch.Tensor, group: int, rows: slice) -> torch.Tensor:
    """:func:`_column` of some rows."""
    values = _column(values, group)
    return values if values.dim() < 2 else values[rows]


def _shifts(x: ActivationCodes, segments: Segments) -> list[torch.Tensor]:
    """Sums of ``code - zero_point`` of each token over each segment: float32 ``[M, 1]``, whole numbers."""
    found = []
    for start, stop, _, group in segments:
        total = x.codes[:, start:stop].sum(-1, keepdim=True, dtype=torch.int32)
        if x.zero_point is not None:
            total = total - _column(x.zero_point.to(torch.int32), group) * (stop - start)
        found.append(total.float())
    return found


@dispatch.backend("wnan_codes", "aten_int8")
def multiply(
    x: ActivationCodes, runtime: Runtime, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Sums of integers, exactly as the formula says, scaled in float32 at the end."""
    form, rows = form_of(runtime), x.codes.shape[0]
    operand = _operand(x, runtime)
    codes, zero = operand.codes, operand.zero
    segments = _segments(form, x.spec, runtime.in_features)
    sums = None if zero is None else _segment_sums(runtime, segments)
    shifts = _shifts(x, segments) if "rest" in runtime.tensors else None
    if form.fields == 1 and len(segments) == 1 and rows * runtime.out_features <= SMALL and shifts is None:
        return _multiply_small(x, operand, runtime, None if sums is None else sums[0], bias, dtype)
    if len(segments) > MOST_SUMS and x.spec.group_size == -1 and shifts is None:
        return _multiply_diagonal(x, operand, runtime, segments, bias, dtype)
    whole = x.spec.granularity == "tensor" and form.folded  # one scale of x: it goes into those of the weight
    y = torch.empty(rows, runtime.out_features, dtype=torch.float32)
    block = -(-rows // -(-rows // ROWS))  # equal blocks
    for part, number in cpu_bytes.parts(runtime, max(CHUNK // min(rows, block), 256)):
        weights, width = cpu_bytes.weights(runtime, part, number), part.stop - part.start
        row = runtime.tensors["row_scale"][part] if form.folded else None
        row = row * x.scale if whole else row
        for first in range(0, rows, block):
            here = slice(first, min(first + block, rows))
            count = here.stop - first
            total = scratch("total", (count, width), torch.float32)
            for i, (start, stop, own, group) in enumerate(segments):
                acc, matrix = scratch("sums", (count, width), torch.int32), weights[:, start:stop].t()
                torch._int_mm(codes[here, start:stop], matrix, out=acc)
                if operand.low is not None:
                    acc.mul_(2).add_(torch._int_mm(operand.low[here, start:stop], matrix))
                if isinstance(zero, int):
                    acc.sub_(sums[i, part], alpha=zero)  # type: ignore[index]
                elif zero is not None:
                    own_zero = _of_rows(zero, group, here).expand(count, 1)
                    acc.addcmul_(own_zero, sums[i, part], value=-1)  # type: ignore[index]
                share = total if not i else scratch("share", (count, width), torch.float32)
                share.copy_(acc)
                if shifts is not None:
                    share.addcmul_(shifts[i][here], runtime.tensors["rest"][own, part], value=-1)
                if not whole:
                    share.mul_(_of_rows(x.scale, group, here))
                if not form.folded:
                    share.mul_(runtime.tensors["group_scale"][own, part].float())
                if i:
                    total.add_(share)
            _write(y[here, part], total, row, None if bias is None else bias[part].float())
    return y if dtype == torch.float32 else y.to(dtype)


def _write(out: torch.Tensor, total: torch.Tensor, row: torch.Tensor | None, bias: torch.Tensor | None) -> None:
    """``total * row + bias`` in one pass."""
    if row is None:
        out.copy_(total) if bias is None else torch.add(total, bias, out=out)
    else:
        torch.mul(total, row, out=out) if bias is None else torch.addcmul(bias, total, row, out=out)


def _multiply_diagonal(
    x: ActivationCodes, operand: _Operand, runtime: Runtime, segments: Segments, bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """:func:`multiply` with one product for all groups: row ``(g, m)`` of its input is group ``g`` of token ``m``."""
    rows, columns = operand.codes.shape
    groups = len(segments)
    spread = [_along_diagonal(codes, segments) for codes in (operand.codes, operand.low) if codes is not None]
    sums = None if operand.zero is None else _segment_sums(runtime, segments)
    y = torch.empty(rows, runtime.out_features, dtype=torch.float32)
    for part, number in cpu_bytes.parts(runtime, max(CHUNK // (rows * groups), 256)):
        matrix, width = cpu_bytes.weights(runtime, part, number).t(), part.stop - part.start
        acc = scratch("sums", (groups * rows, width), torch.int32)
        torch._int_mm(spread[0], matrix, out=acc)
        if len(spread) > 1:
            acc.mul_(2).add_(torch._int_mm(spread[1], matrix))
        split = acc.view(groups, rows, width)
        if operand.zero is not None:
            zero = operand.zero if isinstance(operand.zero, torch.Tensor) else torch.tensor([operand.zero])
            split.addcmul_(zero.to(torch.int32).expand(rows, 1), sums[:, None, part], value=-1)  # type: ignore[index]
        share = scratch("share", (groups, rows, width), torch.float32).copy_(split)
        share.mul_(runtime.tensors["group_scale"][:, None, part].float())
        y[:, part] = share.sum(0)
    y.mul_(x.scale)
    return (y if bias is None else y.add_(bias)).to(dtype)


def _along_diagonal(codes: torch.Tensor, segments: Segments) -> torch.Tensor:
    rows, columns = codes.shape
    out = torch.zeros(len(segments), rows, columns, dtype=codes.dtype)
    for i, (start, stop, _, _) in enumerate(segments):
        out[i, :, start:stop] = codes[:, start:stop]
    return out.flatten(0, 1)


def _multiply_small(
    x: ActivationCodes, operand: _Operand, runtime: Runtime, sums: torch.Tensor | None, bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """:func:`multiply` with one scale a row and few numbers: what counts is the number of operations."""
    matrix = runtime.tensors["bytes"].t()
    acc = torch._int_mm(operand.codes, matrix)
    if operand.low is not None:
        acc.mul_(2).add_(torch._int_mm(operand.low, matrix))
    if isinstance(operand.zero, int):
        acc.sub_(sums, alpha=operand.zero)  # type: ignore[arg-type]
    elif operand.zero is not None:
        acc.addcmul_(operand.zero.expand(acc.shape[0], 1), sums, value=-1)  # type: ignore[arg-type]
    row, y = runtime.tensors["row_scale"], acc.to(torch.float32)
    if x.spec.granularity == "tensor":
        row = row * x.scale
    else:
        y.mul_(x.scale)
    y = y.mul_(row) if bias is None else torch.addcmul(bias if bias.dtype == y.dtype else bias.float(), y, row)
    return y if dtype == torch.float32 else y.to(dtype)


@dispatch.backend("wnan_codes", "float_sums")
def multiply_floats(
    x: ActivationCodes, runtime: Runtime, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The same codes in a float32 product with the scaled weight, some rows at a time: for scales in many groups."""
    form, columns = form_of(runtime), runtime.in_features
    values = activation.dequantize(x)
    y = torch.empty(values.shape[0], runtime.out_features, dtype=torch.float32)
    for part, number in cpu_bytes.parts(runtime, UNPACKED // 2 // columns):
        weight = scratch("floats", (part.stop - part.start, columns), torch.float32)
        weight.copy_(cpu_bytes.weights(runtime, part, number))
        if "rest" in runtime.tensors:
            grouped, rest = cpu_bytes.by_group(weight, runtime.tensors["rest"][:, part].t(), form.length)
            grouped.sub_(rest)
        if form.folded:
            weight.mul_(runtime.tensors["row_scale"][part, None])
        else:
            scale = runtime.tensors["group_scale"][:, part].t().float()
            grouped, scale = cpu_bytes.by_group(weight, scale, form.length)
            grouped.mul_(scale)
        y[:, part] = torch.nn.functional.linear(values, weight, None if bias is None else bias[part].float())
    return y if dtype == torch.float32 else y.to(dtype)


@dispatch.backend("wnan_codes", "copy")
def copy(x: ActivationCodes, runtime: Runtime, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """A float product of ``code - zero_point``, which bfloat16 holds exactly, with the expanded weight."""
    weight = runtime.tensors["copy"]
    codes = x.codes.to(torch.int16) if x.zero_point is None else x.codes.to(torch.int16) - x.zero_point.to(torch.int16)
    y = torch.nn.functional.linear(codes.to(weight.dtype), weight).float().mul_(x.scale)
    return (y if bias is None else y.add_(bias)).to(dtype)


def _bytes(case: Case) -> bool:
    # A matrix of one column has the strides of its transpose: `_int_mm` takes it for that, and reads past its end.
    return case.K > 1 and (exact_unsigned() or exact_in_steps()) and case.K * 255 * 128 < 2**31


def _wide(case: Case) -> bool:
    """Whether codes are held as bytes: above four bits, and where memory is no matter."""
    return case.bits > 4 or (case.cached and case.layout is None) or case.layout == "integer8"


def _packed(case: Case) -> bool:
    return not _wide(case)


def _few_sums(case: Case) -> bool:
    few = case.sums <= MOST_SUMS
    if not few and case.activation is not None and case.activation.group_size == -1 and case.whole_zeros:
        few = case.M * case.sums <= DIAGONAL
    return _bytes(case) and few


def _copied(case: Case) -> bool:
    return case.cached and case.layout is not None and (case.activation is None or case.activation.group_size == -1)


_EXACT = (
    "torch's product of bytes is not exact on this CPU ({isa}), or for K={K} (1, or sums leave 32 bits), or scales in "
    "{sums} groups do not fold into one sum: use group_scale='int', or one scale a channel"
)
_FLOATS = "codes of more than 4 bits, and with memory='cached' all codes, are held as bytes"
_LOW = (1, 2, 3, 4)

dispatch.add_rows([
    Row("wnan", "cpu", FLOATS, ANY_BITS, "*", _copied, "copy",
        "no float copy is kept (memory='cached', and scales in groups), or x has groups of its own", above="partials"),
    Row("wnan", "cpu", FLOATS, _LOW, "integer4", lambda case: _packed(case) and _few_sums(case), "aten_int8", _EXACT),
    Row("wnan", "cpu", FLOATS, ANY_BITS, "integer8", lambda case: _wide(case) and _few_sums(case), "aten_int8", _EXACT),
    Row("wnan", "cpu", FLOATS, _LOW, "integer4", _packed, "float_sums", _FLOATS),
    Row("wnan", "cpu", FLOATS, ANY_BITS, "integer8", _wide, "float_sums", _FLOATS),
    Row("wnan", "*", FLOATS, ANY_BITS, "*", lambda case: True, "dequant", "serves every format", slow=True),
    Row("wnan", "*", (), ANY_BITS, "*", lambda case: True, "reference", "serves every format", slow=True),
])
