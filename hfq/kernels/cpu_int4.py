"""CPU layouts on torch's int4 operator: codes up to 4 bits as one plane of nibbles, 5 to 8 bits as two.

``_weight_int4pack_mm_for_cpu`` computes ``(nibble - 8) * scale + zero`` in bfloat16 with float32 sums, groups of 32,
64, 128 or 256 along K. Any affine grid whose groups are multiples of 32 fits: longer groups repeat their scale, ragged
and odd sizes are padded (K with zeros in x, N with rows that are cut off). It stores for each block of N and each k the
nibbles of the block side by side, which :func:`nibbles` reads back without a transposition inside the bytes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from hfq.errors import KernelError
from hfq.formats import bitpack
from hfq.formats.affine import expand
from hfq.formats.spec import PER_TENSOR, QuantSpec
from hfq.kernels import dispatch, reference
from hfq.kernels.isa import float_compute, isa
from hfq.kernels.packed import Layout, PackedWeight, Runtime, register
from hfq.kernels.workspace import scratch

__all__ = ["Geometry", "geometry", "group_of", "lost", "nibble_block", "nibbles"]

_pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu.default
_mm = torch.ops.aten._weight_int4pack_mm_for_cpu.default

# Columns and rows of the slab that is dequantized at once: its float32 part (CHUNK_K x CHUNK_N) is 1 MiB, stays in L2.
# Measured: 512 x 512 within 2 % of the best of 128..1024 x 256..4096 on all three benchmark shapes.
CHUNK_N, CHUNK_K = 512, 512


def group_of(group: int) -> int:
    """The longest group of the operator that divides ``group``; 0 if there is none."""
    return next((g for g in (256, 128, 64, 32) if group % g == 0), 0)


@dataclass(frozen=True)
class Geometry:
    """Padded sizes: ``K`` and ``N`` as the operator sees them, ``group`` its group length."""

    N: int
    K: int
    group: int


@functools.lru_cache(maxsize=1024)
def geometry(spec: QuantSpec, out_features: int, in_features: int) -> Geometry:
    """How a weight is padded. Raises KernelError if its groups do not fit the operator."""
    if spec.groups(in_features) == 1:
        padded = -(-in_features // 32) * 32
        group = group_of(padded)
    else:
        group = group_of(spec.group_length(in_features))
        if not group:
            raise KernelError(f"groups of {spec.group_size} are not multiples of 32")
        padded = -(-in_features // group) * group
    block = max(nibble_block()[0], 16)
    return Geometry(-(-out_features // block) * block, padded, group)


@functools.cache
def nibble_block() -> tuple[int, bool]:
    """How this process' torch lays nibbles out: ``(block, halves)``.

    The packed bytes are ``[N / block, K, block / 2]``; byte d of a (block, k) holds columns d and d + block/2
    (``halves``) or 2d and 2d + 1. Found by packing known codes, because it depends on the instruction set. ``(0,
    False)`` if it is neither: then codes are read back through an identity product.
    """
    n, k = 128, 32
    column = torch.arange(n)[:, None].expand(n, k)
    row = torch.arange(k)[None, :].expand(n, k)
    values = (column % 16, column // 16, row % 16, row // 16)
    digits = [_pack(value.to(torch.int32).contiguous(), 1).flatten() for value in values]
    index = [torch.stack([d & 15, d >> 4], -1).long() for d in digits]
    found = torch.stack([index[0] + 16 * index[1], index[2] + 16 * index[3]], -1)
    for block in (64, 32, 16):
        base = torch.arange(0, n, block)[:, None, None, None]
        byte = torch.arange(block // 2)[None, None, :, None]
        half = torch.arange(2)[None, None, None, :]
        rows = torch.arange(k)[None, :, None, None].expand(n // block, k, block // 2, 2)
        for halves in (True, False):
            columns = base + (byte + half * (block // 2) if halves else 2 * byte + half)
            expected = torch.stack([columns.expand_as(rows), rows], -1).reshape(found.shape)
            if torch.equal(found, expected):
                return block, halves
    return 0, False


def pack_nibbles(codes: torch.Tensor, geo: Geometry) -> torch.Tensor:
    """uint8 codes below 16 ``[N, K]`` to the operator's layout, padded."""
    padded = torch.zeros(geo.N, geo.K, dtype=torch.int32)
    padded[: codes.shape[0], : codes.shape[1]] = codes
    return _pack(padded, 1)


def nibbles(packed: torch.Tensor, geo: Geometry) -> torch.Tensor:
    """Inverse of :func:`pack_nibbles` before the padding is cut: uint8 ``[geo.N, geo.K]``."""
    block, halves = nibble_block()
    if not block:
        return _through_identity(packed, geo)
    view = packed.reshape(geo.N // block, geo.K, block // 2)
    out = torch.empty(geo.N // block, block, geo.K, dtype=torch.uint8)
    low, high = (slice(0, block // 2), slice(block // 2, block)) if halves else (slice(0, None, 2), slice(1, None, 2))
    out[:, low] = (view & 15).transpose(1, 2)
    out[:, high] = (view >> 4).transpose(1, 2)
    return out.reshape(geo.N, geo.K)


def _through_identity(packed: torch.Tensor, geo: Geometry) -> torch.Tensor:
    """Codes as products with unit vectors: scale 1 and zero 8 give the code itself, which bfloat16 holds exactly."""
    grid = torch.ones(geo.K // geo.group, geo.N, 2, dtype=torch.bfloat16)
    grid[..., 1] = 8
    out = torch.empty(geo.N, geo.K, dtype=torch.uint8)
    for start in range(0, geo.K, 64):
        rows = min(64, geo.K - start)
        unit = torch.zeros(rows, geo.K, dtype=torch.bfloat16)
        unit[torch.arange(rows), start + torch.arange(rows)] = 1
        out[:, start : start + rows] = _mm(unit, packed, geo.group, grid).t().to(torch.uint8)
    return out


def _centre(zero_point: torch.Tensor | None, spec: QuantSpec) -> torch.Tensor:
    """The code stored as the operator's middle (8, or 136 of two planes): float32, one number or one a group.

    The operator adds ``zero`` in bfloat16 to ``(nibble - 8) * scale``, and two planes are summed after rounding: what
    cancels there cancels with bfloat16's precision. So the zero point goes to the middle wherever all codes then fit,
    which leaves nothing to cancel. 4 and 8 bits fill the planes; 7 bits have room for zero points from 8.
    """
    middle = 8.0 if spec.bits <= 4 else 136.0
    if spec.bits in (4, 8):
        return torch.tensor(middle)
    if zero_point is None:
        return torch.tensor(float(spec.middle))
    return zero_point.float().round().clamp(8 if spec.bits == 7 else 0, spec.max_code)


def _per_group(values: torch.Tensor, packed_shape: tuple[int, int], spec: QuantSpec, geo: Geometry) -> torch.Tensor:
    """A parameter of the canonical groups as ``[K / group, rows]`` of the operator's groups."""
    rows, in_features = packed_shape
    values = values.expand(rows, -1) if values.dim() else values.expand(rows, 1)
    index = torch.arange(geo.K // geo.group) * geo.group // spec.group_length(in_features)
    return values[:, index.clamp(max=values.shape[1] - 1)].t()


def _grids(packed: PackedWeight, geo: Geometry) -> list[torch.Tensor]:
    """The operator's ``[K / group, N, 2]`` for each plane: ``scale`` and ``zero``; padding rows are zero.

    The scale is the one that the operator sees, so that all codes of a group share one relative error. Of two planes
    the high one takes whole steps of its own, the low one the rest, less than one such step.
    """
    shape, spec = (packed.out_features, packed.in_features), packed.spec
    scale = packed.scale.to(torch.bfloat16).float()
    zero = torch.tensor(float(spec.middle)) if packed.zero_point is None else packed.zero_point.float()
    offset = (_centre(packed.zero_point, spec) - zero) * scale
    parts = [(scale, offset)]
    if spec.bits > 4:
        steps = scale * 16
        high = ((offset / steps).round() * steps).to(torch.bfloat16).float()
        parts = [(scale, offset - high), (steps, high)]
    grids = []
    for width, shift in parts:
        grid = torch.zeros(geo.K // geo.group, geo.N, 2, dtype=torch.bfloat16)
        grid[:, : shape[0], 0] = _per_group(width, shape, spec, geo)
        grid[:, : shape[0], 1] = _per_group(shift, shape, spec, geo)
        grids.append(grid)
    return grids


def _shift(zero_point: torch.Tensor | None, spec: QuantSpec, in_features: int) -> torch.Tensor | int:
    """What is added to a code to make its nibble (or byte of two nibbles): uint8 per element, or one number."""
    middle = 8 if spec.bits <= 4 else 136
    centre = _centre(zero_point, spec)
    return expand((middle - centre).to(torch.uint8), in_features, spec) if centre.dim() else middle - int(centre)


def _shared(packed: PackedWeight) -> dict[str, torch.Tensor]:
    tensors = {"scale": packed.scale}
    if packed.zero_point is not None:
        tensors["zero_point"] = packed.zero_point
    return tensors


def _note(packed: PackedWeight, geo: Geometry, planes: int) -> str:
    parts = []
    if packed.spec.bits != 4 * planes:
        parts.append(f"{packed.spec.bits}-bit codes take {4 * planes} bits")
    each = " and plane" if planes > 1 else ""
    parts.append(f"scales and zeros again in bfloat16, 32 bits a group of {geo.group}{each}")
    if (packed.out_features, packed.in_features) != (geo.N, geo.K):
        parts.append(f"padded to {geo.N} x {geo.K}")
    return "; ".join(parts)


def _make(layout: str, packed: PackedWeight, dtype: torch.dtype) -> Runtime:
    geo = geometry(packed.spec, packed.out_features, packed.in_features)
    codes = bitpack.unpack(packed.qweight, packed.spec.bits, packed.in_features)
    grids = _grids(packed, geo)
    codes = codes + _shift(packed.zero_point, packed.spec, packed.in_features)
    if layout == "int4pack":
        tensors = {"low": pack_nibbles(codes, geo), "low_grid": grids[0]}
    else:
        tensors = {
            "low": pack_nibbles(codes & 15, geo), "high": pack_nibbles(codes >> 4, geo),
            "low_grid": grids[0], "high_grid": grids[1],
        }
    note = _note(packed, geo, 1 if layout == "int4pack" else 2)
    return Runtime(
        layout, {**tensors, **_shared(packed)}, packed.spec, packed.in_features, packed.out_features, dtype, note,
        packed.name,
    )


def _geometry(runtime: Runtime) -> tuple[Geometry, float]:
    """Padded sizes, and what one scale per tensor lost in bfloat16: an error that all outputs would share."""
    if runtime.extra is None:
        runtime.extra = (geometry(runtime.spec, runtime.out_features, runtime.in_features), lost(runtime))
    return runtime.extra


def lost(runtime: Runtime) -> float:
    """Ratio of the scale to its bfloat16 rounding, for one scale per tensor; else 1."""
    if runtime.spec.group_size != PER_TENSOR:
        return 1.0
    scale = runtime.scale.flatten()[0].double()
    return float(scale / scale.to(torch.bfloat16))


def _codes(runtime: Runtime) -> torch.Tensor:
    geo, _ = _geometry(runtime)
    codes = nibbles(runtime.tensors["low"], geo)
    if "high" in runtime.tensors:
        codes |= nibbles(runtime.tensors["high"], geo) << 4
    codes = codes[: runtime.out_features, : runtime.in_features]
    return codes - _shift(runtime.zero_point, runtime.spec, runtime.in_features)


def _canonical(runtime: Runtime) -> torch.Tensor:
    return bitpack.pack(_codes(runtime).contiguous(), runtime.spec.bits)


def _input(x: torch.Tensor, geo: Geometry, dtype: torch.dtype) -> torch.Tensor:
    """``x`` in the compute dtype, contiguous, K padded with zeros."""
    x = x.to(dtype) if x.dtype != dtype else x
    if x.shape[-1] != geo.K:
        return torch.nn.functional.pad(x, (0, geo.K - x.shape[-1]))
    return x if x.is_contiguous() else x.contiguous()


def _output(y: torch.Tensor, runtime: Runtime, dtype: torch.dtype, bias: torch.Tensor | None) -> torch.Tensor:
    if y.shape[-1] != runtime.out_features:
        y = y[:, : runtime.out_features]
    if y.dtype != dtype or not y.is_contiguous():
        y = y.to(dtype).contiguous()
    return y if bias is None else y.add_(bias)


@dispatch.backend("wna16", "int4pack")
def int4pack(x: torch.Tensor, runtime: Runtime, bias: torch.Tensor | None) -> torch.Tensor:
    """Small M: the fused operator, once for each plane of nibbles."""
    tensors = runtime.tensors
    geo, ratio = _geometry(runtime)
    xb = _input(x, geo, torch.bfloat16)
    y = _mm(xb, tensors["low"], geo.group, tensors["low_grid"])
    if "high" in tensors:
        # The sum of both planes is taken in float32: a rounding of y less.
        y = _mm(xb, tensors["high"], geo.group, tensors["high_grid"]).float().add_(y)
    if ratio != 1.0:
        y = y.float().mul_(ratio)
    return _output(y, runtime, x.dtype, bias)


@dispatch.backend("wna16", "int4pack_dequant")
def int4pack_dequant(x: torch.Tensor, runtime: Runtime, bias: torch.Tensor | None) -> torch.Tensor:
    """Large M: dequantize slabs of columns into a buffer that stays in cache, and multiply each."""
    geo, ratio = _geometry(runtime)
    dtype = float_compute(isa())
    xc = _input(x, geo, dtype)
    block, half = nibble_block()[0], nibble_block()[0] // 2
    y = torch.empty(x.shape[0], geo.N, dtype=x.dtype)
    for start in range(0, geo.N, CHUNK_N):
        width = min(CHUNK_N, geo.N - start)
        blocks = width // block
        part = torch.mm(xc, _slab(runtime.tensors, geo, start, width, dtype, ratio))
        # Columns come as (half, block, byte); the output wants (block, half, byte).
        target = y[:, start : start + width].view(-1, blocks, 2, half)
        target.copy_(part.view(-1, 2, blocks, half).transpose(1, 2))
    return _output(y, runtime, x.dtype, bias)


def _slab(
    tensors: dict[str, torch.Tensor], geo: Geometry, start: int, width: int, dtype: torch.dtype, ratio: float
) -> torch.Tensor:
    """Columns ``start:start + width`` of the transposed weight, ``[K, width]``, in (half, block, byte) order."""
    block, half = nibble_block()[0], nibble_block()[0] // 2
    blocks, groups = width // block, geo.K // geo.group
    grid = tensors["low_grid"][:, start : start + width].view(groups, blocks, 2, half, 2)
    grid = grid.permute(4, 0, 2, 1, 3).float().reshape(2, groups, 1, width)
    scale, shift = grid[0], grid[1] - 8 * grid[0]
    if "high" in tensors:
        # (lo - 8) s + zero_lo + (hi - 8) 16 s + zero_hi = (lo + 16 hi) s + shift
        high = tensors["high_grid"][:, start : start + width, 1].view(groups, blocks, 2, half)
        shift = shift + high.permute(0, 2, 1, 3).float().reshape(groups, 1, width) - 128 * scale
    if ratio != 1.0:
        scale, shift = scale * ratio, shift * ratio
    out = scratch("slab", (geo.K, width), dtype)
    parts = max(round(geo.K / CHUNK_K), 1)
    step = -(-groups // parts) * geo.group
    for k in range(0, geo.K, step):
        rows = min(step, geo.K - k)
        codes = _slab_codes(tensors["low"], geo, start, blocks, k, rows, "low")
        if "high" in tensors:
            codes |= _slab_codes(tensors["high"], geo, start, blocks, k, rows, "high") << 4
        values = out[k : k + rows] if dtype == torch.float32 else scratch("values", (rows, width), torch.float32)
        values.copy_(codes)
        grouped = values.view(rows // geo.group, geo.group, width)
        span = slice(k // geo.group, (k + rows) // geo.group)
        torch.addcmul(shift[span], grouped, scale[span], out=grouped)
        if dtype != torch.float32:
            out[k : k + rows].copy_(values)
    return out


def _slab_codes(
    packed: torch.Tensor, geo: Geometry, start: int, blocks: int, k: int, rows: int, plane: str
) -> torch.Tensor:
    """Nibbles ``[rows, 2 * blocks * half]`` of a slab: all low halves, then all high ones."""
    block, half = nibble_block()[0], nibble_block()[0] // 2
    view = packed.view(geo.N // block, geo.K, half)[start // block : start // block + blocks, k : k + rows]
    packed_rows = scratch("bytes", (rows, blocks, half), torch.uint8)
    # Moving eight bytes at a time is what makes the transposition cheap.
    packed_rows.view(torch.int64).copy_(view.view(torch.int64).transpose(0, 1))
    flat = packed_rows.view(rows, blocks * half)
    out = scratch("codes_" + plane, (rows, 2 * blocks * half), torch.uint8)
    torch.bitwise_and(flat, 15, out=out[:, : blocks * half])
    torch.bitwise_right_shift(flat, 4, out=out[:, blocks * half :])
    return out


def _dequantize(runtime: Runtime, dtype: torch.dtype) -> torch.Tensor:
    return reference.dequantize(runtime.packed(), dtype)


for _layout in ("int4pack", "nibbles"):
    register(_layout, Layout(
        make=functools.partial(_make, _layout), canonical=_canonical, dequantize=_dequantize,
    ))
