"""Learned tables of inputs in groups, beside those of one range a tensor."""

from __future__ import annotations

import pytest
import torch

from hfq.errors import QuantizationError
from hfq.formats import ActivationSpec
from hfq.layers import times
from hfq.layers.times import NoiseLevels
from hfq.rounding.level_steps import LearnedLevels

SPEC = ActivationSpec(4, granularity="tensor", dynamic=False)
LEVELS = NoiseLevels([9.0, 1.0])


def table(**more) -> LearnedLevels:
    start = {"plain": (torch.tensor([0.5]), torch.tensor([3.0])),
             "groups": (torch.arange(1.0, 7.0).reshape(2, 3), torch.tensor([[-40.0, 2.0, 30.0]])),
             "shared": (torch.ones(1, 2), torch.zeros(1, 2))}  # fmt: skip
    return LearnedLevels(dict.fromkeys(start, SPEC), start, LEVELS, **{"learn_zero": False, **more})


def test_every_group_has_its_step_at_every_level():
    made = table()
    scale, zero = made.params("groups")
    assert torch.equal(scale, torch.arange(1.0, 7.0).reshape(2, 3)) and zero.tolist() == [[-40, 2, 30]] * 2
    assert made.params("plain")[0].tolist() == [0.5, 0.5] and made.params("shared")[0].shape == (2, 2)
    with times.at(1.0):
        assert made.at("groups")[0].tolist() == [4, 5, 6] and made.at("plain")[0].shape == (1,)
        (made.at("groups")[0] * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert made.scale[0].grad is None and made.scale[1].grad.tolist() == [0, 1, 2, 3, 0, 0]
    assert not any(p.requires_grad for p in made.zero_point)


def test_zero_points_that_learn_stay_on_the_grid():
    assert table(learn_zero=True).params("groups")[1].tolist() == [[0, 2, 15]] * 2


def test_another_number_of_levels():
    with pytest.raises(QuantizationError, match="3 ranges for 2"):
        LearnedLevels({"x": SPEC}, {"x": (torch.ones(3, 2), torch.ones(3, 2))}, LEVELS)
