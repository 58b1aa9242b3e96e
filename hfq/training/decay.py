"""A low-rank helper of a weight that loses its rank in phases until nothing is left of it.

In a phase the stronger part of its components stays and the weaker part fades; then the weaker part is cut off and
what is left is factorised anew, so that components are sorted by energy again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from hfq.errors import ConfigError

__all__ = ["CURVES", "Decay", "factorise", "refactorise"]

CURVES = ("cosine", "linear")


@dataclass(frozen=True)
class Decay:
    """When which component has which factor: a pure function of the step.

    Args:
        rank: at the start.
        phase_steps: steps of one phase.
        shrink: share of the components that fades in a phase; the rest, rounded down, stays.
        curve: how they fade, "cosine" ``(1 + cos(pi t / T)) / 2`` or "linear" ``1 - t / T``.
        warmup: steps before the first phase, all components whole.
    """

    rank: int
    phase_steps: int
    shrink: float = 0.5
    curve: str = "cosine"
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.phase_steps < 1 or self.warmup < 0:
            raise ConfigError(f"rank={self.rank}, phase_steps={self.phase_steps}, warmup={self.warmup}: "
                              "positive numbers are needed (warmup may be 0)")
        if not 0 < self.shrink <= 1:
            raise ConfigError(f"shrink={self.shrink!r}: a number in (0, 1]")
        if self.curve not in CURVES:
            raise ConfigError(f"schedule={self.curve!r}: one of {list(CURVES)}")

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """The rank in each phase; the last one is 0."""
        found = [self.rank]
        while found[-1]:
            found.append(math.floor((1 - self.shrink) * found[-1]))
        return tuple(found)

    @property
    def steps(self) -> int:
        """The first step without the helper."""
        return self.warmup + self.phase_steps * (len(self.ranks) - 1)

    def phase(self, step: int) -> int:
        return min(max(step - self.warmup, 0) // self.phase_steps, len(self.ranks) - 1)

    def rank_at(self, step: int) -> int:
        return self.ranks[self.phase(step)]

    def factors(self, step: int) -> torch.Tensor:
        """``[rank]`` float32: 1 for what stays, ``u`` in ``(0, 1]`` for what fades, 0 for what is gone."""
        phase, found = self.phase(step), torch.zeros(self.rank)
        rank = self.ranks[phase]
        if rank:
            keep = self.ranks[phase + 1]
            share = (max(step - self.warmup, 0) - phase * self.phase_steps) / self.phase_steps
            found[:keep] = 1
            found[keep:rank] = (1 + math.cos(math.pi * share)) / 2 if self.curve == "cosine" else 1 - share
        return found


def factorise(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``L`` ``[rows, rank]`` and ``R`` ``[rank, columns]``, float32, with the nearest product of that rank.

    Both carry the root of the singular values, largest first.
    """
    u, s, v = torch.linalg.svd(matrix.detach().float(), full_matrices=False)
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).contiguous(), (root[:, None] * v[:rank]).contiguous()


def refactorise(left: torch.Tensor, right: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The product of the first ``rank`` components, factorised anew; the other components of the result are zero.

    Through two thin QR decompositions: the product itself, as large as the weight, is never made.
    """
    q1, r1 = torch.linalg.qr(left[:, :rank].float())
    q2, r2 = torch.linalg.qr(right[:rank].float().t())
    u, s, v = torch.linalg.svd(r1 @ r2.t(), full_matrices=False)
    root, new_left, new_right = s.sqrt(), torch.zeros_like(left), torch.zeros_like(right)
    new_left[:, :rank] = (q1 @ u) * root
    new_right[:rank] = root[:, None] * (v @ q2.t())
    return new_left, new_right
