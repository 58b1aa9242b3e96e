"""Adam for parameters on the Stiefel manifold (orthogonal matrices), beside plain Adam for all others.

A rotation is moved along the manifold by a Cayley map, so that it stays orthogonal in every step and keeps the sign of
its determinant. Which parameters are rotations is decided by the modules that hold them, never by their shape.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hfq.errors import ConfigError

__all__ = ["ManifoldAdam", "Orthogonal", "orthogonality_error", "parameter_groups", "reorthogonalise"]


class Orthogonal(nn.Module):
    """Base of modules whose own parameters are (stacks of) square orthogonal matrices ``[..., d, d]``."""


def parameter_groups(module: nn.Module, *, rotation_lr: float, lr: float) -> list[dict[str, Any]]:
    """Optimiser groups of the trainable parameters of ``module``: those of :class:`Orthogonal` modules, then the rest.

    Parameters keep the order of ``named_parameters``; an empty group is left out.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for part in module.modules():
        found = [p for p in part.parameters(recurse=False) if p.requires_grad]
        (matrices if isinstance(part, Orthogonal) else others).extend(found)
    groups = [
        {"params": matrices, "lr": rotation_lr, "stiefel": True}, {"params": others, "lr": lr, "stiefel": False},
    ]  # fmt: skip
    return [group for group in groups if group["params"]]


class ManifoldAdam(torch.optim.Optimizer):
    """Riemannian Adam with the canonical metric and Cayley steps; groups without ``stiefel`` get plain Adam.

    For a matrix ``X`` with Euclidean gradient ``G`` the Riemannian gradient is ``G - X G^T X``. Its first moment is
    kept per element, its second moment is one number a matrix. The step is
    ``X <- (I + lr/2 A)^-1 (I - lr/2 A) X`` with ``A = (M X^T - X M^T) / 2``; the first moment moves along by the same
    map.

    Args:
        params: parameters, or groups with ``stiefel`` (default of a group: false).
        lr: default learning rate.
        betas, eps: of Adam.
        orthogonalise_every: steps between two projections back onto the manifold (rounding drifts away from it).

    Raises:
        ConfigError: a rotation is not a (stack of) square matrices, or an option is out of range.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        orthogonalise_every: int = 10,
    ) -> None:
        if not lr >= 0 or not all(0 <= beta < 1 for beta in betas) or not eps > 0 or orthogonalise_every < 1:
            raise ConfigError(f"lr={lr}, betas={betas}, eps={eps}, orthogonalise_every={orthogonalise_every}: "
                              "lr at least 0, betas in [0, 1), eps above 0, at least every step are needed")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "stiefel": False}
        super().__init__(params, defaults)
        self.orthogonalise_every = orthogonalise_every
        for group in self.param_groups:
            for p in group["params"] if group["stiefel"] else ():
                if p.dim() < 2 or p.shape[-1] != p.shape[-2]:
                    raise ConfigError(f"a rotation of shape {tuple(p.shape)}: square matrices [..., d, d] are needed")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; ``closure`` is evaluated before it, with gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.int64)
                    state["first"] = torch.zeros_like(p)
                    shape = (*p.shape[:-2], 1, 1) if group["stiefel"] else p.shape
                    state["second"] = torch.zeros(shape, dtype=p.dtype, device=p.device)
                state["step"] += 1
                (self._cayley if group["stiefel"] else self._adam)(p, p.grad, state, group)
        return loss

    @staticmethod
    def _moments(gradient: torch.Tensor, square: torch.Tensor, state: dict[str, Any], group: Any) -> torch.Tensor:
        """Update both moments; the bias-corrected, scaled direction."""
        (b1, b2), count = group["betas"], int(state["step"])
        state["first"].mul_(b1).add_(gradient, alpha=1 - b1)
        state["second"].mul_(b2).add_(square, alpha=1 - b2)
        spread = (state["second"] / (1 - b2**count)).sqrt_().add_(group["eps"])
        return state["first"] / (1 - b1**count) / spread

    def _adam(self, p: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: Any) -> None:
        p.sub_(self._moments(gradient, gradient.square(), state, group), alpha=group["lr"])

    def _cayley(self, p: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: Any) -> None:
        x = p.detach()
        riemannian = gradient - x @ gradient.mT @ x
        # On square matrices the canonical inner product is half the Euclidean one.
        square = 0.5 * riemannian.square().sum((-2, -1), keepdim=True)
        direction = self._moments(riemannian, square, state, group)
        half = group["lr"] / 4 * (direction @ x.mT - x @ direction.mT)  # lr/2 A
        eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        both = torch.cat([x, state["first"]], -1)
        moved = torch.linalg.solve(eye + half, both - half @ both)
        new, first = moved.split(x.shape[-1], -1)
        state["first"].copy_(first)
        if int(state["step"]) % self.orthogonalise_every == 0:
            new = reorthogonalise(new)
        p.copy_(new)


def reorthogonalise(x: torch.Tensor) -> torch.Tensor:
    """The orthogonal matrices closest to ``x`` ``[..., d, d]`` (polar factor, computed in float64)."""
    u, _, vh = torch.linalg.svd(x.double())
    return (u @ vh).to(x.dtype)


def orthogonality_error(x: torch.Tensor) -> float:
    """Largest element of ``|X^T X - I|`` over a stack of matrices, in float64."""
    y = x.detach().double()
    eye = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)
    return float((y.mT @ y - eye).abs().max())
