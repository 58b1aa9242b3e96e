"""CPU layouts and backend of the integer product: bytes and ``_int_mm``.

Weights are held as signed bytes ``(code - offset) * multiple``, one block for each group along K whose scale has to be
applied to its own sum, one block in all where the scales fold into the rows (one scale a row, or two-level scales).
Codes of up to 4 bits stay packed, two or four in a byte: the fields of a byte are rows far apart, so that a block of
rows is unpacked by one mask and one shift into a buffer that stays in cache.

On CPUs without VNNI the byte product saturates sums of two products in 16 bits, which is a wrong number without a sign
of it. What is exact is found out once, with the largest codes there are. There, codes of 8 bits are taken in two steps,
their upper seven bits and the last one, unless the weight's codes are so small that nothing saturates.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch

from hfq.formats import ActivationCodes, ActivationSpec, bitpack, twolevel
from hfq.formats.spec import QuantSpec
from hfq.kernels import dispatch, reference
from hfq.kernels.dispatch import ANY_BITS, FLOATS, Case, Row
from hfq.kernels.packed import Layout, PackedWeight, Runtime, register
from hfq.kernels.workspace import scratch

__all__ = ["exact_in_steps", "exact_signed", "exact_unsigned"]

# Sums of one part of the output (rows of x times columns): they stay in the second-level cache.
CHUNK = 1 << 16
# Outputs of this size are made in one part: fewer operations count more.
SMALL = 1 << 18
# Bytes of unpacked weights that stay there.
UNPACKED = 1 << 19
# Up to so many rows unsigned codes multiply faster than signed ones on some CPUs, and the shift costs nothing.
FEW = 2
# Weights of this size never saturate: 255 * 64 * 2 < 2**15.
NARROW = 64


def _exact(activation: torch.dtype, low: int, high: int, weights: tuple[int, ...] = (-128, 127)) -> bool:
    """Whether products of extreme codes are exact, in all kernels that sizes choose from."""
    for m in (1, 3, 40, 130):
        for k in (64, 200):
            for a in (low, high):
                for w in weights:
                    x, weight = torch.full((m, k), a, dtype=activation), torch.full((48, k), w, dtype=torch.int8)
                    if not bool((torch._int_mm(x, weight.t()) == a * w * k).all()):
                        return False
    return True


@functools.cache
def exact_unsigned() -> bool:
    """Whether this process multiplies uint8 with int8 exactly."""
    return _exact(torch.uint8, 0, 255)


@functools.cache
def exact_signed() -> bool:
    """Whether this process multiplies int8 with int8 exactly."""
    return _exact(torch.int8, -128, 127)


@functools.cache
def exact_in_steps() -> bool:
    """Whether it does so for seven-bit activations, and for weights within ``NARROW``."""
    return _exact(torch.uint8, 0, 127) and _exact(torch.uint8, 0, 255, (-NARROW, NARROW))


# The layout


@dataclass(frozen=True)
class _Form:
    """What follows from the tensors of a runtime.

    ``bounds`` are the K ranges of the blocks, ``fields`` the codes in a byte of them.
    """

    bounds: tuple[tuple[int, int], ...]
    fields: int
    folded: bool
    segments: dict[int, list[tuple[int, int, int, int]]] = field(default_factory=dict)


def _form(runtime: Runtime) -> _Form:
    if runtime.extra is None:
        blocks, columns = runtime.tensors["blocks"], runtime.in_features
        length = blocks.shape[-1]
        bounds = tuple((start, min(start + length, columns)) for start in range(0, columns, length))
        fields = 1 if blocks.dtype == torch.int8 else _fields(runtime.spec.bits)
        runtime.extra = _Form(bounds, fields, "row_scale" in runtime.tensors)
    return runtime.extra


def _fields(bits: int) -> int:
    return 4 if bits <= 2 else 2


def _offset(packed: PackedWeight | Runtime) -> torch.Tensor:
    """The whole number that is taken from every code of a group: float32, ``[rows or 1, groups]``."""
    spec, zero = packed.spec, packed.zero_point
    if zero is None:
        return torch.full((1, 1), float(spec.middle))
    if spec.bits == 8:  # all 256 differences must fit a signed byte
        return torch.full((1, 1), 128.0)
    return zero.float().round().clamp(0, spec.max_code)


def _per_element(values: torch.Tensor, spec: QuantSpec, columns: int) -> torch.Tensor:
    if values.shape[-1] == 1:
        return values
    return values.repeat_interleave(spec.group_length(columns), -1)[..., :columns]


def _make(packed: PackedWeight, dtype: torch.dtype, *, fields: int) -> Runtime:
    spec, rows, columns = packed.spec, packed.out_features, packed.in_features
    groups = spec.groups(columns)
    offset = _offset(packed)
    rest = None if packed.zero_point is None else packed.zero_point.float() - offset
    rest = rest if rest is not None and bool((rest != 0).any()) else None
    whole = fields == 1 or columns % spec.group_length(columns) == 0
    levels = twolevel.split(packed.scale, spec) if rest is None and groups > 1 and whole else None
    tensors = {"scale": packed.scale}
    if packed.zero_point is not None:
        tensors["zero_point"] = packed.zero_point
    if groups == 1 or levels is not None:
        step = packed.scale[:, 0].float() if levels is None else levels[0]
        tensors["row_scale"] = step.expand(rows).contiguous()
        length = columns
    else:
        tensors["group_scale"] = packed.scale.t().contiguous()
        length = spec.group_length(columns)
    if levels is not None:
        tensors["multiple"] = levels[1]
    if rest is not None:
        tensors["rest"] = rest.t().expand(-1, rows).contiguous()
    codes = bitpack.unpack(packed.qweight, spec.bits, columns)
    if fields == 1:
        stored = codes.to(torch.int16) - _per_element(offset, spec, columns).to(torch.int16)
        if levels is not None:
            stored *= _per_element(levels[1].to(torch.int16), spec, columns)
        tensors["blocks"] = _blocked(stored.to(torch.int8), length)
    else:
        if packed.zero_point is not None:
            tensors["offset"] = offset.expand(rows, -1).to(torch.int8).contiguous()
        tensors["blocks"] = _blocked(_across_rows(codes, spec.bits, fields), length)
    note = f"{spec.bits}-bit codes as bytes" if fields == 1 else f"{fields} codes a byte, across rows"
    runtime = Runtime(
        "integer8" if fields == 1 else "integer4", tensors, spec, columns, rows, dtype,
        note + "; scales and sums again for the product", packed.name,
    )
    runtime.tensors["sums"] = _sums(runtime, _form(runtime).bounds)
    return runtime


def _blocked(matrix: torch.Tensor, length: int) -> torch.Tensor:
    """``[rows, columns]`` as ``[blocks, rows, length]``, the last one filled with zeros."""
    padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % length))
    return padded.unflatten(1, (-1, length)).transpose(0, 1).contiguous()


def _across_rows(codes: torch.Tensor, bits: int, fields: int) -> torch.Tensor:
    """Byte ``[r, k]`` holds the codes ``[j * R + r, k]`` of all fields ``j``, ``R`` rows of bytes."""
    codes = torch.nn.functional.pad(codes, (0, 0, 0, -codes.shape[0] % fields))
    parts = codes.view(fields, -1, codes.shape[1])
    out = parts[0].clone()
    for j in range(1, fields):
        out |= parts[j] << (8 // fields * j)
    return out


def _unpack(runtime: Runtime, start: int, stop: int, field: int) -> torch.Tensor:
    """Field ``field`` of the rows of bytes ``start:stop``, as signed bytes ``[blocks, rows, length]``."""
    blocks, fields = runtime.tensors["blocks"], _form(runtime).fields
    source = blocks[:, start:stop]
    out = scratch("unpacked", tuple(source.shape), torch.uint8)
    width = 8 // fields
    if field == fields - 1:
        torch.bitwise_right_shift(source, width * field, out=out)
    else:
        torch.bitwise_and(source, (1 << width) - 1 << width * field, out=out)
        if field:
            out.bitwise_right_shift_(width * field)
    signed = out.view(torch.int8)
    first = field * blocks.shape[1] + start
    rows = slice(first, min(first + stop - start, runtime.out_features))
    signed = signed[:, : max(rows.stop - rows.start, 0)]
    offset, multiple = runtime.tensors.get("offset"), runtime.tensors.get("multiple")
    if offset is None:
        signed.sub_(runtime.spec.middle)
    else:
        _by_group(signed, runtime).sub_(_of_rows(offset, rows, signed))
    if multiple is not None:
        _by_group(signed, runtime).mul_(_of_rows(multiple, rows, signed))
    return signed


def _by_group(signed: torch.Tensor, runtime: Runtime) -> torch.Tensor:
    """``[blocks, rows, length]`` with the groups of the grid as an axis of their own."""
    length = runtime.spec.group_length(runtime.in_features)
    if signed.shape[0] > 1 or signed.shape[2] <= length:
        return signed  # a block is a group
    return signed.unflatten(2, (-1, length))[0]


def _of_rows(values: torch.Tensor, rows: slice, signed: torch.Tensor) -> torch.Tensor:
    """``[rows, groups]`` in the shape that goes with :func:`_by_group`."""
    part = values[rows]
    if signed.shape[0] > 1:
        return part.t()[..., None]
    return part[..., None] if part.shape[1] > 1 else part


def _parts(runtime: Runtime, width: int) -> list[tuple[slice, tuple[int, int, int] | None]]:
    """Ranges of output rows of about ``width``, each with where its packed bytes lie (``None``: bytes as they are)."""
    form, blocks = _form(runtime), runtime.tensors["blocks"]
    if form.fields == 1:
        step = max(width, 64)
        return [(slice(i, min(i + step, runtime.out_features)), None) for i in range(0, runtime.out_features, step)]
    step = max(min(width, UNPACKED // (blocks.shape[0] * blocks.shape[2])), 16)
    found: list[tuple[slice, tuple[int, int, int] | None]] = []
    for j in range(form.fields):
        base = j * blocks.shape[1]
        for start in range(0, blocks.shape[1], step):
            stop = min(start + step, blocks.shape[1])
            rows = slice(base + start, min(base + stop, runtime.out_features))
            if rows.stop > rows.start:
                found.append((rows, (start, stop, j)))
    return found


def _weights(runtime: Runtime, part: slice, where: tuple[int, int, int] | None) -> torch.Tensor:
    return runtime.tensors["blocks"][:, part] if where is None else _unpack(runtime, *where)


def _sums(runtime: Runtime, bounds: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """Sums of the stored bytes over each range of K: int32 ``[ranges, rows]``."""
    length = runtime.tensors["blocks"].shape[-1]
    sums = torch.empty(len(bounds), runtime.out_features, dtype=torch.int32)
    for part, where in _parts(runtime, 256):
        weights = _weights(runtime, part, where)
        for i, (start, stop) in enumerate(bounds):
            block = start // length
            sums[i, part] = weights[block, :, start - block * length : stop - block * length].sum(-1, dtype=torch.int32)
    return sums


def _canonical(runtime: Runtime) -> torch.Tensor:
    spec, columns = runtime.spec, runtime.in_features
    form, blocks = _form(runtime), runtime.tensors["blocks"]
    flat = blocks.transpose(0, 1).flatten(1)[:, :columns]
    if form.fields == 1:
        wide = flat.to(torch.int16)
        if "multiple" in runtime.tensors:
            wide = wide // _per_element(runtime.tensors["multiple"].to(torch.int16), spec, columns)
        wide = wide + _per_element(_offset(runtime), spec, columns).to(torch.int16)
        return bitpack.pack(wide.to(torch.uint8), spec.bits)
    width = 8 // form.fields
    fields = [flat >> width * j & (1 << width) - 1 for j in range(form.fields)]
    return bitpack.pack(torch.cat(fields)[: runtime.out_features].contiguous(), spec.bits)


def _dequantize(runtime: Runtime, dtype: torch.dtype) -> torch.Tensor:
    return reference.dequantize(runtime.packed(), dtype)


def _make4(packed: PackedWeight, dtype: torch.dtype) -> Runtime:
    return _make(packed, dtype, fields=_fields(packed.spec.bits))


def _make8(packed: PackedWeight, dtype: torch.dtype) -> Runtime:
    return _make(packed, dtype, fields=1)


register("integer4", Layout(make=_make4, canonical=_canonical, dequantize=_dequantize))
register("integer8", Layout(make=_make8, canonical=_canonical, dequantize=_dequantize))


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
    zero = None if x.zero_point is None else x.zero_point.to(torch.int32)
    codes = x.codes if x.codes.is_contiguous() else x.codes.contiguous()
    if exact_unsigned():
        if zero is not None:
            return _Operand(codes, None, zero)
        if codes.shape[0] > FEW and exact_signed():
            return _Operand(codes, None, None)
        return _Operand(codes.view(torch.uint8).bitwise_xor(128), None, 128)
    if zero is None:
        codes = codes.view(torch.uint8).bitwise_xor(128)
    number: torch.Tensor | int = 128 if zero is None else zero
    narrow = runtime.spec.bits <= 4 and "multiple" not in runtime.tensors
    if narrow or (zero is not None and x.spec.bits < 8):
        return _Operand(codes, None, number)
    return _Operand(codes >> 1, codes & 1, number)


def _segments(form: _Form, spec: ActivationSpec, columns: int) -> list[tuple[int, int, int, int]]:
    """K ranges over which both scales are constant: ``(start, stop, block of the weight, group of x)``."""
    known = form.segments.get(spec.group_size)
    if known is not None:
        return known
    length = columns if spec.group_size == -1 else spec.group_size
    edges = sorted({0, columns, *range(0, columns, length), *(start for start, _ in form.bounds)})
    block = form.bounds[0][1] - form.bounds[0][0]
    found = [(a, b, a // block, a // length) for a, b in zip(edges, edges[1:], strict=False)]
    form.segments[spec.group_size] = found
    return found


def _segment_sums(runtime: Runtime, segments: list[tuple[int, int, int, int]]) -> torch.Tensor:
    sums = runtime.tensors["sums"]
    if sums.shape[0] != len(segments):  # groups of x cut those of the weight: found out once
        sums = runtime.tensors["sums"] = _sums(runtime, tuple((a, b) for a, b, _, _ in segments))
    return sums


def _column(values: torch.Tensor, group: int) -> torch.Tensor:
    """Parameters of ``x`` for one group: ``[M, 1]`` of tokens, ``[1]`` of the tensor."""
    return values if values.dim() < 2 or values.shape[1] == 1 else values[:, group : group + 1]


def _shifts(x: ActivationCodes, segments: list[tuple[int, int, int, int]]) -> list[torch.Tensor]:
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
    """Sums of integers by torch's byte product, exactly as the formula says, scaled in float32 at the end."""
    form, rows = _form(runtime), x.codes.shape[0]
    operand = _operand(x, runtime)
    codes, zero = operand.codes, operand.zero
    segments = _segments(form, x.spec, runtime.in_features)
    sums = None if zero is None else _segment_sums(runtime, segments)
    shifts = _shifts(x, segments) if "rest" in runtime.tensors else None
    if form.fields == 1 and len(segments) == 1 and rows * runtime.out_features <= SMALL and shifts is None:
        return _multiply_small(x, operand, runtime, None if sums is None else sums[0], bias, dtype)
    y = torch.empty(rows, runtime.out_features, dtype=torch.float32)
    for part, where in _parts(runtime, max(CHUNK // rows, 256)):
        weights = _weights(runtime, part, where)
        width = part.stop - part.start
        total = scratch("total", (rows, width), torch.float32)
        out = y[:, part]
        for i, (start, stop, block, group) in enumerate(segments):
            first = block * weights.shape[2]
            piece, matrix = codes[:, start:stop], weights[block, :, start - first : stop - first]
            acc = scratch("sums", (rows, width), torch.int32)
            torch._int_mm(piece, matrix.t(), out=acc)
            if operand.low is not None:
                acc.mul_(2).add_(torch._int_mm(operand.low[:, start:stop], matrix.t()))
            if isinstance(zero, int):
                acc.sub_(sums[i, part], alpha=zero)  # type: ignore[index]
            elif zero is not None:
                acc.addcmul_(_column(zero, group).expand(rows, 1), sums[i, part], value=-1)  # type: ignore[index]
            share = total if not i else scratch("share", (rows, width), torch.float32)
            share.copy_(acc)
            if shifts is not None:
                share.addcmul_(shifts[i], runtime.tensors["rest"][block, part], value=-1)
            share.mul_(_column(x.scale, group))
            if not form.folded:
                share.mul_(runtime.tensors["group_scale"][block, part].float())
            if i:
                total.add_(share)
        if form.folded:
            row = runtime.tensors["row_scale"][part]
            torch.mul(total, row, out=out) if bias is None else torch.addcmul(bias[part].float(), total, row, out=out)
        else:
            out.copy_(total) if bias is None else torch.add(total, bias[part].float(), out=out)
    return y if dtype == torch.float32 else y.to(dtype)


def _multiply_small(
    x: ActivationCodes, operand: _Operand, runtime: Runtime, sums: torch.Tensor | None, bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """:func:`multiply` with one scale a row and few numbers: what counts is the number of operations."""
    matrix = runtime.tensors["blocks"][0].t()
    acc = torch._int_mm(operand.codes, matrix)
    if operand.low is not None:
        acc.mul_(2).add_(torch._int_mm(operand.low, matrix))
    if isinstance(operand.zero, int):
        acc.sub_(sums, alpha=operand.zero)  # type: ignore[arg-type]
    elif operand.zero is not None:
        acc.addcmul_(operand.zero.expand(acc.shape[0], 1), sums, value=-1)  # type: ignore[arg-type]
    row = runtime.tensors["row_scale"]
    y = acc.to(torch.float32).mul_(x.scale)
    y = y.mul_(row) if bias is None else torch.addcmul(bias if bias.dtype == y.dtype else bias.float(), y, row)
    return y if dtype == torch.float32 else y.to(dtype)


@dispatch.backend("wnan_codes", "copy")
def copy(x: ActivationCodes, runtime: Runtime, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """A float product of ``code - zero_point``, which bfloat16 holds exactly, with the expanded weight."""
    weight = runtime.tensors["copy"]
    codes = x.codes.to(torch.int16) if x.zero_point is None else x.codes.to(torch.int16) - x.zero_point.to(torch.int16)
    y = torch.nn.functional.linear(codes.to(weight.dtype), weight).float().mul_(x.scale)
    return (y if bias is None else y.add_(bias)).to(dtype)


def _bytes(case: Case) -> bool:
    return (exact_unsigned() or exact_in_steps()) and case.K * 255 * 128 < 2**31


def _few_codes(case: Case) -> bool:
    return _bytes(case) and not (case.cached and case.layout is None)


def _copied(case: Case) -> bool:
    return case.cached and case.layout is not None and (case.activation is None or case.activation.group_size == -1)


_BYTES = "torch's product of bytes is not exact on this CPU ({isa}), or sums over K={K} leave 32 bits"
_LOW = (1, 2, 3, 4)

dispatch.add_rows([
    Row("wnan", "cpu", FLOATS, ANY_BITS, "*", _copied, "copy",
        "no float copy is kept (memory='cached', and scales in groups), or x has groups of its own", above="partials"),
    Row("wnan", "cpu", FLOATS, _LOW, "integer4", _few_codes, "aten_int8",
        _BYTES + ", or memory='cached' keeps bytes", constraint=True),
    Row("wnan", "cpu", FLOATS, ANY_BITS, "integer8", _bytes, "aten_int8", _BYTES, constraint=True),
    Row("wnan", "*", FLOATS, ANY_BITS, "*", lambda case: True, "dequant", "serves every format", slow=True),
    Row("wnan", "*", (), ANY_BITS, "*", lambda case: True, "reference", "serves every format", slow=True),
])
