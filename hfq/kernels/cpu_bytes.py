"""CPU layouts of the integer product: weights as signed bytes ``(code - offset) * multiple``, ``[rows, K]``.

"integer8" holds the bytes. "integer4" keeps codes of up to 4 bits packed, two or four in a byte: the fields of a byte
are different rows, so that some rows are unpacked by a mask and a shift into a buffer that stays in cache. ``multiple``
is one but for two-level scales, which thereby become one scale a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hfq.formats import bitpack, twolevel
from hfq.formats.spec import QuantSpec
from hfq.kernels import reference
from hfq.kernels.packed import Layout, PackedWeight, Runtime, register
from hfq.kernels.workspace import scratch

__all__ = ["UNPACKED", "Form", "form_of", "parts", "sums", "weights"]

# Bytes of unpacked weights that stay in the second-level cache.
UNPACKED = 1 << 20


@dataclass(frozen=True)
class Form:
    """What follows from the tensors of a runtime.

    Attributes:
        fields: codes in a byte.
        height: rows of bytes that are unpacked together.
        length: elements of a row that share a scale.
        folded: the scales are one a row.
        segments: K ranges by group size of the inputs, filled as calls come.
    """

    fields: int
    height: int
    length: int
    folded: bool
    segments: dict[int, list[tuple[int, int, int, int]]] = field(default_factory=dict)


def form_of(runtime: Runtime) -> Form:
    if runtime.extra is None:
        fields = 1 if runtime.tensors["bytes"].dtype == torch.int8 else _fields(runtime.spec.bits)
        height = _height(runtime.out_features, runtime.in_features, fields)
        length = runtime.spec.group_length(runtime.in_features)
        runtime.extra = Form(fields, height, length, "row_scale" in runtime.tensors)
    return runtime.extra


def _fields(bits: int) -> int:
    return 4 if bits <= 2 else 2


def _height(rows: int, columns: int, fields: int) -> int:
    """Rows of bytes that are unpacked at once: their ``fields * height`` rows of codes fill ``UNPACKED`` bytes."""
    most = max(UNPACKED // (fields * columns), 8)
    return -(-rows // (fields * -(-rows // (fields * most))))


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


def _make(packed: PackedWeight, dtype: torch.dtype, fields: int) -> Runtime:
    spec, rows, columns = packed.spec, packed.out_features, packed.in_features
    offset = _offset(packed)
    rest = None if packed.zero_point is None else packed.zero_point.float() - offset
    rest = rest if rest is not None and bool((rest != 0).any()) else None
    levels = twolevel.split(packed.scale, spec) if rest is None else None
    tensors = {"scale": packed.scale}
    if packed.zero_point is not None:
        tensors["zero_point"] = packed.zero_point
    if spec.groups(columns) == 1 or levels is not None:
        step = packed.scale[:, 0].float() if levels is None else levels[0]
        tensors["row_scale"] = step.expand(rows).contiguous()
    else:
        tensors["group_scale"] = packed.scale.t().contiguous()
    if levels is not None:
        tensors["multiple"] = levels[1]
    if rest is not None:
        tensors["rest"] = rest.t().expand(-1, rows).contiguous()
    codes = bitpack.unpack(packed.qweight, spec.bits, columns)
    if fields == 1:
        stored = codes.to(torch.int16) - _per_element(offset, spec, columns).to(torch.int16)
        if levels is not None:
            stored *= _per_element(levels[1].to(torch.int16), spec, columns)
        tensors["bytes"] = stored.to(torch.int8)
    else:
        if packed.zero_point is not None:
            tensors["offset"] = offset.expand(rows, -1).to(torch.int8).contiguous()
        tensors["bytes"] = _across_rows(codes, fields)
    note = f"{spec.bits}-bit codes as bytes" if fields == 1 else f"{fields} codes a byte, across rows"
    runtime = Runtime(
        "integer8" if fields == 1 else "integer4", tensors, spec, columns, rows, dtype,
        note + "; scales and sums again for the product", packed.name,
    )
    length = columns if "row_scale" in tensors else spec.group_length(columns)
    edges = [*range(0, columns, length), columns]
    tensors["sums"] = sums(runtime, list(zip(edges, edges[1:], strict=False)))
    return runtime


def _across_rows(codes: torch.Tensor, fields: int) -> torch.Tensor:
    """Byte ``[b * h + i, k]`` holds the codes ``[(b * fields + j) * h + i, k]`` of all fields ``j``; height ``h``."""
    height = _height(*codes.shape, fields)
    codes = torch.nn.functional.pad(codes, (0, 0, 0, -codes.shape[0] % (fields * height)))
    several = codes.view(-1, fields, height, codes.shape[1])
    out = several[:, 0].clone()
    for j in range(1, fields):
        out |= several[:, j] << (8 // fields * j)
    return out.flatten(0, 1)


def _unpack(runtime: Runtime, part: slice, number: int) -> torch.Tensor:
    """Rows ``part``, those of block ``number`` of rows of bytes, as signed bytes ``[rows, K]``."""
    form = form_of(runtime)
    height, width = form.height, 8 // form.fields
    source = runtime.tensors["bytes"][number * height : (number + 1) * height]
    out = scratch("unpacked", (form.fields * height, runtime.in_features), torch.uint8)
    for j in range(form.fields):
        target = out[j * height : (j + 1) * height]
        if j == form.fields - 1:
            torch.bitwise_right_shift(source, width * j, out=target)
        else:
            torch.bitwise_and(source, (1 << width) - 1 << width * j, out=target)
            if j:
                target.bitwise_right_shift_(width * j)
    signed = out.view(torch.int8)[: part.stop - part.start]
    offset, multiple = runtime.tensors.get("offset"), runtime.tensors.get("multiple")
    if offset is None:
        signed.sub_(runtime.spec.middle)
    else:
        grouped, values = by_group(signed, offset[part], form.length)
        grouped.sub_(values)
    if multiple is not None:
        grouped, values = by_group(signed, multiple[part], form.length)
        grouped.mul_(values)
    return signed


def by_group(matrix: torch.Tensor, values: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A view of ``matrix`` ``[rows, K]`` and ``values`` ``[rows, groups]`` in shapes that go together."""
    if values.shape[1] == 1:
        return matrix, values
    if matrix.shape[1] % length == 0:
        return matrix.unflatten(1, (-1, length)), values[..., None]
    return matrix, values.repeat_interleave(length, 1)[:, : matrix.shape[1]]


def parts(runtime: Runtime, width: int) -> list[tuple[slice, int]]:
    """Ranges of output rows, about ``width`` where they need no unpacking, each with its number."""
    form, rows = form_of(runtime), runtime.out_features
    step = max(width, 16) if form.fields == 1 else form.fields * form.height
    return [(slice(i, min(i + step, rows)), i // step) for i in range(0, rows, step)]


def weights(runtime: Runtime, part: slice, number: int) -> torch.Tensor:
    """Rows ``part`` as signed bytes ``[rows, K]``; valid until the next call."""
    return runtime.tensors["bytes"][part] if form_of(runtime).fields == 1 else _unpack(runtime, part, number)


def sums(runtime: Runtime, bounds: list[tuple[int, int]]) -> torch.Tensor:
    """Sums of the signed bytes over each range of K: int32 ``[ranges, rows]``."""
    found = torch.empty(len(bounds), runtime.out_features, dtype=torch.int32)
    for part, number in parts(runtime, 256):
        matrix = weights(runtime, part, number)
        for i, (start, stop) in enumerate(bounds):
            found[i, part] = matrix[:, start:stop].sum(-1, dtype=torch.int32)
    return found


def _canonical(runtime: Runtime) -> torch.Tensor:
    spec, columns, form = runtime.spec, runtime.in_features, form_of(runtime)
    stored = runtime.tensors["bytes"]
    if form.fields == 1:
        wide = stored.to(torch.int16)
        if "multiple" in runtime.tensors:
            wide = wide // _per_element(runtime.tensors["multiple"].to(torch.int16), spec, columns)
        wide = wide + _per_element(_offset(runtime), spec, columns).to(torch.int16)
        return bitpack.pack(wide.to(torch.uint8), spec.bits)
    width = 8 // form.fields
    several = stored.view(-1, form.height, columns)
    codes = torch.stack([several >> width * j & (1 << width) - 1 for j in range(form.fields)], 1)
    return bitpack.pack(codes.reshape(-1, columns)[: runtime.out_features].contiguous(), spec.bits)


def _dequantize(runtime: Runtime, dtype: torch.dtype) -> torch.Tensor:
    return reference.dequantize(runtime.packed(), dtype)


def _make4(packed: PackedWeight, dtype: torch.dtype) -> Runtime:
    return _make(packed, dtype, _fields(packed.spec.bits))


def _make8(packed: PackedWeight, dtype: torch.dtype) -> Runtime:
    return _make(packed, dtype, 1)


register("integer4", Layout(make=_make4, canonical=_canonical, dequantize=_dequantize))
register("integer8", Layout(make=_make8, canonical=_canonical, dequantize=_dequantize))
