"""Outliers in two steps: against the definition, element by element, and at its edges."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from hfq.calibration.outliers import RULES, Rule, channel_scales, detect, truncate
from hfq.errors import ConfigError, QuantizationError


def by_definition(values: list[float], rule: Rule) -> tuple[list[float], float]:
    """Coarse set and limit of one row, in plain Python."""
    ordered = sorted(values)

    def quantile(q: float) -> float:
        place = q * (len(ordered) - 1)
        i = int(place)
        return ordered[i] + (ordered[min(i + 1, len(ordered) - 1)] - ordered[i]) * (place - i)

    low, high = quantile(rule.low), quantile(rule.high)
    threshold = high + rule.reach * (high - low)
    coarse = [v for v in ordered if v > threshold]
    best, limit = -math.inf, math.inf
    for j in range(len(coarse)):
        kept = coarse[:j]
        previous = kept[-1] if kept else threshold
        gap = coarse[j] - previous
        variance = statistics.variance(kept) if len(kept) > 1 else 0.0
        score = (gap**2 if rule.squared else gap) - rule.balance * variance
        if score > best:
            best, limit = score, previous
    return coarse, limit


@pytest.mark.parametrize("name", RULES)
def test_the_definition_on_random_rows(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(200, 60, generator=generator).abs() ** 2
    rows[::3, :4] *= 20
    rows[5] = 1.0
    found = detect(rows, RULES[name])
    for i, row in enumerate(rows.double().tolist()):
        coarse, limit = by_definition(row, RULES[name])
        assert sorted(rows[i][found.coarse[i]].double().tolist()) == coarse
        assert float(found.limit[i]) == pytest.approx(limit, rel=1e-12)
        assert int(found.outlier[i].sum()) == sum(v > limit for v in coarse)
    assert 0 < int(found.outlier.sum()) < int(found.coarse.sum())


def test_the_two_rules_differ() -> None:
    rows = torch.randn(300, 100).abs() ** 3
    assert not torch.equal(detect(rows, RULES["paper"]).limit, detect(rows, RULES["vendor"]).limit)


@pytest.mark.parametrize("name", RULES)
def test_four_values(name: str) -> None:
    values = torch.cat([torch.rand(200) + 0.5, torch.tensor([32.0, 5.0, 60.0, 30.0])])
    found = detect(values, RULES[name])
    assert sorted(values[found.coarse[0]].tolist()) == [5, 30, 32, 60]
    assert sorted(values[found.outlier[0]].tolist()) == [30, 32, 60] and float(found.limit) == 5


@pytest.mark.parametrize("values", [torch.ones(64), torch.zeros(64), torch.rand(1000), torch.ones(1), torch.rand(2)])
def test_nothing_coarse(values: torch.Tensor) -> None:
    found = detect(values)
    assert not found.coarse.any() and not found.outlier.any() and math.isinf(float(found.limit))
    cut, share = truncate(values[None])
    assert torch.equal(cut[0], values) and share == 0
    assert torch.equal(channel_scales(-values, values), torch.ones(len(values), dtype=torch.float64))


def test_a_single_coarse_value_is_an_outlier() -> None:
    values = torch.cat([torch.rand(50), torch.tensor([9.0])])
    found = detect(values)
    assert int(found.coarse.sum()) == int(found.outlier.sum()) == 1
    assert float(found.limit) == float(found.threshold)
    cut, share = truncate(torch.stack([values, -values]))
    threshold = float(found.threshold)
    assert cut[0, -1] == pytest.approx(threshold) and cut[1, -1] == pytest.approx(-threshold)
    assert torch.equal(cut[:, :-1], torch.stack([values, -values])[:, :-1]) and share == pytest.approx(1 / 51)


def test_scales_of_channels() -> None:
    high = torch.cat([torch.rand(100) + 0.5, torch.tensor([40.0, 0.7])])
    low = torch.cat([-torch.rand(100) - 0.5, torch.tensor([-0.6, -90.0])])
    for name, power in (("paper", 0.5), ("vendor", 0.7)):
        scale = channel_scales(low, high, RULES[name])
        assert torch.equal(scale[:100], torch.ones(100, dtype=torch.float64))
        for channel, side, value in ((100, high, 40.0), (101, -low, 90.0)):
            found = detect(side, RULES[name])
            ordinary = side[~found.outlier[0]].max()
            base = float(found.limit) if name == "paper" else float(ordinary)
            assert float(scale[channel]) == pytest.approx((value / base) ** power, rel=1e-6)


def test_all_other_channels_zero() -> None:
    high = torch.zeros(32)
    high[3] = 5
    for rule in RULES.values():
        assert torch.equal(channel_scales(torch.zeros(32), high, rule), torch.ones(32, dtype=torch.float64))


def test_bad_input() -> None:
    for bad in (torch.tensor([1.0, math.nan]), torch.tensor([-1.0, 2.0]), torch.ones(0), torch.ones(2, 2, 2)):
        with pytest.raises(QuantizationError):
            detect(bad)
    with pytest.raises(ConfigError):
        Rule(low=0.8, high=0.2)
