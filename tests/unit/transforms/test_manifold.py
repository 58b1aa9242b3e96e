"""Adam on the Stiefel manifold: orthogonality, determinant, groups by module, and plain Adam for the rest."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hfq.errors import ConfigError
from hfq.transforms.init import random_orthogonal
from hfq.transforms.manifold import ManifoldAdam, Orthogonal, orthogonality_error, parameter_groups, reorthogonalise


def stack(count: int, size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([random_orthogonal(size, generator) for _ in range(count)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_stay_orthogonal_and_reach_a_rotation(dtype: torch.dtype) -> None:
    start, goal = stack(3, 20, 0).to(dtype), stack(3, 20, 1).to(dtype)
    # Only a rotation with the same determinant can be reached.
    goal[:, 0] *= (torch.linalg.det(start) * torch.linalg.det(goal)).sign()[:, None]
    x = nn.Parameter(start.clone())
    adam = ManifoldAdam([{"params": [x], "lr": 0.2, "stiefel": True}])
    losses = []
    for _ in range(300):
        adam.zero_grad()
        loss = (x - goal).square().sum()
        loss.backward()
        adam.step()
        losses.append(loss.item())
        assert orthogonality_error(x) < (1e-5 if dtype == torch.float32 else 1e-12)
    assert losses[-1] < 0.05 * losses[0]
    assert torch.equal(torch.linalg.det(x.detach()).sign(), torch.linalg.det(start).sign())


def test_one_step_is_the_cayley_map_of_the_formula() -> None:
    x0, g = stack(1, 6, 2)[0], torch.randn(6, 6, dtype=torch.float64)
    x = nn.Parameter(x0.clone())
    x.grad = g.clone()
    ManifoldAdam([{"params": [x], "lr": 0.1, "stiefel": True}]).step()
    r = g - x0 @ g.T @ x0
    direction = r / (r.square().sum().mul(0.5).sqrt() + 1e-8)  # the bias corrections cancel in the first step
    a = (direction @ x0.T - x0 @ direction.T) / 2
    eye = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(x.detach(), torch.linalg.inv(eye + 0.05 * a) @ (eye - 0.05 * a) @ x0)


def test_rounding_drift_is_projected_away() -> None:
    drifted = stack(1, 16, 3).float() * (1 + 1e-3)

    def error(every: int) -> float:
        x = nn.Parameter(drifted.clone())
        adam = ManifoldAdam([{"params": [x], "lr": 1e-3, "stiefel": True}], orthogonalise_every=every)
        for _ in range(4):
            x.grad = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0))
            adam.step()
        return orthogonality_error(x)

    assert error(4) < 1e-6 < 1e-3 < error(100)


def test_groups_follow_modules_not_shapes() -> None:
    class Turn(Orthogonal):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Parameter(torch.eye(4))

    module = nn.ModuleList([nn.Linear(4, 4, bias=False), Turn(), nn.LayerNorm(4)])
    groups = parameter_groups(module, rotation_lr=0.5, lr=0.1)
    assert [(len(g["params"]), g["stiefel"], g["lr"]) for g in groups] == [(1, True, 0.5), (3, False, 0.1)]
    assert groups[0]["params"][0] is module[1].q
    module[1].requires_grad_(False)
    assert len(parameter_groups(module, rotation_lr=0.5, lr=0.1)) == 1


def test_other_parameters_get_adam() -> None:
    mine, theirs = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    ours = ManifoldAdam([{"params": [mine], "lr": 0.01}])
    adam = torch.optim.Adam([theirs], lr=0.01)
    for step in range(5):
        mine.grad = torch.randn(5, generator=torch.Generator().manual_seed(step))
        theirs.grad = mine.grad.clone()
        ours.step()
        adam.step()
    torch.testing.assert_close(mine, theirs)


def test_reorthogonalise_finds_the_closest() -> None:
    q = stack(2, 8, 4)
    noisy = q + 1e-3 * torch.randn(2, 8, 8, dtype=torch.float64)
    found = reorthogonalise(noisy)
    assert orthogonality_error(found) < 1e-12
    assert (found - noisy).norm() <= (q - noisy).norm()


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": 0.0}, {"orthogonalise_every": 0}])
def test_options_are_checked(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        ManifoldAdam([nn.Parameter(torch.ones(2))], **wrong)
    with pytest.raises(ConfigError, match="square"):
        ManifoldAdam([{"params": [nn.Parameter(torch.ones(2, 3))], "stiefel": True}])
