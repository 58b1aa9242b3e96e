"""Where the grids of everything that a denoiser multiplies begin, noise level by noise level.

What enters its layers, and the queries, keys, values and probabilities of its attentions, are sampled in whole passes
of the model as it is; every level has ranges of its own. A range is one for a tensor, or one a group of channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hfq.calibration import clusters, ranges, static, trajectories
from hfq.calibration.static import AttentionSample
from hfq.errors import DataError, QuantizationError
from hfq.formats import ActivationSpec, groups
from hfq.layers import products
from hfq.layers.conv import pads_of
from hfq.layers.times import NoiseLevels
from hfq.report import Report

__all__ = ["OPERANDS", "Grid", "Grids", "How", "measure"]

OPERANDS = ("query", "key", "value")
# Elements of a sample: at one level of several, 1 MiB of float32.
LIMIT = 1 << 18


@dataclass
class Grid:
    """Grids of one input or operand.

    Attributes:
        spec: of its codes.
        scale, zero: ``[levels]``, or ``[levels, groups]``.
        labels: group of each channel, int64; ``None``: one range for the tensor.
        axis: of the channels: 1 of pictures, else -1.
        rows: how many were seen.
    """

    spec: ActivationSpec
    scale: torch.Tensor
    zero: torch.Tensor
    labels: torch.Tensor | None = None
    axis: int = -1
    rows: int = 0


@dataclass
class Grids:
    """Grids of inputs by layer, and of the sides of attentions by module; ``head_dims`` of the latter."""

    inputs: dict[str, Grid]
    sides: dict[str, dict[str, Grid]]
    head_dims: dict[str, int]


@dataclass(frozen=True)
class How:
    """How grids are found.

    Attributes:
        bits_for: width of a layer's input; 16 for floats.
        grouped: whether an input of that width has a range for each group of channels.
        groups: most of them; fewer channels have one each.
        observer: "percentile" or "minmax".
        attention: operands too, of attentions inside which inputs are quantized.
        softmax_bits: of the probabilities; 16 for floats.
        rows: of calls at each level that are looked at.
        seed: of samples.
    """

    bits_for: Callable[[str], int]
    grouped: Callable[[int], bool] = lambda bits: False
    groups: int = 256
    observer: str = "percentile"
    attention: bool = True
    softmax_bits: int = 8
    rows: int = 64
    seed: int = 0


def measure(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], sites: Sequence[Any], levels: NoiseLevels, how: How,
    report: Report | None = None,
) -> Grids:
    """Grids for the inputs of ``sites``, and for attentions, at every level.

    Args:
        batches: calls of the model, each at one timestep.
        report: gets notes of what stays float.

    Raises:
        DataError: a level has no call. QuantizationError: the data does not reach a site.
    """
    asked = [site for site in sites if how.bits_for(site.name) != 16]
    timesteps = trajectories.timesteps_of(batches)
    each = how.rows if len(levels) > 1 else how.rows * len(set(timesteps))
    builder = _Builder(model, batches, asked, how, report)
    for index in range(len(levels)):
        own = [batches[i] for i, t in enumerate(timesteps) if len(levels) == 1 or levels.of(t) == index]
        if not own:
            raise DataError(f"no call at the noise level {levels.levels[index]:g}")
        builder.add(*_seen(model, trajectories.evenly(own, each), asked, how, LIMIT if len(levels) > 1 else 4 * LIMIT))
    return builder.grids()


def _seen(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], sites: Sequence[Any], how: How, limit: int
) -> tuple[dict[str, torch.Tensor], dict[str, AttentionSample]]:
    """Samples of inputs by site, and of attentions by name."""
    names = {module: name for name, module in model.named_modules()}
    watching = static.watching_attentions(model, limit=limit, seed=how.seed) if how.attention else nullcontext({})
    with watching as seen:
        rows = static.observe_outside(model, batches, sites, limit=limit, seed=how.seed)
    missed = [site.name for site in sites if site.name not in rows]
    if missed:
        raise QuantizationError(f"the calibration data never reaches {', '.join(missed)}: leave it out with "
                                "modules_to_not_convert")
    every = sorted(names[module] for module in seen if module in names)
    return rows, {name: static.attention_sample(name, seen[model.get_submodule(name)], limit, how.seed)
                  for name in every}  # fmt: skip


class _Builder:
    """Collects the grids of one level after the other."""

    def __init__(
        self, model: nn.Module, batches: Sequence[Mapping[str, Any]], sites: Sequence[Any], how: How,
        report: Report | None,
    ) -> None:
        self.model, self.batches, self.sites, self.how, self.report = model, batches, sites, how, report
        self.inputs: dict[str, list[Grid]] = {}
        self.sides: dict[str, dict[str, list[Grid]]] = {}
        self.head_dims: dict[str, int] = {}
        self._first: tuple[dict[str, torch.Tensor], dict[str, AttentionSample]] | None = None

    def add(self, rows: Mapping[str, torch.Tensor], samples: Mapping[str, AttentionSample]) -> None:
        for site in self.sites:
            found = self.inputs.setdefault(site.name, [])
            found.append(self._input(site, rows[site.name], found))
        for name, sample in samples.items():
            inside = [self.how.bits_for(site.name) for site in self.sites if site.name.startswith(f"{name}.")]
            if not inside or self._causal(name):
                continue
            self.head_dims[name] = sample.query.shape[-1]
            sides = self.sides.setdefault(name, {})
            for side in OPERANDS:
                found, x = sides.setdefault(side, []), getattr(sample, side)
                labels = found[0].labels if found else self._labels(
                    max(inside), x.shape[1], lambda first, own=(name, side): getattr(first[1][own[0]], own[1]))
                found.append(self._grid(x, max(inside), labels, x.shape[1]))
            if self.how.softmax_bits != 16:
                p = sample.probabilities.clamp(min=0)
                sides.setdefault("probabilities", []).append(self._grid(p, self.how.softmax_bits, None, 1, zero=True))

    def grids(self) -> Grids:
        sides = {name: {side: _joined(found) for side, found in one.items()} for name, one in self.sides.items()}
        return Grids({name: _joined(found) for name, found in self.inputs.items()}, sides, self.head_dims)

    def _causal(self, name: str) -> bool:
        causal = products.causal(self.model.get_submodule(name))
        if causal and self.report is not None:
            self.report.note(products.NOT_CAUSAL)
        return causal

    def _input(self, site: Any, rows: torch.Tensor, found: Sequence[Grid]) -> Grid:
        conv, module, bits = site.kind == "conv", site.module, self.how.bits_for(site.name)
        if conv and module.groups > 1:  # every output reads some channels alone: no groups of all of them
            labels = None
        else:
            labels = found[0].labels if found else self._labels(bits, rows.shape[1], lambda first: first[0][site.name])
        columns = rows.shape[1] * (math.prod(module.kernel_size) if conv else 1)
        # Zeros of the padding are inputs too.
        grid = self._grid(rows, bits, labels, columns, zero=conv and any(pads_of(module)))
        grid.axis = 1 if conv else -1
        return grid

    def _labels(self, bits: int, channels: int, sample: Callable[[Any], torch.Tensor]) -> torch.Tensor | None:
        """Group of each channel, the same at all levels."""
        if not self.how.grouped(bits):
            return None
        if channels <= self.how.groups:
            return torch.arange(channels)
        if self._first is None:  # calls of all levels
            calls = trajectories.evenly(self.batches, self.how.rows)
            self._first = _seen(self.model, calls, self.sites, self.how, LIMIT)
        ends = torch.stack(list(sample(self._first).aminmax(dim=0)), 1)
        return clusters.kmeans(ends, self.how.groups, self.how.seed).unique(return_inverse=True)[1]

    def _grid(
        self, rows: torch.Tensor, bits: int, labels: torch.Tensor | None, columns: int, zero: bool = False
    ) -> Grid:
        spec = ActivationSpec(bits, granularity="tensor", dynamic=False)
        if labels is None:
            scale, point = ranges.fit(rows, spec, self.how.observer)
            assert point is not None
        else:
            scale, point = ranges.fit_groups(rows, labels, bits, self.how.observer, zero=zero,
                                             largest=groups.largest_zero(columns, bits))  # fmt: skip
        return Grid(spec, scale, point, labels, rows=len(rows))


def _joined(found: Sequence[Grid]) -> Grid:
    """Grids of single levels as one of all of them."""
    first = found[0]
    scale, zero = (torch.stack([getattr(one, name) for one in found]) for name in ("scale", "zero"))
    if first.labels is None:
        scale, zero = scale[:, 0], zero[:, 0]
    return Grid(first.spec, scale, zero, first.labels, first.axis, sum(one.rows for one in found))
