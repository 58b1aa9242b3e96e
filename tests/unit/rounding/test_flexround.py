"""Rounding through division: start, gradients, export."""

from __future__ import annotations

import pytest
import torch

from hfq.errors import ConfigError
from hfq.formats import PER_TENSOR, QuantSpec, affine
from hfq.rounding import nearest
from hfq.rounding.flexround import DivisorRounding, initial_grid


def weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SPECS = [
    QuantSpec(bits, group, symmetric, scale_dtype=dtype)
    for bits, group, symmetric, dtype in [
        (4, -1, False, "float16"), (3, 16, False, "float16"), (2, 0, True, "float16"), (4, 16, True, "bfloat16"),
        (8, -1, False, "float32"), (3, 24, True, "float32"), (1, 16, False, "float16"),
    ]
]  # fmt: skip


def stirred(spec: QuantSpec, amount: float, *shape: int, rank: int | None = None) -> DivisorRounding:
    """A quantizer whose parameters have moved at random."""
    q = DivisorRounding(weight(*shape), spec, rank=rank, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in q.parameters():
            p += amount * torch.randn(p.shape, generator=generator)
    return q


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_start_is_round_to_nearest_on_the_initial_grid(spec: QuantSpec, rank: int | None) -> None:
    w = weight(10, 40)
    q = DivisorRounding(w, spec, rank=rank)
    scale, zero = initial_grid(w, spec)
    expected = affine.decode(affine.encode(w, scale, zero, spec), scale, zero, spec)
    assert torch.equal(q(), expected)
    assert not q.shifts().any()


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_codes_reproduce_the_output_bit_by_bit(spec: QuantSpec, rank: int | None) -> None:
    q = stirred(spec, 0.3, 10, 40, rank=rank)
    codes = q.codes()
    assert torch.equal(affine.dequantize(codes), q())
    assert codes.scale.dtype == spec.torch_scale_dtype
    assert codes.codes.dtype == torch.uint8 and int(codes.codes.max()) <= spec.max_code
    assert q.shifts().any()


@pytest.mark.parametrize(
    "spec", [QuantSpec(3), QuantSpec(3, 16, True), QuantSpec(3, 0, scale_dtype="float32")], ids=str
)
def test_gradients_are_those_of_the_formulas(spec: QuantSpec) -> None:
    q = stirred(spec, 0.3, 10, 40)
    with torch.no_grad():
        q.matrix[0, :5] = 0
        q.log_scale -= 0.5  # a grid so narrow that weights are cut off
    upstream = weight(10, 40, seed=5)
    q().backward(upstream)
    with torch.no_grad():
        s1 = affine.expand(q.scale(), 40, spec)
        divisor = s1 * q.log_divisors().exp()
        low = affine.expand(q.low, 40, spec)
        rounded = (q.matrix / divisor).round()
        code = torch.maximum(torch.minimum(rounded, low + spec.max_code), low)
        inside = code == rounded
        assert 0.02 < float((~inside).float().mean()) < 0.9, "the case has to have both kinds"
        by_log = torch.where(inside, -s1 * q.matrix / divisor, torch.zeros(())) * upstream
        by_scale = torch.where(inside, s1 * (code - q.matrix / divisor), s1 * code) * upstream
    torch.testing.assert_close(q.log_divisor.grad, by_log)
    torch.testing.assert_close(q.log_row.grad, by_log.sum(1, keepdim=True))
    assert not q.log_divisor.grad[~inside].any()
    assert not q.log_divisor.grad[0, :5].any()
    grouped = affine.grouped(by_scale, spec).sum(-1)
    expected = grouped.sum().reshape(1, 1) if spec.group_size == PER_TENSOR else grouped
    # The stored scale differs from exp(log) by its rounding, which is straight-through.
    torch.testing.assert_close(q.log_scale.grad, expected, rtol=2e-3, atol=1e-3)


def test_descent_lowers_a_loss() -> None:
    w = weight(16, 32)
    x = weight(64, 32, seed=3) @ (weight(32, 32, seed=4) * torch.arange(1, 33) ** -1.0)
    q = DivisorRounding(w, QuantSpec(3))
    adam = torch.optim.Adam(q.parameters(), lr=1e-2)
    curve = []
    for _ in range(100):
        adam.zero_grad()
        loss = ((q() - w) @ x.T).square().mean()
        loss.backward()
        adam.step()
        curve.append(float(loss.detach()))
    assert curve[-1] < 0.7 * curve[0]


def test_convolution_shapes_and_depthwise() -> None:
    q = DivisorRounding(weight(8, 4, 3, 3), QuantSpec(4))
    assert q.log_row.shape == (8, 1, 1, 1) and q.log_input.shape == (1, 4, 1, 1)
    assert q().shape == (8, 4, 3, 3)
    assert torch.equal(affine.dequantize(q.codes()).reshape(8, 4, 3, 3), q())
    with torch.no_grad():
        q.log_input[0, 2] = 0.5
    assert (q.log_divisors().reshape(8, 4, 9)[:, 2] == 0.5).all()
    assert DivisorRounding(weight(8, 1, 3, 3), QuantSpec(4)).log_input is None
    assert DivisorRounding(weight(8, 4), QuantSpec(4)).log_input is None


def test_zero_row_and_constant_row() -> None:
    w = torch.stack([torch.zeros(32), torch.full((32,), 0.5), weight(32)])
    for spec in (QuantSpec(4), QuantSpec(4, symmetric=True), QuantSpec(4, 16)):
        q = DivisorRounding(w, spec)
        assert torch.isfinite(q.scale()).all() and (q.scale() >= 1e-8).all()
        assert not q()[0].any()
        torch.testing.assert_close(q()[1], w[1], rtol=0.08, atol=0)
        q().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in q.parameters() if p.grad is not None)


def test_low_rank_form_reaches_any_divisor() -> None:
    target = weight(6, 9, seed=7)
    q = DivisorRounding(weight(6, 9), QuantSpec(4), rank=6)
    with torch.no_grad():
        u, s, vh = torch.linalg.svd(target, full_matrices=False)
        q.log_left.copy_(u * s)
        q.log_right.copy_(vh)
    torch.testing.assert_close(q.log_divisors(), target, rtol=1e-5, atol=1e-5)
    full = DivisorRounding(weight(6, 9), QuantSpec(4))
    with torch.no_grad():
        full.log_divisor.copy_(q.log_divisors())
    assert torch.equal(full(), q())


def test_options() -> None:
    w = weight(8, 32)
    fixed = DivisorRounding(w, QuantSpec(3), learn_scale=False, row_factor=False)
    assert fixed.log_row is None and not fixed.log_scale.requires_grad
    searched = DivisorRounding(w, QuantSpec(3), grid=nearest.grid_of(w, QuantSpec(3), clip="mse"))
    assert not torch.equal(searched(), DivisorRounding(w, QuantSpec(3))())
    clipped = initial_grid(w, QuantSpec(3), clipping=True)
    assert torch.equal(clipped[0], nearest.grid_of(w, QuantSpec(3), clip="mse2d", max_shrink=0.99)[0])
    assert DivisorRounding(w, QuantSpec(3)).clamped_share() == 0
    half = nearest.grid_of(w / 2, QuantSpec(3))
    assert DivisorRounding(w, QuantSpec(3), grid=half).clamped_share() > 0.02


def test_symmetric_grid_uses_the_wider_range() -> None:
    w = torch.tensor([[-1.0, 0.25, 1.0]])
    assert float(initial_grid(w, QuantSpec(2, symmetric=True, scale_dtype="float32"))[0]) == pytest.approx(2 / 3)


def test_impossible_options() -> None:
    with pytest.raises(ConfigError, match="zero_point"):
        DivisorRounding(weight(4, 8), QuantSpec(4, zero_point="float"))
    with pytest.raises(ConfigError, match="rank"):
        DivisorRounding(weight(4, 8), QuantSpec(4), rank=0)
    with pytest.raises(ConfigError, match="does not fit"):
        DivisorRounding(weight(4, 8), QuantSpec(4), grid=(torch.ones(1, 1), None))


@pytest.mark.parametrize("symmetric", [False, True])
def test_tiny_weights_on_float32_scales(symmetric: bool) -> None:
    """Scales of float32 go far below the smallest float16: a scaled weight gives the scaled result."""
    weight, spec = torch.randn(8, 64), QuantSpec(4, 32, symmetric, scale_dtype="float32")
    plain, small = DivisorRounding(weight, spec), DivisorRounding(weight * 2.0**-24, spec)
    assert torch.equal(plain(), small() * 2.0**24)
