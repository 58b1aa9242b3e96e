"""The Triton kernel of a Hadamard transform in front of quantization. Importing needs Triton.

A row is a matrix ``[power of two, core]`` (or several, one for each block). The powers of two are a butterfly in
float32. A core above 1 is a product with its matrix of +1 and -1: the float32 numbers, scaled by a power of two, are
split into a float16 head and tail, so that the tensor cores give almost all of float32's precision (2**-22).
"""

from __future__ import annotations

import triton
import triton.language as tl

from hfq.kernels.triton.producers_jit import _activated, emit, extremes, grid_of, stored_grid

__all__ = ["mix_kernel"]


@triton.jit
def _butterfly(v, LEFT: tl.constexpr, POWER_OF_2: tl.constexpr, LOG: tl.constexpr, RIGHT: tl.constexpr):
    """Sylvester transform, unscaled, on the middle axis of ``[LEFT * POWER_OF_2 * RIGHT]``.

    Each stage pairs the two halves of the axis and puts their sum and difference at its end; after LOG stages every
    bit of the index is back in its place.
    """
    for _ in tl.static_range(LOG):
        halves = tl.permute(tl.reshape(v, (LEFT, 2, POWER_OF_2 // 2, RIGHT)), (0, 2, 3, 1))
        a, b = tl.split(halves)
        both = tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2))  # [LEFT, POWER_OF_2 // 2, 2, RIGHT]
        v = tl.reshape(both, (LEFT * POWER_OF_2 * RIGHT,))
    return v


@triton.jit
def mix_kernel(
    x_ptr, u_ptr, sign_ptr, core_ptr, scale_ptr, zero_ptr, factor_ptr, q_ptr, sx_ptr, zx_ptr, xs_ptr,
    K, stride_x, stride_u, stride_q, norm,
    BLOCKS: tl.constexpr, POWER_OF_2: tl.constexpr, LOG: tl.constexpr, CORE: tl.constexpr, CORE_PAD: tl.constexpr,
    ACT: tl.constexpr, TIMES: tl.constexpr, SIGNS: tl.constexpr, CODES: tl.constexpr,
    STATIC: tl.constexpr, SYMMETRIC: tl.constexpr, STEPS: tl.constexpr, SHIFT: tl.constexpr, SUMS: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """One row a program: x ``[M, K]`` to codes int8 ``[M, stride_q]`` (CODES) or floats ``[M, K]``, and scale, zero
    point and sums as in ``rows_kernel``. The row is ``BLOCKS`` (rounded up) runs of ``POWER_OF_2 * CORE`` columns.
    """
    ROWS: tl.constexpr = BLOCKS * POWER_OF_2
    row = tl.program_id(0)
    lane = tl.arange(0, ROWS * CORE_PAD)
    if CORE == 1:
        column, ok = lane, lane < K
    else:
        column = lane // CORE_PAD * CORE + lane % CORE_PAD
        ok = (lane % CORE_PAD < CORE) & (column < K)
    v = tl.load(x_ptr + row.to(tl.int64) * stride_x + column, mask=ok, other=0.0)
    v = _activated(v.to(tl.float32), ACT)
    if TIMES:
        v *= tl.load(u_ptr + row.to(tl.int64) * stride_u + column, mask=ok, other=0.0).to(tl.float32)
    if SIGNS:
        v *= tl.load(sign_ptr + column, mask=ok, other=0).to(tl.float32)
    v = _butterfly(v, BLOCKS, POWER_OF_2, LOG, CORE_PAD)
    if CORE > 1:
        top = tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
        # 2**e with 2**e <= max|v| < 2**(e + 1), by its bits, and its inverse; numbers that are not finite stay so.
        bits = tl.minimum(tl.maximum(top & 0x7F800000, 0x0C800000), 0x7E800000)
        size, inverse = bits.to(tl.float32, bitcast=True), (0x7F000000 - bits).to(tl.float32, bitcast=True)
        tile = tl.reshape(v, (ROWS, CORE_PAD)) * inverse
        head = tile.to(tl.float16)
        tail = ((tile - head.to(tl.float32)) * 2048.0).to(tl.float16)
        at = tl.arange(0, CORE_PAD)
        core = tl.load(core_ptr + at[:, None] * CORE_PAD + at[None, :])
        low = tl.dot(tail, core)
        tile = tl.dot(head, core, low * 0.00048828125)
        v = tl.reshape(tile, (ROWS * CORE_PAD,)) * size
    v = tl.where(ok, v * norm, 0.0)
    if CODES:
        rows = row + tl.arange(0, 1)
        low_bits, high_bits = extremes(tl.reshape(v, (1, ROWS * CORE_PAD)), SYMMETRIC)
        if STATIC:
            scale, zero = stored_grid(scale_ptr, zero_ptr, low_bits.to(tl.float32), SYMMETRIC)
        else:
            scale, zero = grid_of(low_bits, high_bits, factor_ptr, 1.0, STEPS, SYMMETRIC, FACTOR, False)
            tl.store(sx_ptr + rows, scale)
            if not SYMMETRIC:
                tl.store(zx_ptr + rows, zero.to(tl.int32) - SHIFT)
        tail = K + tl.arange(0, 128)  # rows of codes take multiples of 128 bytes
        tl.store(q_ptr + row.to(tl.int64) * stride_q + tail, tl.zeros((128,), tl.int8), mask=tail < stride_q)
        if CORE == 1:
            tile = tl.reshape(v, (1, ROWS * CORE_PAD))
            sums = emit(tile, scale, zero, rows, rows >= 0, column, K, q_ptr, xs_ptr, stride_q, 1, 0, STEPS, SYMMETRIC,
                        SHIFT, 0, SUMS)
        else:
            sums = _emit_core(v, scale, zero, row, column, ok, q_ptr, stride_q, STEPS, SYMMETRIC, SHIFT, SUMS)
        if SUMS:
            tl.store(xs_ptr + rows, sums.to(tl.int32))
    else:
        tl.store(q_ptr + row.to(tl.int64) * stride_q + column, v.to(q_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _emit_core(
    v, scale, zero, row, column, ok, q_ptr, stride_q, STEPS: tl.constexpr, SYMMETRIC: tl.constexpr,
    SHIFT: tl.constexpr, SUMS: tl.constexpr,
):
    """``emit`` for lanes that are not columns: a core that is no power of two leaves gaps between them."""
    one_scale, one_zero = tl.sum(scale, 0), tl.sum(zero, 0)
    inverse = tl.div_rn(one_scale * 0.0 + 1.0, one_scale)
    LOWEST: tl.constexpr = -STEPS if SYMMETRIC else 0
    rounded = (v * inverse + 12582912.0) - 12582912.0
    code = tl.minimum(tl.maximum(rounded + one_zero, LOWEST), STEPS) - SHIFT
    tl.store(q_ptr + row.to(tl.int64) * stride_q + column, code.to(tl.int8), mask=ok)
    return tl.sum(tl.where(ok, code, 0.0), 0) if SUMS else one_zero
