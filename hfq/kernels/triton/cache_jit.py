"""The Triton kernels of attention over packed keys and values. Importing this module needs Triton.

The layout is that of :mod:`hfq.kernels.kv`: planes of bits that follow each other along the token axis, whole rows of
bytes, a byte holding one channel of tokens that are a fraction of the block apart. A program of the decode kernel takes
a run of rows of one head, and with them one run of tokens for each field of the bytes; order does not matter to a
softmax. Scales of tokens stay outside of the products: those of keys multiply the scores, those of values the
probabilities, zero points become one number a token. Stored scales of channels multiply the query. Other scales,
outliers and rotary embeddings are applied to the decoded tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["AXES", "append_kernel", "combine_kernel", "decode_kernel", "floats_kernel"]

AXES = {"token": 0, "channel": 1, "window": 2, "part": 3}
TOKEN, CHANNEL, WINDOW, PART = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
_LOW = tl.constexpr(-1e30)  # below every score; an infinity would give NaN where a tile has no token at all


@triton.constexpr_function
def narrowest(bits):
    """Bits of the narrowest plane."""
    return 1 if bits in (1, 3) else bits


@triton.jit
def _bytes(ptr, rows, ok, channels, c_ok, D):
    """Rows of bytes ``[ROWS, CHANNELS]``."""
    at = rows[:, None] * D + channels[None, :]
    return tl.load(ptr + at, mask=ok[:, None] & c_ok[None, :], other=0, eviction_policy="evict_first")


@triton.jit
def _level(code, table_ptr, TABLE: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Levels of codes: entries of a table, or the codes themselves, exactly."""
    if TABLE:
        v = tl.load(table_ptr + code.to(tl.int32)).to(DTYPE)
    else:
        v = ((code.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - 1024.0).to(DTYPE)
    return v


@triton.jit
def _full(
    level, s_ptr, o_ptr, i_ptr, v_ptr, tokens, t_ok, channels, c_ok, head_channels, D, GROUPS, group, slots_stride,
    AXIS: tl.constexpr, INT_ZERO: tl.constexpr, SLOTS: tl.constexpr, DTYPE: tl.constexpr,
):
    """A tile of numbers ``[TOKENS, CHANNELS]`` from its levels: scales and offsets of any axis, then outliers."""
    x = level.to(tl.float32)
    ok = t_ok[:, None] & c_ok[None, :]
    if AXIS == CHANNEL:
        s = tl.load(s_ptr + head_channels, mask=c_ok, other=0.0)[None, :]
        o = tl.load(o_ptr + head_channels, mask=c_ok, other=0.0)[None, :]
    elif AXIS == TOKEN:
        s = tl.load(s_ptr + tokens, mask=t_ok, other=0.0).to(tl.float32)[:, None]
        o = tl.load(o_ptr + tokens, mask=t_ok, other=0.0).to(tl.float32)[:, None]
    else:
        if AXIS == WINDOW:
            at = (tokens // group)[:, None] * D + channels[None, :]
        else:
            at = tokens[:, None] * GROUPS + (channels // group)[None, :]
        s = tl.load(s_ptr + at, mask=ok, other=0.0).to(tl.float32)
        o = tl.load(o_ptr + at, mask=ok, other=0.0).to(tl.float32)
    x = (x - o) * s if INT_ZERO else x * s + o
    for j in range(SLOTS):
        index = tl.load(i_ptr + tokens * slots_stride + j, mask=t_ok, other=-1).to(tl.int32)
        value = tl.load(v_ptr + tokens * slots_stride + j, mask=t_ok, other=0.0).to(tl.float32)
        x += tl.where(index[:, None] == head_channels[None, :], value[:, None], 0.0)
    return tl.where(ok, x, 0.0).to(DTYPE)


@triton.jit
def _queries(q_at, s_ptr, o_ptr, q_ok, h_ok, channels, D, FOLD: tl.constexpr, DTYPE: tl.constexpr):
    """Both halves of the queries, and what multiplies the zero points of the keys: their sum.

    FOLD: the stored scales of the channels are in the queries, and the sum is that with the channels' offsets.
    """
    ok = q_ok[:, None] & h_ok[None, :]
    a = tl.load(q_at, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(q_at + D // 2, mask=ok, other=0.0).to(tl.float32)
    if FOLD:
        low = tl.load(o_ptr + channels, mask=h_ok, other=0.0)
        high = tl.load(o_ptr + channels + D // 2, mask=h_ok, other=0.0)
        total = tl.sum(a * low[None, :] + b * high[None, :], 1)
        a *= tl.load(s_ptr + channels, mask=h_ok, other=0.0)[None, :]
        b *= tl.load(s_ptr + channels + D // 2, mask=h_ok, other=0.0)[None, :]
        a, b = a.to(DTYPE), b.to(DTYPE)
    else:
        a, b = a.to(DTYPE), b.to(DTYPE)  # the sum must be that of what is multiplied
        total = tl.sum(a.to(tl.float32), 1) + tl.sum(b.to(tl.float32), 1)
    return a, b, total


@triton.jit
def _turned(a, b, cos_at, sin_at, ok):
    """The halves of the keys with their rotary embedding."""
    c = tl.load(cos_at, mask=ok, other=0.0).to(tl.float32)
    s = tl.load(sin_at, mask=ok, other=0.0).to(tl.float32)
    return a * c - b * s, b * c + a * s


@triton.jit
def _softmax_step(s, m, total, LOW: tl.constexpr):
    """Online softmax: probabilities ``[Q, TOKENS]``, the factor of what was summed before, new maximum and sum."""
    top = tl.maximum(m, tl.max(s, 1))
    p = tl.where(s > LOW, tl.exp2((s - top[:, None]) * 1.4426950408889634), 0.0)
    old = tl.exp2((m - top) * 1.4426950408889634)
    return p, old, top, total * old + tl.sum(p, 1)


@triton.jit
def _masked(
    s, mask_ptr, positions, t_ok, q_rows, q_ok, stride_mq, skip, skip_count, scaling, softcap,
    MASK: tl.constexpr, SOFTCAP: tl.constexpr, LOW: tl.constexpr,
):
    """Scaled scores with the mask applied; tokens that something else covers (the sink) are left out."""
    s *= scaling
    if SOFTCAP:
        e = tl.exp2(-2.8853900817779268 * tl.abs(s / softcap))
        s = tl.where(s < 0, -softcap, softcap) * (1.0 - e) / (1.0 + e)
    keep = t_ok & ((positions < skip) | (positions >= skip + skip_count))
    ok = q_ok[:, None] & keep[None, :]
    if MASK != 0:
        at = q_rows.to(tl.int64)[:, None] * stride_mq + positions[None, :]
        if MASK == 1:
            ok = ok & (tl.load(mask_ptr + at, mask=ok, other=0) != 0)
        else:
            extra = tl.load(mask_ptr + at, mask=ok, other=0.0).to(tl.float32)
            ok = ok & (extra > LOW)
            s += extra
    return tl.where(ok, s, LOW)


@triton.jit
def _write_partial(acc, m, total, acc_ptr, m_ptr, l_ptr, pid, part, PARTS, Q, DV, q_rows, q_ok, channels):
    base = (pid * PARTS + part) * Q + q_rows
    at = base.to(tl.int64)[:, None] * DV + channels[None, :]
    tl.store(acc_ptr + at, acc, mask=q_ok[:, None] & (channels < DV)[None, :])
    tl.store(m_ptr + base, m, mask=q_ok)
    tl.store(l_ptr + base, total, mask=q_ok)


@triton.jit(do_not_specialize=["tokens", "at", "rows_per_split", "part0", "PARTS", "skip_count"])
def decode_kernel(
    q_ptr, k_ptr, ks_ptr, ko_ptr, ki_ptr, kv_ptr, kt_ptr, v_ptr, vs_ptr, vo_ptr, vi_ptr, vv_ptr, vt_ptr,
    cos_ptr, sin_ptr, mask_ptr, skip_ptr, acc_ptr, m_ptr, l_ptr,
    HEADS, Q, D, DV, capacity, tokens, at, rows_per_split, part0, PARTS, skip_count,
    stride_ksb, stride_ksh, stride_kob, stride_vsb, stride_vsh, stride_vob, k_groups, k_group, v_groups, v_group,
    stride_cb, stride_ct, stride_mb, stride_mh, stride_mq, scaling, softcap,
    KB: tl.constexpr, VB: tl.constexpr, K_AXIS: tl.constexpr, V_AXIS: tl.constexpr, K_INT: tl.constexpr,
    V_INT: tl.constexpr, K_TABLE: tl.constexpr, V_TABLE: tl.constexpr, K_SLOTS: tl.constexpr, V_SLOTS: tl.constexpr,
    ROTARY: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, SKIP: tl.constexpr, DTYPE: tl.constexpr,
    QP: tl.constexpr, HALF: tl.constexpr, DVP: tl.constexpr, BT: tl.constexpr,
):
    """Partial attention of one head's queries over a run of rows of one block: program (batch and head, split).

    q ``[B, H, Q, D]``; codes uint8 ``[B, H, capacity * bits / 8, D]``; scales, offsets, outliers as in
    ``formats.kv.Encoded`` (CHANNEL: float32 ``[H * D]``); cos, sin ``[B or 1, tokens, D / 2]`` of the first half of a
    head with the second; mask over all tokens, ``at`` the position of the block's first one; skip ``[B]``: first of
    ``skip_count`` positions to leave out. Writes acc ``[B * H, PARTS, Q, DV]`` and m, l ``[B * H, PARTS, Q]``.
    """
    FIELDS: tl.constexpr = 8 // narrowest(KB)
    K_FOLD: tl.constexpr = K_AXIS == CHANNEL and not ROTARY and K_SLOTS == 0
    K_FULL: tl.constexpr = not K_FOLD and (ROTARY or K_SLOTS > 0 or K_AXIS != TOKEN)
    V_FULL: tl.constexpr = V_SLOTS > 0 or V_AXIS != TOKEN
    V_FIELDS: tl.constexpr = 8 // narrowest(VB)
    STEP: tl.constexpr = FIELDS if FIELDS > V_FIELDS else V_FIELDS  # runs of tokens
    PAIR: tl.constexpr = 2 if STEP > 1 else 1
    pid, split = tl.program_id(0), tl.program_id(1)
    b, h = pid // HEADS, pid % HEADS
    q_rows, half, value = tl.arange(0, QP), tl.arange(0, HALF), tl.arange(0, DVP)
    q_ok, h_ok, v_ok = q_rows < Q, half < D // 2, value < DV
    q_at = q_ptr + pid.to(tl.int64) * Q * D + q_rows[:, None] * D + half[None, :]
    qa, qb, q_sum = _queries(q_at, ks_ptr, ko_ptr, q_ok, h_ok, h * D + half, D, K_FOLD, DTYPE)

    run = capacity // STEP  # tokens of one run; a program walks over part of it, for every run
    k_ptr += pid.to(tl.int64) * (capacity * KB // 8) * D
    v_ptr += pid.to(tl.int64) * (capacity * VB // 8) * DV
    ks_ptr += b * stride_ksb + h * stride_ksh
    ko_ptr += b * stride_ksb + h * stride_ksh
    vs_ptr += b * stride_vsb + h * stride_vsh
    vo_ptr += b * stride_vsb + h * stride_vsh
    ki_ptr += b * stride_kob
    kv_ptr += b * stride_kob
    vi_ptr += b * stride_vob
    vv_ptr += b * stride_vob
    mask_ptr += b.to(tl.int64) * stride_mb + h.to(tl.int64) * stride_mh
    skip = tl.load(skip_ptr + b).to(tl.int32) if SKIP else 0

    m = tl.full((QP,), _LOW, tl.float32)
    total = tl.zeros((QP,), tl.float32)
    acc = tl.zeros((QP, DVP), tl.float32)
    constant = tl.zeros((QP,), tl.float32)
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, run)
    # All runs of a tile of rows in one iteration would take too many registers: their bytes come again from the cache.
    for i in range(tl.cdiv(last - first, BT) * (STEP // PAIR)):
        rows = first + i // (STEP // PAIR) * BT + tl.arange(0, BT)
        r_ok = rows < last
        for j in tl.static_range(PAIR):
            f = i * 0 + j if STEP == PAIR else i % (STEP // PAIR) * PAIR + j
            t = f * run + rows
            t_ok = r_ok & (t < tokens)
            # Of a plane with fewer fields, some runs are rows further down.
            ka = _plane(k_ptr, rows, r_ok, half, h_ok, D, run, capacity, f, STEP, KB)
            kc = _plane(k_ptr + D // 2, rows, r_ok, half, h_ok, D, run, capacity, f, STEP, KB)
            k1, k2 = _level(ka, kt_ptr, K_TABLE, KB, DTYPE), _level(kc, kt_ptr, K_TABLE, KB, DTYPE)
            if K_FULL:
                k1 = _full(k1, ks_ptr, ko_ptr, ki_ptr, kv_ptr, t, t_ok, half, h_ok, h * D + half, D, k_groups, k_group,
                           K_SLOTS, K_AXIS, K_INT, K_SLOTS, tl.float32)
                k2 = _full(k2, ks_ptr, ko_ptr, ki_ptr, kv_ptr, t, t_ok, half + D // 2, h_ok, h * D + half + D // 2, D,
                           k_groups, k_group, K_SLOTS, K_AXIS, K_INT, K_SLOTS, tl.float32)
                if ROTARY:
                    angle = b * stride_cb + (at + t)[:, None] * stride_ct + half[None, :]
                    k1, k2 = _turned(k1, k2, cos_ptr + angle, sin_ptr + angle, t_ok[:, None] & h_ok[None, :])
            scores = tl.dot(qa, tl.trans(k1.to(DTYPE)))
            scores = tl.dot(qb, tl.trans(k2.to(DTYPE)), scores)
            if K_FOLD:
                scores += q_sum[:, None]
            elif not K_FULL:
                ks = tl.load(ks_ptr + t, mask=t_ok, other=0.0).to(tl.float32)
                ko = tl.load(ko_ptr + t, mask=t_ok, other=0.0).to(tl.float32)
                if K_INT:
                    scores = (scores - q_sum[:, None] * ko[None, :]) * ks[None, :]
                else:
                    scores = scores * ks[None, :] + q_sum[:, None] * ko[None, :]
            scores = _masked(scores, mask_ptr, at + t, t_ok, q_rows, q_ok, stride_mq, skip, skip_count, scaling,
                             softcap, MASK, SOFTCAP, _LOW)
            p, old, m, total = _softmax_step(scores, m, total, _LOW)
            codes = _plane(v_ptr, rows, r_ok, value, v_ok, DV, run, capacity, f, STEP, VB)
            v = _level(codes, vt_ptr, V_TABLE, VB, DTYPE)
            acc *= old[:, None]
            if V_FULL:
                v = _full(v, vs_ptr, vo_ptr, vi_ptr, vv_ptr, t, t_ok, value, v_ok, h * DV + value, DV, v_groups,
                          v_group, V_SLOTS, V_AXIS, V_INT, V_SLOTS, DTYPE)
                acc = tl.dot(p.to(DTYPE), v, acc)
            else:
                vs = tl.load(vs_ptr + t, mask=t_ok, other=0.0).to(tl.float32)
                vo = tl.load(vo_ptr + t, mask=t_ok, other=0.0).to(tl.float32)
                largest = tl.maximum(tl.max(vs, 0), 1e-30)  # keeps the products of small scales in 16 bits
                weights = p * (vs / largest)[None, :]
                acc += tl.dot(weights.to(DTYPE), v) * largest
                zero = -vs * vo if V_INT else vo
                constant = constant * old + tl.sum(p * zero[None, :], 1)
    acc += constant[:, None]
    _write_partial(acc, m, total, acc_ptr, m_ptr, l_ptr, pid, part0 + split, PARTS, Q, DV, q_rows, q_ok, value)


@triton.jit
def _plane(
    ptr, rows, r_ok, channels, c_ok, D, run, capacity, field, STEP: tl.constexpr, BITS: tl.constexpr
):
    """Codes of run ``field`` out of STEP: rows ``[BT]`` of that run, whatever the width of the planes.

    A plane of width w has 8 / w fields of ``capacity * w / 8`` rows; STEP * w / 8 runs share a field.
    """
    if BITS == 3:
        low = _field(ptr, rows, r_ok, channels, c_ok, D, run, field, STEP, 2)
        high = _field(ptr + (capacity // 4) * D, rows, r_ok, channels, c_ok, D, run, field, STEP, 1)
        q = low | (high << 2)
    else:
        q = _field(ptr, rows, r_ok, channels, c_ok, D, run, field, STEP, BITS)
    return q


@triton.jit
def _field(ptr, rows, r_ok, channels, c_ok, D, run, field, STEP: tl.constexpr, WIDTH: tl.constexpr):
    PER: tl.constexpr = STEP * WIDTH // 8  # runs in one field of the plane
    at = rows if PER == 1 else field % PER * run + rows
    data = _bytes(ptr, at, r_ok, channels, c_ok, D)
    if WIDTH < 8:
        shift = tl.zeros((1, 1), tl.uint8) + (field // PER * WIDTH).to(tl.uint8)
        data = (data >> shift) & ((1 << WIDTH) - 1)
    return data


@triton.jit(do_not_specialize=["tokens", "at", "limit", "part", "PARTS", "skip_count"])
def floats_kernel(
    q_ptr, k_ptr, v_ptr, first_ptr, mask_ptr, skip_ptr, acc_ptr, m_ptr, l_ptr,
    HEADS, Q, D, DV, tokens, at, limit, part, PARTS, skip_count, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh,
    stride_vt, stride_mb, stride_mh, stride_mq, scaling, softcap,
    FIRST: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, SKIP: tl.constexpr, DTYPE: tl.constexpr,
    QP: tl.constexpr, HALF: tl.constexpr, DVP: tl.constexpr, BT: tl.constexpr,
):
    """The same over keys and values that are floats: one part, program (batch and head).

    Token i has the position ``at + i``, or ``first[b] + i`` (FIRST), and counts while that is below ``limit``.
    """
    pid = tl.program_id(0)
    b, h = pid // HEADS, pid % HEADS
    q_rows, half, value = tl.arange(0, QP), tl.arange(0, HALF), tl.arange(0, DVP)
    q_ok, h_ok, v_ok = q_rows < Q, half < D // 2, value < DV
    q_at = q_ptr + pid.to(tl.int64) * Q * D + q_rows[:, None] * D + half[None, :]
    qa = tl.load(q_at, mask=q_ok[:, None] & h_ok[None, :], other=0.0).to(DTYPE)
    qb = tl.load(q_at + D // 2, mask=q_ok[:, None] & h_ok[None, :], other=0.0).to(DTYPE)
    k_ptr += b.to(tl.int64) * stride_kb + h * stride_kh
    v_ptr += b.to(tl.int64) * stride_vb + h * stride_vh
    mask_ptr += b.to(tl.int64) * stride_mb + h.to(tl.int64) * stride_mh
    skip = tl.load(skip_ptr + b).to(tl.int32) if SKIP else 0
    start = tl.load(first_ptr + b).to(tl.int32) if FIRST else at
    m = tl.full((QP,), _LOW, tl.float32)
    total = tl.zeros((QP,), tl.float32)
    acc = tl.zeros((QP, DVP), tl.float32)
    for t0 in range(0, tokens, BT):
        t = t0 + tl.arange(0, BT)
        t_ok = (t < tokens) & (start + t < limit)
        k_at = k_ptr + t[:, None] * stride_kt + half[None, :]
        k1 = tl.load(k_at, mask=t_ok[:, None] & h_ok[None, :], other=0.0).to(DTYPE)
        k2 = tl.load(k_at + D // 2, mask=t_ok[:, None] & h_ok[None, :], other=0.0).to(DTYPE)
        scores = tl.dot(qb, tl.trans(k2), tl.dot(qa, tl.trans(k1)))
        scores = _masked(scores, mask_ptr, start + t, t_ok, q_rows, q_ok, stride_mq, skip, skip_count, scaling,
                         softcap, MASK, SOFTCAP, _LOW)
        p, old, m, total = _softmax_step(scores, m, total, _LOW)
        v = tl.load(v_ptr + t[:, None] * stride_vt + value[None, :], mask=t_ok[:, None] & v_ok[None, :], other=0.0)
        acc = tl.dot(p.to(DTYPE), v.to(DTYPE), acc * old[:, None])
    _write_partial(acc, m, total, acc_ptr, m_ptr, l_ptr, pid, part, PARTS, Q, DV, q_rows, q_ok, value)


@triton.jit(do_not_specialize=["PARTS"])
def combine_kernel(acc_ptr, m_ptr, l_ptr, y_ptr, Q, DV, PARTS, DVP: tl.constexpr):
    """Partial results in a fixed order to y float32 ``[B * H * Q, DV]``; zeros where a query attends to nothing."""
    pid, q = tl.program_id(0), tl.program_id(1)
    channels = tl.arange(0, DVP)
    ok = channels < DV
    m = tl.load(m_ptr + pid * PARTS * Q + q)
    total = tl.load(l_ptr + pid * PARTS * Q + q)
    acc = tl.load(acc_ptr + (pid.to(tl.int64) * PARTS * Q + q) * DV + channels, mask=ok, other=0.0)
    for part in range(1, PARTS):
        at = (pid * PARTS + part) * Q + q
        m_part = tl.load(m_ptr + at)
        top = tl.maximum(m, m_part)
        old, new = tl.exp2((m - top) * 1.4426950408889634), tl.exp2((m_part - top) * 1.4426950408889634)
        total = total * old + tl.load(l_ptr + at) * new
        acc = acc * old + tl.load(acc_ptr + at.to(tl.int64) * DV + channels, mask=ok, other=0.0) * new
        m = top
    y = tl.where(total > 0, acc / tl.where(total > 0, total, 1.0), 0.0)
    tl.store(y_ptr + (pid.to(tl.int64) * Q + q) * DV + channels, y, mask=ok)


@triton.jit
def _rounded(v):
    return (v + 12582912.0) - 12582912.0


@triton.jit(do_not_specialize=["tokens", "at"])
def append_kernel(
    x_ptr, low_ptr, edges_ptr, c_ptr, s_ptr, o_ptr, HEADS, D, capacity, tokens, at, stride_xb, stride_xh, stride_xt,
    stride_sb, stride_sh, window,
    BITS: tl.constexpr, AXIS: tl.constexpr, TABLE: tl.constexpr, INT_ZERO: tl.constexpr, SMALLEST: tl.constexpr,
    T: tl.constexpr, DP: tl.constexpr,
):
    """Encode tokens x ``[B, H, tokens, D]`` and put them into a block from token ``at`` on: program (batch and head).

    AXIS TOKEN: one scale a token and head; CHANNEL: stored (``low``: scale, then offset, float32 ``[2, H * D]``);
    WINDOW: the tokens are one window, which begins at a multiple of ``window``. TABLE: codes by ``edges``, the middles
    between sorted levels in ``[-1, 1]``. A byte belongs to one program; its fields are written one after the other.
    """
    LEVELS: tl.constexpr = (1 << BITS) - 1
    pid = tl.program_id(0)
    b, h = pid // HEADS, pid % HEADS
    t, d = tl.arange(0, T), tl.arange(0, DP)
    t_ok, d_ok = t < tokens, d < D
    ok = t_ok[:, None] & d_ok[None, :]
    x_ptr += b.to(tl.int64) * stride_xb + h * stride_xh
    x = tl.load(x_ptr + t[:, None] * stride_xt + d[None, :], mask=ok, other=0.0).to(tl.float32)
    if AXIS == CHANNEL:
        scale = tl.load(low_ptr + h * D + d, mask=d_ok, other=1.0)[None, :]
        offset = tl.load(low_ptr + HEADS * D + h * D + d, mask=d_ok, other=0.0)[None, :]
    else:
        OVER: tl.constexpr = 1 if AXIS == TOKEN else 0
        low = tl.min(tl.where(ok, x, float("inf")), OVER)
        high = tl.max(tl.where(ok, x, float("-inf")), OVER)
        if INT_ZERO:
            low, high = tl.minimum(low, 0.0), tl.maximum(high, 0.0)
        steps = tl.full(low.shape, 2.0 if TABLE else LEVELS, tl.float32)
        # Maxima skip NaN: a token with one, or with an infinity, gets a scale that is not a number.
        fault = tl.sum(tl.where(ok, x * 0.0, 0.0), OVER)
        half = (tl.minimum(tl.maximum(tl.div_rn(high - low, steps), SMALLEST), 65504.0) + fault).to(tl.float16)
        wide = half.to(tl.float32)
        if INT_ZERO:
            shift = tl.minimum(tl.maximum(_rounded(tl.div_rn(-low, wide)), 0.0), LEVELS)
        elif TABLE:
            shift = (high + low) / 2
        else:
            shift = low
        shift = tl.minimum(tl.maximum(shift, -65504.0), 65504.0).to(tl.float16)
        base = b * stride_sb + h * stride_sh
        if AXIS == TOKEN:
            tl.store(s_ptr + base + at + t, half, mask=t_ok)
            tl.store(o_ptr + base + at + t, shift, mask=t_ok)
            scale, offset = wide[:, None], shift.to(tl.float32)[:, None]
        else:
            tl.store(s_ptr + base + (at // window) * D + d, half, mask=d_ok)
            tl.store(o_ptr + base + (at // window) * D + d, shift, mask=d_ok)
            scale, offset = wide[None, :], shift.to(tl.float32)[None, :]
    scale = tl.broadcast_to(scale, (T, DP))
    if TABLE:
        a = tl.div_rn(x - offset, scale)
        code = tl.zeros((T, DP), tl.int32)
        for i in tl.static_range(LEVELS):
            code += (a > tl.load(edges_ptr + i)).to(tl.int32)
    elif INT_ZERO:
        code = tl.minimum(tl.maximum(_rounded(tl.div_rn(x, scale)) + offset, 0.0), LEVELS).to(tl.int32)
    else:
        code = tl.minimum(tl.maximum(_rounded(tl.div_rn(x - offset, scale)), 0.0), LEVELS).to(tl.int32)
    c_ptr += pid.to(tl.int64) * (capacity * BITS // 8) * D
    if BITS == 3:
        _insert(c_ptr, code & 3, at + t, ok, d, D, capacity, 2)
        _insert(c_ptr + (capacity // 4) * D, code >> 2, at + t, ok, d, D, capacity, 1)
    else:
        _insert(c_ptr, code, at + t, ok, d, D, capacity, BITS)


@triton.jit
def _insert(ptr, code, tokens, ok, d, D, capacity, WIDTH: tl.constexpr):
    """Codes of ``tokens`` into a plane. Tokens of one field are in different rows; fields come one after the other."""
    rows = capacity * WIDTH // 8
    at = (tokens % rows)[:, None] * D + d[None, :]
    field = tokens // rows
    if WIDTH == 8:
        tl.store(ptr + at, code.to(tl.uint8), mask=ok)
    else:
        MASK: tl.constexpr = (1 << WIDTH) - 1
        for f in tl.static_range(8 // WIDTH):
            mine = ok & (field == f)[:, None]
            old = tl.load(ptr + at, mask=mine, other=0).to(tl.int32)
            tl.store(ptr + at, ((old & (255 ^ (MASK << (WIDTH * f)))) | (code << (WIDTH * f))).to(tl.uint8), mask=mine)
            tl.debug_barrier()
