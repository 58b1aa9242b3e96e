"""Learned steps and ranges: what is simulated is what is stored, and gradients are those of the definition."""

from __future__ import annotations

import pytest
import torch

from hfq.errors import ConfigError
from hfq.formats import ActivationSpec, QuantSpec, activation, affine
from hfq.rounding.learned_step import LearnedRange, LearnedStep, RangedWeight

GRID = ActivationSpec(4, False, "tensor", dynamic=False)


def test_a_step_is_learned_and_its_zero_point_is_not() -> None:
    step = LearnedStep(GRID, (torch.tensor([0.2]), torch.tensor([3.0])))
    assert [name for name, _ in step.named_parameters()] == ["scale"]
    x = torch.linspace(-2, 4, 50)
    activation.fake(x, GRID, step()).sum().backward()
    codes = (x / 0.2).round().clamp(-3, 12)
    inside = codes == (x / 0.2).round()
    want = torch.where(inside, codes - x / 0.2, codes).sum()
    torch.testing.assert_close(step.scale.grad, want[None], rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        step.scale.fill_(-1.0)  # an optimiser may go too far
    assert float(step.params()[0]) == pytest.approx(1e-6) and float(step.params()[1]) == 3


def test_a_range_moves_step_and_zero_point() -> None:
    grid = LearnedRange(GRID, (torch.tensor([0.2]), torch.tensor([3.0])))
    scale, zero = grid.params()
    assert float(scale) == pytest.approx(0.2) and float(zero) == 3
    x = torch.randn(2000)
    before = float((activation.fake(x, GRID, grid.params()) - x).square().mean())
    adam = torch.optim.Adam(grid.parameters(), lr=1e-2)
    for _ in range(300):
        adam.zero_grad()
        (activation.fake(x, GRID, grid()) - x).square().mean().backward()
        adam.step()
    assert float((activation.fake(x, GRID, grid.params()) - x).square().mean()) < 0.2 * before
    assert float(grid.params()[1]) != 3
    for reach, low in ((-1.0, 0.0), (1e9, 0.0), (1.0, 5.0), (1.0, -50.0)):
        with torch.no_grad():
            grid.reach.fill_(reach)
            grid.low.fill_(low)
        params = grid.params()
        activation.check_parameters(params, GRID)
        assert float(activation.fake(torch.zeros(1), GRID, params)) == 0 and float(params[0]) * 15 >= 1e-6 * (1 - 1e-6)


@pytest.mark.parametrize("spec", [QuantSpec(4), QuantSpec(3, 8), QuantSpec(4, symmetric=True), QuantSpec(2, 0)])
@pytest.mark.parametrize("shape", [(6, 20), (6, 5, 2, 2)])
def test_codes_are_what_is_simulated(spec: QuantSpec, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    weight[2] = 0
    ranged = RangedWeight(weight, spec)
    plain = affine.quantize(weight.flatten(1), spec)
    assert torch.equal(ranged.codes().codes, plain.codes)
    with torch.no_grad():
        for p in ranged.parameters():
            p.add_(0.1 * p.abs().mean() * torch.randn_like(p))
    assert torch.equal(ranged().detach().flatten(1), affine.dequantize(ranged.codes()))
    ranged().square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in ranged.parameters())
    with pytest.raises(ConfigError):
        RangedWeight(weight, QuantSpec(4, zero_point="float"))
