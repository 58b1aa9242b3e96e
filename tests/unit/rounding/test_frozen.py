"""Weights that are tuned behind learned rounding."""

from __future__ import annotations

import pytest
import torch

from hfq.errors import ConfigError
from hfq.formats import Codes, QuantSpec, affine
from hfq.rounding.frozen import STARTS, FrozenRounding
from hfq.rounding.lowrank import GatedRounding


def learned(spec: QuantSpec, shape=(6, 4, 3, 3), seed: int = 0) -> tuple[torch.Tensor, GatedRounding]:
    """A weight and gates of it that were learned at random, on a grid that clips."""
    torch.manual_seed(seed)
    weight = torch.randn(shape)
    scale, zero = affine.fit(weight.flatten(1), spec)
    grid = (scale.float() * 0.7).to(scale.dtype), zero
    gates = GatedRounding(weight, spec, rank=None, learn_scale=False, grid=grid)
    with torch.no_grad():
        gates.full.normal_(0, 4)
    gates.harden()
    return weight, gates


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("spec", [QuantSpec(4, -1), QuantSpec(3, 8), QuantSpec(4, -1, symmetric=True)])
def test_starts_at_the_hard_rounding(spec, start):
    weight, gates = learned(spec)
    tuned = FrozenRounding(weight, gates.codes(), start)
    assert torch.equal(tuned(), gates()) and torch.equal(tuned.codes().codes, gates.codes().codes)
    assert torch.equal(affine.dequantize(tuned.codes()).reshape(weight.shape), tuned())


def test_gradients_pass_the_floor_and_stop_at_the_clamp():
    weight, gates = learned(QuantSpec(4, -1))
    tuned = FrozenRounding(weight, gates.codes())
    (tuned() * 3).sum().backward()
    codes = tuned.latent.detach() / tuned.scale
    codes = codes.floor() + tuned.up + tuned.zero
    inside = (codes >= 0) & (codes <= 15)
    assert 0 < inside.float().mean() < 1
    torch.testing.assert_close(tuned.latent.grad, 3 * inside.float())


def test_codes_follow_the_weight_over_a_grid_line():
    spec = QuantSpec(4, -1)
    codes = Codes(torch.tensor([[3, 9]], dtype=torch.uint8), torch.ones(1, 1).half(),
                  torch.tensor([[5]], dtype=torch.uint8), spec)  # fmt: skip
    tuned = FrozenRounding(torch.tensor([[-2.6, 4.4]]), codes)  # up: 1 and 0
    with torch.no_grad():
        tuned.latent.add_(torch.tensor([[0.55, 0.55]]))
    assert tuned.codes().codes.tolist() == [[3, 9]]
    with torch.no_grad():
        tuned.latent.add_(0.06)
    assert tuned.codes().codes.tolist() == [[4, 10]]
    assert tuned().tolist() == [[-1.0, 5.0]]


def test_codes_of_another_weight_are_refused():
    weight, gates = learned(QuantSpec(4, -1))
    with pytest.raises(ConfigError, match="no neighbours"):
        FrozenRounding(weight.flip(0), gates.codes())
    with pytest.raises(ConfigError, match="start"):
        FrozenRounding(weight, gates.codes(), "elsewhere")
