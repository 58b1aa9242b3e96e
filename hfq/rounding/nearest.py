"""Round to nearest on a searched grid: min-max, shrunk range, range and zero point together, or percentiles.

A grid is chosen per group by its own error; rows, groups and candidates are independent. The search runs on the
transposed weight (``[group elements, groups]``): parameters then broadcast along the contiguous axis, which is also the
layout in which :mod:`hfq.rounding.gptq` fits one group of all rows at a time.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from hfq.errors import ConfigError, QuantizationError
from hfq.formats import PER_TENSOR, Codes, QuantSpec, affine

__all__ = ["CLIPS", "fit_columns", "grid_of", "solve"]

CLIPS = ("none", "mse", "mse2d", "percentile", "percentiles")
# The shares of which "percentiles" takes the best.
_SHARES = (0.999, 0.9999, 0.99999)

# Elements in flight at once: three float32 temporaries of this size stay in a core's second-level cache.
_CHUNK_CPU = 1 << 16
_CHUNK_OTHER = 1 << 24
# Zero points tried per range in the two-dimensional search; up to 4 bits that is all of them.
_MOST_ZERO_POINTS = 16


def solve(weight: torch.Tensor, spec: QuantSpec, **options: Any) -> Codes:
    """Codes of ``weight`` ``[rows, in_features]`` on the grid that :func:`grid_of` finds with the same options.

    Halves round to even.
    """
    scale, zero_point = grid_of(weight, spec, **options)
    return Codes(affine.encode(weight.detach().float(), scale, zero_point, spec), scale, zero_point, spec)


def grid_of(
    weight: torch.Tensor,
    spec: QuantSpec,
    *,
    clip: str = "none",
    norm: float = 2.4,
    grid: int = 100,
    max_shrink: float = 0.8,
    share: float = 0.999,
    hessian_diag: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero point of every group of ``weight`` ``[rows, in_features]``.

    Args:
        clip: ``"none"`` covers minimum and maximum. ``"mse"`` shrinks both ends by ``1 - i/grid`` for
            ``i = 0 .. max_shrink * grid - 1`` and keeps the least ``sum |w - Q(w)|**norm``. ``"mse2d"`` tries every
            zero point with every range width (symmetric grids: the same as ``"mse"``; above 4 bits the zero points
            are thinned to 16 a range). ``"percentile"`` covers the central ``2 * share - 1`` of the elements,
            ``"percentiles"`` takes of 0.999, 0.9999 and 0.99999 the share of the least squared error.
        norm: exponent of the error.
        share: the upper quantile that ``"percentile"`` keeps; its mirror image is the lower one.
        hessian_diag: ``[in_features]`` non-negative weights of the columns in the error (mean square of the inputs).

    Returns:
        ``(scale, zero_point)`` of shape ``spec.parameter_shape(rows, in_features)``, in their stored dtypes.

    Raises:
        ConfigError: ``clip`` or a range is impossible. QuantizationError: the weight is not finite.
    """
    _check(clip, norm, grid, max_shrink, share)
    if weight.ndim != 2:
        raise ConfigError(f"a matrix [rows, in_features] is needed, got shape {tuple(weight.shape)}")
    if not torch.isfinite(weight).all():
        raise QuantizationError("the tensor to quantize has NaN or infinite elements")
    w = weight.detach().float()
    rows, in_features = w.shape
    options = {"clip": clip, "norm": norm, "grid": grid, "max_shrink": max_shrink, "share": share}
    if spec.group_size == PER_TENSOR:
        weights = None if hessian_diag is None else hessian_diag.expand(rows, -1).reshape(-1)
        scale, zero = fit_columns(w.reshape(-1, 1), spec, weights=weights, **options)
        return scale.reshape(1, 1), None if zero is None else zero.reshape(1, 1)
    length = spec.group_length(in_features)
    scales, zeros = [], []
    for start in range(0, in_features, length):
        part = slice(start, start + length)
        weights = None if hessian_diag is None else hessian_diag[part]
        scale, zero = fit_columns(w[:, part].t(), spec, weights=weights, **options)
        scales.append(scale)
        zeros.append(zero)
    return torch.stack(scales, 1), None if spec.symmetric else torch.stack(zeros, 1)  # type: ignore[arg-type]


def fit_columns(
    x: torch.Tensor,
    spec: QuantSpec,
    *,
    clip: str = "none",
    norm: float = 2.4,
    grid: int = 100,
    max_shrink: float = 0.8,
    share: float = 0.999,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One grid for each column of float32 ``x`` ``[elements, columns]``: ``(scale [columns], zero_point [columns])``.

    The options are those of :func:`grid_of`; ``weights`` is ``[elements]``.
    """
    if clip == "none":
        return affine.fit_range(x.amin(0).clamp(max=0), x.amax(0).clamp(min=0), spec)
    if weights is not None and not bool((weights > 0).any()):
        weights = None  # inputs that were never seen: every error counts the same
    width = max(1, (_CHUNK_CPU if x.device.type == "cpu" else _CHUNK_OTHER) // x.shape[0])
    parts = [
        _fit_chunk(x[:, i : i + width].contiguous(), spec, clip, norm, grid, max_shrink, share, weights)
        for i in range(0, x.shape[1], width)
    ]
    scale = torch.cat([scale for scale, _ in parts])
    return scale, None if spec.symmetric else torch.cat([zero for _, zero in parts])  # type: ignore[misc]


def _fit_chunk(
    x: torch.Tensor,
    spec: QuantSpec,
    clip: str,
    norm: float,
    grid: int,
    max_shrink: float,
    share: float,
    weights: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if clip in ("percentile", "percentiles"):
        last, ordered, candidates = x.shape[0] - 1, x.sort(dim=0).values, []
        for kept in _SHARES if clip == "percentiles" else (share,):
            low, high = ordered[math.floor((1 - kept) * last)], ordered[math.ceil(kept * last)]
            scale, zero = affine.fit_range(low.clamp(max=0), high.clamp(min=0), spec)
            candidates.append((scale, scale if zero is None else zero))
        if len(candidates) > 1:
            return _best(x, spec, candidates, 2, weights)
        return candidates[0][0], None if spec.symmetric else candidates[0][1]
    low, high = x.amin(0).clamp(max=0), x.amax(0).clamp(min=0)
    fractions = 1 - torch.arange(max(1, int(max_shrink * grid)), device=x.device, dtype=x.dtype) / grid
    if clip == "mse2d" and not spec.symmetric:
        candidates = _ranges_and_zero_points(low, high, fractions, spec)
    else:
        scale, zero = affine.fit_range(fractions[:, None] * low, fractions[:, None] * high, spec)
        candidates = list(zip(scale, scale if zero is None else zero, strict=True))
    return _best(x, spec, candidates, norm, weights)


def _ranges_and_zero_points(
    low: torch.Tensor, high: torch.Tensor, fractions: torch.Tensor, spec: QuantSpec
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every (scale, zero point) worth trying.

    With a step ``d`` the grid covers ``[-z d, (max_code - z) d]``. A window that sticks out beyond one end of the data
    while it cuts the other end off is never better than the window moved inside, so only the zero points between
    "touches the lower end" and "touches the upper end" are tried (one more on each side, as both are rounded).
    """
    top = spec.max_code
    found = []
    for fraction in fractions:
        scale, _ = affine.fit_range(fraction * low, fraction * high, spec)
        step = scale.float()
        first = (top - high / step).floor().clamp(0, top)
        last = torch.maximum((-low / step).ceil().clamp(0, top), first)
        count = int((last - first).amax()) + 1
        stride = max(1.0, (count - 1) / (_MOST_ZERO_POINTS - 1))
        for i in range(min(count, _MOST_ZERO_POINTS)):
            zero = torch.minimum(first + round(i * stride), last)
            found.append((scale, zero.to(scale.dtype if spec.zero_point == "float" else torch.uint8)))
    return found


def _best(
    x: torch.Tensor,
    spec: QuantSpec,
    candidates: list[tuple[torch.Tensor, torch.Tensor]],
    norm: float,
    weights: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    least = torch.full_like(x[0], math.inf)
    best_scale, best_zero = candidates[0][0].clone(), candidates[0][1].clone()
    at, code = torch.empty_like(x), torch.empty_like(x)
    for scale, zero in candidates:
        step = scale.float()
        z = torch.full_like(step, spec.middle) if spec.symmetric else zero.float()
        # In units of the step, so that one multiplication a group at the end replaces one an element.
        torch.addcmul(z, x, step.reciprocal(), out=at)
        torch.round(at, out=code)
        code.clamp_(0, spec.max_code).sub_(at)
        error = _power(code, norm)
        total = (error.sum(0) if weights is None else weights.to(error.dtype) @ error).mul_(step.pow(norm))
        better = total < least
        least = torch.where(better, total, least)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, None if spec.symmetric else best_zero


def _power(error: torch.Tensor, norm: float) -> torch.Tensor:
    """``|error| ** norm`` in place; exp and log are four times as fast as ``pow``, and log(0) gives exp(-inf) = 0."""
    if norm == 2:
        return error.square_()
    if norm == 1:
        return error.abs_()
    return error.abs_().log_().mul_(norm).exp_()


def _check(clip: str, norm: float, grid: int, max_shrink: float, share: float) -> None:
    if clip not in CLIPS:
        raise ConfigError(f"clip={clip!r}: one of {list(CLIPS)}")
    if not norm > 0:
        raise ConfigError(f"norm={norm!r}: a positive number")
    if grid < 1 or not 0 <= max_shrink < 1:
        raise ConfigError(f"grid={grid!r}, max_shrink={max_shrink!r}: grid at least 1, max_shrink in [0, 1)")
    if not 0.5 < share <= 1:
        raise ConfigError(f"share={share!r}: a number in (0.5, 1]")
