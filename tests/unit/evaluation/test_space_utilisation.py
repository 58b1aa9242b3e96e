"""The share of a quantizer's cube that a cloud of vectors fills."""

from __future__ import annotations

import math

import pytest
import torch

from hfq.errors import DataError
from hfq.evaluation.space_utilisation import chi_square, space_utilisation


@pytest.mark.parametrize(("alpha", "degrees", "expected"), [(0.95, 10, 18.307), (0.99, 1, 6.635), (0.5, 100, 99.334)])
def test_quantiles(alpha: float, degrees: int, expected: float) -> None:
    assert chi_square(alpha, degrees) == pytest.approx(expected, abs=1e-3)


def test_a_round_cloud_fills_what_a_ball_fills() -> None:
    x = torch.randn(200_000, 3, dtype=torch.float64)
    ball = math.pi / 6  # of the cube around it
    assert space_utilisation(x) == pytest.approx(ball ** (1 / 3), rel=0.02)
    # The confidence does not matter for a centred cloud, an offset mean does.
    assert space_utilisation(x, 0.9) == pytest.approx(space_utilisation(x), rel=0.02)
    assert space_utilisation(x + torch.tensor([4.0, 0, 0])) < 0.7 * space_utilisation(x)


def test_large_dimensions_do_not_overflow() -> None:
    x = torch.randn(3000, 512) * 1e-4
    assert 0 < space_utilisation(x) < 1
    assert space_utilisation(x * 1e6) == pytest.approx(space_utilisation(x))


def test_impossible_clouds() -> None:
    flat = torch.randn(50, 4, dtype=torch.float64)
    flat[:, 3] = 0
    assert space_utilisation(flat) == 0.0
    for wrong, alpha in ((torch.randn(4, 4), 0.9), (torch.randn(9), 0.9), (torch.randn(9, 2), 1.0)):
        with pytest.raises(DataError, match="N > d"):
            space_utilisation(wrong, alpha)
    with pytest.raises(DataError, match="NaN"):
        space_utilisation(torch.full((9, 2), float("nan")))
