"""Dyadic numbers: every rule against Python integers, which know no overflow and no rounding mode of a library."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfq.errors import QuantizationError
from hfq.formats import dyadic

WIDE = st.integers(-(2**50), 2**50)


def t(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)



@given(WIDE, st.integers(1, 2**40))
def test_divisions(a: int, b: int) -> None:
    assert dyadic.floor_div(t(a), t(b)).item() == a // b
    wanted = (2 * abs(a) + b) // (2 * b) * (1 if a >= 0 else -1)
    assert dyadic.round_div(t(a), t(b)).item() == wanted == dyadic.round_div(t(a), b).item()
    if a >= 0:
        assert dyadic.round_div_positive(t(a), t(b)).item() == wanted


@given(WIDE, st.integers(0, 62))
def test_shifts(a: int, k: int) -> None:
    wanted = math.floor(Fraction(a, 2**k) + Fraction(1, 2)) if k else a
    assert dyadic.rshift_round(t(a), k).item() == wanted == dyadic.rshift_round(t(a), t(k)).item()
    assert dyadic.shifted(t(a), t(k)).item() == wanted == dyadic.shifted(t(a), k).item()
    small = a >> 40
    assert dyadic.shifted(t(small), t(-min(k, 40))).item() == small << min(k, 40)


@pytest.mark.must_hold("i_llm", 5)
@given(st.integers(0, 2**62 - 1))
def test_integer_root(n: int) -> None:
    assert dyadic.isqrt(t(n)).item() == math.isqrt(n)


@pytest.mark.must_hold("i_llm", 5)
def test_integer_root_at_the_squares() -> None:
    roots = torch.cat([torch.arange(0, 5000), torch.randint(1, 2**31 - 1, (20000,)), torch.tensor([2**31 - 1])])
    for n in (roots * roots, (roots * roots - 1).clamp_min(0), roots * roots + 2 * roots):
        n = n[n < 2**62]
        found = dyadic.isqrt(n)
        assert (found * found <= n).all() and ((found + 1) * (found + 1) > n).all()


@given(st.integers(0, 2**62 - 1))
def test_bit_length(n: int) -> None:
    assert dyadic.bit_length(t(n)).item() == n.bit_length()


@settings(max_examples=300)
@given(st.integers(1, 2**60), st.integers(1, 2**40 - 1), st.integers(-20, 60), st.sampled_from([8, 16]))
def test_ratio(n: int, d: int, k: int, bits: int) -> None:
    mantissa, shift = (x.item() for x in dyadic.from_ratio(t(n), t(d), t(k), bits))
    assert 2 ** (bits - 1) <= mantissa <= 2**bits - 1
    exact, found = Fraction(n, d) / Fraction(2) ** k, Fraction(mantissa) / Fraction(2) ** shift
    assert abs(found / exact - 1) <= Fraction(9, 16 * 2 ** (bits - 1))


@given(st.floats(1e-12, 1e9), st.sampled_from([8, 15, 16]))
def test_fit(scale: float, bits: int) -> None:
    mantissa, shift = dyadic.fit(scale, bits)
    assert 2 ** (bits - 1) <= mantissa <= 2**bits - 1 and abs(mantissa / 2**shift / scale - 1) <= 2.0**-bits * 1.01


def test_shared_shift() -> None:
    values = torch.tensor([0.5, -0.001, 3.0, 0.0])
    mantissa, shift = dyadic.fit_shared(values)
    assert 2**14 <= mantissa.abs().max() < 2**15 and mantissa[3] == 0
    assert ((mantissa / 2.0**shift - values).abs() <= 0.5 / 2**shift).all()
    for wrong in (torch.zeros(3), torch.tensor([1.0, float("nan")]), torch.tensor([float("inf")])):
        with pytest.raises(QuantizationError, match="no dyadic scale"):
            dyadic.fit_shared(wrong)


def test_saturation_and_decoding() -> None:
    assert dyadic.saturate(t(-300, 5, 300), 8).tolist() == [-127, 5, 127]
    assert dyadic.saturate(t(-3, 5, 300), 8, signed=False).tolist() == [0, 5, 255]
    number = dyadic.Dyadic(t(7, 255).to(torch.uint8), t(192), t(8), t(7))
    assert dyadic.decode(number).tolist() == [0.0, 248 * 0.75] and number.centred().tolist() == [0, 248]
