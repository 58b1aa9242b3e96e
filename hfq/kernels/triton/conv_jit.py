"""The Triton kernel of integer convolutions: an implicit product, no laid-out input. Importing needs Triton.

The weight is the left operand (tiles ``[out channels, positions]``), both operands have the channels contiguous, as
the int8 tensor core instruction asks for. A step takes channels of one tap, so that a tile of the input has one offset.
The input has its border already: loads that were masked with another number than zero could not be copied to shared
memory asynchronously. A second weight over the central taps reads the same tiles of the input into sums of its own:
there the two products share every load.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["conv_kernel"]


@triton.constexpr_function
def _central(tap, kh, kw, ch, cw):
    """Number of the central tap that tap ``tap`` of the kernel is; -1 for one outside of the centre."""
    row, column = tap // kw - (kh - ch) // 2, tap % kw - (kw - cw) // 2
    return row * cw + column if 0 <= row < ch and 0 <= column < cw else -1


@triton.jit
def _scaled(acc, offs_n, n_ok, zx, s_ptr, ws_ptr):
    """Sums less what the input's zero point adds, times the scale of the row: float32."""
    ws = tl.load(ws_ptr + offs_n, mask=n_ok, other=0)
    s = tl.load(s_ptr + offs_n, mask=n_ok, other=0.0)
    return (acc - (ws * zx)[:, None]).to(tl.float32) * s[:, None]


@triton.jit(do_not_specialize=["M"])
def conv_kernel(
    x_ptr, w_ptr, s_ptr, ws_ptr, wc_ptr, sc_ptr, wsc_ptr, sx_ptr, zx_ptr, b_ptr, y_ptr,
    M, N, C, H, W, OH, OW,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    CH: tl.constexpr, CW: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, HAS_BIAS: tl.constexpr,
):
    """One tile ``[BN output channels, BM positions]``.

    x int8 ``[B, H, W, C]``, border included; w int8 ``[N, KH * KW, C]``, wc ``[N, CH * CW, C]`` over the central taps
    (CH 0: none); s, sc float32 and ws, wsc int32 (sums over the weights) ``[N]``; sx float32, zx int32, one number;
    y ``[M, N]``, M positions ``B * OH * OW``. BK divides C.
    """
    TILES: tl.constexpr = 16  # tiles of positions that run through the weights together
    DUAL: tl.constexpr = CH > 0
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    pid = tl.program_id(0)
    width = TILES * tiles_n
    first_m = pid // width * TILES
    height = tl.minimum(tiles_m - first_m, TILES)
    pid_m, pid_n = first_m + pid % width % height, pid % width // height

    offs_n = pid_n * BN + tl.arange(0, BN)
    offs_m = pid_m * BM + tl.arange(0, BM)
    offs_k = tl.arange(0, BK)
    n_ok, m_ok = offs_n < N, offs_m < M
    rows = tl.where(n_ok, offs_n, 0).to(tl.int64)
    at = tl.where(m_ok, offs_m, 0)
    column, line = at % OW, at // OW
    first = ((line // OH).to(tl.int64) * H + line % OH * SH) * W + column * SW  # of the position's taps
    x_first = x_ptr + (first * C)[None, :] + offs_k[:, None]

    acc = tl.zeros((BN, BM), dtype=tl.int32)
    if DUAL:
        coarse = tl.zeros((BN, BM), dtype=tl.int32)
    for tap in tl.static_range(KH * KW):
        x_tile = x_first + (tap // KW * DH * W + tap % KW * DW) * C
        w_tile = w_ptr + (rows * (KH * KW) + tap)[:, None] * C + offs_k[None, :]
        if _central(tap, KH, KW, CH, CW) >= 0:
            c_tile = wc_ptr + (rows * (CH * CW) + _central(tap, KH, KW, CH, CW))[:, None] * C + offs_k[None, :]
            for k in range(0, C, BK):
                k0 = tl.multiple_of(k, BK)
                x = tl.load(x_tile + k0)
                acc = tl.dot(tl.load(w_tile + k0), x, acc, out_dtype=tl.int32)
                coarse = tl.dot(tl.load(c_tile + k0), x, coarse, out_dtype=tl.int32)
        else:
            for k in range(0, C, BK):
                k0 = tl.multiple_of(k, BK)
                acc = tl.dot(tl.load(w_tile + k0), tl.load(x_tile + k0), acc, out_dtype=tl.int32)

    zx = tl.load(zx_ptr)
    y = _scaled(acc, offs_n, n_ok, zx, s_ptr, ws_ptr)
    if DUAL:
        y += _scaled(coarse, offs_n, n_ok, zx, sc_ptr, wsc_ptr)
    y = y * tl.load(sx_ptr)
    if HAS_BIAS:
        y += tl.load(b_ptr + offs_n, mask=n_ok, other=0.0).to(tl.float32)[:, None]
    out = offs_m.to(tl.int64)[None, :] * N + offs_n[:, None]
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=n_ok[:, None] & m_ok[None, :])
