"""The Triton kernels of weight-only matrix products. Importing this module needs Triton.

The weight is the left operand (``Y.T = W @ X.T``): the decoded weight stays in registers as operand A of the tensor
core instruction, and the token tile may be as small as 16. Codes become floats without a conversion: shifted to the top
of the mantissa under the exponent of ``2**bits``, they read exactly ``2**bits + code`` (for 4 bits in bfloat16:
``(q << 3) | 0x4180`` is ``16 + q``). The offset leaves with the zero point; it is small, so that little is lost where
it is subtracted after the product.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["ELEM", "GROUP", "GROUP_XSUM", "dequant_kernel", "reduce_kernel", "wna16_kernel", "xsum_kernel"]

# How scale and zero point are applied (SCALE_MODE).
GROUP = tl.constexpr(0)  # zero point subtracted from the decoded codes (exact), scale on the float32 sum of a group
GROUP_XSUM = tl.constexpr(1)  # both on the float32 sum; the sums of the activations come from xsum_kernel
ELEM = tl.constexpr(2)  # both on every weight, in the activation dtype, one accumulator


@triton.constexpr_function
def _mantissa(dtype):
    return 10 if dtype == tl.float16 else 7


@triton.constexpr_function
def _offset(bits, dtype):
    """What :func:`_decoded` adds to a code: ``2**bits``, or 0 where the mantissa is too short for it."""
    return 0 if bits > _mantissa(dtype) else 1 << bits


@triton.constexpr_function
def _bias(bits, dtype):
    """Bit pattern of ``2.0**bits``: with the code in the top mantissa bits, the number is ``2**bits + code``."""
    return (15 + bits) << 10 if dtype == tl.float16 else (127 + bits) << 7


@triton.constexpr_function
def _shift(at, top, register="$1"):
    """PTX that moves bit ``at`` of both words of a register to bit ``top``; the neighbour's bits are masked later."""
    if at == top:
        return f"mov.b32 t, {register};"
    return f"shr.b32 t, {register}, {at - top};" if at > top else f"shl.b32 t, {register}, {top - at};"


@triton.constexpr_function
def _unpack_asm(at, width, bits, dtype):
    """Two words a register: shift, then ``(t & mask) | bias`` in one lop3; three-bit codes take a second plane ($2)."""
    two = lambda v: f"0x{v:04x}{v:04x}"  # noqa: E731
    low = _mantissa(dtype) - bits
    mask, bias = two(((1 << width) - 1) << low), two(_bias(bits, dtype))
    code = f".reg .b32 t; {_shift(at, low)} lop3.b32 $0, t, {mask}, {bias}, 0xea;"
    if bits == 3:
        code = (
            f".reg .b32 t, u; {_shift(2 * (at % 8), low)} lop3.b32 u, t, {mask}, {bias}, 0xea; "
            f"{_shift(at, low + 2, '$2')} lop3.b32 $0, t, {two(4 << low)}, u, 0xea;"
        )
    return "{ " + code + " }"


@triton.constexpr_function
def _unpack8_asm(at):
    """Eight bits in bfloat16: low nibble as ``16 + l`` less 272, plus the high one as ``256 + 16 h``, all exact."""
    low = f"shr.b32 t, $1, {at - 3};" if at > 3 else f"shl.b32 t, $1, {3 - at};"
    return (
        "{ .reg .b32 t, lo, hi, one, less; mov.b32 one, 0x3f803f80; mov.b32 less, 0xc388c388; "
        f"{low} lop3.b32 lo, t, 0x00780078, 0x41804180, 0xea; shr.b32 t, $1, {at + 1}; "
        "lop3.b32 hi, t, 0x00780078, 0x43804380, 0xea; "
        "fma.rn.bf16x2 lo, lo, one, less; fma.rn.bf16x2 $0, hi, one, lo; }"
    )


@triton.jit
def _decoded(wa, wb, wh, J: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Slice J of a block as ``_offset + code`` in DTYPE, exactly.

    Three-bit blocks are two tiles of the 2-bit plane (wa, wb) and one of the 1-bit plane (wh).
    """
    LOW: tl.constexpr = _mantissa(DTYPE) - BITS
    BIAS: tl.constexpr = _bias(BITS, DTYPE)
    if LOW < 0:
        if ASM:
            v = tl.inline_asm_elementwise(
                _unpack8_asm(8 * J), "=r,r", [wa], dtype=tl.bfloat16, is_pure=True, pack=2
            )
        else:
            q = ((wa >> (BITS * J)) & 255).to(tl.int32) | 0x4B000000
            v = (q.to(tl.float32, bitcast=True) - 8388608.0).to(tl.bfloat16)
    elif BITS == 3:
        plane = wa if J < 8 else wb
        if ASM and LOW + BITS == 10:  # float16
            v = tl.inline_asm_elementwise(
                _unpack_asm(J, 2, 3, DTYPE), "=r,r,r", [plane, wh], dtype=tl.float16, is_pure=True, pack=2
            )
        elif ASM:
            v = tl.inline_asm_elementwise(
                _unpack_asm(J, 2, 3, DTYPE), "=r,r,r", [plane, wh], dtype=tl.bfloat16, is_pure=True, pack=2
            )
        else:
            q = ((plane >> (2 * (J % 8))) & 3) | (((wh >> J) & 1) << 2)
            v = ((q << LOW) | BIAS).to(tl.int16).to(DTYPE, bitcast=True)
    elif ASM and LOW + BITS == 10:
        v = tl.inline_asm_elementwise(
            _unpack_asm(BITS * J, BITS, BITS, DTYPE), "=r,r", [wa], dtype=tl.float16, is_pure=True, pack=2
        )
    elif ASM:
        v = tl.inline_asm_elementwise(
            _unpack_asm(BITS * J, BITS, BITS, DTYPE), "=r,r", [wa], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        q = (wa >> (BITS * J)) & ((1 << BITS) - 1)
        v = ((q << LOW) | BIAS).to(tl.int16).to(DTYPE, bitcast=True)
    return v


@triton.jit
def _parameter(ptr, offs_n, n_ok, g, stride_sn, stride_sg, USED: tl.constexpr, OTHERWISE: tl.constexpr):
    """Scale or zero point of group g for the rows of a tile, float32; a constant where there is none."""
    if USED:
        value = tl.load(ptr + offs_n * stride_sn + g * stride_sg, mask=n_ok, other=0, eviction_policy="evict_last")
        out = value.to(tl.float32)
    else:
        out = tl.full(offs_n.shape, OTHERWISE, tl.float32)
    return out


@triton.jit(do_not_specialize=["M"])
def wna16_kernel(  # noqa: C901 - branches on constants, resolved at compile time
    x_ptr, w_ptr, h_ptr, s_ptr, z_ptr, xs_ptr, b_ptr, y_ptr,
    M, N, K, W, G, stride_sn, stride_sg, NB, NB_SPLIT, NU,
    BITS: tl.constexpr, SL: tl.constexpr, FIELDS: tl.constexpr, FOLD: tl.constexpr, GROUP_SIZE: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, MODE: tl.constexpr, HAS_ZERO: tl.constexpr, MIDDLE: tl.constexpr,
    PARTIAL: tl.constexpr, EVEN_K: tl.constexpr, HAS_BIAS: tl.constexpr, ASM: tl.constexpr,
):
    """One tile ``[BN rows of W, BM tokens]`` over the blocks of one split.

    x ``[M, K]``; w int16 ``[N, W]`` (h: the 1-bit plane ``[N, W / 2]`` of three-bit codes); scale and zero point by
    strides; xs float32 ``[M, NU]`` (GROUP_XSUM); y ``[M, N]``, or float32 ``[splits, M, N]`` when PARTIAL.
    GROUP_SIZE 0: one scale a row. FOLD: codes that share a scale, a divisor of the block.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    OFF: tl.constexpr = _offset(BITS, DTYPE)
    BLOCK: tl.constexpr = FIELDS * SL
    FOLDS: tl.constexpr = BLOCK // FOLD
    PER_FOLD: tl.constexpr = FOLD // SL
    CHANNEL: tl.constexpr = GROUP_SIZE == 0
    FUSED: tl.constexpr = MODE == ELEM or (CHANNEL and MODE == GROUP)  # one accumulator is enough
    FLOAT_ZERO: tl.constexpr = HAS_ZERO and z_ptr.dtype.element_ty != tl.uint8
    pid, pid_k = tl.program_id(0), tl.program_id(1)
    tiles_m = tl.cdiv(M, BM)
    pid_m, pid_n = pid % tiles_m, pid // tiles_m  # tiles that share weights run side by side

    offs_n = pid_n * BN + tl.arange(0, BN)
    offs_m = pid_m * BM + tl.arange(0, BM)
    offs_t = tl.arange(0, SL)
    n_ok, m_ok = offs_n < N, offs_m < M
    rows = tl.where(n_ok, offs_n, 0)
    w_tile = w_ptr + rows.to(tl.int64)[:, None] * W + offs_t[None, :]
    h_tile = h_ptr + rows.to(tl.int64)[:, None] * (W // 2) + offs_t[None, :]
    x_tile = x_ptr + tl.where(m_ok, offs_m, 0).to(tl.int64)[None, :] * K + offs_t[:, None]
    xs_row = xs_ptr + tl.where(m_ok, offs_m, 0).to(tl.int64) * NU

    first = pid_k * NB_SPLIT
    last = tl.minimum(first + NB_SPLIT, NB)
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    # What is applied after the dot is fetched one group early and carried, since the compiler pipelines only operands
    # of a dot. What is applied before it must be loaded in the loop: a carried value would keep the compiler from
    # decoding in the layout of the dot operand, and every decoded tile would pass through shared memory.
    g0 = 0 if CHANNEL else tl.minimum(first * BLOCK // GROUP_SIZE, G - 1)
    s_next = _parameter(s_ptr, offs_n, n_ok, g0, stride_sn, stride_sg, True, 1)
    z_next = _parameter(z_ptr, offs_n, n_ok, g0, stride_sn, stride_sg, HAS_ZERO, MIDDLE)
    for blk in range(first, last):
        k0 = tl.multiple_of(blk * BLOCK, BLOCK)
        if BITS == 3:
            wa = tl.load(w_tile + 2 * blk * SL, eviction_policy="evict_first")
            wb = tl.load(w_tile + (2 * blk + 1) * SL, eviction_policy="evict_first")
            wh = tl.load(h_tile + blk * SL, eviction_policy="evict_first")
        else:
            wa = tl.load(w_tile + tl.multiple_of(blk * SL, SL), eviction_policy="evict_first")
            wb, wh = wa, wa
        for f in tl.static_range(FOLDS):
            s, z = s_next, z_next
            if not CHANNEL:
                here = tl.minimum((k0 + f * FOLD) // GROUP_SIZE, G - 1)
                ahead = tl.minimum((k0 + (f + 1) * FOLD) // GROUP_SIZE, G - 1)
                if MODE == ELEM:
                    s = _parameter(s_ptr, offs_n, n_ok, here, stride_sn, stride_sg, True, 1)
                else:
                    s_next = _parameter(s_ptr, offs_n, n_ok, ahead, stride_sn, stride_sg, True, 1)
                if MODE == GROUP_XSUM:
                    z_next = _parameter(z_ptr, offs_n, n_ok, ahead, stride_sn, stride_sg, HAS_ZERO, MIDDLE)
                else:
                    z = _parameter(z_ptr, offs_n, n_ok, here, stride_sn, stride_sg, HAS_ZERO, MIDDLE)
            if MODE == GROUP_XSUM:
                xs = tl.load(xs_row + blk * FOLDS + f, mask=m_ok, other=0.0)
            part = acc if FUSED else tl.zeros((BN, BM), dtype=tl.float32)
            for i in tl.static_range(PER_FOLD):
                at = k0 + (f * PER_FOLD + i) * SL
                if EVEN_K:
                    x = tl.load(x_tile + at, eviction_policy="evict_last")
                else:
                    x = tl.load(x_tile + at, mask=(at + offs_t < K)[:, None], other=0.0)
                v = _decoded(wa, wb, wh, f * PER_FOLD + i, BITS, DTYPE, ASM)
                if MODE == GROUP:
                    v = v - (z + OFF).to(DTYPE)[:, None]
                elif MODE == ELEM:
                    if FLOAT_ZERO:
                        v = (v - OFF).to(DTYPE)  # apart: offset + z would round
                    v = v - (z if FLOAT_ZERO else z + OFF).to(DTYPE)[:, None]
                    v = v * s.to(DTYPE)[:, None]
                part = tl.dot(v, x, part)
            if FUSED:
                acc = part
            elif MODE == GROUP_XSUM:
                part -= (z + OFF)[:, None] * xs[None, :]
                acc += part if CHANNEL else part * s[:, None]
            else:
                acc += part * s[:, None]
    if CHANNEL and MODE != ELEM:
        acc *= s_next[:, None]

    ok = n_ok[:, None] & m_ok[None, :]
    out = offs_m.to(tl.int64)[None, :] * N + offs_n[:, None]
    if PARTIAL:
        tl.store(y_ptr + pid_k.to(tl.int64) * M * N + out, acc, mask=ok)
    else:
        if HAS_BIAS:
            acc += tl.load(b_ptr + offs_n, mask=n_ok, other=0.0).to(tl.float32)[:, None]
        tl.store(y_ptr + out, acc.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["TOTAL"])
def reduce_kernel(part_ptr, b_ptr, y_ptr, N, TOTAL, SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum the float32 partials ``[SPLIT, M, N]`` in a fixed order, add the bias, round once: y ``[M, N]``."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = offs < TOTAL
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    part = part_ptr + offs
    for _ in tl.static_range(SPLIT):
        acc += tl.load(part, mask=ok, other=0.0)
        part += TOTAL
    if HAS_BIAS:
        acc += tl.load(b_ptr + offs % N, mask=ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, acc.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def xsum_kernel(x_ptr, xs_ptr, K, NU, FOLD: tl.constexpr, ROWS: tl.constexpr):
    """Float32 sums of x ``[M, K]`` over stretches of FOLD elements: ``[M, NU]``, ROWS of them a program."""
    m = tl.program_id(0).to(tl.int64)
    u = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    k = u[:, None] * FOLD + tl.arange(0, FOLD)[None, :]
    x = tl.load(x_ptr + m * K + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(xs_ptr + m * NU + u, tl.sum(x, 1), mask=u < NU)


@triton.jit
def dequant_kernel(
    w_ptr, h_ptr, s_ptr, z_ptr, y_ptr, N, K, W, G, stride_sn, stride_sg,
    BITS: tl.constexpr, SL: tl.constexpr, FIELDS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    BN: tl.constexpr, HAS_ZERO: tl.constexpr, MIDDLE: tl.constexpr, EVEN_K: tl.constexpr,
):
    """``scale * (code - zero)`` of one block of BN rows, computed in float32, rounded once: y ``[N, K]``.

    Runs for every group size: where a group may end inside a slice, scales are read for each element.
    """
    BLOCK: tl.constexpr = FIELDS * SL
    UNIFORM: tl.constexpr = GROUP_SIZE == 0 or GROUP_SIZE % SL == 0
    blk = tl.program_id(1)
    offs_n = tl.program_id(0) * BN + tl.arange(0, BN)
    offs_t = tl.arange(0, SL)
    n_ok = offs_n < N
    rows = tl.where(n_ok, offs_n, 0)
    w_tile = w_ptr + rows.to(tl.int64)[:, None] * W + offs_t[None, :]
    out = y_ptr + offs_n.to(tl.int64)[:, None] * K + offs_t[None, :]
    if BITS == 3:
        wa = tl.load(w_tile + 2 * blk * SL)
        wb = tl.load(w_tile + (2 * blk + 1) * SL)
        wh = tl.load(h_ptr + rows.to(tl.int64)[:, None] * (W // 2) + offs_t[None, :] + blk * SL)
    else:
        wa = tl.load(w_tile + blk * SL)
        wb, wh = wa, wa
    for j in tl.static_range(FIELDS):
        k = blk * BLOCK + j * SL
        if BITS == 3:
            low = wa if j < 8 else wb
            q = ((low >> (2 * (j % 8))) & 3) | (((wh >> j) & 1) << 2)
        else:
            q = (wa >> (BITS * j)) & ((1 << BITS) - 1)
        v = (q.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0  # exact, without a conversion
        if UNIFORM:
            g = 0 if GROUP_SIZE == 0 else tl.minimum(k // GROUP_SIZE, G - 1)
            s = _parameter(s_ptr, rows, n_ok, g, stride_sn, stride_sg, True, 1)
            z = _parameter(z_ptr, rows, n_ok, g, stride_sn, stride_sg, HAS_ZERO, MIDDLE)
            v = (v - z[:, None]) * s[:, None]
        else:
            g = tl.minimum((k + offs_t) // GROUP_SIZE, G - 1)
            at = rows[:, None] * stride_sn + g[None, :] * stride_sg
            z = tl.load(z_ptr + at).to(tl.float32) if HAS_ZERO else MIDDLE
            v = (v - z) * tl.load(s_ptr + at).to(tl.float32)
        ok = n_ok[:, None] if EVEN_K else n_ok[:, None] & (k + offs_t < K)[None, :]
        tl.store(out + k, v.to(y_ptr.dtype.element_ty), mask=ok)
