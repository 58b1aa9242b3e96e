from __future__ import annotations

import pytest
import torch

from hfq.errors import QuantizationError
from hfq.formats import QuantSpec, affine


def round_trip(w, spec):
    codes = affine.quantize(w, spec)
    return codes, affine.dequantize(codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_symmetric_scale_reaches_the_largest_element(bits):
    w = torch.tensor([[-3.0, 1.0, 0.25, 2.0]])
    spec = QuantSpec(bits, symmetric=True, scale_dtype="float32")
    codes, back = round_trip(w, spec)
    assert codes.zero_point is None
    assert codes.scale.item() == pytest.approx(3 / (2 ** (bits - 1) - 1))
    assert back[0, 0].item() == pytest.approx(-3.0, rel=1e-6)


def test_one_bit_symmetric_is_the_definition():
    codes, back = round_trip(torch.tensor([[-2.0, 1.5]]), QuantSpec(1, symmetric=True))
    assert codes.scale.item() == 2 and set(back.flatten().tolist()) <= {-2.0, 0.0}


@pytest.mark.parametrize("value", [0.0, 0.75, -0.75])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_constant_groups(value, symmetric, bits):
    w = torch.full((2, 8), value)
    codes, back = round_trip(w, QuantSpec(bits, 4, symmetric=symmetric))
    assert torch.allclose(back, w, rtol=2**-10, atol=0)
    if value == 0:
        assert (codes.scale == 1).all() and (back == 0).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("zero_point", ["int", "float"])
def test_one_sided_ranges_contain_zero(sign, zero_point):
    w = sign * torch.linspace(1, 2, 16)[None]
    codes, back = round_trip(w, QuantSpec(4, zero_point=zero_point, scale_dtype="float32"))
    assert codes.scale.item() == pytest.approx(2 / 15)
    assert codes.zero_point.item() == pytest.approx(0 if sign > 0 else 15)
    assert (back - w).abs().max() <= codes.scale.item() / 2 * 1.001


def test_ragged_group_has_its_own_scale():
    w = torch.cat([torch.full((1, 4), 8.0), torch.tensor([[0.1, -0.1]])], 1)
    codes, back = round_trip(w, QuantSpec(4, 4))
    assert codes.scale.shape == (1, 2)
    assert torch.allclose(back[0, 4:], w[0, 4:], rtol=0.07)


def test_per_tensor_has_one_scale():
    w = torch.randn(5, 12)
    codes, back = round_trip(w, QuantSpec(8, 0))
    assert codes.scale.shape == codes.zero_point.shape == (1, 1)
    assert (back - w).abs().max() <= float(codes.scale) * 0.51 + (w.abs().max() * 2**-11)


def test_halves_round_to_even_and_codes_clamp():
    scale, zero = torch.ones(1, 1), torch.full((1, 1), 4, dtype=torch.uint8)
    w = torch.tensor([[0.5, 1.5, -0.5, -1.5, 99.0, -99.0]])
    assert affine.encode(w, scale, zero, QuantSpec(3)).tolist() == [[4, 6, 4, 2, 7, 0]]


def test_a_float_zero_point_shifts_the_grid():
    spec = QuantSpec(2, zero_point="float", scale_dtype="float32")
    scale, zero = torch.ones(1, 1), torch.full((1, 1), 0.5)
    w = torch.tensor([[-0.5, 0.5, 1.5, 2.5]])
    codes = affine.encode(w, scale, zero, spec)
    assert codes.tolist() == [[0, 1, 2, 3]]
    assert torch.equal(affine.decode(codes, scale, zero, spec), w)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(bad):
    w = torch.randn(2, 8)
    w[1, 3] = bad
    with pytest.raises(QuantizationError, match="NaN or infinite"):
        affine.quantize(w, QuantSpec(4))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (4,), (2, 2, 2)])
def test_what_is_no_matrix_is_refused(shape):
    with pytest.raises(QuantizationError, match="matrix"):
        affine.quantize(torch.zeros(shape), QuantSpec(4))


def test_a_scale_that_its_dtype_cannot_hold():
    w = torch.tensor([[1e6, -1e6]])
    with pytest.raises(QuantizationError, match="float32"):
        affine.quantize(w, QuantSpec(1))
    _, back = round_trip(w, QuantSpec(8, scale_dtype="float32"))
    assert torch.allclose(back, w, rtol=1e-2)


@pytest.mark.parametrize(("dtype", "small"), [("float32", 1e-9), ("bfloat16", 1e-9), ("float16", 2e-3)])
def test_small_weights_keep_their_grid(dtype, small):
    """Only float16 scales have a floor near real weights."""
    w = torch.randn(4, 32) * small
    _, back = round_trip(w, QuantSpec(4, scale_dtype=dtype))
    assert (back - w).norm() / w.norm() < 0.15


def test_scales_are_rounded_before_codes_are_computed():
    """With the unrounded scale some codes near the end of the range would differ."""
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(8, scale_dtype="bfloat16")
    codes = affine.quantize(w, spec)
    s, z = codes.scale.double(), codes.zero_point.double()
    assert torch.equal(codes.codes, ((w.double() / s).round() + z).clamp(0, 255).to(torch.uint8))


def test_decode_rounds_once():
    codes = affine.quantize(torch.randn(32, 64), QuantSpec(8, 32))
    exact = affine.decode(codes.codes, codes.scale, codes.zero_point, codes.spec, torch.float64)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(affine.dequantize(codes, dtype), exact.to(dtype))


class TestFake:
    @pytest.mark.parametrize("zero_point", ["int", "float"])
    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_is_decode_of_encode(self, bits, zero_point):
        spec = QuantSpec(bits, 16, zero_point=zero_point)
        w = torch.randn(8, 48)
        codes = affine.quantize(w, spec)
        scale = codes.scale.float() * 0.7  # some codes clamp
        expected = affine.decode(affine.encode(w, scale, codes.zero_point, spec), scale, codes.zero_point, spec)
        assert torch.equal(affine.fake(w, scale, codes.zero_point, spec), expected)

    @pytest.mark.parametrize("zero_point", ["int", "float"])
    def test_gradient_to_the_weight_is_one_inside_and_zero_outside(self, zero_point):
        spec = QuantSpec(3, zero_point=zero_point, scale_dtype="float32")
        scale, zero = torch.ones(1, 1), torch.full((1, 1), 4.0)
        w = torch.tensor([[-9.0, -4.4, -4.0, 0.3, 3.0, 3.4, 9.0]], requires_grad=True)
        affine.fake(w, scale, zero, spec).sum().backward()
        assert w.grad.tolist() == [[0, 1, 1, 1, 1, 1, 0]]

    def test_gradient_to_the_scale(self):
        """The learned-step rule: rounding error inside, the clamped level outside."""
        spec = QuantSpec(3, scale_dtype="float32")
        scale = torch.ones(1, 1, requires_grad=True)
        zero = torch.full((1, 1), 4, dtype=torch.uint8)
        values = torch.tensor([[0.3, -1.4, 9.0, -9.0]])
        out = affine.fake(values, scale, zero, spec)
        for i, expected in enumerate([0.0 - 0.3, -1.0 + 1.4, 3.0, -4.0]):
            (gradient,) = torch.autograd.grad(out[0, i], scale, retain_graph=True)
            assert gradient.item() == pytest.approx(expected, abs=1e-6)

    def test_gradient_to_a_float_zero_point(self):
        """None inside the range; minus one step where the code is clamped."""
        spec = QuantSpec(3, zero_point="float", scale_dtype="float32")
        zero = torch.full((1, 1), 3.5, requires_grad=True)
        out = affine.fake(torch.tensor([[0.3, 9.0]]), torch.full((1, 1), 0.5), zero, spec)
        inside, outside = (torch.autograd.grad(v, zero, retain_graph=True)[0].item() for v in out[0])
        assert inside == pytest.approx(0, abs=1e-7) and outside == pytest.approx(-0.5)

    def test_sixteen_bit_weights_keep_their_dtype(self):
        w = torch.randn(4, 16, dtype=torch.bfloat16)
        scale, zero = affine.fit(w, QuantSpec(4))
        assert affine.fake(w, scale, zero, QuantSpec(4)).dtype == torch.bfloat16
