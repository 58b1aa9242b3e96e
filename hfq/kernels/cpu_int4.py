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
from hfq.formats.spec import QuantSpec
from hfq.kernels import dispatch, layouts, reference
from hfq.kernels.isa import float_compute, isa
from hfq.kernels.packed import PackedWeight, Runtime
from hfq.kernels.workspace import scratch

__all__ = ["Geometry", "geometry", "group_of", "nibble_block", "nibbles"]

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


def _grid(packed: PackedWeight, geo: Geometry, width: float, middle: float) -> torch.Tensor:
    """The operator's ``[K / group, N, 2]``: scale ``s * width`` and zero ``(middle - z) * s``; padding gets zeros."""
    rows, spec = packed.out_features, packed.spec
    # From the scale that the operator sees, so that a code equal to the zero point stays close to zero.
    scale = packed.scale.to(torch.bfloat16).float()
    zero = torch.tensor(float(spec.middle)) if packed.zero_point is None else packed.zero_point.float()
    both = torch.stack([scale * width, (middle - zero) * scale], -1).expand(rows, -1, 2)
    length = spec.group_length(packed.in_features)
    index = (torch.arange(geo.K // geo.group) * geo.group // length).clamp(max=both.shape[1] - 1)
    out = torch.zeros(geo.K // geo.group, geo.N, 2, dtype=torch.bfloat16)
    out[:, :rows] = both[:, index].transpose(0, 1)
    return out


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
    if (geo.N, geo.K) != (packed.out_features, packed.in_features):
        parts.append(f"padded to {geo.N} x {geo.K}")
    return "; ".join(parts)


def _make(layout: str, packed: PackedWeight, dtype: torch.dtype) -> Runtime:
    geo = geometry(packed.spec, packed.out_features, packed.in_features)
    codes = bitpack.unpack(packed.qweight, packed.spec.bits, packed.in_features)
    if layout == "int4pack":
        tensors = {"low": pack_nibbles(codes, geo), "low_grid": _grid(packed, geo, 1.0, 8.0)}
    else:
        # value = (hi - 8) * 16 s + (136 - z) s  +  (lo - 8) * s: the offsets of both nibbles sit in the larger plane.
        tensors = {
            "low": pack_nibbles(codes & 15, geo), "high": pack_nibbles(codes >> 4, geo),
            "low_grid": _grid(packed, geo, 1.0, 0.0), "high_grid": _grid(packed, geo, 16.0, 136.0),
        }
        tensors["low_grid"][..., 1] = 0
    note = _note(packed, geo, 1 if layout == "int4pack" else 2)
    return Runtime(
        layout, {**tensors, **_shared(packed)}, packed.spec, packed.in_features, packed.out_features, dtype, note,
        packed.name,
    )


def _geometry(runtime: Runtime) -> Geometry:
    if runtime.extra is None:
        runtime.extra = geometry(runtime.spec, runtime.out_features, runtime.in_features)
    return runtime.extra


def _codes(runtime: Runtime) -> torch.Tensor:
    geo = _geometry(runtime)
    codes = nibbles(runtime.tensors["low"], geo)
    if "high" in runtime.tensors:
        codes |= nibbles(runtime.tensors["high"], geo) << 4
    return codes[: runtime.out_features, : runtime.in_features]


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
    geo = _geometry(runtime)
    xb = _input(x, geo, torch.bfloat16)
    y = _mm(xb, tensors["low"], geo.group, tensors["low_grid"])
    if "high" in tensors:
        # The sum of both planes is taken in float32: a rounding of y less.
        y = _mm(xb, tensors["high"], geo.group, tensors["high_grid"]).float().add_(y)
    return _output(y, runtime, x.dtype, bias)


@dispatch.backend("wna16", "int4pack_dequant")
def int4pack_dequant(x: torch.Tensor, runtime: Runtime, bias: torch.Tensor | None) -> torch.Tensor:
    """Large M: dequantize slabs of columns into a buffer that stays in cache, and multiply each."""
    geo = _geometry(runtime)
    dtype = float_compute(isa())
    xc = _input(x, geo, dtype)
    block, half = nibble_block()[0], nibble_block()[0] // 2
    y = torch.empty(x.shape[0], geo.N, dtype=x.dtype)
    for start in range(0, geo.N, CHUNK_N):
        width = min(CHUNK_N, geo.N - start)
        blocks = width // block
        part = torch.mm(xc, _slab(runtime, geo, start, width, dtype))
        # Columns come as (half, block, byte); the output wants (block, half, byte).
        target = y[:, start : start + width].view(-1, blocks, 2, half)
        target.copy_(part.view(-1, 2, blocks, half).transpose(1, 2))
    return _output(y, runtime, x.dtype, bias)


def _slab(runtime: Runtime, geo: Geometry, start: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Columns ``start:start + width`` of the transposed weight, ``[K, width]``, columns in (half, block, byte) order."""
    tensors = runtime.tensors
    block, half = nibble_block()[0], nibble_block()[0] // 2
    blocks, groups = width // block, geo.K // geo.group
    grid = tensors["low_grid"][:, start : start + width].view(groups, blocks, 2, half, 2)
    grid = grid.permute(4, 0, 2, 1, 3).to(torch.float32, memory_format=torch.contiguous_format).view(2, groups, 1, width)
    scale, shift = grid[0], grid[1] - 8 * grid[0]
    if "high" in tensors:
        # code = lo + 16 hi, so the offset of the low plane's middle is the high grid's zero less its own middle.
        high = tensors["high_grid"][:, start : start + width, 1].view(groups, blocks, 2, half)
        shift = high.permute(0, 2, 1, 3).float().reshape(groups, 1, width) - 136 * scale
    out = scratch("slab", (geo.K, width), dtype)
    step = max(CHUNK_K // geo.group, 1) * geo.group
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
    layouts.register(_layout, layouts.Layout(
        make=functools.partial(_make, _layout), canonical=_canonical, dequantize=_dequantize,
    ))
