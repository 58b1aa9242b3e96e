"""What every solver promises, on random shapes, formats and problems."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfq.formats import QuantSpec, affine
from hfq.rounding import gptq, nearest
from hfq.rounding.flexround import DivisorRounding

SPEC = st.builds(
    QuantSpec,
    bits=st.integers(2, 8),
    group_size=st.sampled_from([-1, 0, 1, 5, 16, 33]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
)
SHAPE = st.tuples(st.integers(1, 9), st.integers(1, 70))


def matrix(shape: tuple[int, int], seed: int, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator)
    return w * torch.rand(shape, generator=generator) ** 2 * spread


def second_moment(k: int, seed: int, tokens: int | None = None) -> torch.Tensor:
    """Of correlated inputs with a few outlier channels."""
    g = torch.Generator().manual_seed(seed)
    tokens = 4 * k if tokens is None else tokens
    x = torch.randn(tokens, k, generator=g) @ (torch.randn(k, k, generator=g) * torch.arange(1, k + 1) ** -0.7).T
    x += 0.1 * torch.randn(tokens, k, generator=g)
    x[:, torch.randperm(k, generator=g)[: max(1, k // 30)]] *= 10
    return 2 / tokens * x.T @ x


def loss(w: torch.Tensor, codes: gptq.Codes, h: torch.Tensor) -> float:
    d = (affine.dequantize(codes) - w).double()
    return float(((d @ h.double()) * d).sum())


def well_formed(codes: gptq.Codes, w: torch.Tensor, spec: QuantSpec) -> None:
    shape = spec.parameter_shape(*w.shape)
    assert codes.codes.dtype == torch.uint8 and codes.codes.shape == w.shape
    assert int(codes.codes.max()) <= spec.max_code
    assert codes.scale.shape == shape and codes.scale.dtype == spec.torch_scale_dtype
    assert torch.isfinite(codes.scale).all() and (codes.scale > 0).all()
    if spec.symmetric:
        assert codes.zero_point is None
    else:
        assert codes.zero_point is not None and codes.zero_point.shape == shape
        assert int(codes.zero_point.max()) <= spec.max_code


@settings(max_examples=40, deadline=None)
@given(SHAPE, SPEC, st.sampled_from(nearest.CLIPS), st.integers(0, 1000))
def test_nearest_is_well_formed_and_its_codes_are_nearest(
    shape: tuple[int, int], spec: QuantSpec, clip: str, seed: int
) -> None:
    w = matrix(shape, seed)
    codes = nearest.solve(w, spec, clip=clip, grid=20)
    well_formed(codes, w, spec)
    # No other code of the same grid is nearer.
    here = (affine.dequantize(codes) - w).abs()
    for move in (-1, 1):
        other = (codes.codes.int() + move).clamp(0, spec.max_code).to(torch.uint8)
        there = (affine.decode(other, codes.scale, codes.zero_point, spec) - w).abs()
        assert (here <= there + 1e-6 * (1 + w.abs())).all()


@settings(max_examples=40, deadline=None)
@given(SHAPE, SPEC, st.sampled_from(["mse", "mse2d"]), st.integers(0, 1000))
def test_a_searched_grid_never_loses_to_min_max(shape: tuple[int, int], spec: QuantSpec, clip: str, seed: int) -> None:
    w = matrix(shape, seed)

    def error(codes: gptq.Codes) -> float:
        return float((affine.dequantize(codes) - w).abs().double().pow(2.4).sum())

    found, plain = error(nearest.solve(w, spec, clip=clip)), error(nearest.solve(w, spec))
    assert found <= plain * (1 + 1e-4) + 1e-12


@settings(max_examples=40, deadline=None)
@given(SHAPE, SPEC, st.booleans(), st.booleans(), st.integers(0, 2), st.integers(0, 1000), st.integers(1, 100))
def test_column_solver_is_well_formed(
    shape: tuple[int, int], spec: QuantSpec, static: bool, act_order: bool, refine: int, seed: int, tokens: int
) -> None:
    w, h = matrix(shape, seed), second_moment(shape[1], seed, tokens)  # few tokens: singular
    act_order = act_order and (static or spec.groups(shape[1]) == 1)
    codes, stats = gptq.solve(w, h, spec, static_groups=static, act_order=act_order, refine=refine)
    well_formed(codes, w, spec)
    assert stats["loss"] == pytest.approx(loss(w, codes, h), rel=1e-2, abs=1e-9 + 1e-5 * float(((w @ h) * w).sum()))


@settings(max_examples=30, deadline=None)
@given(SHAPE, SPEC, st.one_of(st.none(), st.integers(1, 4)), st.integers(0, 1000))
def test_learned_division_exports_what_it_computes(
    shape: tuple[int, int], spec: QuantSpec, rank: int | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = matrix(shape, seed)
    q = DivisorRounding(w, spec, rank=rank, generator=generator)
    with torch.no_grad():
        for p in q.parameters():
            p += 0.5 * torch.randn(p.shape, generator=generator)
    codes = q.codes()
    well_formed(codes, w, spec)
    assert torch.equal(affine.dequantize(codes), q())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(4, 16), (3, -1), (2, 16)])
def test_solvers_beat_nearest_on_the_objective_in_the_mean(bits: int, group: int, symmetric: bool) -> None:
    spec = QuantSpec(bits, group, symmetric)
    ratios = []
    for seed in range(6):
        w, h = torch.randn(32, 64, generator=torch.Generator().manual_seed(seed)), second_moment(64, seed)
        plain = loss(w, nearest.solve(w, spec, clip="mse"), h)
        solved = [
            nearest.solve(w, spec, clip="mse", hessian_diag=h.diagonal()),
            gptq.solve(w, h, spec, clip="mse")[0],
            gptq.solve(w, h, spec, clip="mse", static_groups=True, act_order=True)[0],
            gptq.solve(w, h, spec, clip="mse", refine=3)[0],
            gptq.solve(w, h, spec, clip="mse", norm=2.0, weigh_clip=True, refine=3)[0],
        ]
        ratios.append([loss(w, codes, h) / plain for codes in solved])
    mean = torch.tensor(ratios).log().mean(0).exp()
    weighted, plain_columns, ordered, refined, both = mean.tolist()
    assert weighted < 1
    assert max(plain_columns, ordered) < 0.6
    assert refined < plain_columns
    assert both < plain_columns


def test_same_input_same_bytes() -> None:
    w, h = matrix((16, 48), 0), second_moment(48, 0)
    for solve in (
        lambda: nearest.solve(w, QuantSpec(3, 16), clip="mse2d"),
        lambda: gptq.solve(w, h, QuantSpec(3, 16), clip="mse", refine=2)[0],
        lambda: gptq.solve(w, h, QuantSpec(3, 16), act_order=True, static_groups=True)[0],
    ):
        first, second = solve(), solve()
        assert torch.equal(first.codes, second.codes) and torch.equal(first.scale, second.scale)
        assert torch.equal(first.zero_point, second.zero_point)
