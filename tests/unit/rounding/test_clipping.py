"""The learned range: exported codes are what was optimised, gradients are the straight-through ones."""

import pytest
import torch

from hfq.errors import ConfigError
from hfq.formats import QuantSpec, affine
from hfq.rounding.clipping import ClippedRounding, round_clamped

SPECS = [
    QuantSpec(2, -1), QuantSpec(3, 12), QuantSpec(4, 0), QuantSpec(4, 16, symmetric=True), QuantSpec(8, -1),
    QuantSpec(1, 8), QuantSpec(3, -1, scale_dtype="float32"), QuantSpec(2, -1, symmetric=True, scale_dtype="bfloat16"),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_codes_decode_to_the_forward_pass(spec):
    weight = torch.randn(24, 40)
    rounding = ClippedRounding(weight, spec)
    with torch.no_grad():
        rounding.upper.add_(torch.randn_like(rounding.upper) * 3)
        rounding.lower.add_(torch.randn_like(rounding.lower) * 3)
    for other in (None, torch.randn(24, 40) * 3):
        assert torch.equal(affine.dequantize(rounding.codes(other)), rounding(other))
    assert rounding.upper.shape == spec.parameter_shape(24, 40)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_without_learning_it_is_round_to_nearest(spec):
    weight = torch.randn(24, 40)
    rounding = ClippedRounding(weight, spec, learn=False)
    ours, plain = rounding.codes(), affine.quantize(weight, spec)
    assert torch.equal(ours.codes, plain.codes) and torch.equal(ours.scale, plain.scale)
    assert not list(rounding.parameters())


def test_the_range_is_what_the_factors_say():
    weight = torch.tensor([[-1.0, 2.0, 0.5, 0.0]])
    rounding = ClippedRounding(weight, QuantSpec(8, -1, scale_dtype="float32"), init=0.0)
    codes = rounding.codes()
    assert codes.scale.item() == pytest.approx(1.5 / 255) and codes.zero_point.item() == 85
    assert rounding().max().item() == pytest.approx(1.0, abs=0.01)
    assert rounding().min().item() == pytest.approx(-0.5, abs=0.01)


def test_gradients_reach_the_factors_and_the_weight():
    weight = torch.randn(16, 32, requires_grad=True)
    rounding = ClippedRounding(weight, QuantSpec(3, -1), init=1.0)
    (rounding(weight) * torch.randn(16, 32)).sum().backward()
    assert rounding.upper.grad.abs().min() > 0 and rounding.lower.grad.abs().min() > 0
    # Clamped elements pass nothing on; the extremes of a row set its range and do.
    q = rounding.codes(weight).codes
    inside = (q > 0) & (q < 7)
    assert (weight.grad[inside] != 0).all()
    clamped = ~inside & (weight.detach() != weight.detach().amax(1, keepdim=True))
    clamped &= weight.detach() != weight.detach().amin(1, keepdim=True)
    assert (weight.grad[clamped] == 0).any()


def test_round_clamped_has_the_straight_through_gradient():
    w = torch.tensor([-9.0, -0.4, 0.3, 1.2, 9.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    round_clamped(w, scale, torch.tensor(-2.0), torch.tensor(5.0)).sum().backward()
    assert w.grad.tolist() == [0, 1, 1, 1, 0]
    q = torch.tensor([-2.0, -1, 1, 2, 5])
    assert scale.grad.item() == pytest.approx(float((q - torch.tensor([0, -0.8, 0.6, 2.4, 0])).sum()))


def test_learning_the_range_beats_the_largest_weight():
    weight = torch.randn(32, 64)
    weight[:, 0] = 8.0
    rounding = ClippedRounding(weight, QuantSpec(2, -1))
    start = (rounding() - weight).square().mean().item()
    adam = torch.optim.AdamW(rounding.parameters(), lr=0.1, weight_decay=0)
    inputs = torch.randn(256, 64) * torch.cat((torch.tensor([0.01]), torch.ones(63)))
    first = None
    for _ in range(60):
        loss = (inputs @ (rounding() - weight).t()).square().mean()
        first = first or loss.item()
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert loss.item() < 0.7 * first and start > 0


@pytest.mark.parametrize("weight", [torch.zeros(3, 8), torch.full((3, 8), 0.7), torch.full((3, 8), -1e-12)])
def test_degenerate_rows_stay_finite(weight):
    rounding = ClippedRounding(weight, QuantSpec(4, -1))
    out = rounding()
    out.sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(rounding.upper.grad).all()
    codes = rounding.codes()
    assert torch.isfinite(codes.scale).all() and (codes.zero_point <= 15).all()
    assert (out - weight).abs().max() <= 0.03 * weight.abs().max() + 1e-4


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="zero_point"):
        ClippedRounding(torch.randn(4, 8), QuantSpec(4, -1, zero_point="float"))
    with pytest.raises(ConfigError, match="matrix"):
        ClippedRounding(torch.randn(4), QuantSpec(4))
