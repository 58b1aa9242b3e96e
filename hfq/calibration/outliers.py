"""Outliers found in two steps, and what is done about them: weights are cut off, channels of activations scaled.

Coarse: what lies above the third quartile by a multiple of the distance between the quartiles. Fine: the coarse set,
sorted, is cut in two where the gap between the parts, less the spread of the lower part, is largest. The lower part is
kept as ordinary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hfq.calibration.observers import MinMax
from hfq.calibration.step import input_rows
from hfq.errors import ConfigError, QuantizationError

__all__ = ["RULES", "InputRanges", "Outliers", "Rule", "channel_scales", "detect", "truncate"]

_CHUNK = 1 << 22  # elements sorted at once


@dataclass(frozen=True)
class Rule:
    """How outliers are told apart.

    Attributes:
        low, high: the quantiles whose distance measures the spread of ordinary values.
        reach: how many distances above ``high`` an ordinary value may lie.
        balance: weight of the variance of the kept part against the gap.
        squared: the gap counts squared.
        exponent: of a channel's excess in its scale.
        relative_to: a channel's excess is measured from the largest value of the kept part of the coarse set
            ("kept"), or of all channels that are no outliers ("ordinary").
    """

    low: float = 0.25
    high: float = 0.75
    reach: float = 1.5
    balance: float = 1.0
    squared: bool = True
    exponent: float = 0.5
    relative_to: str = "kept"

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1 or self.reach < 0 or self.balance < 0 or not 0 <= self.exponent <= 1:
            raise ConfigError(f"{self}: quantiles in [0, 1] in order, reach and balance from 0, exponent in [0, 1]")


# As the paper describes it, and as an inference engine ships its half for activations.
RULES = {
    "paper": Rule(),
    "vendor": Rule(0.2, 0.8, squared=False, exponent=0.7, relative_to="ordinary"),
}


@dataclass(frozen=True)
class Outliers:
    """What was found in each row.

    Attributes:
        threshold: ``[rows]``, where the coarse set begins (strictly above).
        limit: ``[rows]``, largest value of the kept part of the coarse set, or the threshold if nothing of it is kept;
            infinite where the coarse set is empty.
        coarse, outlier: bool ``[rows, n]``.
    """

    threshold: torch.Tensor
    limit: torch.Tensor
    coarse: torch.Tensor
    outlier: torch.Tensor


@torch.no_grad()
def detect(values: torch.Tensor, rule: Rule = RULES["paper"]) -> Outliers:
    """Outliers among the non-negative ``values`` ``[rows, n]`` (or ``[n]``, one row), each row for itself.

    Raises:
        QuantizationError: no element, or values that are negative or not finite.
    """
    rows = values[None] if values.ndim == 1 else values
    if rows.ndim != 2 or not rows.numel():
        raise QuantizationError(f"values of shape {tuple(values.shape)}: a vector or a matrix [rows, n] is needed")
    if not bool(torch.isfinite(rows).all()) or bool((rows < 0).any()):
        raise QuantizationError("outliers are looked for in magnitudes: finite and not negative")
    step = max(1, _CHUNK // rows.shape[1])
    parts = [_detect(rows[i : i + step].double(), rule) for i in range(0, len(rows), step)]
    threshold, limit = (torch.cat([part[k] for part in parts]) for k in (0, 1))
    coarse = rows.double() > threshold[:, None]
    return Outliers(threshold, limit, coarse, coarse & (rows.double() > limit[:, None]))


def _detect(rows: torch.Tensor, rule: Rule) -> tuple[torch.Tensor, torch.Tensor]:
    """``(threshold, limit)`` of each row."""
    ordered = rows.sort(1).values
    low, high = (_quantile(ordered, q) for q in (rule.low, rule.high))
    threshold = high + rule.reach * (high - low)
    count = (rows > threshold[:, None]).sum(1)
    most = int(count.max())
    if not most:
        return threshold, torch.full_like(threshold, torch.inf)
    top = ordered[:, -most:]  # the coarse set of a row are its last ``count`` columns
    first = (most - count)[:, None]
    position = torch.arange(most, device=rows.device)[None]
    inside = position >= first
    # Sums over the part before each cut, measured from the threshold so that they stay small.
    above = torch.where(inside, top - threshold[:, None], 0.0)
    total, squares = (_before(x.cumsum(1)) for x in (above, above.square()))
    size = (position - first).clamp(min=0)
    spread = (squares - total.square() / size.clamp(min=1)).clamp(min=0) / (size - 1).clamp(min=1)
    previous = torch.where(size > 0, _before(top), threshold[:, None])
    gap = top - previous
    score = (gap.square() if rule.squared else gap) - rule.balance * torch.where(size >= 2, spread, 0.0)
    best = score.masked_fill(~inside, -torch.inf).argmax(1, keepdim=True)  # the first of equals
    return threshold, torch.where(count > 0, previous.gather(1, best)[:, 0], torch.inf)


def _quantile(ordered: torch.Tensor, share: float) -> torch.Tensor:
    """Linear interpolation between neighbours; exact where they are equal."""
    place = share * (ordered.shape[1] - 1)
    below = int(place)
    a, b = ordered[:, below], ordered[:, min(below + 1, ordered.shape[1] - 1)]
    return a + (b - a) * (place - below)


def _before(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


@torch.no_grad()
def truncate(weight: torch.Tensor, rule: Rule = RULES["paper"]) -> tuple[torch.Tensor, float]:
    """``weight`` ``[rows, n]`` with the outliers of each row cut to the largest ordinary magnitude; and their share."""
    found = detect(weight.detach().abs().float(), rule)
    limit = found.limit[:, None].to(weight.dtype)
    return torch.maximum(torch.minimum(weight.detach(), limit), -limit), float(found.outlier.float().mean())


@torch.no_grad()
def channel_scales(low: torch.Tensor, high: torch.Tensor, rule: Rule = RULES["paper"]) -> torch.Tensor:
    """What each channel should be divided by: at least 1, and exactly 1 for channels without outliers.

    Args:
        low, high: ``[channels]``, smallest and largest activation of each channel.
    """
    scale = torch.ones(high.shape, dtype=torch.float64, device=high.device)
    reach = torch.maximum(high, -low).double()
    for side in (high, -low):
        values = side.double().clamp(min=0)
        found = detect(values, rule)
        outlier = found.outlier[0]
        if not bool(outlier.any()):
            continue
        if rule.relative_to == "kept":
            base, excess = found.limit[0], reach
        else:
            base, excess = values.masked_fill(outlier, 0).max(), values
        if float(base) > 0:  # (all other channels may be zero)
            scale = torch.where(outlier, torch.maximum(scale, (excess / base) ** rule.exponent), scale)
    return scale


class InputRanges:
    """Smallest and largest input of each channel of some modules, padded rows left out.

    Attributes:
        ranges: by the name of the module, ``[features]`` each.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = dict(modules)
        self.ranges = {name: MinMax(axis=-1) for name in modules}

    @contextmanager
    def watching(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> Iterator[None]:
        """Take in what the modules are called with; ``hidden`` enters the block, ``mask`` bool ``[B, T]``."""
        handles = [
            module.register_forward_pre_hook(self._hook(self.ranges[name], hidden, mask), with_kwargs=True)
            for name, module in self.modules.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, seen: MinMax, hidden: torch.Tensor, mask: torch.Tensor | None) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            keep = None if mask is None else input_rows(x, hidden, mask)
            rows = x.detach().reshape(-1, x.shape[-1])
            seen.update(rows if keep is None else rows[keep.to(rows.device)])

        return hook

    def reduce(self) -> None:
        """Merge over all processes; to be called once, by every process."""
        for seen in self.ranges.values():
            seen.reduce()

    def range(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """``(low, high)`` of a module's input channels; ``None`` if it was never called."""
        seen = self.ranges[name]
        return None if seen.low is None else seen.range()
