"""The schedule of a helper that loses its rank, its factorisation, and the grid that it is trained with."""

from __future__ import annotations

import math

import pytest
import torch

from hfq.errors import ConfigError
from hfq.formats import QuantSpec, affine
from hfq.rounding.learned_step import weight_codes, weight_grid
from hfq.training.decay import Decay, factorise, refactorise


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("rank", "wanted"), [(32, (32, 16, 8, 4, 2, 1, 0)), (3, (3, 1, 0)), (1, (1, 0))])
def test_ranks(rank, wanted):
    decay = Decay(rank, 10, warmup=4)
    assert decay.ranks == wanted and decay.steps == 4 + 10 * (len(wanted) - 1)
    assert [decay.rank_at(4 + 10 * i) for i in range(len(wanted))] == list(wanted)
    assert decay.rank_at(0) == decay.rank_at(13) == rank and decay.rank_at(10**6) == 0


@pytest.mark.parametrize("curve", ["cosine", "linear"])
def test_factors(curve):
    """The stronger half is whole, the weaker fades together, the rest is gone."""
    decay = Decay(8, 400, curve=curve)
    assert torch.equal(decay.factors(0), torch.ones(8))
    fading = [decay.factors(step) for step in range(400, 800, 57)]
    for one in fading:
        assert (one[:2] == 1).all() and (one[4:] == 0).all() and one[2] == one[3]
    assert [float(one[2]) for one in fading] == sorted((float(one[2]) for one in fading), reverse=True)
    if curve == "cosine":
        assert float(decay.factors(799)[2]) < 1e-4
        assert math.isclose(float(decay.factors(600)[2]), 0.5, abs_tol=1e-6)
    assert not decay.factors(decay.steps).any()
    assert decay.factors(decay.steps - 1)[0] < (1e-4 if curve == "cosine" else 1)


def test_the_whole_rank_is_the_matrix_and_less_is_monotonically_worse():
    matrix = noise(12, 20)
    errors = []
    for rank in (1, 4, 8, 12):
        left, right = factorise(matrix, rank)
        errors.append(float((matrix - left @ right).norm()))
    assert errors == sorted(errors, reverse=True) and errors[0] < matrix.norm() and errors[-1] < 1e-4


def test_the_end_of_a_phase():
    """The kept product stays, its columns are orthogonal and sorted, the rest is zero."""
    left, right = noise(12, 8), noise(8, 20)
    new_left, new_right = refactorise(left, right, 4)
    kept = left[:, :4] @ right[:4]
    assert (new_left @ new_right - kept).norm() / kept.norm() < 1e-5
    gram = new_left[:, :4].t() @ new_left[:, :4]
    torch.testing.assert_close(gram, torch.diag(gram.diagonal()), rtol=0, atol=1e-4)
    norms = new_left.norm(dim=0)
    assert (norms.diff() <= 1e-5).all() and not new_left[:, 4:].any() and not new_right[4:].any()


def test_impossible_schedules():
    for bad in ({"rank": 0, "phase_steps": 1}, {"rank": 2, "phase_steps": 0},
                {"rank": 2, "phase_steps": 1, "shrink": 0}, {"rank": 2, "phase_steps": 1, "curve": "square"}):
        with pytest.raises(ConfigError):
            Decay(**bad)


@pytest.mark.parametrize("kind", ["int", "float"])
def test_gradients_of_a_learned_grid(kind):
    """Inside: 1 to the weight, code - zero - w/s to the scale, none to the zero point. Clipped: 0, code - zero, -s."""
    spec = QuantSpec(3, -1, zero_point=kind, scale_dtype="float32")
    weight = torch.tensor([[0.31, -0.12, 5.0, -5.0]], requires_grad=True)
    scale = torch.tensor([[0.2]], requires_grad=True)
    zero = torch.tensor([[3.0 if kind == "int" else 3.3]], requires_grad=True)
    used, offset = weight_grid(scale, zero, spec)
    z = float(zero.detach())
    for i, code in enumerate([None, None, 7.0, 0.0]):
        fake = affine.fake(weight, used, offset, spec)[0, i]
        inputs = (weight, scale, zero)
        found = [torch.zeros(()) if g is None else g.sum() for g in
                 torch.autograd.grad(fake, inputs, retain_graph=True, allow_unused=True)]  # fmt: skip
        u = float(weight.detach()[0, i]) / 0.2
        if code is None:
            rounded = round(u + z) if kind == "float" else round(u) + z
            wanted = (1.0, rounded - z - u, 0.0)
        else:
            wanted = (0.0, code - z, -0.2 if kind == "float" else 0.0)
        for one, other in zip(found, wanted, strict=True):
            assert math.isclose(float(one), other, abs_tol=1e-5)
    damped, _ = weight_grid(scale, zero, spec, damping=0.25)
    assert torch.equal(damped, used)
    assert torch.autograd.grad(damped.sum(), scale)[0] == 0.25


def test_codes_decode_to_what_training_saw():
    for spec in (QuantSpec(4, 8), QuantSpec(3, -1, zero_point="float", scale_dtype="float32"), QuantSpec(4, -1, True)):
        weight = noise(6, 32)
        scale, zero = affine.fit(weight, spec)
        scale, zero = scale.float() * 1.01, None if zero is None else zero.float()
        fake = affine.fake(weight, *weight_grid(scale, zero, spec), spec)
        codes = weight_codes(weight, scale, zero, spec)
        assert torch.equal(affine.dequantize(codes), fake)
        assert torch.equal(weight_codes(fake, scale, zero, spec).codes, codes.codes)
