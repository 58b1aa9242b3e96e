"""The Triton kernels of integer products: int8 activations, 8- or 4-bit weights, int32 sums. Importing needs Triton.

The weight is the left operand (``Y.T = W @ X.T``), so that the token tile may be as small as 16 and decoded four-bit
codes stay in registers. Both operands have the summed axis contiguous, as the int8 tensor core instruction asks for.
Four-bit codes are multiplied as 16 times themselves, which one mask makes of them.

With a scale for each group the int32 sum of a group starts at the bit pattern of ``1.5 * 2**23``: read as a float it is
that number plus the sum, exactly while the sum stays below ``2**22``, so no integer is converted in the loop.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["finish_kernel", "wnan_kernel"]

_START = tl.constexpr(0x4B400000)  # the bits of 12582912.0
_BASE = tl.constexpr(12582912.0)


# How the zero points of the weight are applied (W_ZERO).
ZERO_SUMS = tl.constexpr(1)  # by sums of the activations
ZERO_CODES = tl.constexpr(2)  # subtracted from each code (four-bit codes with integer zero points)


@triton.constexpr_function
def _nibble_asm(high):
    """PTX: four bytes to 16 times the signed codes of their low or high halves."""
    if high:
        return "and.b32 $0, $1, 0xf0f0f0f0;"
    return "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xf0f0f0f0; }"


@triton.constexpr_function
def _nibble_less_asm(high):
    """PTX: four bytes to ``8 * code - $2``: with the top bits set no byte borrows from the next."""
    shift = "shr.b32 t, $1, 1;" if high else "shl.b32 t, $1, 3;"
    return "{ .reg .b32 t; " + shift + (
        " lop3.b32 t, t, 0x78787878, 0x80808080, 0xea; sub.u32 t, t, $2; xor.b32 $0, t, 0x80808080; }"
    )


@triton.jit
def _codes(w, z, HALF: tl.constexpr, NIBBLES: tl.constexpr, LESS: tl.constexpr, ASM: tl.constexpr):
    """The int8 operand of a tile: codes; or 16 times those of one half of the bytes; or 8 times them, less z (LESS)."""
    if not NIBBLES:
        v = w
    elif LESS and ASM:
        v = tl.inline_asm_elementwise(
            _nibble_less_asm(HALF == 1), "=r,r,r", [w, z[:, None]], dtype=tl.int8, is_pure=True, pack=4
        )
    elif LESS:
        v = (((w >> (4 * HALF)) & 15) << 3).to(tl.int8) - z[:, None]
    elif ASM:
        v = tl.inline_asm_elementwise(_nibble_asm(HALF == 1), "=r,r", [w], dtype=tl.int8, is_pure=True, pack=4)
    elif HALF == 1:
        v = w & -16
    else:
        v = (w << 4).to(tl.int8)
    return v


@triton.jit
def _parameter(ptr, offs_n, n_ok, g, stride_sn, stride_sg, USED: tl.constexpr):
    """Scale or zero point of group g for the rows of a tile, float32; 0 where there is none."""
    if USED:
        value = tl.load(ptr + offs_n * stride_sn + g * stride_sg, mask=n_ok, other=0, eviction_policy="evict_last")
        out = value.to(tl.float32)
    else:
        out = tl.zeros(offs_n.shape, tl.float32)
    return out


@triton.jit
def _finish(
    acc, n, m, s_ptr, z_ptr, sx_ptr, zx_ptr, xs_ptr, ws_ptr, b_ptr, K, stride_sn, stride_sx,
    GROUPED: tl.constexpr, NIBBLES: tl.constexpr, MIDDLE: tl.constexpr, W_ZERO: tl.constexpr, X_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr, WIDE: tl.constexpr,
):
    """Sums to outputs, float32, for any shape of ``acc``: n and m are the index tensors that broadcast to it.

    Ungrouped, all corrections are integers: ``acc - zx * sum(w) - zw * (sum(x) - K * zx)``, K the features; with
    ZERO_CODES w is less zw already. Grouped, the weight's scales and zero points are in ``acc``, and ``ws`` holds
    ``sum(scale * (w - zw))``.
    """
    sx = tl.load(sx_ptr + m * stride_sx)
    if GROUPED:
        y = acc
        if X_ZERO:
            zx = tl.load(zx_ptr + m * stride_sx).to(tl.float32)
            y -= zx * tl.load(ws_ptr + n)
        y = y * sx
    else:
        BY_SUMS: tl.constexpr = W_ZERO == ZERO_SUMS
        FLOAT_ZERO: tl.constexpr = BY_SUMS and z_ptr.dtype.element_ty != tl.uint8
        t = acc
        if NIBBLES:  # exact: every product was 16 (8) times a whole number
            t = acc >> (3 if W_ZERO == ZERO_CODES else 4)
        if WIDE:
            t = t.to(tl.int64)
        if BY_SUMS:
            xs = tl.load(xs_ptr + m)
        if X_ZERO:
            zx = tl.load(zx_ptr + m * stride_sx)
            t -= (zx.to(tl.int64) if WIDE else zx) * tl.load(ws_ptr + n)
            if BY_SUMS:
                xs -= K * zx
        if BY_SUMS and not FLOAT_ZERO:
            zw = tl.load(z_ptr + n * stride_sn).to(tl.int32) - MIDDLE
            t -= (zw.to(tl.int64) if WIDE else zw) * xs
        y = t.to(tl.float32)
        if FLOAT_ZERO:
            y -= (tl.load(z_ptr + n * stride_sn).to(tl.float32) - MIDDLE) * xs.to(tl.float32)
        y = y * (sx * tl.load(s_ptr + n * stride_sn).to(tl.float32))
    if HAS_BIAS:
        y += tl.load(b_ptr + n).to(tl.float32)
    return y


@triton.jit(do_not_specialize=["M"])
def wnan_kernel(
    x_ptr, w_ptr, s_ptr, z_ptr, sx_ptr, zx_ptr, xs_ptr, ws_ptr, b_ptr, y_ptr,
    M, N, K, W, G, FEATURES, stride_sn, stride_sg, stride_sx, NB, NB_SPLIT, NU,
    NIBBLES: tl.constexpr, BK: tl.constexpr, FOLD: tl.constexpr, GROUP_SIZE: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, W_ZERO: tl.constexpr, X_ZERO: tl.constexpr, MIDDLE: tl.constexpr,
    PARTIAL: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr, ASM: tl.constexpr,
):
    """One tile ``[BN rows of W, BM tokens]`` over the blocks (BK codes each) of one split.

    x int8 by rows of K bytes, zero beyond the features; w int8 ``[N, W]``; scale and zero point by strides; sx, zx:
    scale float32 and zero point int32 of the tokens (stride 0: of the tensor); xs int32 ``[M, NU]``: sums of x over
    FOLD codes (ungrouped: over the row), read when W_ZERO is ZERO_SUMS; ws: sums over w ``[N]``, int32 (grouped: of
    ``scale * (w - zero)``, float32), read when X_ZERO; y ``[M, N]``, or partial sums ``[splits, M, N]``, int32
    (grouped: float32). GROUP_SIZE 0: one scale a row.
    """
    GROUPED: tl.constexpr = GROUP_SIZE != 0
    PARTS: tl.constexpr = 2 if NIBBLES else 1
    SL: tl.constexpr = BK // PARTS  # codes in one dot
    PER_FOLD: tl.constexpr = (FOLD // SL) if GROUPED else PARTS
    FOLDS: tl.constexpr = PARTS // PER_FOLD
    TILES: tl.constexpr = 16  # token tiles that run through the weights together
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    pid, pid_k = tl.program_id(0), tl.program_id(1)
    width = TILES * tiles_n
    first_m = pid // width * TILES
    height = tl.minimum(tiles_m - first_m, TILES)
    pid_m, pid_n = first_m + pid % width % height, pid % width // height

    offs_n = pid_n * BN + tl.arange(0, BN)
    offs_m = pid_m * BM + tl.arange(0, BM)
    offs_t = tl.arange(0, SL)
    n_ok, m_ok = offs_n < N, offs_m < M
    w_tile = w_ptr + tl.where(n_ok, offs_n, 0).to(tl.int64)[:, None] * W + offs_t[None, :]
    x_tile = x_ptr + tl.where(m_ok, offs_m, 0).to(tl.int64)[None, :] * K + offs_t[:, None]
    xs_row = xs_ptr + tl.where(m_ok, offs_m, 0).to(tl.int64) * NU

    first = pid_k * NB_SPLIT
    last = tl.minimum(first + NB_SPLIT, NB)
    if GROUPED:
        # Applied after the dot, hence fetched one group early and carried: the compiler pipelines operands of a dot.
        total = tl.zeros((BN, BM), dtype=tl.float32)
        g0 = tl.minimum(first * BK // GROUP_SIZE, G - 1)
        s_next = _parameter(s_ptr, offs_n, n_ok, g0, stride_sn, stride_sg, True)
        z_next = _parameter(z_ptr, offs_n, n_ok, g0, stride_sn, stride_sg, W_ZERO == ZERO_SUMS)
    acc = tl.zeros((BN, BM), dtype=tl.int32)
    for blk in range(first, last):
        k0 = tl.multiple_of(blk * BK, BK)
        w = tl.load(w_tile + tl.multiple_of(blk * SL, SL), eviction_policy="evict_first")
        less = offs_n
        for f in tl.static_range(FOLDS):
            if GROUPED:
                s, z = s_next, z_next
                ahead = tl.minimum((k0 + (f + 1) * PER_FOLD * SL) // GROUP_SIZE, G - 1)
                s_next = _parameter(s_ptr, offs_n, n_ok, ahead, stride_sn, stride_sg, True)
                z_next = _parameter(z_ptr, offs_n, n_ok, ahead, stride_sn, stride_sg, W_ZERO == ZERO_SUMS)
                if W_ZERO == ZERO_SUMS:
                    xs = tl.load(xs_row + blk * FOLDS + f, mask=m_ok, other=0).to(tl.float32)
                acc = tl.full((BN, BM), _START, tl.int32)
            if W_ZERO == ZERO_CODES:  # applied before the dot: a carried value would spoil its operand's layout
                here = tl.minimum((k0 + f * PER_FOLD * SL) // GROUP_SIZE, G - 1) if GROUPED else 0
                z8 = tl.load(z_ptr + offs_n * stride_sn + here * stride_sg, mask=n_ok, other=0)
                less = (z8 << 3).to(tl.int8)
            for i in tl.static_range(PER_FOLD):
                x = tl.load(x_tile + k0 + (f * PER_FOLD + i) * SL, eviction_policy="evict_last")
                v = _codes(w, less, f * PER_FOLD + i, NIBBLES, W_ZERO == ZERO_CODES, ASM)
                acc = tl.dot(v, x, acc, out_dtype=tl.int32)
            if GROUPED:
                part = acc.to(tl.float32, bitcast=True) - _BASE
                if W_ZERO == ZERO_SUMS:
                    zero = (z - MIDDLE) * (16 if NIBBLES else 1)
                    part -= zero[:, None] * xs[None, :]
                total += part * s[:, None]

    ok = n_ok[:, None] & m_ok[None, :]
    out = offs_m.to(tl.int64)[None, :] * N + offs_n[:, None]
    if PARTIAL:
        out += pid_k.to(tl.int64) * M * N
    if GROUPED:
        acc = total * (0.125 if W_ZERO == ZERO_CODES else 0.0625) if NIBBLES else total
    if PARTIAL:
        tl.store(y_ptr + out, acc, mask=ok)
    else:
        n, m = tl.where(n_ok, offs_n, 0), tl.where(m_ok, offs_m, 0)
        y = _finish(acc, n[:, None], m[None, :], s_ptr, z_ptr, sx_ptr, zx_ptr, xs_ptr, ws_ptr, b_ptr, FEATURES,
                    stride_sn, stride_sx, GROUPED, NIBBLES, MIDDLE, W_ZERO, X_ZERO, HAS_BIAS, WIDE)
        tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["TOTAL"])
def finish_kernel(
    part_ptr, s_ptr, z_ptr, sx_ptr, zx_ptr, xs_ptr, ws_ptr, b_ptr, y_ptr, N, TOTAL, FEATURES, stride_sn, stride_sx,
    SPLIT: tl.constexpr, GROUPED: tl.constexpr, NIBBLES: tl.constexpr, MIDDLE: tl.constexpr, W_ZERO: tl.constexpr,
    X_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):
    """Add the partial sums ``[SPLIT, M, N]`` in a fixed order and finish them: y ``[M, N]``."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = offs < TOTAL
    acc = tl.zeros((BLOCK,), dtype=part_ptr.dtype.element_ty)
    part = part_ptr + offs
    for _ in tl.static_range(SPLIT):
        acc += tl.load(part, mask=ok, other=0)
        part += TOTAL
    offs = tl.where(ok, offs, 0)
    m, n = offs // N, offs % N
    y = _finish(acc, n, m, s_ptr, z_ptr, sx_ptr, zx_ptr, xs_ptr, ws_ptr, b_ptr, FEATURES, stride_sn, stride_sx,
                GROUPED, NIBBLES, MIDDLE, W_ZERO, X_ZERO, HAS_BIAS, WIDE)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=ok)
