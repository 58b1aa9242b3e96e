"""Operators of an integer-only transformer: products, softmax, exponential, gated units, norms, rotary embedding.

Everything between token ids and logits is here, on integer tensors with dyadic scales (:mod:`hfq.formats.dyadic`):
int32 accumulators, int64 where scales are applied, one row (a token, or a head of a token) one scale. A row's result
depends on that row alone, so batch, padding, chunking and device do not change a bit of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hfq.errors import KernelError, QuantizationError
from hfq.formats.dyadic import (
    Dyadic,
    bit_length,
    from_ratio,
    isqrt,
    round_div,
    round_div_positive,
    rshift_round,
    shifted,
)  # fmt: skip
from hfq.kernels.byte_mm import integer_mm

__all__ = [
    "UNIT", "add_residual", "attend", "check_accumulators", "exponential", "gated_relu", "gated_sigmoid",
    "narrow", "normalise", "product", "project", "project_narrow", "quantize_symmetric", "requantize",
    "rotate", "softmax", "store",
]  # fmt: skip

LIFT = 12
UNIT = 1 << LIFT  # one, and the steps of a halving, in the exponential
NORM_SQUARES = 62  # bits that a sum of squares may take
CHUNK = 1 << 19  # attention scores that are worked on at once
_MASKED = -(1 << 30)


# -- products --------------------------------------------------------------------------------------------------------
def check_accumulators(
    inner: int, left: int, right: int, weight_mantissa: int = 15, mantissa: int = 8, where: str = ""
) -> None:
    """Raise unless every sum of ``inner`` products, and its scaling, fits its integer.

    Args:
        inner: length of the sums.
        left, right: largest magnitudes of the factors (255 and 127 for unsigned times signed bytes).
        weight_mantissa, mantissa: bits of the scales of the columns and of the rows.
        where: for the message.

    Raises:
        QuantizationError: an accumulator could overflow.
    """
    largest = inner * left * right
    if largest >= 1 << 31:
        limit = ((1 << 31) - 1) // (left * right)
        raise QuantizationError(f"{where or 'product'}: sums of {inner} products of {left} x {right} overflow 32 bits; "
                                f"at most {limit} inputs are possible")
    if largest.bit_length() + 1 + weight_mantissa + mantissa > 61:
        raise QuantizationError(f"{where or 'product'}: sums of {inner} products times scales of {weight_mantissa} and "
                                f"{mantissa} bits overflow 64 bits: use fewer bits for the scale of a row")


def product(x: Dyadic, weight: Tensor, total: Tensor) -> Tensor:
    """``(x.data - x.zero_point) @ weight.T`` as int32.

    Args:
        x: uint8 data ``[M, K]`` with a zero point a row.
        weight: int8 ``[N, K]``.
        total: int32 ``[N]``, the row sums of ``weight``.
    """
    y = integer_mm(x.data, weight.t())
    return y if x.zero_point is None else y.sub_(x.zero_point.to(torch.int32) * total)


def project(
    x: Dyadic, weight: Tensor, total: Tensor, mantissa: Tensor, shift: int, bias: tuple[Tensor, int] | None = None
) -> Dyadic:
    """A linear layer up to its output scale: int64 ``[M, N]`` with one scale a row, zero point 0.

    Args:
        x, weight, total: as in :func:`product`.
        mantissa: int64 ``[N]``, of the weight's output channels; they share ``shift``.
        bias: int64 mantissas ``[N]`` below ``2**30`` and their shift.
    """
    y = product(x, weight, total) * mantissa
    if bias is None:
        return Dyadic(y, x.mantissa, x.shift + shift)
    # Both on a power of two: the row's where the bias stays in range, else the finest at which it does.
    k = x.shift + shift
    y = y * x.mantissa
    kept = torch.minimum(k, torch.full_like(k, bias[1] + 30))
    y = shifted(y, k - kept) + shifted(bias[0].expand_as(y), bias[1] - kept)
    return narrow(Dyadic(y, torch.ones_like(kept), kept), 44)


def project_narrow(x: Dyadic, weight: Tensor, total: Tensor, mantissa: Tensor, shift: int) -> Dyadic:
    """:func:`project` without bias in 32 bits: the accumulators of a row in 15 bits, times the channels' mantissas.

    For rows that are requantized to a byte: the fifteen bits are cut from the largest accumulator of the row.
    """
    y = product(x, weight, total)
    cut = (bit_length(_magnitude(y)) - 15).clamp_min(0)
    y = rshift_round(y, cut.to(torch.int32)).mul_(mantissa)
    return Dyadic(y, x.mantissa, x.shift + shift - cut)


def narrow(x: Dyadic, bits: int) -> Dyadic:
    """Rows shifted right (rounding) until every magnitude fits ``bits`` bits; zero point 0."""
    excess = (bit_length(_magnitude(x.data)) - bits).clamp_min(0)
    return Dyadic(rshift_round(x.data, excess), x.mantissa, x.shift - excess)


def _magnitude(x: Tensor) -> Tensor:
    return torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True))


# -- requantization --------------------------------------------------------------------------------------------------
def requantize(x: Dyadic, bits: int, mantissa_bits: int = 8, divisor: Tensor | None = None) -> Dyadic:
    """Rows of wide integers to unsigned codes of ``bits`` bits with a scale and a zero point a row.

    The range of a row contains zero; its extremes map to 0 and ``2**bits - 1``. The codes are ``(data - low) * top /
    spread``, rounded: the quotient of a row as a multiplier of 30 bits for the upper 16 bits of the difference.

    Args:
        x: int32 data, or int64 data below ``2**46``, zero point 0, ``[..., C]``.
        bits: 2 to 16.
        mantissa_bits: of the new scale.
        divisor: int64 ``[..., 1]``: the data stand for ``data / divisor`` (below ``2**30``).

    Returns:
        Codes as uint8 (int32 above 8 bits), zero point int32.
    """
    top = (1 << bits) - 1
    low = x.data.amin(-1, keepdim=True).clamp_max(0)
    spread = (x.data.amax(-1, keepdim=True).clamp_min(0) - low).clamp_min(1).to(torch.int64)
    if bits > 8:
        zero = -low * top
        codes = torch.div((x.data * top).add_(zero + (spread >> 1)), spread, rounding_mode="trunc").to(torch.int32)
        zero = round_div_positive(zero, spread).to(torch.int32)
    else:
        cut = (bit_length(spread) - 16).clamp_min(0)
        width, point = spread >> cut, 30 - bits
        factor = torch.div((width >> 1) + (top << point), width, rounding_mode="trunc").to(torch.int32)
        narrowed, half = cut.to(x.data.dtype), 1 << (point - 1)
        codes = ((x.data - low) >> narrowed).to(torch.int32).mul_(factor).add_(half)
        codes = (codes >> point).to(torch.uint8)
        zero = ((-low >> narrowed).to(torch.int32) * factor + half) >> point
    mantissa, shift = from_ratio(spread * x.mantissa, top if divisor is None else divisor * top, x.shift, mantissa_bits)
    return Dyadic(codes, mantissa, shift, zero)


def quantize_symmetric(x: Dyadic, bits: int, mantissa_bits: int = 8) -> Dyadic:
    """Rows of integers to signed codes ``-(2**(bits-1) - 1) ... 2**(bits-1) - 1`` (int8), zero point 0."""
    top = (1 << (bits - 1)) - 1
    spread = _magnitude(x.data).clamp_min(1)
    codes = round_div(x.data * top, spread).to(torch.int8)
    mantissa, shift = from_ratio(spread * x.mantissa, top, x.shift, mantissa_bits)
    return Dyadic(codes, mantissa, shift)


def store(x: Dyadic, mantissa: Tensor, shift: int, bits: int) -> Tensor:
    """Rows of integers on a fixed grid: ``value * mantissa / 2**shift`` rounded and saturated, int8.

    Args:
        x: int64 data with a scale a row; ``|data| * x.mantissa * mantissa`` below ``2**62``.
        mantissa: int64 ``[C]``, of the *inverse* step of every channel.
    """
    top = (1 << (bits - 1)) - 1
    return shifted(x.data * mantissa * x.mantissa, x.shift + shift).clamp_(-top, top).to(torch.int8)


# -- norms and residual ----------------------------------------------------------------------------------------------
def normalise(
    x: Tensor, gain: Tensor, gain_shift: int, bias: Tensor | None = None, *, centred: bool = False,
    scale: tuple[Tensor, Tensor] | None = None,
) -> tuple[Dyadic, Tensor]:
    """RMS or layer norm of integer rows, before the division by the root.

    Args:
        x: int32 or int64 ``[..., C]``; the scale of a row does not matter.
        gain: int64 mantissas ``[C]`` below ``2**15``, with one shift.
        bias: int64 mantissas ``[C]`` below ``2**15`` with the same shift.
        centred: subtract the mean (layer norm).
        scale: mantissas and shifts ``[C]`` of the channels of ``x`` where they differ.

    Returns:
        ``(y, root)``: the norm is ``y.data / root / 2**gain_shift``, for :func:`requantize` with ``divisor=root``.
    """
    if scale is not None:
        x = _aligned(x, *scale)
    size = x.shape[-1]
    bits = min((NORM_SQUARES - size.bit_length()) // 2, 26) - int(centred)
    x = x.to(torch.int64)
    if centred:  # in the most bits that a sum leaves, so that the mean is not rounded to few
        x = shifted(x, bit_length(_magnitude(x)) - 40)
        x = x - round_div(x.sum(-1, keepdim=True), size)
    x = shifted(x, bit_length(_magnitude(x)) - bits)
    root = isqrt(round_div_positive((x * x).sum(-1, keepdim=True), size)).clamp_min(1)
    y = x * gain
    if bias is not None:
        y = y + bias * root
    one = torch.ones_like(root)
    return Dyadic(y, one, one * gain_shift), root


def _aligned(x: Tensor, mantissa: Tensor, shift: Tensor) -> Tensor:
    """Channels of different scales on one scale, eight bits finer than the smallest."""
    common = mantissa >> (shift - shift.min())
    smallest = common.min().clamp_min(1)
    return (x.to(torch.int64) * round_div_positive(common << 8, smallest)) >> 8


def add_residual(stream: Dyadic, bits: Tensor, delta: Dyadic) -> tuple[Dyadic, Tensor]:
    """The residual stream (int32, power-of-two scale a row) plus a delta, on the finest scale that leaves 30 bits.

    Args:
        stream: mantissa 1; data int32.
        bits: ``bit_length`` of the largest magnitude of each row of ``stream`` ``[..., 1]``.
        delta: int64 data times mantissa below ``2**62``, zero point 0.

    Returns:
        The new stream and its ``bits``.
    """
    data = delta.data * delta.mantissa
    most = torch.maximum(bits - stream.shift, bit_length(_magnitude(data)) - delta.shift)
    shift = 29 - most
    total = shifted(stream.data.to(torch.int64), stream.shift - shift) + shifted(data, delta.shift - shift)
    total = total.to(torch.int32)
    return Dyadic(total, stream.mantissa, shift), bit_length(_magnitude(total))


# -- rotary embedding ------------------------------------------------------------------------------------------------
def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotary embedding in int32: ``(x_1 c - x_2 s, x_2 c + x_1 s) / 2**14`` rounded.

    Args:
        x: int32 ``[..., D]`` below ``2**15``; the first ``2 * cos.shape[-1]`` channels turn.
        cos, sin: int32 ``[..., R]`` in units of ``2**-14``.
        interleaved: channel ``2 i`` turns with ``2 i + 1``, else ``i`` with ``i + R``.
    """
    count = cos.shape[-1]
    turning = x[..., : 2 * count]
    if interleaved:
        first, second = turning[..., 0::2], turning[..., 1::2]
    else:
        first, second = turning[..., :count], turning[..., count:]
    a = rshift_round(first * cos - second * sin, 14)
    b = rshift_round(second * cos + first * sin, 14)
    turned = torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)
    return turned if 2 * count == x.shape[-1] else torch.cat((turned, x[..., 2 * count :]), -1)


# -- exponential, softmax, gated units -------------------------------------------------------------------------------
def exponential(x: Tensor, mantissa: Tensor, shift: Tensor) -> Tensor:
    """``exp(-x * mantissa / 2**shift)`` for ``x >= 0`` by shifts, in units of ``2**-12``.

    ``log2(e)`` is 1.4375, and ``2**-f`` on a unit is linear: ``(1 - f / 2) >> whole``. The scale of a row is lifted so
    that a halving is exactly :data:`UNIT` steps.

    Args:
        x: int32 ``[..., C]``, 0 to ``2**14 - 1``.
        mantissa, shift: int64 ``[..., 1]``, the mantissa below ``2**16``.

    Returns:
        int32 ``0 ... UNIT``; :data:`UNIT` for 0.
    """
    factor = mantissa + (mantissa >> 1) - (mantissa >> 4)
    wide = (bit_length(factor) - 16).clamp_min(0)
    lift = LIFT - shift + wide
    left = lift.clamp(0, 30).to(torch.int32)
    right = (-lift).clamp(0, 31).to(torch.int32)
    # Beyond 31 halvings nothing is left: what comes after the shift stays below 2**30.
    steps = x * (factor >> wide).to(torch.int32)
    steps = (torch.minimum(steps, (1 << 30) >> left) << left) >> right
    whole = (steps >> LIFT).clamp_max_(30)
    return (2 * UNIT - (steps & (UNIT - 1))) >> (whole + 1)


def softmax(
    scores: Tensor, mantissa: Tensor, shift: Tensor, visible: Tensor | None, *, clip: tuple[int, int] = (240, 4),
    bits: int = 8, out_bits: int = 16,
) -> Tensor:
    """Softmax of integer rows with the range clipped below the maximum.

    Args:
        scores: int32 ``[..., S]`` below ``2**22``.
        mantissa, shift: int64 ``[..., 1]``, scale of each row.
        visible: bool, broadcasts against ``scores``; ``None`` for all.
        clip: dyadic width of the clipped range; 240 / 2**4 = 15.
        bits: of the exponential's input, up to 14; above, the scores in as many bits as fit it.
        out_bits: probabilities are in units of ``2**-(out_bits - 1)``.

    Returns:
        int32 ``0 ... 2**(out_bits - 1)``; rows without a visible position are zero.
    """
    # The clip in steps of the row; a window wider than the scores can be is no window.
    power = shift - clip[1]
    window = torch.div(clip[0] << power.clamp(0, 54), mantissa << (-power).clamp(0, 54), rounding_mode="floor")
    window = window.clamp(1, 1 << 23).to(torch.int32)
    if visible is None:
        least, most = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
    else:
        hidden = ~visible
        most = scores.masked_fill(hidden, _MASKED).amax(-1, keepdim=True)
        least = torch.minimum(scores.masked_fill(hidden, -_MASKED).amin(-1, keepdim=True), most)
    spread = torch.minimum(most - least, window).clamp_min(1)
    x = torch.minimum((most - scores).clamp_min_(0), spread)
    if bits <= 14:
        top, point = (1 << bits) - 1, 30 - bits
        cut = (bit_length(spread) - 16).clamp_min(0).to(torch.int32)
        width = spread >> cut
        factor = torch.div((width >> 1) + (top << point), width, rounding_mode="trunc")
        x = ((x >> cut).mul_(factor).add_(1 << (point - 1))) >> point
        mantissa, shift = from_ratio(spread * mantissa, top, shift)
    else:
        cut = (bit_length(spread) - 14).clamp_min(0)
        x, shift = x >> cut.to(torch.int32), shift - cut
    e = exponential(x, mantissa, shift)
    if visible is not None:
        e = e.masked_fill_(hidden, 0)
    total = e.sum(-1, keepdim=True, dtype=torch.int32).clamp_min(1).to(torch.int64)
    # e / total as a multiplier of up to 18 bits; the shift that follows must stay below 31
    power = (bit_length(total) + 17).clamp_max(out_bits + 29)
    factor = torch.div((1 << power) + (total >> 1), total, rounding_mode="trunc").to(torch.int32)
    down = (power - (out_bits - 1)).to(torch.int32)
    return ((e * factor).add_((1 << down) >> 1)) >> down


def gated_sigmoid(
    gate: Dyadic, up: Dyadic, inverse: tuple[Tensor, int] | None = None, *, bits: int = 8
) -> Dyadic:
    """``gate * sigmoid(gate / s) * up``, the product of a gated unit with SiLU (``s`` 1) or a smoothed one.

    Args:
        gate, up: codes ``[M, C]`` with a scale and a zero point a row.
        inverse: int64 mantissas ``[C]`` below ``2**15`` and a shift: ``1 / s``.
        bits: the sigmoid is in units of ``2**-(bits - 1)``.

    Returns:
        int64 ``[M, C]``, one scale a row; data times mantissa below ``2**60``.
    """
    x = gate.centred()
    z, shift = x, gate.shift
    if x.dtype == torch.int32 and gate.data.dtype != torch.uint8:
        excess = (bit_length(_magnitude(x)) - 14).clamp_min(0)
        z, shift = x >> excess.to(torch.int32), shift - excess
    if inverse is not None:  # 1 / s per channel, brought back to 14 bits on the scale of the row
        wide = x.to(torch.int64) * inverse[0]
        excess = (bit_length(_magnitude(wide)) - 14).clamp_min(0)
        z, shift = rshift_round(wide, excess).to(torch.int32), shift + inverse[1] - excess
    e = exponential(z.abs(), gate.mantissa, shift)
    below = e + UNIT
    above = e + ((UNIT - e) & ~(z >> 31))  # the numerator: one where z >= 0, e below
    sigmoid = torch.div((above << (bits - 1)) + (below >> 1), below, rounding_mode="trunc")
    return _scaled_product(x, up, gate, sigmoid, bits - 1)


def gated_relu(gate: Dyadic, up: Dyadic) -> Dyadic:
    """``relu(gate) * up``; arguments and result as of :func:`gated_sigmoid`."""
    return _scaled_product(gate.centred().clamp_min(0), up, gate, None, 0)


def _scaled_product(x: Tensor, up: Dyadic, gate: Dyadic, factor: Tensor | None, shift: int) -> Dyadic:
    other, k = up.centred(), gate.shift + up.shift + shift
    narrow_codes = gate.data.dtype == torch.uint8
    y = x * other if narrow_codes else x.to(torch.int64) * other
    y = y if factor is None else y * factor if shift <= 13 else y.to(torch.int64) * factor
    # Scales of 8 bits have a product of 16; the product of wider ones is brought to 30.
    mantissa = gate.mantissa * up.mantissa
    excess = (bit_length(mantissa) - 30).clamp_min(0)
    y2 = Dyadic(y, rshift_round(mantissa, excess), k - excess)
    return y2 if y.dtype == torch.int32 else narrow(y2, 26)


# -- attention -------------------------------------------------------------------------------------------------------
def attend(
    query: Dyadic, keys: Tensor, values: Tensor, past: int, padding: Tensor | None = None, *,
    clip: tuple[int, int] = (240, 4), bits: int = 8, out_bits: int = 16,
) -> Tensor:
    """Causal attention over integer keys and values.

    Args:
        query: int8 data ``[B, T, H, D]``, scale ``[B, T, H, 1]`` (of the whole product with a key).
        keys, values: int8 ``[B, G, S, D]``; ``H / G`` query heads share one. Positions from ``past + T`` are ignored.
        past: position of the first query.
        padding: bool ``[B, past + T]``, the positions that count; ``None``: all.
        clip, bits, out_bits: as in :func:`softmax`.

    Returns:
        int32 ``[B, T, H, D]`` in units of the values' step times ``2**-(out_bits - 1)``.
    """
    batch, tokens, heads, size = query.data.shape
    groups = keys.shape[1]
    share = heads // groups
    out = torch.empty(batch, tokens, heads, size, dtype=torch.int32, device=keys.device)
    step = max(1, CHUNK // (batch * heads * (past + tokens)))
    for start in range(0, tokens, step):
        stop = min(start + step, tokens)
        count, end = stop - start, past + stop
        rows = (batch, groups, count * share)
        q = query.data[:, start:stop].reshape(batch, count, groups, share, size).transpose(1, 2).contiguous()
        scores = torch.empty(*rows, end, dtype=torch.int32, device=keys.device)
        for b in range(batch):
            for g in range(groups):
                scores[b, g] = integer_mm(q[b, g].view(-1, size), keys[b, g, :end].t())
        mantissa, shift = (
            s[:, start:stop].reshape(batch, count, groups, share, 1).transpose(1, 2)
            for s in (query.mantissa, query.shift)
        )
        visible = _visible(past + start, count, padding, keys.device)
        scores = scores.view(batch, groups, count, share, end)
        p = softmax(scores, mantissa, shift, visible, clip=clip, bits=bits, out_bits=out_bits).view(*rows, end)
        target = out[:, start:stop].view(batch, count, groups, share, size)
        for b in range(batch):
            for g in range(groups):
                target[b, :, g] = _weigh(p[b, g], values[b, g, :end], out_bits).view(count, share, size)
    return out


def _visible(first: int, count: int, padding: Tensor | None, device: torch.device) -> Tensor | None:
    """bool ``[B or 1, 1, count, 1, first + count]``: which positions a query sees; ``None`` for all."""
    end = first + count
    if count == 1:
        return None if padding is None else padding[:, None, None, None, :end]
    causal = torch.arange(end, device=device) <= torch.arange(first, end, device=device)[:, None]
    causal = causal[None, None, :, None, :]
    return causal if padding is None else causal & padding[:, None, None, None, :end]


def _weigh(p: Tensor, values: Tensor, bits: int) -> Tensor:
    """``p @ values`` for probabilities of up to 16 bits: two products of bytes."""
    if bits <= 8:
        return integer_mm(p.to(torch.uint8), values)
    if bits > 16:
        raise KernelError(f"probabilities of {bits} bits: at most 16 are possible")
    both = torch.cat(((p >> 8).to(torch.uint8), (p & 255).to(torch.uint8)))
    y = integer_mm(both, values)
    return (y[: p.shape[0]] << 8) + y[p.shape[0] :]
