"""Integer operators against Python integers that follow the written rules, and against the functions they stand for."""

from __future__ import annotations

import math

import pytest
import torch

from hfq.errors import QuantizationError
from hfq.formats.dyadic import Dyadic, decode
from hfq.kernels import dyadic


def column(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)[:, None]


def rows_of(x: torch.Tensor, mantissa: int = 200, shift: int = 12) -> Dyadic:
    ones = torch.ones(*x.shape[:-1], 1, dtype=torch.int64)
    return Dyadic(x, ones * mantissa, ones * shift)


def codes(generator: torch.Generator, rows: int, size: int) -> Dyadic:
    data = torch.randint(0, 256, (rows, size), generator=generator).to(torch.uint8)
    zero = torch.randint(0, 256, (rows, 1), generator=generator).to(torch.int32)
    mantissa = torch.randint(128, 256, (rows, 1), generator=generator)
    return Dyadic(data, mantissa, torch.randint(5, 20, (rows, 1), generator=generator), zero)


# -- the written rules in Python integers ----------------------------------------------------------------------------
def ref_ratio(n: int, d: int, k: int, bits: int) -> tuple[int, int]:
    lift = 57 - bits - d.bit_length()
    quotient = (n << (61 - n.bit_length())) // (d << lift)
    high = (1 << bits) - 1
    over = 4 + (quotient > (high << 4) + 7)
    return min((quotient + (1 << over >> 1)) >> over, high), k - n.bit_length() - over + 61 - lift


def ref_requantize(row: list[int], m: int, k: int, bits: int, divisor: int = 1) -> tuple[list[int], int, int, int]:
    top, low = (1 << bits) - 1, min(0, *row)
    spread = max(max(0, *row) - low, 1)
    cut = max(spread.bit_length() - 16, 0)
    width, point = spread >> cut, 30 - bits
    factor = ((width >> 1) + (top << point)) // width
    made = [(((v - low) >> cut) * factor + (1 << point - 1)) >> point for v in row]
    zero = ((-low >> cut) * factor + (1 << point - 1)) >> point
    return made, *ref_ratio(spread * m, top * divisor, k, 8), zero


def ref_exp(x: int, m: int, k: int) -> int:
    factor, lift = m + (m >> 1) - (m >> 4), 12 - k
    steps = min(x * factor, (1 << 30) >> max(lift, 0)) << max(lift, 0) >> max(-lift, 0)
    return (8192 - (steps & 4095)) >> (min(steps >> 12, 30) + 1)


def ref_softmax(row: list[int], seen: list[bool], m: int, k: int, clip: tuple[int, int], out: int) -> list[int]:
    if not any(seen):
        return [0] * len(row)
    shown = [v for v, s in zip(row, seen, strict=True) if s]
    power = k - clip[1]
    window = (clip[0] << max(power, 0)) // (m << max(-power, 0))
    most = max(shown)
    spread = max(min(most - min(shown), min(max(window, 1), 1 << 23)), 1)
    cut = max(spread.bit_length() - 16, 0)
    width = spread >> cut
    factor = ((width >> 1) + (255 << 22)) // width
    scale = ref_ratio(spread * m, 255, k, 8)
    e = [ref_exp(((min(max(most - v, 0), spread) >> cut) * factor + (1 << 21)) >> 22, *scale) if s else 0
         for v, s in zip(row, seen, strict=True)]
    total = max(sum(e), 1)
    point = min(total.bit_length() + 17, out + 29)
    factor, down = ((1 << point) + (total >> 1)) // total, point - out + 1
    return [(v * factor + (1 << down >> 1)) >> down for v in e]


# -- products --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(3))
def test_linear_layers_equal_python_integers(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, w = codes(g, 6, 40), torch.randint(-127, 128, (12, 40), generator=g).to(torch.int8)
    mantissa = torch.randint(2000, 32768, (12,), generator=g)
    bias = torch.randint(-(1 << 29), 1 << 29, (12,), generator=g), 20
    total = w.sum(-1, dtype=torch.int32)
    acc = [[sum((int(p) - int(z)) * int(q) for p, q in zip(xr, wr, strict=True)) for wr in w.tolist()]
           for xr, (z,) in zip(x.data.tolist(), x.zero_point.tolist(), strict=True)]  # type: ignore[union-attr]
    y = dyadic.project(x, w, total, mantissa, 17)
    assert y.data.tolist() == [[a * int(m) for a, m in zip(r, mantissa, strict=True)] for r in acc]
    assert torch.equal(y.shift, x.shift + 17)
    narrow = dyadic.project_narrow(x, w, total, mantissa.to(torch.int32), 17)
    assert narrow.data.dtype == torch.int32
    assert ((decode(narrow) - decode(y)).abs() <= decode(y).abs().amax(-1, keepdim=True) * 2.0**-11).all()
    biased = dyadic.project(x, w, total, mantissa, 17, bias)
    wanted = decode(y) + bias[0].double() / 2**20
    assert torch.allclose(decode(biased), wanted, rtol=1e-6, atol=float(wanted.abs().max()) * 1e-7)


# -- requantization --------------------------------------------------------------------------------------------------
@pytest.mark.must_hold("i_llm", 2)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_requantization(bits: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(bits)
    for reach in (3, 200, 1 << 17, (1 << 29) if dtype == torch.int32 else 1 << 44):
        data = torch.randint(-reach, reach + 1, (5, 33), generator=g).to(dtype)
        data[1], data[2], data[3] = 0, data[2].abs(), -data[3].abs()
        x = rows_of(data, 201, 30)
        y = dyadic.requantize(x, bits)
        wanted = [ref_requantize(row, 201, 30, bits) for row in data.tolist()]
        assert y.data.tolist() == [w[0] for w in wanted] and y.data.dtype == torch.uint8
        found = torch.cat((y.mantissa, y.shift, y.zero_point), -1).tolist()  # type: ignore[arg-type, list-item]
        assert found == [list(w[1:]) for w in wanted]
        top, step = 2**bits - 1, decode(Dyadic(torch.ones(5, 1), y.mantissa, y.shift))
        assert ((decode(y) - decode(x)).abs() <= 2 * step).all()
        assert int(y.data.max()) <= top
        signs = (data.amin(-1) < 0) & (data.amax(-1) > 0)
        assert (y.data.amin(-1)[signs] == 0).all() and (y.data.amax(-1)[signs] == top).all()


def test_wide_and_symmetric_codes() -> None:
    data = torch.randint(-(1 << 40), 1 << 40, (4, 30))
    y = dyadic.requantize(rows_of(data, 131, 45), 16, 16)
    step = decode(Dyadic(torch.ones(4, 1), y.mantissa, y.shift))
    assert int(y.mantissa.min()) >= 1 << 15 and (((decode(y) - decode(rows_of(data, 131, 45))).abs()) <= 2 * step).all()
    z = dyadic.quantize_symmetric(rows_of(data, 131, 45), 8, 16)
    step = decode(Dyadic(torch.ones(4, 1), z.mantissa, z.shift))
    assert (z.data.abs().amax(-1) == 127).all()
    assert ((decode(z) - decode(rows_of(data, 131, 45))).abs() <= step).all()


@pytest.mark.must_hold("i_llm", 9)
def test_accumulators_that_could_overflow_are_refused() -> None:
    dyadic.check_accumulators(33025, 255, 255)
    with pytest.raises(QuantizationError, match="down: sums of 33026 products of 255 x 255 overflow 32 bits; at most"):
        dyadic.check_accumulators(33026, 255, 255, where="down")
    dyadic.check_accumulators(133000, 127, 127, 15, 8)
    with pytest.raises(QuantizationError, match="overflow 64 bits"):
        dyadic.check_accumulators(66000, 255, 127, 15, 16)


# -- exponential and softmax -----------------------------------------------------------------------------------------
@pytest.mark.must_hold("i_llm", 3)
@pytest.mark.parametrize("scale", [(241, 12), (128, 7), (255, 3), (200, 15), (129, 20), (40000, 22)])
def test_exponential(scale: tuple[int, int]) -> None:
    m, k = scale
    x = torch.arange(0, 1 << 13, dtype=torch.int32)[None]
    e = dyadic.exponential(x, column(m), column(k))[0]
    if m < 256:
        assert e.tolist() == [ref_exp(v, m, k) for v in range(1 << 13)]
    exact = torch.exp(-x[0].double() * m / 2**k)
    found = e.double() / dyadic.UNIT
    assert int(e[0]) == dyadic.UNIT and (found - exact).abs().max() <= 0.045
    shown = exact > 0.01
    assert ((found / exact)[shown] - 1).abs().max() <= 0.09
    assert (e.diff() <= 0).all() and (found[exact < 1e-6] <= 2.0**-12).all()


@pytest.mark.must_hold("i_llm", 4)
@pytest.mark.parametrize("out", [8, 16])
@pytest.mark.parametrize("length", [1, 7, 512, 8000])
def test_softmax(out: int, length: int) -> None:
    g = torch.Generator().manual_seed(length)
    scores = torch.randint(-60000, 60000, (9, length), generator=g).to(torch.int32)
    scores[3] = 5
    m, k = torch.full((9, 1), 180), torch.tensor([[17], [19], [12], [15], [16], [17], [18], [20], [22]])
    seen = torch.rand(9, length, generator=g) < 0.7
    seen[0], seen[1] = True, False
    p = dyadic.softmax(scores, m, k, seen, out_bits=out)
    wanted = [ref_softmax(r, s, 180, int(shift), (240, 4), out)
              for r, s, shift in zip(scores.tolist(), seen.tolist(), k, strict=True)]
    assert torch.equal(p, torch.tensor(wanted, dtype=torch.int32))
    one = 1 << (out - 1)
    assert int(p.min()) >= 0 and int(p.max()) <= one and not p[1].any() and not p[~seen].any()
    some = seen.any(-1)
    if out == 16:  # a probability of a few units, as over thousands of equal keys, is off by more
        assert length > 512 or ((p.sum(-1)[some] - one).abs() <= 0.01 * one).all()
    exact = (scores.double() * 180 / 2.0**k).masked_fill(~seen, float("-inf"))[some].softmax(-1)
    assert (p[some].double() / one - exact).abs().sum(-1).mean() < (0.12 if out == 16 else 0.9)


def test_softmax_of_accumulators_is_finer() -> None:
    scores = torch.randint(-60000, 60000, (50, 64)).to(torch.int32)
    m, k = torch.full((50, 1), 180), torch.full((50, 1), 19)
    exact = (scores.double() * 180 / 2.0**19).softmax(-1)
    lost = [float((dyadic.softmax(scores, m, k, None, bits=bits).double() / 2**15 - exact).abs().sum(-1).mean())
            for bits in (6, 8, 16)]
    assert lost[2] < lost[1] < lost[0] < 0.3


# -- gated units -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("smoothed", [False, True])
def test_gated_unit(smoothed: bool, bits: int) -> None:
    g = torch.Generator().manual_seed(1)
    gate, up = codes(g, 6, 50), codes(g, 6, 50)
    gate = Dyadic(gate.data, gate.mantissa, torch.randint(9, 14, (6, 1), generator=g), gate.zero_point)
    s = torch.rand(50, generator=g).double() * 3 + 0.3 if smoothed else torch.ones(50).double()
    inverse = ((1 / s * 2**12).round().to(torch.int64), 12) if smoothed else None
    y = dyadic.gated_sigmoid(gate, up, inverse, bits=bits)
    exact = decode(gate) * torch.sigmoid(decode(gate) / s) * decode(up)
    limit = (decode(gate) * decode(up)).abs() * (0.025 if bits == 16 else 0.03)
    assert ((decode(y) - exact).abs() <= limit + 1e-9).all()
    relu = dyadic.gated_relu(gate, up)
    assert torch.allclose(decode(relu), decode(gate).clamp_min(0) * decode(up), rtol=1e-9)


def test_large_gates_do_not_underflow() -> None:
    gate = Dyadic(torch.tensor([[255, 0, 128]]).to(torch.uint8), column(200), column(5), torch.tensor([[128]]))
    one = Dyadic(torch.full((1, 3), 129).to(torch.uint8), column(128), column(7), torch.tensor([[128]]))
    y = decode(dyadic.gated_sigmoid(gate, one))[0]
    assert y[0] == pytest.approx(127 * 200 / 32) and y[1] == 0 and y[2] == 0


# -- norms and residual ----------------------------------------------------------------------------------------------
@pytest.mark.must_hold("i_llm", 6)
@pytest.mark.parametrize("centred", [False, True])
def test_norm(centred: bool) -> None:
    g = torch.Generator().manual_seed(4)
    x = (torch.randn(5, 96, generator=g) * 1e6).to(torch.int32)
    x[1, 7] = 1 << 29  # one channel far above the others
    x[2] = 0
    gain, bias = (torch.rand(96, generator=g) + 0.5).double(), torch.randn(96, generator=g).double()
    fixed = [(v * 2**13).round().to(torch.int64) for v in (gain, bias)]
    y, root = dyadic.normalise(x, fixed[0], 13, fixed[1] if centred else None, centred=centred)
    twice = dyadic.normalise(2 * x.to(torch.int64), fixed[0], 13, fixed[1] if centred else None, centred=centred)
    assert torch.equal(twice[0].data, y.data) and torch.equal(twice[1], root)
    found = decode(y) / root.double()
    z = x.double() - (x.double().mean(-1, keepdim=True) if centred else 0)
    z = z / z.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
    exact = z * gain + (bias if centred else 0)
    assert torch.allclose(found, exact, atol=2e-3, rtol=1e-3)
    rows = dyadic.requantize(y, 8, divisor=root)
    if not centred:
        assert not y.data[2].any() and not decode(rows)[2].any()
    step = decode(Dyadic(torch.ones(5, 1), rows.mantissa, rows.shift))
    assert ((decode(rows) - exact).abs() <= 2 * step + 2e-3).all()


def test_norm_of_channels_with_scales_of_their_own() -> None:
    x = torch.randint(-100, 101, (3, 8))
    mantissa, shift = torch.tensor([128, 200, 255, 130] * 2), torch.tensor([10, 10, 9, 11, 12, 10, 10, 8])
    values = x.double() * mantissa / 2.0**shift
    y, root = dyadic.normalise(x, torch.full((8,), 1 << 13), 13, scale=(mantissa, shift))
    assert torch.allclose(decode(y) / root.double(), values / values.square().mean(-1, keepdim=True).sqrt(), atol=0.03)


def test_residual_keeps_the_small_beside_the_large() -> None:
    stream = Dyadic(torch.tensor([[5, -3, 1 << 20]], dtype=torch.int32), column(1), column(10))
    delta = Dyadic(torch.tensor([[7, 1, -9]]), column(3), column(20))
    total, bits = dyadic.add_residual(stream, column(21), delta)
    assert torch.allclose(decode(total), decode(stream) + decode(delta), atol=1e-6)
    assert int(total.data.abs().max()) < 1 << 30 and bits.item() == int(total.data.abs().max()).bit_length()
    large = Dyadic(torch.tensor([[1 << 45, 5, -(1 << 44)]]), column(200), column(-3))
    total, _ = dyadic.add_residual(total, bits, large)
    assert torch.allclose(decode(total), decode(large), rtol=1e-6, atol=float(decode(large).max()) * 2e-9)


# -- rotary embedding and attention ----------------------------------------------------------------------------------
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation(interleaved: bool) -> None:
    angle = torch.rand(4, 1, 3) * 6
    x = torch.randint(-(1 << 15) + 1, 1 << 15, (4, 2, 8)).to(torch.int32)
    cos, sin = ((f(angle) * (1 << 14)).round().to(torch.int32) for f in (torch.cos, torch.sin))
    y = dyadic.rotate(x, cos, sin, interleaved=interleaved)
    first, second = (x[..., 0:6:2], x[..., 1:6:2]) if interleaved else (x[..., :3], x[..., 3:6])
    a, b = first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()
    exact = torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)
    assert (y[..., :6] - exact).abs().max() < 4 and torch.equal(y[..., 6:], x[..., 6:])


@pytest.mark.parametrize("out", [8, 12, 16])
def test_attention_in_chunks_with_padding(out: int, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(-127, 128, shape, generator=g).to(torch.int8)

    query = Dyadic(draw(2, 6, 4, 16), torch.randint(128, 256, (2, 6, 4, 1), generator=g), torch.full((2, 6, 4, 1), 20))
    keys, values = draw(2, 2, 9, 16), draw(2, 2, 9, 16)
    padding = torch.ones(2, 9, dtype=torch.bool)
    padding[1, :2] = False
    whole = dyadic.attend(query, keys, values, 3, padding, out_bits=out)
    monkeypatch.setattr(dyadic, "CHUNK", 1)
    assert torch.equal(dyadic.attend(query, keys, values, 3, padding, out_bits=out), whole)
    one = dyadic.attend(Dyadic(query.data[:1], query.mantissa[:1], query.shift[:1]), keys[:1], values[:1], 3,
                        out_bits=out)
    assert torch.equal(one, whole[:1])
    wide = [t.repeat_interleave(2, 1).double() for t in (keys, values)]
    scores = decode(query).transpose(1, 2) @ wide[0].transpose(-1, -2)
    hidden = torch.ones(6, 9, dtype=torch.bool).triu(4)[None, None] | ~padding[:, None, None]
    exact = scores.masked_fill(hidden, -math.inf).softmax(-1) @ wide[1]
    assert (whole.transpose(1, 2).double() / 2 ** (out - 1) - exact).abs().mean() < 4
