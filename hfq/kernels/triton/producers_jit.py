"""Triton kernels that make quantized activations: norm, activation function or nothing, then codes.

Importing needs Triton. Everything is computed in float32. Codes are int8: signed ones as they are, unsigned ones less
``2**(bits - 1)``; zero points are shifted alike. Rows are padded with zero bytes. Adding and subtracting
``1.5 * 2**23`` rounds halves to even. A row that holds a NaN or an infinity gets the scale NaN, so that what is
computed from it is loud.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "FRONTS", "emit", "grid_of", "rows_kernel", "rows_long_kernel", "stored_grid",
    "sums_kernel",
]

_MAGIC = tl.constexpr(12582912.0)
_INFINITY = tl.constexpr(0x7F800000)
_MINUS_INFINITY = tl.constexpr(-2139095041)  # the ordered form of its bits, see _ordered
_LEAST = tl.constexpr(1e-6)  # formats.activation.SMALLEST_RANGE

# What happens to a row before it is quantized (FRONT, ACT).
FRONTS = {"none": 0, "rms": 1, "layer": 2}
RMS, LAYER = tl.constexpr(1), tl.constexpr(2)
SILU, GELU, GELU_TANH, RELU = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)


@triton.jit
def _round(v):
    return (v + _MAGIC) - _MAGIC


@triton.jit
def _ordered(v):
    """The bits of v as integers in the order of the numbers; NaNs are beyond the infinities. Its own inverse."""
    bits = v.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _back(bits):
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def extremes(v, SYMMETRIC: tl.constexpr):
    """Ordered bits of the smallest and largest number of each row; symmetric: of the largest magnitude, twice."""
    if SYMMETRIC:
        high = tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
        low = high
    else:
        bits = _ordered(v)
        high, low = tl.max(bits, 1), tl.min(bits, 1)
    return low, high


@triton.jit
def grid_of(
    low, high, factor_ptr, exponent, STEPS: tl.constexpr, SYMMETRIC: tl.constexpr, FACTOR: tl.constexpr,
    POWER: tl.constexpr,
):
    """Scale and zero point (float32) of rows with these extremes. POWER: the range is ``reach ** exponent``."""
    if SYMMETRIC:
        bad = high >= _INFINITY
        reach = tl.maximum(high.to(tl.float32, bitcast=True), 1e-5 if POWER else _LEAST)
        if POWER:
            reach = tl.exp2(exponent * tl.log2(reach))
        if FACTOR:
            reach *= tl.load(factor_ptr).to(tl.float32)
        scale = tl.div_rn(reach, tl.full(reach.shape, STEPS, tl.float32))
        zero = tl.zeros(reach.shape, tl.float32)
    else:
        bad = (high >= _INFINITY) | (low <= _MINUS_INFINITY)
        bottom, top = tl.minimum(_back(low), 0.0), tl.maximum(_back(high), _LEAST)
        reach = top - bottom
        if FACTOR:
            factor = tl.load(factor_ptr).to(tl.float32)
            reach, bottom = reach * factor, bottom * factor
        scale = tl.div_rn(reach, tl.full(reach.shape, STEPS, tl.float32))
        inverse = tl.div_rn(tl.full(reach.shape, 1.0, tl.float32), scale)
        zero = tl.minimum(tl.maximum(_round(-bottom * inverse), 0.0), STEPS)
    return tl.where(bad, float("nan"), scale), zero


@triton.jit
def stored_grid(scale_ptr, zero_ptr, like, SYMMETRIC: tl.constexpr):
    """A stored scale and zero point, one of each, for every row."""
    scale = tl.zeros(like.shape, tl.float32) + tl.load(scale_ptr).to(tl.float32)
    zero = tl.zeros(like.shape, tl.float32)
    if not SYMMETRIC:
        zero += tl.load(zero_ptr).to(tl.float32)
    return scale, zero


@triton.jit
def emit(
    v, scale, zero, rows, row_ok, columns, K, q_ptr, xs_ptr, stride_q, NU, first_unit,
    STEPS: tl.constexpr, SYMMETRIC: tl.constexpr, SHIFT: tl.constexpr, UNIT: tl.constexpr, SUMS: tl.constexpr,
):
    """Write the codes of a tile ``[ROWS, COLUMNS]``, zero from column K to stride_q, and their sums over UNIT columns.

    Returns the sums of the tile's rows.
    """
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    LOWEST: tl.constexpr = -STEPS if SYMMETRIC else 0
    code = tl.minimum(tl.maximum(_round(v * inverse[:, None]) + zero[:, None], LOWEST), STEPS)
    inside = columns[None, :] < K
    stored = tl.where(inside, code - SHIFT, 0.0)
    ok = row_ok[:, None] & (columns[None, :] < stride_q)
    tl.store(q_ptr + rows.to(tl.int64)[:, None] * stride_q + columns[None, :], stored.to(tl.int8), mask=ok)
    if SUMS and UNIT:
        UNITS: tl.constexpr = v.shape[1] // UNIT
        parts = tl.sum(tl.reshape(stored, (v.shape[0], UNITS, UNIT)), 2)  # whole numbers below 2**24: exact
        at = first_unit + tl.arange(0, UNITS)
        xs = xs_ptr + rows.to(tl.int64)[:, None] * NU + at[None, :]
        tl.store(xs, parts.to(tl.int32), mask=row_ok[:, None] & (at[None, :] < NU))
    return tl.sum(stored, 1) if SUMS and not UNIT else zero


@triton.jit
def _activated(v, ACT: tl.constexpr):
    if ACT == SILU:
        v = v * tl.sigmoid(v)
    elif ACT == GELU:
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif ACT == GELU_TANH:
        v = v * tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
    elif ACT == RELU:
        v = tl.maximum(v, 0.0)
    return v


@triton.jit
def _loaded(x_ptr, u_ptr, rows, columns, ok, stride_x, stride_u, ACT: tl.constexpr, TIMES: tl.constexpr):
    """x, or ``act(x)``, or ``act(x) * u``; 0 outside. 16-bit results are rounded as the unfused functions do."""
    v = tl.load(x_ptr + rows.to(tl.int64)[:, None] * stride_x + columns[None, :], mask=ok, other=0.0)
    v = _activated(v.to(tl.float32), ACT)
    if TIMES:
        u = tl.load(u_ptr + rows.to(tl.int64)[:, None] * stride_u + columns[None, :], mask=ok, other=0.0)
        v *= u.to(tl.float32)
    return v


@triton.jit
def _finished(
    v, mean, rstd, g_ptr, c_ptr, mul_ptr, add_ptr, batch, columns, ok, stride_mod,
    FRONT: tl.constexpr, GAIN: tl.constexpr, OFFSET: tl.constexpr, CENTRE: tl.constexpr, MODULATE: tl.constexpr,
):
    """The norm, then ``v * mul + add`` (MODULATE 1), ``v * (1 + mul[batch]) + add[batch]`` (2) or ``v * mul`` (3)."""
    inside = columns < stride_mod
    if FRONT != 0:
        v = (v - mean[:, None]) * rstd[:, None]
        if GAIN:
            gain = tl.load(g_ptr + columns, mask=inside, other=0.0).to(tl.float32) + OFFSET
            v *= gain[None, :]
        if CENTRE:
            v += tl.load(c_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    if MODULATE == 1:
        v *= tl.load(mul_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        v += tl.load(add_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    elif MODULATE == 2:
        at = batch.to(tl.int64)[:, None] * stride_mod + columns[None, :]
        v *= 1.0 + tl.load(mul_ptr + at, mask=ok, other=0.0).to(tl.float32)
        v += tl.load(add_ptr + at, mask=ok, other=0.0).to(tl.float32)
    elif MODULATE == 3:
        v *= tl.load(mul_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    return tl.where(ok, v, 0.0)


@triton.jit(do_not_specialize=["M", "tokens"])
def rows_kernel(
    x_ptr, u_ptr, g_ptr, c_ptr, mul_ptr, add_ptr, scale_ptr, zero_ptr, factor_ptr, q_ptr, sx_ptr, zx_ptr, xs_ptr,
    M, K, stride_x, stride_u, stride_q, NU, tokens, eps, offset, exponent,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FRONT: tl.constexpr, ACT: tl.constexpr, TIMES: tl.constexpr,
    GAIN: tl.constexpr, CENTRE: tl.constexpr, MODULATE: tl.constexpr, STATIC: tl.constexpr, SYMMETRIC: tl.constexpr,
    STEPS: tl.constexpr, SHIFT: tl.constexpr, UNIT: tl.constexpr, SUMS: tl.constexpr, FACTOR: tl.constexpr,
    POWER: tl.constexpr,
):
    """ROWS rows a program, each whole in registers. x ``[M, K]`` (and u) by row strides to codes ``[M, stride_q]``,
    scale float32 ``[M]``, zero point int32 ``[M]`` (less SHIFT) and sums int32 ``[M, NU]``.

    FRONT 1, 2: RMSNorm, LayerNorm with gain ``offset + g`` and bias c. MODULATE: see :func:`_finished`; ``tokens`` rows
    share a batch index. POWER: the scale comes from x before ``mul``, raised to ``exponent``.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = rows < M
    rows = tl.where(row_ok, rows, 0)
    columns = tl.arange(0, COLUMNS)
    ok = row_ok[:, None] & (columns[None, :] < K)
    v = _loaded(x_ptr, u_ptr, rows, columns, ok, stride_x, stride_u, ACT, TIMES)
    mean, rstd = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    if FRONT == LAYER:
        mean = tl.sum(v, 1) / K
        centred = tl.where(ok, v - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / K + eps)
    elif FRONT == RMS:
        rstd = 1.0 / tl.sqrt_rn(tl.sum(v * v, 1) / K + eps)
    if POWER:
        low, high = extremes(v, SYMMETRIC)
    v = _finished(v, mean, rstd, g_ptr, c_ptr, mul_ptr, add_ptr, rows // tokens, columns, ok, K, FRONT, GAIN, offset,
                  CENTRE, MODULATE)
    if STATIC:
        scale, zero = stored_grid(scale_ptr, zero_ptr, rstd, SYMMETRIC)
    else:
        if not POWER:
            low, high = extremes(v, SYMMETRIC)
        scale, zero = grid_of(low, high, factor_ptr, exponent, STEPS, SYMMETRIC, FACTOR, POWER)
        tl.store(sx_ptr + rows, scale, mask=row_ok)
        if not SYMMETRIC:
            tl.store(zx_ptr + rows, zero.to(tl.int32) - SHIFT, mask=row_ok)
    sums = emit(v, scale, zero, rows, row_ok, columns, K, q_ptr, xs_ptr, stride_q, NU, 0, STEPS, SYMMETRIC, SHIFT, UNIT,
                SUMS)
    if SUMS and not UNIT:
        tl.store(xs_ptr + rows, sums.to(tl.int32), mask=row_ok)


@triton.jit(do_not_specialize=["tokens"])
def rows_long_kernel(
    x_ptr, u_ptr, g_ptr, c_ptr, mul_ptr, add_ptr, scale_ptr, zero_ptr, factor_ptr, q_ptr, sx_ptr, zx_ptr, xs_ptr,
    K, stride_x, stride_u, stride_q, NU, tokens, eps, offset, exponent,
    COLUMNS: tl.constexpr, FRONT: tl.constexpr, ACT: tl.constexpr, TIMES: tl.constexpr,
    GAIN: tl.constexpr, CENTRE: tl.constexpr, MODULATE: tl.constexpr, STATIC: tl.constexpr, SYMMETRIC: tl.constexpr,
    STEPS: tl.constexpr, SHIFT: tl.constexpr, UNIT: tl.constexpr, SUMS: tl.constexpr, FACTOR: tl.constexpr,
    POWER: tl.constexpr,
):
    """The same for long rows: one row a program, read again for each pass (statistics, extremes, codes)."""
    rows = tl.program_id(0) + tl.arange(0, 1)
    row_ok = rows >= 0
    mean, rstd = tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32)
    if FRONT != 0:
        if FRONT == LAYER:
            total = tl.zeros((1, COLUMNS), tl.float32)
            for k in range(0, K, COLUMNS):
                columns = k + tl.arange(0, COLUMNS)
                total += _loaded(x_ptr, u_ptr, rows, columns, (columns < K)[None, :], stride_x, stride_u, ACT, TIMES)
            mean = tl.sum(total, 1) / K
        squares = tl.zeros((1, COLUMNS), tl.float32)
        for k in range(0, K, COLUMNS):
            columns = k + tl.arange(0, COLUMNS)
            ok = (columns < K)[None, :]
            v = _loaded(x_ptr, u_ptr, rows, columns, ok, stride_x, stride_u, ACT, TIMES)
            v = tl.where(ok, v - mean[:, None], 0.0)
            squares += v * v
        rstd = 1.0 / tl.sqrt_rn(tl.sum(squares, 1) / K + eps)
    if STATIC:
        scale, zero = stored_grid(scale_ptr, zero_ptr, rstd, SYMMETRIC)
    else:
        low, high = tl.zeros((1,), tl.int32), tl.zeros((1,), tl.int32)  # zero is in every range
        for k in range(0, K, COLUMNS):
            columns = k + tl.arange(0, COLUMNS)
            ok = (columns < K)[None, :]
            v = _loaded(x_ptr, u_ptr, rows, columns, ok, stride_x, stride_u, ACT, TIMES)
            if not POWER:
                v = _finished(v, mean, rstd, g_ptr, c_ptr, mul_ptr, add_ptr, rows // tokens, columns, ok, K, FRONT,
                              GAIN, offset, CENTRE, MODULATE)
            part_low, part_high = extremes(v, SYMMETRIC)
            low, high = tl.minimum(low, part_low), tl.maximum(high, part_high)
        scale, zero = grid_of(low, high, factor_ptr, exponent, STEPS, SYMMETRIC, FACTOR, POWER)
        tl.store(sx_ptr + rows, scale)
        if not SYMMETRIC:
            tl.store(zx_ptr + rows, zero.to(tl.int32) - SHIFT)
    sums = tl.zeros((1,), tl.float32)
    for k in range(0, stride_q, COLUMNS):
        columns = k + tl.arange(0, COLUMNS)
        ok = (columns < K)[None, :]
        v = _loaded(x_ptr, u_ptr, rows, columns, ok, stride_x, stride_u, ACT, TIMES)
        v = _finished(v, mean, rstd, g_ptr, c_ptr, mul_ptr, add_ptr, rows // tokens, columns, ok, K, FRONT, GAIN,
                      offset, CENTRE, MODULATE)
        first = k // UNIT if UNIT else 0
        sums += emit(v, scale, zero, rows, row_ok, columns, K, q_ptr, xs_ptr, stride_q, NU, first, STEPS, SYMMETRIC,
                     SHIFT, UNIT, SUMS)
    if SUMS and not UNIT:
        tl.store(xs_ptr + rows, sums.to(tl.int32))


@triton.jit
def sums_kernel(q_ptr, xs_ptr, stride_q, NU, UNIT: tl.constexpr, ROWS: tl.constexpr):
    """Sums over stretches of UNIT columns of codes ``[M, stride_q]``: int32 ``[M, NU]``."""
    m = tl.program_id(0).to(tl.int64)
    u = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = u[:, None] * UNIT + tl.arange(0, UNIT)[None, :]
    code = tl.load(q_ptr + m * stride_q + columns, mask=columns < stride_q, other=0).to(tl.int32)
    tl.store(xs_ptr + m * NU + u, tl.sum(code, 1), mask=u < NU)
