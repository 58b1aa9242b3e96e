"""Distances between sets of pictures, and between pictures, against numbers worked out otherwise."""

from __future__ import annotations

import math

import pytest
import torch

from hfq.errors import DataError
from hfq.evaluation.generation import Drawn, feature_distance, frechet, generation, kernel_distance, psnr


def normal(count: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_frechet_of_moved_and_scaled_sets():
    x = normal(500, 6)
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet(x, x + 2) == pytest.approx(6 * 4)
    spread = float(torch.cov(x.T).trace())
    mean = float(x.mean(0).square().sum())
    assert frechet(x, 3 * x) == pytest.approx(4 * (mean + spread))  # (3 - 1)^2 of the mean and of every deviation


def test_frechet_against_the_root_of_the_product():
    scipy = pytest.importorskip("scipy.linalg")
    x, y = normal(60, 5) @ normal(5, 5, 1), normal(40, 5, 2) @ normal(5, 5, 3) + 1
    one, other = torch.cov(x.T), torch.cov(y.T)
    root = scipy.sqrtm((one @ other).numpy()).real
    wanted = (x.mean(0) - y.mean(0)).square().sum() + one.trace() + other.trace() - 2 * root.trace()
    assert frechet(x.float(), y.float()) == pytest.approx(float(wanted), rel=1e-4)
    assert frechet(x[:3], y[:3]) > 0  # fewer pictures than features


def test_kernel_distance():
    x, y = normal(40, 8), normal(40, 8, 1)

    def kernel(a, b):
        return (float(a @ b) / 8 + 1) ** 3

    off = [(i, j) for i in range(40) for j in range(40) if i != j]
    wanted = (sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in off) / (40 * 39)
              - 2 * sum(kernel(a, b) for a in x for b in y) / 1600)
    assert kernel_distance(x, y, subsets=2) == pytest.approx(wanted, rel=1e-9)
    assert kernel_distance(x, y + 1, size=20) > 10 * abs(kernel_distance(x, y, size=20))
    assert kernel_distance(x, y, size=20) == kernel_distance(x, y, size=20)


def test_psnr():
    pictures = torch.full((3, 1, 4, 4), 0.5)
    other = pictures + torch.tensor([0.0, 0.1, 0.01]).view(3, 1, 1, 1)
    assert psnr(other, pictures).tolist() == pytest.approx([100, 20, 40], abs=1e-3)


def test_feature_distance_sees_directions_only():
    maps = [normal(2, 3 * 4).view(2, 3, 2, 2).float(), normal(2, 5 * 4, 1).view(2, 5, 2, 2).float()]
    assert feature_distance(maps, [7 * m for m in maps]).abs().max() < 1e-6
    assert feature_distance(maps, [-m for m in maps]).tolist() == pytest.approx([8, 8])  # 4 at each depth
    half = torch.zeros(1, 2, 1, 2)
    half[0, 0] = 1
    turned = half.clone()
    turned[0, :, 0, 1] = torch.tensor([0.0, 1.0])
    assert feature_distance([half], [turned]).tolist() == pytest.approx([1])  # 2 at one of two positions


def drawn(count: int = 6, seed: int = 0) -> Drawn:
    features = normal(count, 4, seed).float()
    return Drawn(features.sigmoid().view(count, 1, 2, 2), features, [features.view(count, 4, 1, 1)], features)


def test_all_numbers_at_once():
    one, other = drawn(), drawn(seed=1)
    answers = one.logits.argmax(-1)
    found = generation(one, other.features, answers, reference=one)
    assert found.pictures == 6 and found.accuracy == 1 and found.psnr == 100 and found.feature_distance == 0
    assert found.fid == frechet(one.features, other.features) and found.kid > -math.inf
    assert generation(one, other.features, (answers + 1) % 4).accuracy == 0
    free = generation(one, other.features, int(answers[0]))
    assert free.accuracy == pytest.approx(float((answers != answers[0]).double().mean())) and free.psnr is None


def test_wrong_input():
    one = drawn()
    with pytest.raises(DataError, match="5 targets for 6"):
        generation(one, one.features, torch.zeros(5, dtype=torch.long))
    with pytest.raises(DataError, match="NaN"):
        generation(Drawn(one.pictures * math.nan, one.logits, one.maps, one.features), one.features, 0)
    with pytest.raises(DataError, match="counts must agree"):
        generation(Drawn(one.pictures[:4], one.logits, one.maps, one.features), one.features, 0)
    with pytest.raises(DataError, match=r"\[N, D\]"):
        frechet(one.features, one.features[:, :2])
    with pytest.raises(DataError, match="at least two"):
        kernel_distance(one.features[:1], one.features)
    with pytest.raises(DataError, match="cannot be compared"):
        psnr(one.pictures, one.pictures[:2])
    with pytest.raises(DataError, match="the same network"):
        feature_distance(one.maps, [])
