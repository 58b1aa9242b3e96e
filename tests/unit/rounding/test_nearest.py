"""Grids of round to nearest: each clip mode against a plain enumeration of what it says it searches."""

from __future__ import annotations

import pytest
import torch

from hfq.errors import ConfigError, QuantizationError
from hfq.formats import PER_TENSOR, QuantSpec, affine
from hfq.rounding import nearest


def weight(rows: int = 12, columns: int = 40, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * (
        1 + torch.rand(rows, columns, generator=generator) ** 8 * 6
    )


def error(
    w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, spec: QuantSpec, norm: float
) -> torch.Tensor:
    q = affine.decode(affine.encode(w, scale, zero, spec), scale, zero, spec)
    return (q - w).abs().double().pow(norm).sum()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [-1, 0, 16])  # 40 columns: 16 leaves a ragged last group of 8
def test_none_is_the_min_max_grid(group: int, symmetric: bool) -> None:
    w, spec = weight(), QuantSpec(4, group, symmetric)
    got, expected = nearest.solve(w, spec), affine.quantize(w, spec)
    assert torch.equal(got.codes, expected.codes)
    assert torch.equal(got.scale, expected.scale)
    assert got.scale.shape == spec.parameter_shape(*w.shape)


@pytest.mark.parametrize("norm", [1.0, 2.0, 2.4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [-1, 16])
def test_mse_equals_enumeration(group: int, symmetric: bool, norm: float) -> None:
    w, spec = weight(4), QuantSpec(3, group, symmetric)
    scale, zero = nearest.grid_of(w, spec, clip="mse", norm=norm)
    length = spec.group_length(40)
    for row in range(4):
        for g in range(spec.groups(40)):
            x = w[row : row + 1, g * length : (g + 1) * length]
            one = QuantSpec(3, -1, symmetric)
            low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
            best = min(
                error(x, *affine.fit_range(low * (1 - i / 100), high * (1 - i / 100), one), one, norm)
                for i in range(80)
            )
            own = None if zero is None else zero[row, g].reshape(1, 1)
            torch.testing.assert_close(
                error(x, scale[row, g].reshape(1, 1), own, one, norm), best, rtol=1e-4, atol=1e-9
            )


def test_two_dimensional_search_equals_enumeration() -> None:
    spec = QuantSpec(3)
    generator = torch.Generator().manual_seed(1)
    rows = [
        torch.randn(1, 24, generator=generator),
        torch.rand(1, 24, generator=generator) + 0.5,
        -torch.rand(1, 24, generator=generator),
        torch.randn(1, 24, generator=generator) ** 3,
    ]
    for x in rows:
        scale, zero = nearest.grid_of(x, spec, clip="mse2d")
        low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
        candidates = []
        for i in range(80):
            step, _ = affine.fit_range(low * (1 - i / 100), high * (1 - i / 100), spec)
            candidates += [error(x, step, torch.full((1, 1), z, dtype=torch.uint8), spec, 2.4) for z in range(8)]
        torch.testing.assert_close(error(x, scale, zero, spec, 2.4), min(candidates), rtol=1e-4, atol=1e-9)


def test_searches_do_not_lose_to_each_other() -> None:
    w = weight(64, 128)
    spec = QuantSpec(3, 32)
    errors = {
        clip: float(error(w, *nearest.grid_of(w, spec, clip=clip), spec, 2.4)) for clip in ("none", "mse", "mse2d")
    }
    assert errors["mse2d"] < errors["mse"] < errors["none"]


def test_column_weights_move_the_grid() -> None:
    w, spec = weight(32, 64), QuantSpec(3)
    diag = torch.ones(64)
    diag[:4] = 1e4
    plain = nearest.solve(w, spec, clip="mse", norm=2.0)
    weighted = nearest.solve(w, spec, clip="mse", norm=2.0, hessian_diag=diag)
    loss = [float((((affine.dequantize(c) - w) ** 2) * diag).sum()) for c in (plain, weighted)]
    assert loss[1] < 0.9 * loss[0]
    unseen = nearest.solve(w, spec, clip="mse", norm=2.0, hessian_diag=torch.zeros(64))
    assert torch.equal(unseen.codes, plain.codes)


def test_percentile_cuts_one_outlier_on_each_side() -> None:
    w = torch.cat([torch.linspace(-1, 1, 998), torch.tensor([50.0, -40.0])]).reshape(1, -1)
    spec = QuantSpec(8, scale_dtype="float32")
    scale, _ = nearest.grid_of(w, spec, clip="percentile", share=0.995)
    assert float(scale) == pytest.approx(2 / 255, rel=0.05)
    assert float(nearest.grid_of(w, spec, clip="percentile", share=1.0)[0]) == pytest.approx(90 / 255, rel=1e-5)


@pytest.mark.parametrize("clip", nearest.CLIPS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_and_constant_rows(clip: str, symmetric: bool) -> None:
    w = torch.stack([torch.zeros(32), torch.full((32,), 0.75), torch.full((32,), -0.75)])
    codes = nearest.solve(w, QuantSpec(4, symmetric=symmetric), clip=clip)
    got = affine.dequantize(codes)
    assert torch.equal(got[0], torch.zeros(32))
    torch.testing.assert_close(got, w, rtol=2e-3 if not symmetric else 0.08, atol=0)


@pytest.mark.parametrize("clip", ["mse", "mse2d"])
def test_float_zero_points(clip: str) -> None:
    w = weight(8, 64) + 0.3
    spec = QuantSpec(3, 32, zero_point="float")
    scale, zero = nearest.grid_of(w, spec, clip=clip)
    assert zero is not None and zero.dtype == torch.float16
    assert error(w, scale, zero, spec, 2.4) < error(w, *affine.fit(w, spec), spec, 2.4)


def test_per_tensor_weights_repeat_over_rows() -> None:
    w, spec = weight(), QuantSpec(3, PER_TENSOR)
    scale, zero = nearest.grid_of(w, spec, clip="mse", hessian_diag=torch.rand(40))
    assert scale.shape == zero.shape == (1, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"clip": "best"},
        {"norm": 0.0},
        {"grid": 0},
        {"max_shrink": 1.0},
        {"share": 0.5},
        {"clip": "percentile", "share": 2},
    ],
)
def test_impossible_options(change: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(change.keys() - {"clip"} or {"clip"}))):
        nearest.solve(weight(), QuantSpec(4), **change)


def test_not_finite() -> None:
    w = weight()
    w[0, 0] = torch.nan
    with pytest.raises(QuantizationError, match="NaN"):
        nearest.solve(w, QuantSpec(4), clip="mse")
    with pytest.raises(ConfigError, match="matrix"):
        nearest.solve(torch.zeros(2, 3, 4), QuantSpec(4))
