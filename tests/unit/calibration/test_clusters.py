"""Groups of like ranges."""

from __future__ import annotations

import pytest
import torch

from hfq.calibration import clusters
from hfq.errors import ConfigError


def test_separate_clouds_are_found_and_the_seed_decides() -> None:
    torch.manual_seed(0)
    truth = torch.arange(4).repeat_interleave(20)
    points = torch.randn(80, 2) * 0.1 + 10 * torch.stack([truth % 2, truth // 2], 1)
    labels = clusters.kmeans(points, 4, seed=0)
    for label in range(4):
        assert len(labels[truth == label].unique()) == 1
    assert len(labels.unique()) == 4 and torch.equal(labels, clusters.kmeans(points, 4, seed=0))


def test_fewer_points_than_clusters() -> None:
    points = torch.tensor([[0.0, 1.0], [0.0, 1.0], [5.0, 6.0]])
    labels = clusters.kmeans(points, 8)
    assert labels[0] == labels[1] != labels[2]
    made = clusters.group("rows", (points[:, 0], points[:, 1]), 8, 8)
    empty = torch.bincount(made.labels, minlength=8) == 0
    assert empty.sum() == 6 and not made.zero[empty].any()
    assert torch.allclose(made.scale[empty], torch.full((6,), 1 / 255))


def test_ranges_of_groups() -> None:
    low, high = torch.tensor([-1.0, -3.0, -100.0]), torch.tensor([1.0, 5.0, 100.0])
    made = clusters.group("columns", (low, high), 2, 8)
    assert made.labels[0] == made.labels[1] != made.labels[2]
    assert made.scale[made.labels[0]] == pytest.approx(8 / 255)
    assert made.scale[made.labels[2]] == pytest.approx(200 / 255)
    mean = clusters.group("columns", (low, high), 2, 8, how="mean")
    assert mean.scale[mean.labels[0]] == pytest.approx(5 / 255)
    with pytest.raises(ConfigError, match="median"):
        clusters.group("columns", (low, high), 2, 8, how="median")  # type: ignore[arg-type]


def test_the_axis() -> None:
    wide, even = (torch.tensor([-1.0, -50.0]), torch.tensor([1.0, 50.0])), (-50 * torch.ones(2), 50 * torch.ones(2))
    one, other = ((axis, clusters.group(axis, ends, 2, 8), ends) for axis, ends in (("columns", wide), ("rows", even)))
    assert clusters.spread(wide) == 98 and clusters.spread(even) == 0
    assert clusters.choose_axis(one, other, "spread").axis == "columns"
    assert clusters.choose_axis(other, one, "spread").axis == "columns"
    assert clusters.choose_axis(one, other, "step").axis == "columns"
    assert clusters.choose_axis(one, other, "rows").axis == "rows"
    assert clusters.choose_axis(one, (*other[:2], wide), "spread").axis == "rows"  # a tie is the second one's
    with pytest.raises(ConfigError, match="axis='both'"):
        clusters.choose_axis(one, other, "both")
