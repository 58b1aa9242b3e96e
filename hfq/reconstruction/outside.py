"""One site outside the blocks, learned by itself behind the packed blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from hfq.calibration import sequence, static
from hfq.calibration.cache import Store
from hfq.graph.links import Pair
from hfq.layers import swap
from hfq.reconstruction import drop, losses, units
from hfq.reconstruction.drop import Course
from hfq.reconstruction.units import Grids, Unit
from hfq.report import Report
from hfq.transforms import reparameterize

__all__ = ["Moved", "reconstruct"]

REASON = "outside the blocks: learned behind the packed blocks"


class Moved(Sequence[torch.Tensor]):
    """Tensors of a norm as they are after its channels were scaled and shifted."""

    def __init__(self, tensors: Sequence[torch.Tensor], grid: reparameterize.Grid) -> None:
        self.tensors, self.ratio, self.shift = tensors, grid.ratio.float(), grid.shift.float()

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, index: Any) -> Any:
        x = self.tensors[index]
        return x / self.ratio.to(x) + self.shift.to(x)


def reconstruct(
    model: nn.Module, full: nn.Module, batches: Sequence[Mapping[str, Any]], site: Any, grids: Grids, course: Course,
    loss_of: Callable[[nn.Module, Sequence[torch.Tensor]], tuple[losses.Loss, Sequence[torch.Tensor]]],
    fold: Callable[[torch.Tensor, Pair, int, bool], reparameterize.Grid], call: Callable[[], Any], report: Report, *,
    generator: torch.Generator | None = None, seed: int = 0,
) -> None:
    """Find the grids of a site outside the blocks, learn its rounding, and pack it.

    Args:
        model: its blocks are packed. full: the float model.
        loss_of: gives, for the site's module in ``full`` and its outputs there, the loss and the targets.
        fold: folds the channels of the norm in front of it.
        call: runs one pass of ``model``.
    """
    other = SimpleNamespace(name=site.name, module=full.get_submodule(site.name))
    with closing(Store()) as store:
        floats, wanted = sequence.record(full, batches, other, store)
        loss, targets = loss_of(other.module, wanted)
        limit = grids.rows * site.in_features
        rows = static.observe_outside(model, batches, [site], limit=limit, seed=seed)[site.name]
        extra: dict[str, Any] = {}
        float_inputs: Sequence[torch.Tensor] = floats
        pair = _norm(model, site, grids, call, report, seed)
        if pair is not None:
            shifts = pair.sources[0].part.bias is not None  # type: ignore[union-attr]
            grid = fold(rows, pair, grids.bits_for(site.name), shifts)
            rows = (rows.double() / grid.ratio + grid.shift).float()
            float_inputs = Moved(floats, grid)
            extra = {"reparameterized": pair.sources[0].name, "shifted": shifts}
        unit = Unit()
        units.calibrate_rows(unit, [site], rows, grids, extra=extra)
        inputs, _ = sequence.record(model, batches, site, store, results=False)
        found = drop.fit_site(model, site, unit, inputs, targets, float_inputs, loss, course, generator=generator,
                              seed=seed)
    rounding = unit.roundings[site.name]
    rounding.harden()
    options = units.swap_options(unit, site, **found.told())
    swap.swap(model, site.name, rounding.codes(), report, tokens=rows.shape[0], reason=REASON, **options)


def _norm(
    model: nn.Module, site: Any, grids: Grids, call: Callable[[], Any], report: Report, seed: int
) -> Pair | None:
    """The norm in front of a linear whose channels can be folded."""
    if site.kind != "linear" or grids.bits_for(site.name) == 16:
        return None
    pair, reason = reparameterize.outside_pair(model, site, call, seed=seed)
    if pair is None:
        report.note(f"{site.name}: one grid for its inputs from the start: {reason}")
    elif not units.foldable([site], pair, grids):
        return None
    return pair
