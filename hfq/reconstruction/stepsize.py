"""Steps of weights and inputs searched together, by the error of a layer's output weighted with squared gradients.

The error is ``sum (g (y - y'))^2`` over sampled rows, with ``y`` the float output, ``y'`` that of the codes, and ``g``
the gradient of the loss at the output (ones: plain squared error). Steps are multiples of those that cover minimum and
maximum; weights have a multiple a row, inputs one for the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hfq.formats import ActivationSpec, Codes, QuantSpec, activation, affine, twin
from hfq.formats.activation import SMALLEST_RANGE, Parameters
from hfq.formats.twin import TwinSpec
from hfq.rounding import nearest

__all__ = ["GELU_LOW", "Reader", "Search", "fake", "first_shift", "inputs_alone", "joint", "shift_grid"]

# The least number that a GELU gives, negated.
GELU_LOW = 0.16997
Input = tuple[ActivationSpec | TwinSpec, Parameters]


@dataclass(frozen=True)
class Reader:
    """A layer that reads the inputs: float weight ``[O, K]``, its grid, and gradients ``[N, O]`` (``None``: ones)."""

    weight: torch.Tensor
    spec: QuantSpec
    gradients: torch.Tensor | None = None


@dataclass(frozen=True)
class Search:
    """How steps are searched: ``count`` multiples from ``low`` to ``high``, in ``rounds`` of weights and inputs."""

    count: int = 100
    low: float = 0.01
    high: float = 1.2
    rounds: int = 3

    @property
    def multiples(self) -> list[float]:
        """From the largest on: of equal errors the wider range stays."""
        if self.count == 1:
            return [1.0]
        step = (self.high - self.low) / (self.count - 1)
        return [self.high - step * i for i in range(self.count)]


def fake(x: torch.Tensor, given: Input | None) -> torch.Tensor:
    if given is None:
        return x
    spec, params = given
    return twin.fake(x, params[0], spec) if isinstance(spec, TwinSpec) else activation.fake(x, spec, params)


def first_shift(x: torch.Tensor, spec: TwinSpec) -> tuple[int, float]:
    """The shift with which both grids are exactly full, and the largest number (start values for empty regions)."""
    low, high = float(-x.min()), float(x.max())
    levels = 1 << (spec.bits - 1)
    # A region without numbers keeps what a GELU would give it: a range of its bound, a top of one.
    low, high = low if low > 0 else GELU_LOW, high if high > 0 else 1.0
    ratio = (high / max(levels - 1, 1)) / (low / levels)
    return round(math.log2(max(ratio, 1e-30))), max(high, SMALLEST_RANGE)


def shift_grid(first: int, below: int = 3, above: int = 2) -> list[int]:
    """The shifts that are tried: those around the first one, and none."""
    return sorted({0} | {min(15, max(0, m)) for m in range(max(0, first - below), max(0, first + above) + 1)})


class _Rows:
    """Rows and their readers; errors of the readers' outputs."""

    def __init__(self, rows: torch.Tensor, readers: Sequence[Reader]) -> None:
        self.x, self.readers = rows.float(), readers
        self.weights = [r.weight.detach().float().cpu() for r in readers]
        self.outputs = [self.x @ w.t() for w in self.weights]
        self.weighing = [None if r.gradients is None else _scaled(r.gradients) for r in readers]

    def columns(self, i: int, coded: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Errors of reader ``i``'s outputs ``[O]``, float64."""
        e = coded @ weight.t() - self.outputs[i]
        e = e if self.weighing[i] is None else e * self.weighing[i]
        return e.square_().sum(0, dtype=torch.float64)

    def total(self, coded: torch.Tensor, weights: Sequence[torch.Tensor]) -> float:
        return sum(float(self.columns(i, coded, w).sum()) for i, w in enumerate(weights))


def _scaled(gradients: torch.Tensor) -> torch.Tensor | None:
    """Gradients in units of their own size: squares of very small ones would vanish. All zero: they say nothing."""
    g = gradients.float()
    size = g.square().mean().sqrt()
    return g / size if float(size) > 0 else None


def joint(
    rows: torch.Tensor, readers: Sequence[Reader], spec: ActivationSpec | TwinSpec | None, search: Search, *,
    shifts: Callable[[int], Sequence[int]] = shift_grid,
) -> tuple[Input | None, list[Codes], float]:
    """Range of the inputs and codes of each reader: ``(input, codes, error)``.

    Args:
        rows: inputs ``[N, K]``.
        spec: grid of the inputs; of two grids the shift is searched too. ``None`` for floats.
        shifts: the shift that makes both grids full to the ones that are tried.
    """
    data = _Rows(rows, readers)
    grids = [nearest.grid_of(w, r.spec) for w, r in zip(data.weights, readers, strict=True)]
    codes = [_codes(w, r.spec, *g) for w, r, g in zip(data.weights, readers, grids, strict=True)]
    values = [affine.dequantize(c).float() for c in codes]
    given: Input | None = None if spec is None else _widest(data.x, spec)
    best = (math.inf, given, codes)
    for _ in range(max(1, search.rounds)):
        coded = fake(data.x, given)
        codes = [_weights(data, i, coded, grids[i], search) for i in range(len(readers))]
        values = [affine.dequantize(c).float() for c in codes]
        if spec is not None:
            given = _inputs(data, values, spec, search, shifts)
        error = data.total(fake(data.x, given), values)
        if error < best[0]:
            best = (error, given, codes)
        elif error == best[0] or spec is None:
            break
    return best[1], best[2], best[0]


def inputs_alone(
    rows: torch.Tensor, readers: Sequence[Reader], spec: ActivationSpec | TwinSpec, search: Search
) -> Input:
    """The range of the inputs in front of float weights."""
    data = _Rows(rows, readers)
    return _inputs(data, data.weights, spec, search, shift_grid)


def _codes(weight: torch.Tensor, spec: QuantSpec, scale: torch.Tensor, zero: torch.Tensor | None) -> Codes:
    return Codes(affine.encode(weight, scale, zero, spec), scale, zero, spec)


def _weights(data: _Rows, i: int, coded: torch.Tensor, grid: Any, search: Search) -> Codes:
    """The multiple of each row's step with the least error of its output."""
    weight, spec, (scale, zero) = data.weights[i], data.readers[i].spec, grid
    least = torch.full((scale.shape[0],), math.inf, dtype=torch.float64)
    chosen = scale.clone()
    for multiple in search.multiples:
        tried = (scale.float() * multiple).to(scale.dtype)
        tried = torch.where(tried > 0, tried, scale)  # too small for the dtype of scales
        error = data.columns(i, coded, affine.dequantize(_codes(weight, spec, tried, zero)).float())
        error = error if error.shape == least.shape else error.sum().reshape(1)  # one scale for all rows
        better = error < least
        least = torch.where(better, error, least)
        chosen = torch.where(better[:, None], tried, chosen)
    return _codes(weight, spec, chosen, zero)


def _widest(x: torch.Tensor, spec: ActivationSpec | TwinSpec) -> Input:
    if isinstance(spec, TwinSpec):
        first, high = first_shift(x, spec)
        tried = replace(spec, shift=min(15, max(0, first)))
        return tried, (twin.scale_of(torch.tensor([high]), tried), None)
    low, high = x.min().reshape(1), x.max().reshape(1)
    return spec, activation.range_parameters(low, high, spec)


def _inputs(
    data: _Rows, values: Sequence[torch.Tensor], spec: ActivationSpec | TwinSpec, search: Search,
    shifts: Callable[[int], Sequence[int]],
) -> Input:
    """The range (and shift) of the inputs with the least error of all outputs together."""
    start = _widest(data.x, spec)
    candidates: list[Input] = []
    if isinstance(spec, TwinSpec):
        first, high = first_shift(data.x, spec)
        for shift in shifts(first):
            tried = replace(spec, shift=shift)
            candidates += [(tried, (twin.scale_of(torch.tensor([max(high * c, SMALLEST_RANGE)]), tried), None))
                           for c in search.multiples]  # fmt: skip
    else:
        scale, zero = start[1]
        candidates = [(spec, (scale * c, zero)) for c in search.multiples]
    best, found = math.inf, start
    for candidate in candidates:
        error = data.total(fake(data.x, candidate), values)
        if error < best:
            best, found = error, candidate
    return found
