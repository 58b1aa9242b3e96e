"""Column-by-column rounding with error feedback (the GPTQ solver) and an optional descent that starts where it ends.

The objective is ``tr((W - Q) H (W - Q)^T)`` with ``H = (2/N) X^T diag(w) X``. Everything runs on transposed weights
(``[in_features, rows]``): a column of the weight is then one contiguous vector, and all rows advance together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hfq.errors import ConfigError, QuantizationError
from hfq.formats import PER_TENSOR, Codes, QuantSpec, affine
from hfq.rounding import nearest
from hfq.rounding.descent import Descent
from hfq.rounding.factor import Factor, factorise

__all__ = ["Factor", "factorise", "solve", "solve_many"]

_INNER = 32  # columns whose feedback is applied one by one; larger blocks are updated by matrix products


def solve(
    weight: torch.Tensor, hessian: torch.Tensor | Factor, spec: QuantSpec, **options: Any
) -> tuple[Codes, dict[str, Any]]:
    """Codes of ``weight`` ``[rows, K]`` that minimise the error on inputs with second moment ``hessian``.

    The options, and their defaults, are those of :func:`solve_many`.

    Args:
        hessian: ``[K, K]``, or the result of :func:`factorise` (then ``percdamp`` and ``act_order`` are already in it).
        clip, norm, grid, max_shrink: how grids are searched, see :func:`hfq.rounding.nearest.grid_of`.
        weigh_clip: weigh the error of the search with the diagonal of the Hessian.
        block_size: columns between two updates of the whole matrix; changes the result only by rounding.
        act_order: quantize the columns with the largest inputs first. With groups this needs ``static_groups``.
        static_groups: grids from the original weight instead of the weight as updated when its group begins.
        refine: rounds of descent afterwards: scales by least squares, then every code to its best value given the
            others. Each step lowers the (damped) objective or is not taken.
        dtype: float32 or float64, of the column loop.

    Returns:
        The codes on their stored grid, and ``{"loss", "relative_loss", "damping_tries", "damp", "dead_columns"}``:
        ``loss`` is the objective with the undamped Hessian, ``relative_loss`` that over ``tr(W H W^T)``.

    Raises:
        ConfigError: ``act_order`` with groups and without ``static_groups``, or sizes that do not fit.
        QuantizationError: the Hessian cannot be factorised, or something is not finite.
    """
    return solve_many([weight], hessian, spec, **options)[0]


def solve_many(
    weights: Sequence[torch.Tensor],
    hessian: torch.Tensor | Factor,
    spec: QuantSpec,
    *,
    clip: str = "none",
    norm: float = 2.4,
    grid: int = 100,
    max_shrink: float = 0.8,
    weigh_clip: bool = False,
    percdamp: float = 0.01,
    block_size: int = 128,
    act_order: bool = False,
    static_groups: bool = False,
    refine: int = 0,
    dtype: torch.dtype = torch.float32,
    name: str = "",
) -> list[tuple[Codes, dict[str, Any]]]:
    """:func:`solve` for several matrices ``[rows_i, K]`` that read the same input, in one pass over the columns.

    Rows do not influence each other, so the result is that of separate calls up to rounding. ``spec`` may not be
    per tensor when there is more than one matrix.
    """
    factor = hessian
    if not isinstance(factor, Factor):
        factor = factorise(factor, percdamp=percdamp, act_order=act_order, name=name)
    _check(weights, factor, spec, static_groups, name)
    rows = [weight.shape[0] for weight in weights]
    original = torch.cat([weight.detach().to(dtype) for weight in weights]).t().contiguous()
    if not torch.isfinite(original).all():
        raise QuantizationError(f"the weight of {name or 'a linear'} has NaN or infinite elements")
    options = {"clip": clip, "norm": norm, "grid": grid, "max_shrink": max_shrink}
    run = _Columns(original, factor, spec, options, weigh_clip, static_groups)
    run.sweep(block_size)
    codes, scale, zero = run.codes, run.scale, run.zero
    if refine:
        descent = Descent(original, factor.hessian, factor.damp, factor.dead, spec, codes, scale, zero)
        codes, scale = descent.run(refine)
    return _split(original, factor, spec, codes, scale, zero, rows)


def _split(
    original: torch.Tensor,
    factor: Factor,
    spec: QuantSpec,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    rows: list[int],
) -> list[tuple[Codes, dict[str, Any]]]:
    h = factor.hessian.to(original.dtype)
    codes = codes.t().contiguous()
    w = original.t()
    difference = w - affine.decode(codes, scale, zero, spec, original.dtype)
    loss = ((difference @ h) * difference).sum(1).double()
    size = ((w @ h) * w).sum(1).double()
    results, start = [], 0
    for count in rows:
        part = slice(start, start + count)
        own = slice(None) if spec.group_size == PER_TENSOR else part
        lost, whole = float(loss[part].sum()), float(size[part].sum())
        stats = {
            "loss": lost,
            "relative_loss": lost / whole if whole > 0 else 0.0,
            "damping_tries": factor.damping_tries,
            "damp": factor.damp,
            "dead_columns": int(factor.dead.sum()),
        }
        own_zero = None if zero is None else zero[own].clone()
        results.append((Codes(codes[part].clone(), scale[own].clone(), own_zero, spec), stats))
        start += count
    return results


def _check(weights: Sequence[torch.Tensor], factor: Factor, spec: QuantSpec, static_groups: bool, name: str) -> None:
    where = f"{name}: " if name else ""
    k = factor.upper.shape[0]
    for weight in weights:
        if weight.ndim != 2 or weight.shape[1] != k:
            raise ConfigError(f"{where}weight {tuple(weight.shape)} does not fit a Hessian of {k} inputs")
    if factor.order is not None and spec.groups(k) > 1 and not static_groups:
        raise ConfigError(
            f"{where}act_order=True with group_size={spec.group_size} reorders columns across groups: "
            "set static_groups=True"
        )
    if spec.group_size == PER_TENSOR and len(weights) > 1:
        raise ConfigError(f"{where}one scale per tensor: solve the matrices one by one")


class _Columns:
    """One pass over the columns. All tensors are transposed: ``[K, rows]``, parameters ``[groups, rows]``."""

    def __init__(
        self,
        original: torch.Tensor,
        factor: Factor,
        spec: QuantSpec,
        options: dict[str, Any],
        weigh_clip: bool,
        static_groups: bool,
    ) -> None:
        self.spec, self.options, self.factor = spec, options, factor
        self.k, self.rows = original.shape
        self.upper = factor.upper.to(original.dtype)
        self.diag = factor.hessian.diagonal().float() if weigh_clip else None
        self.w = original.masked_fill(factor.dead[:, None], 0)
        per_group = spec.groups(self.k) > 1
        self.dynamic = per_group and not static_groups
        self.length = spec.group_length(self.k)
        self.scales: list[torch.Tensor] = []
        self.zeros: list[torch.Tensor | None] = []
        if not self.dynamic:
            scale, zero = nearest.grid_of(self.w.t(), spec, hessian_diag=self.diag, **options)
            shape = (spec.groups(self.k), self.rows)
            self.scales = list(scale.t().expand(shape).contiguous())
            self.zeros = [None] * shape[0] if zero is None else list(zero.t().expand(shape).contiguous())
        self.order = None if factor.order is None else factor.order.tolist()
        if factor.order is not None:
            self.w = self.w[factor.order]
        self.out = torch.empty(self.k, self.rows, dtype=torch.uint8, device=original.device)

    def sweep(self, block_size: int) -> None:
        """Quantize every column; the error of each is spread over the columns that follow."""
        pivots = self.upper.diagonal().tolist()
        for start, stop in self._blocks(0, self.k, block_size):
            errors = torch.empty(stop - start, self.rows, dtype=self.w.dtype, device=self.w.device)
            for first, last in self._blocks(start, stop, _INNER):
                for j in range(first, last):
                    error = self._column(j, pivots[j], errors[j - start])
                    if j + 1 < last:
                        self.w[j + 1 : last].addr_(self.upper[j, j + 1 : last], error, alpha=-1)
                if last < stop:
                    done = errors[first - start : last - start]
                    self.w[last:stop].addmm_(self.upper[first:last, last:stop].t(), done, alpha=-1)
            if stop < self.k:
                self.w[stop:].addmm_(self.upper[start:stop, stop:].t(), errors, alpha=-1)

    def _blocks(self, start: int, stop: int, size: int) -> list[tuple[int, int]]:
        """Cut ``[start, stop)`` into blocks of ``size``, and before every group that would reach over the end of its
        block: its grid is fitted when all of it has been updated."""
        blocks = []
        while start < stop:
            end = min(start + size, stop)
            if self.dynamic:
                begin = -(-max(start, 1) // self.length) * self.length
                while begin < end and (begin == start or min(begin + self.length, self.k) <= end):
                    begin += self.length
                if start < begin < end:
                    end = begin
            blocks.append((start, end))
            start = end
        return blocks

    def _column(self, j: int, pivot: float, error: torch.Tensor) -> torch.Tensor:
        column = j if self.order is None else self.order[j]
        group = column // self.length
        if self.dynamic and j % self.length == 0:
            part = self.w[j : j + self.length].float()
            weights = None if self.diag is None else self.diag[j : j + self.length]
            scale, zero = nearest.fit_columns(part, self.spec, weights=weights, **self.options)
            self.scales.append(scale)
            self.zeros.append(zero)
        step, zero = self._grid(group)
        w, code = self.w[j], self.out[column]
        torch.div(w, step, out=error)
        if self.spec.zero_point == "float":
            error.add_(zero).round_()
        else:
            error.round_().add_(zero)
        error.clamp_(0, self.spec.max_code)
        code.copy_(error)
        # (w - (code - zero) * step) / pivot
        return error.sub_(zero).mul_(step).sub_(w).div_(-pivot)

    def _grid(self, group: int) -> tuple[torch.Tensor, torch.Tensor | float]:
        if getattr(self, "_group", -1) != group:
            zero = self.zeros[group]
            self._group = group
            self._step = self.scales[group].to(self.w.dtype)
            self._zero = float(self.spec.middle) if zero is None else zero.to(self.w.dtype)
        return self._step, self._zero

    @property
    def codes(self) -> torch.Tensor:
        return self.out

    @property
    def scale(self) -> torch.Tensor:
        if self.spec.group_size == PER_TENSOR:
            return self.scales[0][:1].reshape(1, 1)
        return torch.stack(self.scales, 1)

    @property
    def zero(self) -> torch.Tensor | None:
        if self.spec.symmetric:
            return None
        if self.spec.group_size == PER_TENSOR:
            return self.zeros[0][:1].reshape(1, 1)  # type: ignore[index]
        return torch.stack(self.zeros, 1)  # type: ignore[arg-type]
