"""Parts of a denoiser that are told the noise level of a call."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hfq.errors import CheckpointError, QuantizationError
from hfq.layers import times
from hfq.layers.times import NoiseLevels


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []
        self.fails = False

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        if self.fails:
            raise RuntimeError("stopped")
        levels = times.of(self)
        assert levels is not None
        self.seen.append(levels.index())
        return sample


def model() -> Denoiser:
    made = Denoiser()
    times.install(made, NoiseLevels([900, 500, 100]))
    return made


def test_the_nearest_level_serves_any_timestep() -> None:
    net, x = model(), torch.zeros(2)
    for given in (999, torch.tensor(701), torch.tensor([699.0, 699.0]), 0, -5, 1e9, 500):
        net(x, given)
    net(x, timestep=torch.tensor(120))
    assert net.seen == [0, 0, 1, 2, 2, 0, 1, 2]


def test_a_level_holds_until_the_next_one_is_reached() -> None:
    levels = NoiseLevels([900, 500, 100], "above")
    given = [999, 900, 899, 501, 500, 499, 101, 100, 99, 0, -5]
    assert [levels.of(t) for t in given] == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    net = Denoiser()
    times.install(net, levels)
    net(torch.zeros(2), 501)
    assert net.seen == [0]
    entry = times.describe(net)["noise_levels"]
    again = times.from_manifest(Denoiser(), entry)
    assert (again.levels, again.rule) == (levels.levels, "above") and times.from_manifest(net, entry) is levels
    with pytest.raises(CheckpointError, match="others than"):
        times.from_manifest(net, [900, 500, 100])
    for wrong in ({**entry, "rule": "x"}, {**entry, "levels": 3}, {"levels": [1.0]}, "above"):
        with pytest.raises(CheckpointError, match="noise levels"):
            times.from_manifest(Denoiser(), wrong)


def test_what_is_no_single_timestep() -> None:
    net, x = model(), torch.zeros(2)
    for wrong, text in ((torch.tensor([3.0, 4.0]), "different timesteps"), (float("nan"), "finite"), ("a", "finite")):
        with pytest.raises(QuantizationError, match=text):
            net(x, wrong)
    with pytest.raises(QuantizationError, match="without a timestep"):
        net(x)
    with pytest.raises(QuantizationError, match="takes no timestep"):
        times.install(nn.Linear(2, 2), NoiseLevels([1.0]))
    with pytest.raises(QuantizationError, match="already"):
        times.install(net, NoiseLevels([1.0]))


def test_nothing_is_left_of_a_call() -> None:
    net = model()
    net.fails = True
    with pytest.raises(RuntimeError, match="stopped"):
        net(torch.zeros(1), 5)
    with pytest.raises(QuantizationError, match="outside of its model"):
        NoiseLevels([1.0, 2.0]).index()
    with times.at(1.9):
        assert NoiseLevels([1.0, 2.0]).index() == 1
    assert NoiseLevels([7.0]).index() == 0


def test_copies_and_removal() -> None:
    net = copy.deepcopy(model())
    net(torch.zeros(1), 90)
    assert net.seen == [2] and times.describe(net) == {"noise_levels": [900.0, 500.0, 100.0]}
    times.remove(net)
    times.remove(net)
    assert times.of(net) is None and not net._forward_hooks and not net._forward_pre_hooks and not times.describe(net)


class Part(times.Follower, nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.told: list[float] = []

    def follow(self, timestep: float) -> None:
        self.told.append(timestep)


def test_parts_are_told_by_the_hooks_that_levels_use() -> None:
    net = Denoiser()
    net.part = Part()
    times.listen(net)
    times.install(net, NoiseLevels([900, 500]))
    times.listen(net)
    other = copy.deepcopy(net)
    net(torch.zeros(1), 700.5)
    assert len(net._forward_pre_hooks) == len(net._forward_hooks) == 1
    assert net.part.told == [700.5] and other.part.told == [] and net.seen == [0]


def test_manifests() -> None:
    net = Denoiser()
    assert times.from_manifest(net, [5, 2.5]).levels == (5.0, 2.5) and times.of(net) is None
    for wrong in ("5", [], [True], [float("inf")], {"levels": [1]}):
        with pytest.raises(CheckpointError, match="noise levels"):
            times.from_manifest(net, wrong)
    with pytest.raises(CheckpointError, match="takes no timestep"):
        times.from_manifest(nn.Linear(2, 2), [1.0])
    other = model()
    assert times.from_manifest(other, [900, 500, 100]) is times.of(other)
    with pytest.raises(CheckpointError, match="others"):
        times.from_manifest(other, [900, 500])
