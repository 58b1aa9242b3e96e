"""Largest magnitudes of input channels, some rows of the inputs, and how many elements round to zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from hfq.calibration import ranks
from hfq.calibration.capture import forward, quiet
from hfq.calibration.step import Step, input_rows
from hfq.errors import DataError

__all__ = ["ColumnMaxima", "Rounding", "channel_maxima", "watching"]

Update = Callable[[torch.Tensor], None]


@contextmanager
def watching(step: Step, i: int, updates: Mapping[nn.Module, Update]) -> Iterator[None]:
    """While call ``i`` of the block runs, hand the input rows of each module to its function, padding left out."""
    hidden, mask = step.hidden(i), step.mask(i)

    def hook(update: Update) -> Callable[..., None]:
        def take(_: nn.Module, args: Any, kwargs: Any) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            keep = None if mask is None else input_rows(x, hidden, mask)
            rows = x.detach().reshape(-1, x.shape[-1]).float()
            rows = rows if keep is None else rows[keep.to(rows.device)]
            if rows.shape[0]:
                update(rows)

        return take

    with ExitStack() as stack:
        for module, update in updates.items():
            stack.callback(module.register_forward_pre_hook(hook(update), with_kwargs=True).remove)
        yield


@torch.no_grad()
def channel_maxima(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], sites: Sequence[Any]
) -> dict[str, tuple[torch.Tensor, int]]:
    """Largest magnitude of every channel of what enters ``sites`` in whole passes of ``model``, over all batches.

    Returns:
        site name → (float32 ``[K]``, number of rows); sites never reached are missing.
    """
    maxima: dict[str, ColumnMaxima] = {}
    rows: dict[str, int] = {}

    def hook(site: Any) -> Callable[..., None]:
        def take(_: nn.Module, args: Any, kwargs: Any) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            flat = x.detach().reshape(-1, x.shape[-1]).float()
            maxima.setdefault(site.name, ColumnMaxima()).update(flat)
            rows[site.name] = rows.get(site.name, 0) + flat.shape[0]

        return take

    with quiet(model), ExitStack() as stack:
        for site in sites:
            stack.callback(site.module.register_forward_pre_hook(hook(site), with_kwargs=True).remove)
        for i in ranks.share(len(batches)):
            forward(model, batches[i])
    found = {}
    for name in sorted({name for names in ranks.gather(sorted(maxima)) for name in names}):
        top = maxima.get(name, ColumnMaxima()).reduce()
        assert top is not None
        found[name] = (top, int(ranks.sum_(torch.tensor([rows.get(name, 0)]))))
    return found


class ColumnMaxima:
    """Of one stream of rows ``[n, K]``: the largest magnitude of every channel, and evenly spaced rows.

    Args:
        percentile: 100 is the maximum; below, the largest over the calls of that percentile of a call's rows.
        samples: rows kept of each call.
    """

    def __init__(self, percentile: float = 100.0, samples: int = 0) -> None:
        self.percentile, self.samples = percentile, samples
        self.top: torch.Tensor | None = None
        self.kept: list[torch.Tensor] = []

    def update(self, rows: torch.Tensor) -> None:
        if not torch.isfinite(rows).all():
            raise DataError("an observed activation has NaN or infinite elements")
        size = rows.abs()
        if self.percentile < 100:
            rank = max(1, round(self.percentile / 100 * rows.shape[0]))
            found = size.kthvalue(rank, dim=0).values
        else:
            found = size.amax(0)
        self.top = found if self.top is None else torch.maximum(self.top, found)
        if self.samples:
            self.kept.append(rows[:: max(rows.shape[0] // self.samples, 1)][: self.samples].clone())

    def reduce(self) -> torch.Tensor | None:
        """The maxima over all processes; to be called once, by every process. ``None``: no process saw a row."""
        widths = [width for width in ranks.gather(None if self.top is None else len(self.top)) if width]
        if not widths:
            return None
        top = torch.zeros(widths[0]) if self.top is None else self.top.cpu()
        return ranks.max_(top.contiguous())


class Rounding:
    """Of one stream of rows: the share of elements that round to zero, and how many codes leave the grid.

    Args:
        bits: width of the symmetric codes.
        columns: ``[K]``, what the rows were divided by; the shares of the raw rows, a step each, are counted too.
        exponent: steps are ``max|raw| ** exponent / max_code`` of the token; default ``max|row| / max_code``.
    """

    def __init__(self, bits: int, columns: torch.Tensor | None = None, exponent: float | None = None) -> None:
        self.top, self.columns, self.exponent = (1 << (bits - 1)) - 1, columns, exponent
        self.counts = torch.zeros(4, dtype=torch.float64)  # elements, zeros, zeros of the raw rows, clamped

    def update(self, rows: torch.Tensor) -> None:
        raw = rows if self.columns is None else rows * self.columns.to(rows.device)
        reach = raw.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        step = rows.abs().amax(-1, keepdim=True).clamp(min=1e-6) if self.exponent is None else reach.pow(self.exponent)
        codes = (rows * (self.top / step)).round_().abs_()
        plain = (raw.abs() * (self.top / reach)).round_()
        found = [rows.numel(), int((codes == 0).sum()), int((plain == 0).sum()), int((codes > self.top).sum())]
        self.counts += torch.tensor(found, dtype=torch.float64)

    def reduce(self) -> dict[str, float | int]:
        """Shares over all processes; to be called once, by every process."""
        total, zeros, plain, clamped = ranks.sum_(self.counts).tolist()
        if not total:
            return {}
        return {
            "zero_share": round(zeros / total, 6), "zero_share_per_token": round(plain / total, 6),
            "clamped": int(clamped),
        }
