"""Ends of rows and columns of inputs, noise level by noise level."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hfq.calibration import extremes
from hfq.calibration.extremes import Extremes
from hfq.errors import DataError
from hfq.formats import QuantSpec
from hfq.kernels.geometry import Geometry
from hfq.layers import swap
from hfq.reconstruction import grouping
from hfq.reconstruction.grouping import Groups
from hfq.rounding import nearest


def test_rows_and_columns_over_several_calls() -> None:
    ends, parts = Extremes(), [torch.randn(2, 3, 5, 7), torch.randn(4, 3, 5, 7) + 1]
    for x in parts:
        ends.update(x)
    every = torch.cat(parts)
    assert torch.equal(ends.columns[0], every.amin((0, 1, 2))) and torch.equal(ends.columns[1], every.amax((0, 1, 2)))
    assert torch.equal(ends.rows[0], every.amin((0, 1, 3))) and torch.equal(ends.rows[1], every.amax((0, 1, 3)))
    assert ends.whole == (every.amin(), every.amax()) and ends.seen == 6 * 15 and ends.tensor is None


def test_other_numbers_of_rows_leave_columns_alone() -> None:
    ends = Extremes()
    for rows in (5, 6, 5):
        ends.update(torch.randn(2, rows, 7))
    assert ends.ragged and ends.rows is None and len(ends.columns[0]) == 7
    assert grouping.grouping_of(ends, 8, Groups(2), 7).axis == "columns"
    other = Extremes()
    other.update(torch.randn(2, 5, 7))
    other.merge(ends)
    assert other.rows is None and other.seen == 2 * 21
    # Levels of different lengths have no labels of rows in common.
    short, long = Extremes(), Extremes()
    short.update(torch.randn(2, 5, 7) * torch.arange(1, 6)[:, None])
    long.update(torch.randn(2, 6, 7) * torch.arange(1, 7)[:, None])
    levels = grouping.NoiseLevels([9.0, 1.0])
    assert grouping.banks_of({0: short, 1: long}, levels, 8, Groups(2), 7).spec.axes == ("columns", "columns")
    assert grouping.banks_of({0: short, 1: short}, levels, 8, Groups(2), 7).spec.axes == ("rows", "rows")


def test_a_level_that_was_never_seen_takes_the_nearest() -> None:
    one, two = Extremes(), Extremes()
    one.update(torch.tensor([[0.0, 4.0]]))
    two.update(torch.tensor([[0.0, 8.0]]))
    part = grouping.banks_of({0: one, 2: two}, grouping.NoiseLevels([10.0, 7.0, 3.0]), 8, Groups(2), 2)
    assert part.spec.axes == ("tensor",) * 3 and part.scale[:, 0].tolist() == pytest.approx([4 / 255, 4 / 255, 8 / 255])


def test_borders_of_convolutions_count(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry, x = Geometry(3, 4, (3, 3), pads=(1, 1, 1, 1)), torch.rand(2, 3, 5, 6) + 1
    every = F.unfold(x, 3, padding=1)
    for chunk in (1 << 20, 4 * 27 * 6):
        monkeypatch.setattr("hfq.kernels.grouped.CHUNK", chunk)
        ends = Extremes()
        ends.unfold(x, geometry)
        assert torch.equal(ends.columns[0], every.amin((0, 2))) and torch.equal(ends.rows[1], every.amax((0, 1)))
    assert ends.columns[0][0] == 0 and ends.columns[0][4] > 1 and ends.seen == 2 * 30


def test_what_is_not_finite() -> None:
    with pytest.raises(DataError, match="NaN"):
        Extremes().update(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(DataError, match="NaN"):
        Extremes().unfold(torch.full((1, 3, 4, 4), float("inf")), Geometry(3, 4, (3, 3)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.time = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.Linear(1, 4)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.conv(sample) + self.time(timestep.reshape(1, 1).float())[..., None, None]


def test_calls_by_level() -> None:
    net, calls = Net(), [{"sample": torch.randn(2, 3, 6, 6), "timestep": torch.tensor(t)} for t in (9, 4, 9)]
    for name in ("conv", "time"):
        weight = net.get_submodule(name).weight.detach().flatten(1)
        swap.swap(net, name, nearest.solve(weight, QuantSpec(8, -1)))
    levels = extremes.levels_of(net, calls)
    assert levels.levels == (9.0, 4.0) and len(extremes.levels_of(net, calls, each=False)) == 1
    seen = extremes.observe(net, calls, ["conv", "time"], levels.nearest, attention=False)
    first = torch.cat([calls[0]["sample"], calls[2]["sample"]])
    every = F.unfold(F.pad(first, (1, 1, 1, 1), mode="reflect"), 3)
    assert torch.equal(seen.inputs["conv"][0].columns[1], every.amax((0, 2))) and seen.inputs["conv"][0].seen == 4 * 64
    assert [seen.inputs["time"][i].whole[0].item() for i in (0, 1)] == [9.0, 4.0] and not seen.attentions
    with pytest.raises(DataError, match="without a timestep"):
        extremes.levels_of(net, [{"sample": torch.randn(1, 3, 6, 6)}])
