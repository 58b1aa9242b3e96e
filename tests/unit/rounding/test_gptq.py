"""The column solver against its formula written out naively, and its behaviour on degenerate Hessians."""

from __future__ import annotations

import itertools

import pytest
import torch

from hfq.errors import ConfigError, QuantizationError
from hfq.formats import PER_TENSOR, QuantSpec, affine
from hfq.rounding import gptq, nearest


def problem(rows: int = 24, k: int = 80, tokens: int = 400, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and a Hessian of correlated inputs with outlier channels, float64."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=g, dtype=torch.float64) * torch.arange(1, k + 1) ** -0.7
    x = torch.randn(tokens, k, generator=g, dtype=torch.float64) @ mix.T + 0.1 * torch.randn(
        tokens, k, generator=g, dtype=torch.float64
    )
    x[:, torch.randperm(k, generator=g)[: max(1, k // 30)]] *= 15
    return torch.randn(rows, k, generator=g, dtype=torch.float64), 2 / tokens * x.T @ x


def objective(w: torch.Tensor, codes: gptq.Codes, h: torch.Tensor) -> float:
    d = w - affine.dequantize(codes, torch.float64)
    return float(((d @ h.double()) * d).sum())


def naive(
    w: torch.Tensor, h: torch.Tensor, spec: QuantSpec, percdamp: float, static: bool, order: list[int] | None
) -> torch.Tensor:
    """Optimal brain quantization in a fixed order: after each column the inverse Hessian loses that row and column."""
    k = h.shape[0]
    inverse = torch.linalg.inv(h + percdamp * h.diagonal().mean() * torch.eye(k, dtype=h.dtype))
    w, length = w.clone(), spec.group_length(k)
    original, quantized = w.clone(), torch.zeros_like(w)
    scale = zero = None
    static_scale, static_zero = affine.fit(original, spec)
    order = list(range(k)) if order is None else order
    for position, j in enumerate(order):
        group = j // length
        if static:
            scale = static_scale[:, group : group + 1]
            zero = None if static_zero is None else static_zero[:, group : group + 1]
        elif position % length == 0:
            scale, zero = affine.fit(w[:, j : j + length], QuantSpec(spec.bits, -1, spec.symmetric))
        one = QuantSpec(spec.bits, -1, spec.symmetric)
        column = w[:, j : j + 1]
        quantized[:, j : j + 1] = affine.decode(
            affine.encode(column, scale, zero, one), scale, zero, one, torch.float64
        )
        error = (w[:, j] - quantized[:, j]) / inverse[j, j]
        w -= error[:, None] * inverse[j][None]
        inverse = inverse - inverse[:, j : j + 1] @ inverse[j : j + 1] / inverse[j, j]
    return quantized


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("group", "block", "static", "act_order"),
    [
        (-1, 128, False, False),
        (-1, 17, False, True),
        (16, 32, False, False),
        (24, 32, False, False),
        (48, 32, False, False),
        (64, 16, False, False),
        (16, 32, True, False),
        (24, 128, True, True),
    ],
)
def test_equals_the_naive_formula(group: int, block: int, static: bool, act_order: bool, symmetric: bool) -> None:
    w, h = problem()
    w = w.float().double()  # grids are fitted in float32
    spec = QuantSpec(4, group, symmetric)
    codes, _ = gptq.solve(
        w, h, spec, block_size=block, static_groups=static or group == -1, act_order=act_order, dtype=torch.float64
    )
    order = h.diagonal().argsort(descending=True, stable=True).tolist() if act_order else None
    expected = naive(w, h, spec, 0.01, static or group == -1, order)
    torch.testing.assert_close(affine.dequantize(codes, torch.float64), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("clip", ["none", "mse", "mse2d"])
@pytest.mark.parametrize("group", [-1, 0, 16, 24])
def test_float32_and_blocks_change_little(group: int, clip: str) -> None:
    w, h = problem(seed=3)
    spec = QuantSpec(4, group)
    reference = objective(w, gptq.solve(w, h, spec, clip=clip, dtype=torch.float64)[0], h)
    for block in (8, 64, 128):
        codes, stats = gptq.solve(w.float(), h.float(), spec, clip=clip, block_size=block)
        assert objective(w, codes, h) == pytest.approx(reference, rel=0.15)
        assert stats["loss"] == pytest.approx(objective(w, codes, h), rel=1e-3)


def test_joint_solution_equals_separate_ones() -> None:
    w, h = problem(60)
    parts = [w[:10], w[10:48], w[48:]]
    factor = gptq.factorise(h)
    joint = gptq.solve_many(parts, factor, QuantSpec(4, 16), clip="mse", weigh_clip=True, refine=1, dtype=torch.float64)
    for part, (codes, stats) in zip(parts, joint, strict=True):
        alone, own = gptq.solve(
            part, factor, QuantSpec(4, 16), clip="mse", weigh_clip=True, refine=1, dtype=torch.float64
        )
        assert torch.equal(codes.codes, alone.codes)
        assert torch.equal(codes.scale, alone.scale)
        assert stats["loss"] == pytest.approx(own["loss"], rel=1e-9)


def test_singular_hessian_is_damped_until_it_solves() -> None:
    w, _ = problem(8, 64)
    x = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    codes, stats = gptq.solve(w, 2 / 10 * x.T @ x, QuantSpec(4, 16), percdamp=1e-3)
    assert stats["damping_tries"] >= 1
    assert stats["relative_loss"] < 0.05
    # Slightly indefinite, as rounding makes it: one helping of damping is not enough.
    h = 2 / 10 * (x.T @ x).double() - 5e-4 * torch.eye(64, dtype=torch.float64)
    codes, stats = gptq.solve(w, h, QuantSpec(4, 16), percdamp=1e-4)
    assert stats["damping_tries"] == 3
    assert codes.codes.shape == w.shape


def test_no_silent_fall_back() -> None:
    w, h = problem(4, 16)
    indefinite = 11 * torch.eye(16) - 10 * torch.ones(16, 16)
    with pytest.raises(QuantizationError, match="mlp.up is not positive definite.*49 times"):
        gptq.solve(w, indefinite, QuantSpec(4), name="mlp.up")
    with pytest.raises(QuantizationError, match="negative diagonal"):
        gptq.solve(w, -h, QuantSpec(4))
    with pytest.raises(QuantizationError, match="mlp.up has NaN"):
        gptq.solve(w, h * torch.nan, QuantSpec(4), name="mlp.up")
    with pytest.raises(QuantizationError, match="percdamp=0"):
        gptq.solve(w, torch.ones(16, 16), QuantSpec(4), percdamp=0.0)
    with pytest.raises(QuantizationError, match="weight of mlp.up"):
        gptq.solve(w * torch.inf, h, QuantSpec(4), name="mlp.up")


@pytest.mark.parametrize("refine", [0, 2])
@pytest.mark.parametrize("symmetric", [True, False])
def test_dead_columns_are_zero(symmetric: bool, refine: int) -> None:
    w, h = problem()
    dead = [0, 5, 6, 7, 79]
    h[dead] = 0
    h[:, dead] = 0
    codes, stats = gptq.solve(w.float(), h, QuantSpec(4, 16, symmetric), clip="mse", weigh_clip=True, refine=refine)
    assert stats["dead_columns"] == 5
    assert not affine.dequantize(codes)[:, dead].any()
    alive = [j for j in range(80) if j not in dead]
    assert affine.dequantize(codes)[:, alive].any(0).all()


def test_all_zero_hessian() -> None:
    w, _ = problem(4, 16)
    codes, stats = gptq.solve(w, torch.zeros(16, 16), QuantSpec(4, 8), clip="mse", weigh_clip=True, refine=1)
    assert stats["dead_columns"] == 16 and stats["relative_loss"] == 0
    assert not affine.dequantize(codes).any()


def test_refinement_lowers_the_objective_step_by_step() -> None:
    for seed, (group, symmetric) in enumerate([(16, False), (16, True), (-1, False), (0, True), (24, False)]):
        w, h = problem(seed=seed)
        spec = QuantSpec(3, group, symmetric)
        damped = h + 0.01 * h.diagonal().mean() * torch.eye(80)
        losses = [objective(w, gptq.solve(w, h, spec, refine=n, dtype=torch.float64)[0], damped) for n in (0, 1, 2, 4)]
        assert losses[0] > losses[1] >= losses[2] >= losses[3]


def test_descent_ends_in_a_minimum_of_every_single_code() -> None:
    w, h = problem(6, 32)
    spec = QuantSpec(2, 16)
    codes, _ = gptq.solve(w, h, spec, refine=100, dtype=torch.float64)
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(32)
    best = objective(w, codes, damped)
    for row, column in itertools.product(range(6), range(32)):
        kept = int(codes.codes[row, column])
        for value in {max(kept - 1, 0), min(kept + 1, 3)}:
            codes.codes[row, column] = value
            assert objective(w, codes, damped) >= best - 1e-9
        codes.codes[row, column] = kept


def test_near_the_best_of_all_codes_on_a_tiny_problem() -> None:
    """Four columns of two bits: all 256 rows of codes on the same fixed grid. Greedy loses some draws, not by much."""
    spec, lost = QuantSpec(2), []
    for seed in range(20):
        w, h = problem(1, 4, 40, seed)
        damped = h + 0.01 * h.diagonal().mean() * torch.eye(4)
        codes, _ = gptq.solve(w, h, spec, dtype=torch.float64)
        rows = torch.tensor(list(itertools.product(range(4), repeat=4)), dtype=torch.uint8)
        d = w - affine.decode(rows, codes.scale, codes.zero_point, spec, torch.float64)
        best = float(((d @ damped) * d).sum(1).min())
        plain = objective(w, nearest.solve(w, spec), damped)
        found = objective(w, codes, damped)
        assert found >= best - 1e-9
        lost.append((found / best, plain / best))
    mean = torch.tensor(lost).log().mean(0).exp()
    assert mean[0] < 1.5 and mean[0] < mean[1]


def test_act_order_across_groups_is_refused() -> None:
    w, h = problem()
    with pytest.raises(ConfigError, match="static_groups=True"):
        gptq.solve(w, h, QuantSpec(4, 16), act_order=True)
    gptq.solve(w, h, QuantSpec(4, -1), act_order=True)
    gptq.solve(w, h, QuantSpec(4, PER_TENSOR), act_order=True)


def test_sizes_that_do_not_fit() -> None:
    w, h = problem()
    with pytest.raises(ConfigError, match="mlp.down: weight"):
        gptq.solve(w[:, :16], h, QuantSpec(4), name="mlp.down")
    with pytest.raises(QuantizationError, match="square"):
        gptq.solve(w, h[:16], QuantSpec(4))
    with pytest.raises(ConfigError, match="per tensor"):
        gptq.solve_many([w, w], h, QuantSpec(4, PER_TENSOR))


def test_same_input_same_codes_and_nothing_is_changed() -> None:
    w, h = problem()
    kept = w.clone(), h.clone()
    first = gptq.solve(w, h, QuantSpec(3, 16), clip="mse", refine=2)[0]
    second = gptq.solve(w, h, QuantSpec(3, 16), clip="mse", refine=2)[0]
    assert torch.equal(first.codes, second.codes) and torch.equal(first.scale, second.scale)
    assert torch.equal(w, kept[0]) and torch.equal(h, kept[1])


@pytest.mark.parametrize("refine", [0, 2])
def test_float_zero_points(refine: int) -> None:
    w, h = problem()
    spec = QuantSpec(3, 16, zero_point="float")
    codes, stats = gptq.solve(w, h, spec, clip="mse", refine=refine)
    assert stats["loss"] == pytest.approx(objective(w, codes, h), rel=1e-3)
    assert stats["loss"] < objective(w, nearest.solve(w, spec, clip="mse"), h)


def test_descent_does_not_depend_on_the_size_of_the_weight():
    """Scales of float32 go far below the smallest float16: a scaled weight has the same codes."""
    torch.manual_seed(0)
    weight, x = torch.randn(8, 64), torch.randn(200, 64)
    spec = QuantSpec(3, 32, scale_dtype="float32")
    plain, start = (gptq.solve(weight, x.t() @ x, spec, refine=rounds)[0] for rounds in (4, 0))
    small, _ = gptq.solve(weight * 2.0**-24, x.t() @ x, spec, refine=4)
    assert not torch.equal(plain.scale, start.scale)
    assert torch.equal(plain.codes, small.codes)
    assert torch.equal(plain.scale, small.scale * 2.0**24)
