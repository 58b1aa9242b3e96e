"""Observers against the same quantity computed from all data at once."""

from __future__ import annotations

import pytest
import torch

from hfq.calibration.observers import AbsMax, Histogram, MinMax, Mse, Percentile
from hfq.errors import DataError


def feed(observer, parts):
    for part in parts:
        observer.update(part)
    return observer


@pytest.fixture
def parts():
    return [torch.randn(50, 40) * s + 0.3 for s in (0.01, 1.0, 3.0)]


def test_min_max(parts):
    low, high = feed(MinMax(), parts).range()
    assert low == min(p.min() for p in parts) and high == max(p.max() for p in parts)
    low, high = feed(MinMax(axis=1), parts).range()
    assert torch.equal(high, torch.cat(parts).amax(0)) and torch.equal(low, torch.cat(parts).amin(0))
    low, high = feed(AbsMax(), parts).range()
    assert high == torch.cat(parts).abs().max() == -low


@pytest.mark.parametrize("percent", [99.0, 90.0])
def test_percentile(parts, percent):
    low, high = feed(Percentile(percent), parts).range()
    everything, tail = torch.cat(parts).reshape(-1), (1 - percent / 100) / 2
    assert abs(low - everything.quantile(tail)) < 0.03
    assert abs(high - everything.quantile(1 - tail)) < 0.03
    exact = feed(Percentile(100), parts).range()
    assert exact == feed(MinMax(), parts).range()


def test_order_does_not_matter(parts):
    a, b = feed(Histogram(), parts), feed(Histogram(), parts[::-1])
    assert a.exponent == b.exponent and a.counts.sum() == b.counts.sum() == sum(p.numel() for p in parts)
    assert (a.counts - b.counts).abs().max() <= 2  # borders of bins


@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_beats_min_max(symmetric):
    x = torch.cat([torch.randn(20000), torch.tensor([30.0, -20.0])])
    low, high = feed(Mse(4, symmetric), [x]).range()
    assert high < 15 and low > -15

    def error(low, high):
        levels = 14 if symmetric else 15
        scale = (high - low) / levels
        zero = (-low / scale).round()
        return ((x / scale).round() + zero).clamp(0, levels).sub(zero).mul(scale).sub(x).square().sum()

    top = max(x.max(), -x.min())
    wide = error(-top, top) if symmetric else error(x.min(), x.max())
    assert error(low, high) < 0.5 * wide
    if symmetric:
        assert low == -high


def test_refusals():
    with pytest.raises(DataError, match="before it saw data"):
        MinMax().range()
    with pytest.raises(DataError, match="NaN"):
        MinMax().update(torch.tensor([float("nan")]))
    with pytest.raises(DataError, match="percent"):
        Percentile(20)
