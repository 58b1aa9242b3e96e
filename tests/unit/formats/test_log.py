"""Logarithmic codes: the identity of shifts, bounds, zero, planes of integers, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfq.errors import ConfigError, QuantizationError
from hfq.formats import log
from hfq.formats.log import LogSpec

SPECS = [LogSpec(b, base, zero) for b in (2, 3, 4, 6, 8) for base in ("2", "sqrt2") for zero in ("reserve", "none")]
SPECS += [LogSpec(4, "sqrt2", "repo"), LogSpec(4, "2", "repo")]
NAMES = [f"{s.bits}-{s.base}-{s.zero}" for s in SPECS]


def softmax_like(seed: int = 0, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(3 * torch.randn(*(shape or (4, 33)), generator=generator), -1)


def test_shifts_and_powers_agree() -> None:
    spec = LogSpec(8, "sqrt2", "none")
    for q, value in enumerate(log.table(spec, torch.float64).tolist()):
        shifted = 2.0 ** -math.ceil(q / 2) * (1 + (math.sqrt(2) - 1) * (q % 2))
        assert abs(value - shifted) <= 1e-12 * value


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_codes_fit_decode_and_do_not_move_again(spec: LogSpec) -> None:
    x = softmax_like()
    codes = log.encode(x, x.max(), spec)
    assert codes.dtype == torch.uint8 and int(codes.max()) <= spec.max_code
    assert spec.storable == (int(spec.max_code) < 2**spec.bits) == (spec.zero != "repo")
    found = log.decode(codes, x.max(), spec)
    assert torch.equal(log.encode(found, x.max(), spec), codes)
    assert torch.allclose(log.fake(x, x.max(), spec), found, rtol=1e-6, atol=0)


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_error_and_order(spec: LogSpec) -> None:
    smallest = 2.0 ** (-spec.last / spec.steps)
    x = torch.linspace(0, 1, 4001, dtype=torch.float64)
    found = log.decode(log.encode(x, 1.0, spec), 1.0, spec, torch.float64)
    assert bool((found.diff() >= 0).all())
    inside = x >= smallest * 2 ** (-0.5 / spec.steps) * (1 + 1e-9)
    bound = 2 ** (1 / (2 * spec.steps)) - 1
    assert float(((found - x).abs() / x)[inside].max()) <= bound + 1e-9
    assert float(found[0]) == pytest.approx(smallest if spec.zero == "none" else 0.0, rel=1e-12, abs=0)


def test_half_of_the_smallest_magnitude_is_where_zero_begins() -> None:
    spec = LogSpec(4, "sqrt2", "reserve")
    smallest = 2.0 ** (-14 / 2)
    below, above = (log.encode(torch.tensor([f * smallest]), 1.0, spec) for f in (0.499, 0.501))
    assert int(below) == 15 == spec.zero_code and int(above) == 14


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_planes_add_up_to_the_codes(spec: LogSpec) -> None:
    codes = torch.arange(spec.max_code + 1, dtype=torch.uint8)
    found = sum(plane.of(codes).double() * plane.factor for plane in log.planes(spec))
    wanted = log.table(spec, torch.float64)
    assert torch.allclose(found, wanted, rtol=1e-15, atol=0)  # type: ignore[arg-type]
    used = torch.stack([plane.of(codes) > 0 for plane in log.planes(spec)]).sum(0)
    assert int(used.max()) == 1  # a code belongs to one sum


def test_four_bits_of_the_finer_base_are_two_sums() -> None:
    assert [len(log.planes(LogSpec(b, base))) for b, base in ((4, "sqrt2"), (4, "2"), (3, "sqrt2"))] == [2, 2, 2]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40), st.sampled_from(SPECS), st.floats(0.05, 4))
def test_nearest_in_the_logarithm(values: list[float], spec: LogSpec, scale: float) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    codes = log.encode(x, scale, spec)
    levels = log.table(spec, torch.float64)[: spec.last + 1] * scale
    for v, q in zip(x.tolist(), codes.tolist(), strict=True):
        if q == spec.zero_code:
            assert v <= levels[-1]
        elif v > 0:
            best = (levels.log2() - math.log2(v)).abs().min()
            mine = abs(math.log2(float(levels[q])) - math.log2(v))
            assert mine <= float(best) + 1e-9 or v < levels[-1]


def test_gradients_are_those_of_the_power_and_stop_at_the_ends() -> None:
    spec = LogSpec(3, "sqrt2", "reserve")
    x = torch.tensor([0.0, 1e-4, 0.4, 0.9, 3.0], requires_grad=True)
    scale = torch.tensor(1.0, requires_grad=True)
    y = log.fake(x, scale, spec)
    y.sum().backward()
    assert x.grad is not None and scale.grad is not None
    assert x.grad[[0, 1, 4]].tolist() == [0, 0, 0]
    assert torch.allclose(x.grad[2:4], (y / x).detach()[2:4], rtol=1e-5)
    # d/ds of s * 2**(-round(-2 log2(x / s)) / 2), straight through: nothing inside, one where clamped.
    assert float(scale.grad) == pytest.approx(float(y.detach()[4]), rel=1e-5)


def test_what_cannot_be() -> None:
    for wrong in ({"bits": 1}, {"bits": 9}, {"base": "e"}, {"zero": "maybe"}, {"bits": 8, "zero": "repo"}):
        with pytest.raises(ConfigError):
            LogSpec(**wrong)
    with pytest.raises(QuantizationError, match="below zero"):
        log.encode(torch.tensor([-0.1]), 1.0, LogSpec())
    spec = LogSpec(3, "2", "none")
    assert LogSpec.from_dict(spec.to_dict()) == spec
    with pytest.raises(ConfigError, match="no logarithmic"):
        LogSpec.from_dict({"form": "twin", "bits": 4})


def test_zero_below_all_magnitudes_of_the_dtype() -> None:
    """Eight bits of base 2 reach 2**-255: zero still has the last code, and no NaN in value or gradient."""
    spec = LogSpec(8, "2", "none")
    x = torch.tensor([0.0, 1e-40, 0.3, 1.0], requires_grad=True)
    assert log.encode(x, 1.0, spec).tolist() == [255, 255, 2, 0]
    value = log.fake(x, torch.tensor(1.0), spec)
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(x.grad).all() and float(x.grad[0]) == 0
