"""Descent on ``tr((W - Q) H (W - Q)^T)`` from given codes: scales by least squares, codes one column at a time."""

from __future__ import annotations

import torch

from hfq.formats import PER_TENSOR, QuantSpec, affine

__all__ = ["Descent"]


class Descent:
    """Alternates two steps that never raise the damped objective of a row.

    Args:
        original: ``[K, rows]`` the transposed float weight.
        hessian: ``[K, K]`` undamped; ``damp`` is added to its diagonal, so that inputs which calibration hardly saw
            keep their weight near the original.
        dead: ``[K]`` bool; these columns stay zero.
        codes: uint8 ``[K, rows]``, with ``scale`` and ``zero`` of ``spec.parameter_shape(rows, K)``.
    """

    def __init__(
        self,
        original: torch.Tensor,
        hessian: torch.Tensor,
        damp: float,
        dead: torch.Tensor,
        spec: QuantSpec,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor | None,
    ) -> None:
        self.spec, self.dtype = spec, original.dtype
        self.k, self.rows = original.shape
        self.w = original.masked_fill(dead[:, None], 0)
        self.h = hessian.to(self.dtype, copy=True)
        self.h.diagonal().add_(damp)
        self.h.diagonal()[dead] = 1
        self.length, self.groups = spec.group_length(self.k), spec.groups(self.k)
        shape = (self.groups, self.rows)
        self.step = scale.t().expand(shape).contiguous()
        self.zero = None if zero is None else zero.t().expand(shape).to(self.dtype)
        # Centred codes: the weight is step * centred.
        self.centred = codes.to(self.dtype) - self._spread(self.zero, spec.middle)

    def run(self, rounds: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``rounds`` times both steps; returns codes ``[K, rows]`` and scales in their stored shape."""
        for _ in range(rounds):
            self.fit_scales()
            if not self.sweep():
                break
        self.fit_scales()
        codes = (self.centred + self._spread(self.zero, self.spec.middle)).round_().to(torch.uint8)
        scale = self.step[:1, :1] if self.spec.group_size == PER_TENSOR else self.step.t()
        return codes, scale.contiguous()

    def _spread(self, parameter: torch.Tensor | None, default: float = 0.0) -> torch.Tensor | float:
        """One number an element from one number a group."""
        return default if parameter is None else parameter.repeat_interleave(self.length, 0)[: self.k]

    def _groups_of(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the elements of each group: ``[K, rows]`` to ``[groups, rows]``."""
        padded = torch.nn.functional.pad(x, (0, 0, 0, self.groups * self.length - self.k))
        return padded.reshape(self.groups, self.length, self.rows).sum(1)

    def fit_scales(self) -> None:
        """The scales that minimise the objective for the codes as they are, where that (after rounding to the stored
        dtype) is an improvement of the row."""
        q = self.centred
        right = self._groups_of(q * (self.h @ self.w)).t()  # [rows, groups]
        left = torch.empty(self.rows, self.groups, self.groups, dtype=self.dtype, device=q.device)
        for g in range(self.groups):
            part = slice(g * self.length, (g + 1) * self.length)
            left[:, g] = self._groups_of(q * (self.h[:, part] @ q[part])).t()
        old = self.step.to(self.dtype).t()
        if self.spec.group_size == PER_TENSOR:
            left, right, old = left.sum(0, keepdim=True), right.sum(0, keepdim=True), old[:1]
        # Groups without a code off zero have no say in the objective: the ridge keeps their scale.
        ridge = 1e-6 * left.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).clamp(min=1e-30)
        system = left + torch.diag_embed(ridge.expand_as(right))
        new, info = torch.linalg.solve_ex(system, right + ridge * old)
        stored = new.to(self.step.dtype)
        usable = (info == 0)[:, None] & torch.isfinite(stored) & (new >= affine.smallest_scale(self.spec))
        candidate = torch.where(usable, stored.to(self.dtype), old)
        better = self._value(left, right, candidate) < self._value(left, right, old)
        kept = torch.where(better[:, None], candidate, old).to(self.step.dtype)
        self.step = kept.t().expand(self.groups, self.rows).contiguous()

    @staticmethod
    def _value(left: torch.Tensor, right: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The part of a row's objective that depends on its scales."""
        return ((left @ scale[..., None])[..., 0] - 2 * right).mul(scale).sum(-1)

    def sweep(self, block_size: int = 128) -> bool:
        """Move every code to its best value given all others, column by column; whether any moved."""
        top = self.spec.max_code
        diagonal = self.h.diagonal().tolist()
        step = self.step.to(self.dtype)
        lowest = -self.zero if self.zero is not None else torch.full_like(step, -float(self.spec.middle))
        highest = lowest + top
        pull = self.h @ (self.w - self._spread(step) * self.centred)  # H (W - Q)
        moved = False
        for start in range(0, self.k, block_size):
            stop = min(start + block_size, self.k)
            local, change = pull[start:stop].clone(), torch.zeros_like(pull[start:stop])
            for j in range(start, stop):
                g = j // self.length
                best = torch.addcdiv(self.centred[j], local[j - start], step[g], value=1 / diagonal[j])
                if self.spec.zero_point == "float":
                    best = (best - lowest[g]).round_().clamp_(0, top) + lowest[g]
                else:
                    best = torch.minimum(torch.maximum(best.round_(), lowest[g]), highest[g])
                delta = torch.mul(best - self.centred[j], step[g], out=change[j - start])
                self.centred[j] = best
                if j + 1 < stop:
                    local[j + 1 - start :].addr_(self.h[j + 1 : stop, j], delta, alpha=-1)
            if change.any():
                moved = True
                pull.addmm_(self.h[:, start:stop], change, alpha=-1)
        return moved
