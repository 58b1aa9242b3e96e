"""Stored ranges from samples: observers, channels, logarithms, two grids; samples of bounded size."""

from __future__ import annotations

import pytest
import torch

from hfq.calibration import ranges
from hfq.calibration.static import RowSample
from hfq.errors import ConfigError, DataError
from hfq.formats import ActivationSpec, activation, log, twin
from hfq.formats.log import LogSpec
from hfq.formats.twin import TwinSpec

GRID = ActivationSpec(4, granularity="tensor", dynamic=False)


def error(x: torch.Tensor, params: activation.Parameters, spec: ActivationSpec = GRID) -> float:
    return float((activation.fake(x, spec, params) - x).square().mean())


def heavy() -> torch.Tensor:
    return torch.distributions.StudentT(3.0).sample((4000, 8)).float()


def test_observers_rank_by_their_error() -> None:
    x = heavy()
    found = {name: error(x, ranges.fit(x, GRID, name)) for name in ("minmax", "percentile", "mse")}
    assert found["mse"] < found["minmax"] and found["percentile"] < found["minmax"]
    scale, zero = ranges.fit(x, GRID, "minmax")
    assert float(scale) == pytest.approx(float(x.max() - x.min()) / 15, rel=1e-6)
    assert zero is not None and float(zero) == round(float(-x.min() / scale))
    kl, _ = ranges.fit(x, ActivationSpec(8, True, "tensor", dynamic=False), "kl")
    assert 0 < float(kl) <= float(x.abs().max()) / 127 * (1 + 1e-6)
    positive = ActivationSpec(8, granularity="tensor", dynamic=False)
    assert float(ranges.fit(x.abs(), positive, "kl")[0]) <= float(x.abs().max()) / 255 * (1 + 1e-6)


def test_the_best_of_three_percentiles() -> None:
    x = heavy()
    errors = [error(x, ranges.fit(x, GRID, percentiles=[p])) for p in ranges.PERCENTILES]
    assert error(x, ranges.fit(x, GRID)) == pytest.approx(min(errors))
    ordered = torch.arange(101.0)
    assert ranges.quantiles(ordered, [0.0, 0.255, 1.0]).tolist() == pytest.approx([0.0, 25.5, 100.0])


def test_channels_have_grids_of_their_own_off_zero_too() -> None:
    x = torch.rand(3000, 3, dtype=torch.float64) * torch.tensor([0.01, 1.0, 50.0]) + torch.tensor([5.0, 0.0, -300.0])
    scale, zero = ranges.fit_channels(x, 4)
    assert torch.equal(zero, zero.round()) and float(zero[0]) < -1000 and float(zero[2]) > 60
    codes = ((x / scale).round() + zero).clamp(0, 15)
    assert ((codes - zero) * scale - x).abs().amax(0).lt(1.1 * scale).all() and len(codes.unique()) == 16
    middle = ranges.fit_channels(x, 4, symmetric=True)[1]
    assert middle.tolist() == [8, 8, 8]
    flat = ranges.fit_channels(torch.full((50, 2), 3.0), 4)[0]
    assert bool((flat > 0).all()) and bool(torch.isfinite(flat).all())


def test_logarithms_and_two_grids() -> None:
    p = torch.softmax(4 * torch.randn(500, 30), -1)
    spec = LogSpec(4)
    scale = ranges.fit_log(p, spec)
    tops = ranges.quantiles(p.flatten().sort().values, ranges.PERCENTILES)
    errors = [float((log.fake(p, top, spec) - p).square().sum()) for top in tops]
    assert float(scale) == pytest.approx(float(tops[errors.index(min(errors))]))
    x = torch.nn.functional.gelu(3 * torch.randn(500, 30))
    found, step = ranges.fit_twin(x, TwinSpec(4))
    symmetric = ActivationSpec(4, True, "tensor", dynamic=False)  # as many codes above zero as the coarse grid has
    one = ranges.fit(x, symmetric, "mse")
    assert float((twin.fake(x, step, found) - x).square().mean()) < 0.95 * error(x, one, symmetric)
    found, step = ranges.fit_twin(p, TwinSpec(6, 0, "magnitude"), top=1.0)
    assert float(step) * (31 << found.shift) == pytest.approx(1.0, rel=1e-5)


def test_samples_are_bounded_and_the_same_again() -> None:
    def sample(limit: int, seed: int = 0) -> torch.Tensor:
        rows = RowSample(limit, seed)
        for i in range(10):
            rows.update(torch.arange(40.0).reshape(20, 2) + 100 * i)
        assert rows.seen == 200
        return rows.rows()

    assert sample(1000).shape == (200, 2) and torch.equal(sample(1000)[:, 0].sort().values, sample(1000)[:, 0])
    small = sample(60)
    assert small.shape == (30, 2) and torch.equal(small, sample(60)) and not torch.equal(small, sample(60, 1))
    assert len({int(v) // 100 for v in small[:, 0]}) > 5  # from all over the data


def test_what_has_no_range() -> None:
    with pytest.raises(ConfigError, match="observer"):
        ranges.fit(heavy(), GRID, "median")
    for wrong in (torch.empty(0, 3), torch.tensor([[float("nan")]])):
        with pytest.raises(DataError):
            ranges.fit(wrong, GRID)
    with pytest.raises(DataError, match="no calibration rows"):
        RowSample().rows()


def test_groups_of_columns():
    """Each group has the grid of its own columns; many zeros and one outlier, and one number alone, stay finite."""
    torch.manual_seed(0)
    x = torch.zeros(500, 4)
    x[7, 0], x[:, 1], x[:, 2:] = 100.0, 5.0, 0.3 * torch.randn(500, 2) + 3
    scale, zero = ranges.fit_groups(x, torch.tensor([0, 1, 2, 2]), 4)
    assert torch.isfinite(scale).all() and (scale >= 1e-8).all() and torch.isfinite(zero).all()
    assert scale[0] < 100 / 15 * 1.01 and float(scale[1]) == 5.0
    alone = ranges.fit_groups(x[:, 2:], torch.zeros(2, dtype=torch.long), 4)
    assert torch.equal(scale[2:], alone[0]) and torch.equal(zero[2:], alone[1])
    own = ranges.fit_groups(x, torch.tensor([2, 0, 3, 1]), 4)
    each = [ranges.fit_groups(x[:, i : i + 1], torch.zeros(1, dtype=torch.long), 4) for i in range(4)]
    for place, i in enumerate((1, 3, 0, 2)):
        assert torch.equal(own[0][place : place + 1], each[i][0]) and torch.equal(own[1][place : place + 1], each[i][1])
    # Far from zero the grid need not reach it; where it has to, it is coarser.
    _, off = ranges.fit_groups(x[:, 2:3] + 20, torch.zeros(1, dtype=torch.long), 4)
    wide, on = ranges.fit_groups(x[:, 2:3] + 20, torch.zeros(1, dtype=torch.long), 4, zero=True)
    assert float(off) < 0 <= float(on) <= 15 and wide > 2 * scale[2]
    with pytest.raises(ConfigError, match="observer"):
        ranges.fit_groups(x, torch.zeros(4, dtype=torch.long), 4, "mse")
