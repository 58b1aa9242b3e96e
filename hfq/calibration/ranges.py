"""Stored grids for tensors of which a sample is known: minimum and maximum, percentiles, least error; pure functions.

A sample is ``rows`` ``[N, K]``: what a product will multiply, one token a row. :func:`fit` gives one grid for the
tensor, :func:`fit_channels` one a column and :func:`fit_groups` one for each group of columns, with zero points that
may lie off the grid (a channel far from zero).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from hfq.errors import ConfigError, DataError
from hfq.formats import ActivationSpec, activation, groups, log, twin
from hfq.formats.activation import Parameters
from hfq.formats.log import LogSpec
from hfq.formats.twin import TwinSpec

__all__ = ["OBSERVERS", "PERCENTILES", "fit", "fit_channels", "fit_groups", "fit_log", "fit_twin", "quantiles"]

OBSERVERS = ("minmax", "percentile", "mse", "kl")
# Share of the elements under the upper end of the range (and, mirrored, over its lower end): the best one is taken.
PERCENTILES = (0.999, 0.9999, 0.99999)
_ELEMENTS = 1 << 22  # elements in flight at once


def quantiles(ordered: torch.Tensor, shares: Sequence[float]) -> torch.Tensor:
    """Quantiles ``[len(shares), ...]`` of the first axis of a sorted tensor, with linear interpolation."""
    at = torch.tensor(shares, dtype=torch.float64) * (ordered.shape[0] - 1)
    below = at.floor().long()
    above = (below + 1).clamp(max=ordered.shape[0] - 1)
    weight = (at - below).to(ordered.device, ordered.dtype).reshape(-1, *[1] * (ordered.dim() - 1))
    return ordered[below] + (ordered[above] - ordered[below]) * weight


def fit(
    rows: torch.Tensor, spec: ActivationSpec, observer: str = "percentile", *,
    percentiles: Sequence[float] = PERCENTILES, grid: int = 100, max_shrink: float = 1.0, norm: float = 2.0,
) -> Parameters:
    """Scale ``[1]`` and zero point ``[1]`` of one grid for all of ``rows``.

    Args:
        observer: "minmax" covers everything; "percentile" takes of the ranges between the quantiles ``1 - p`` and ``p``
            the one with the least error; "mse" shrinks the whole range in steps of ``1 / grid``, up to ``max_shrink``,
            for the least error; "kl" the symmetric range whose quantized histogram diverges least from that of the
            numbers. The error is the mean of ``|x - q(x)| ** norm``.
        percentiles: of "percentile".

    Raises:
        ConfigError: the observer is unknown. DataError: no rows, or numbers that are not finite.
    """
    x = _checked(rows).reshape(-1)
    if observer == "kl":
        from hfq.calibration import observers

        found = observers.Kl(spec.bits, spec.symmetric)
        found.update(x)
        return _parameters(*found.range(), spec)
    return _least(x, _candidates(x, observer, percentiles, grid, max_shrink), spec, norm)


def _candidates(
    x: torch.Tensor, observer: str, percentiles: Sequence[float], grid: int, max_shrink: float
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    if observer == "minmax":
        return [(x.min(), x.max())]
    if observer == "percentile":
        ordered = x.sort().values
        lows, highs = quantiles(ordered, [1 - p for p in percentiles]), quantiles(ordered, percentiles)
        return list(zip(lows, highs, strict=True))
    if observer == "mse":
        low, high = x.min().clamp(max=0), x.max().clamp(min=0)
        return [(low * (1 - i / grid), high * (1 - i / grid)) for i in range(round(grid * max_shrink))]
    raise ConfigError(f"observer={observer!r}: one of {OBSERVERS}")


def _parameters(low: torch.Tensor, high: torch.Tensor, spec: ActivationSpec) -> Parameters:
    scale, zero = activation.range_parameters(low.reshape(1).float(), high.reshape(1).float(), spec)
    return scale, zero


def _least(
    x: torch.Tensor, ranges: Sequence[tuple[torch.Tensor, torch.Tensor]], spec: ActivationSpec, norm: float
) -> Parameters:
    found = [_parameters(low, high, spec) for low, high in ranges]
    if len(found) == 1:
        return found[0]
    errors = [float((activation.fake(x, spec, params) - x).abs().pow(norm).sum(dtype=torch.float64))
              for params in found]  # fmt: skip
    return found[errors.index(min(errors))]


def fit_channels(
    rows: torch.Tensor, bits: int, *, percentiles: Sequence[float] = PERCENTILES, symmetric: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A grid for every column: float64 ``(scale [K], zero_point [K])``, of the least squared error of its column.

    ``scale = (high - low) / (2**bits - 1)`` between two quantiles and ``zero_point = round(-low / scale)``, an integer
    that lies on the grid only if the range contains zero. A constant column has the least scale there is, 1e-5 over the
    steps.

    Args:
        symmetric: all zero points are ``2**(bits-1)``: where a shift of single channels cannot be undone.
    """
    x, top, middle = _checked(rows).double(), (1 << bits) - 1, 1 << (bits - 1)
    scales, zeros = [], []
    for part in x.split(max(1, _ELEMENTS // x.shape[0]), dim=1):
        ordered = part.sort(dim=0).values
        lows, highs = quantiles(ordered, [1 - p for p in percentiles]), quantiles(ordered, percentiles)
        least = torch.full((part.shape[1],), torch.inf, dtype=torch.float64)
        best_scale, best_zero = torch.ones_like(least), torch.zeros_like(least)
        for low, high in zip(lows, highs, strict=True):
            if symmetric:
                scale = (torch.maximum(low.abs(), high.abs()) / (middle - 1)).clamp(min=1e-5 / top)
                zero = torch.full_like(scale, middle)
            else:
                scale = (high - low).clamp(min=1e-5) / top
                zero = (-low / scale).round()
            error = (((part / scale).round() + zero).clamp(0, top).sub(zero).mul(scale) - part).square().sum(0)
            better = error < least
            least = torch.where(better, error, least)
            best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        scales.append(best_scale)
        zeros.append(best_zero)
    return torch.cat(scales), torch.cat(zeros)


def fit_groups(
    rows: torch.Tensor, labels: torch.Tensor, bits: int, observer: str = "percentile", *,
    percentiles: Sequence[float] = PERCENTILES, zero: bool = False, largest: int = groups.LARGEST_ZERO,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point ``[groups]``, float32, for each group of columns: see :func:`hfq.formats.groups.grid`.

    Args:
        labels: group of each column, int64 ``[K]``; none of ``0 .. max`` is left out.
        observer: "minmax" covers everything; "percentile" takes of the ranges between the quantiles ``1 - p`` and ``p``
            the one with the least squared error of its group.
        zero: every range contains zero, which is then exact.
        largest: zero point.

    Raises:
        ConfigError: another observer. DataError: no rows, or numbers that are not finite.
    """
    x, count = _checked(rows), int(labels.max()) + 1
    if observer not in ("percentile", "minmax"):
        raise ConfigError(f"observer={observer!r} of groups: 'percentile' or 'minmax'")
    if count == len(labels):  # a group a column
        parts = [part for part in x[:, labels.argsort()].split(max(1, _ELEMENTS // x.shape[0]), 1)]
    else:
        parts = [x[:, labels == label].reshape(-1, 1) for label in range(count)]
    shares = percentiles if observer == "percentile" else [1.0]
    found = [_least_columns(part, bits, shares, zero, largest) for part in parts]
    return torch.cat([scale for scale, _ in found]), torch.cat([z for _, z in found])


def _least_columns(
    x: torch.Tensor, bits: int, shares: Sequence[float], zero: bool, largest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the grids between quantiles, that with the least squared error of each column of ``x``."""
    ordered = x.sort(dim=0).values
    lows, highs = quantiles(ordered, [1 - share for share in shares]), quantiles(ordered, shares)
    least = torch.full((x.shape[1],), torch.inf, dtype=torch.float64)
    best = torch.ones(x.shape[1]), torch.zeros(x.shape[1])
    for low, high in zip(lows, highs, strict=True):
        low, high = (low.clamp(max=0), high.clamp(min=0)) if zero else (low, high)
        scale, z = groups.grid(low, high, bits, largest)
        decoded = (groups.encode(x, scale, z, bits).to(x.dtype) - z) * scale
        error = (decoded - x).square().sum(0, dtype=torch.float64)
        best = tuple(torch.where(error < least, new, old) for new, old in zip((scale, z), best, strict=True))
        least = torch.minimum(error, least)
    return best


def fit_log(x: torch.Tensor, spec: LogSpec, *, percentiles: Sequence[float] = PERCENTILES) -> torch.Tensor:
    """Scale ``[1]`` of a logarithmic format: the upper quantile with the least squared error."""
    x = _checked(x).reshape(-1)
    tops = quantiles(x.sort().values, percentiles).clamp(min=activation.SMALLEST_RANGE)
    errors = [float((log.fake(x, top, spec) - x).square().sum(dtype=torch.float64)) for top in tops]
    return tops[errors.index(min(errors))].reshape(1)


def fit_twin(
    x: torch.Tensor, spec: TwinSpec, *, shifts: Sequence[int] = range(9), grid: int = 40, top: float | None = None
) -> tuple[TwinSpec, torch.Tensor]:
    """Shift and fine step ``[1]`` of the least squared error: ``(spec with that shift, scale)``.

    Args:
        grid: ends of the coarse grid that are tried, from the largest number down to a third of it.
        top: the end of the coarse grid, if it is known (one, for what softmax gives).
    """
    x = _checked(x).reshape(-1)
    high = float(x.max()) if spec.regions == "signed" else float(x.abs().max())
    ends = [top] if top is not None else [max(high, activation.SMALLEST_RANGE) * (1 - i * 2 / 3 / grid)
                                          for i in range(grid)]  # fmt: skip
    best, found = float("inf"), (spec, torch.ones(1))
    for shift in shifts:
        tried = replace(spec, shift=shift)
        for end in ends:
            scale = twin.scale_of(torch.tensor([end]), tried)
            error = float((twin.fake(x, scale, tried) - x).square().sum(dtype=torch.float64))
            if error < best:
                best, found = error, (tried, scale)
    return found


def _checked(rows: torch.Tensor) -> torch.Tensor:
    if not rows.numel():
        raise DataError("no calibration rows were seen: no range can be found")
    if not bool(torch.isfinite(rows).all()):
        raise DataError("an observed activation has NaN or infinite elements")
    return rows.detach().float()
