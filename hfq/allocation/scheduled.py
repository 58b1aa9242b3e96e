"""Widths by part of the model and interval of the denoising schedule, from the damage that each does to the output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hfq import kernels
from hfq.allocation import measured, program
from hfq.calibration import trajectories
from hfq.layers.switched import interval

__all__ = ["schedule_widths"]

Units = Mapping[str, Sequence[Any]]
Quality = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor], str], float]


def schedule_widths(
    model: nn.Module, data: Sequence[Mapping[str, Any]], families: Mapping[str, Units],
    layer: Callable[[Any, int], nn.Module], quality: Quality, *, edges: Sequence[float], widths: Sequence[int],
    target: float, calls: int, book: measured.ScoreBook, progress: Callable[[int, str], Any] | None = None,
) -> dict[str, list[int]]:
    """Site → its width in each interval.

    One unit at one width in one interval at a time, everything else float, gives a score; then every family has an
    integer program of its own, which makes the sum of its scores as large as a mean width of ``target`` allows.

    Args:
        data: calls with timesteps.
        families: what is scored by one metric: metric → unit → the sites in it, which share a width.
        layer: the packed layer of a site at a width.
        quality: ``quality(found, wanted, metric)`` of outputs, higher is better.
        edges: falling timesteps between the intervals.
        widths: to choose from.
        target: bits, mean over the weights and the intervals of each family.
        calls: of an interval, at most, evenly picked.
        book: scores that are known.
        progress: makes a progress bar.
    """
    times = trajectories.timesteps_of(data)
    scores: dict[str, dict[str, dict[int, float]]] = {metric: {} for metric in families}
    with kernels.use(wna16="reference", wnan="reference"):  # the same widths on every machine
        for place in range(len(edges) + 1):
            own = [i for i, time in enumerate(times) if interval(time, edges) == place]
            batches = [data[i] for i in own[:: -(-len(own) // calls)]]
            damage = _Damage(model, batches, layer, quality)
            for metric, units in families.items():
                found = measured.measure(dict.fromkeys(units, widths), damage.of(metric, units), book,
                                         prefix=f"{metric}/{place}/", progress=progress)  # fmt: skip
                scores[metric] |= {f"{place}/{unit}": {bits: -good for bits, good in row.items()}
                                   for unit, row in found.items()}
    chosen: dict[str, list[int]] = {}
    for metric, units in families.items():
        sizes = {name: sum(site.numel for site in units[name.partition("/")[2]]) for name in scores[metric]}
        costs = {name: {bits: float(bits * sizes[name]) for bits in row} for name, row in scores[metric].items()}
        found = program.allocate(scores[metric], costs, target * sum(sizes.values()))
        for name, bits in found.items():  # the intervals come in their order
            for site in units[name.partition("/")[2]]:
                chosen.setdefault(site.name, []).append(bits)
    return chosen


class _Damage:
    """What packing single units does to the outputs of some calls."""

    def __init__(
        self, model: nn.Module, batches: Sequence[Mapping[str, Any]], layer: Callable[[Any, int], nn.Module],
        quality: Quality,
    ) -> None:
        self.model, self.batches, self.layer, self.quality = model, batches, layer, quality
        self.wanted = measured.outputs(model, batches)

    def of(self, metric: str, units: Units) -> Callable[[str, int], float]:
        def score(unit: str, bits: int) -> float:
            packed = {site.name: self.layer(site, bits) for site in units[unit]}
            with measured.replaced(self.model, packed):
                return self.quality(measured.outputs(self.model, self.batches), self.wanted, metric)

        return score
