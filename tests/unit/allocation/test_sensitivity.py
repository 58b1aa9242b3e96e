"""Scores: their range, invariances and direction."""

from __future__ import annotations

import pytest
import torch

from hfq.allocation.sensitivity import InputModification, rounding_losses, zscore_share
from hfq.errors import ConfigError, DataError
from hfq.formats import QuantSpec, affine


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def score(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor | None = None, **options: object) -> float:
    measure = InputModification(**options)  # type: ignore[arg-type]
    measure.update(a, b, mask)
    return measure.value


@pytest.mark.parametrize("reduce", ["token", "flatten"])
def test_input_modification(reduce: str) -> None:
    a, b = draw(3, 6, 8), draw(3, 6, 8, seed=1)
    assert score(a, a, reduce=reduce) == pytest.approx(-1)
    assert score(a, -a, reduce=reduce) == pytest.approx(1)
    assert -1 <= score(a, b, reduce=reduce) <= 1
    assert score(7 * a, 0.01 * b, reduce=reduce) == pytest.approx(score(a, b, reduce=reduce), abs=1e-6)
    assert score(a, a + 0.1 * b, reduce=reduce) < score(a, a + b, reduce=reduce)
    dims = (1, 2) if reduce == "flatten" else (2,)
    cosine = (a * b).sum(dims) / (a.square().sum(dims).sqrt() * b.square().sum(dims).sqrt())
    assert score(a, b, reduce=reduce) == pytest.approx(-float(cosine.mean()), abs=1e-6)


@pytest.mark.parametrize("reduce", ["token", "flatten"])
def test_padding_does_not_change_it(reduce: str) -> None:
    a, b = draw(2, 4, 8), draw(2, 4, 8, seed=1)
    padded_a, padded_b = torch.cat([a, draw(2, 3, 8, seed=2)], 1), torch.cat([b, draw(2, 3, 8, seed=3)], 1)
    mask = torch.tensor([[1] * 4 + [0] * 3] * 2, dtype=torch.bool)
    assert score(padded_a, padded_b, mask, reduce=reduce) == pytest.approx(score(a, b, reduce=reduce), abs=1e-7)
    assert score(padded_a, padded_b, reduce=reduce) != pytest.approx(score(a, b, reduce=reduce), abs=1e-3)


def test_batches_add_up_and_zero_vectors_count_as_zero() -> None:
    a, b = draw(6, 4, 8), draw(6, 4, 8, seed=1)
    parts = InputModification()
    for i in range(0, 6, 2):
        parts.update(a[i : i + 2], b[i : i + 2])
    assert parts.value == pytest.approx(score(a, b), abs=1e-7)
    half = a.clone()
    half[3:] = 0
    assert score(half, half) == pytest.approx(-0.5)


def test_outliers_do_not_hide_small_differences() -> None:
    """Half-precision states with one huge channel: the cosines differ from 1 by less than half precision resolves."""
    a = draw(1, 64, 256)
    a[..., 0] = 3000
    scores = [score(a.bfloat16(), (a + amount * draw(1, 64, 256, seed=1)).bfloat16()) for amount in (0.5, 2.0, 8.0)]
    assert scores[0] < scores[1] < scores[2] < -0.9


def test_images_have_their_vectors_along_the_channels() -> None:
    a, b = draw(2, 8, 3, 5), draw(2, 8, 3, 5, seed=1)
    tokens = [x.flatten(2).transpose(1, 2) for x in (a, b)]
    assert score(a, b, axis=1) == pytest.approx(score(*tokens), abs=1e-7)


def test_input_modification_errors() -> None:
    with pytest.raises(DataError, match="not defined"):
        score(draw(1, 4, 8), draw(1, 4, 16))
    with pytest.raises(DataError, match="no hidden states"):
        _ = InputModification().value
    with pytest.raises(ConfigError, match="reduce"):
        InputModification("mean")


@pytest.mark.parametrize("options", [{}, {"two_sided": True}, {"per_matrix": True}, {"threshold": 2.0}])
def test_zscore_share(options: dict) -> None:
    weights = [draw(300, 400), draw(200, 300, seed=1)]
    expected = {"threshold": 0.02275, "two_sided": 0.3173}.get(next(iter(options), ""), 0.1587)
    share = zscore_share(weights, **options)
    assert share == pytest.approx(expected, rel=0.03)
    assert zscore_share([0.001 * w for w in weights], **options) == pytest.approx(share, abs=1e-4)
    assert zscore_share([w.bfloat16() for w in weights], **options) == pytest.approx(share, rel=0.05)
    assert zscore_share(lambda: iter(weights), **options) == share


def test_zscore_share_is_over_all_weights_of_a_block() -> None:
    wide, narrow = 10 * draw(50, 50), 0.1 * draw(50, 50, seed=1)
    assert zscore_share([wide, narrow]) < 0.13
    assert zscore_share([wide, narrow], per_matrix=True) == pytest.approx(0.1587, rel=0.1)
    assert zscore_share([draw(100, 100).abs()]) != zscore_share([-draw(100, 100).abs()])


def test_zscore_share_without_spread() -> None:
    assert zscore_share([torch.full((4, 4), 0.3)]) == 0
    assert zscore_share([torch.zeros(4, 4)]) == 0
    assert zscore_share([]) == 0


def test_rounding_losses_fall_with_the_width_and_weigh_with_the_inputs() -> None:
    w, x = draw(16, 64), draw(200, 64, seed=1)
    losses = rounding_losses(w, QuantSpec(4, 16), (2, 3, 4, 8))
    assert list(losses) == [2, 3, 4, 8]
    assert losses[2] > losses[3] > losses[4] > losses[8] > 0
    h = 2 / 200 * x.T @ x
    d = affine.dequantize(affine.quantize(w, QuantSpec(4, 16))) - w
    got = rounding_losses(w, QuantSpec(4, 16), (4,), hessian=h)[4]
    assert got == pytest.approx(2 / 200 * float((x @ d.T).square().sum()), rel=1e-4)
    assert rounding_losses(w, QuantSpec(3, 16), (3,), clip="mse")[3] < losses[3]
