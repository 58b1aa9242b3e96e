"""Packed layers and attentions whose inputs have a stored grid at every noise level, in groups of channels or not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hfq.calibration.level_grids import Grid, Grids
from hfq.errors import QuantizationError
from hfq.formats import Codes
from hfq.kernels.grouped_products import Probabilities
from hfq.layers import products, times
from hfq.layers.banks import InputBanks
from hfq.layers.conv import QConv2d, SecondHalf
from hfq.layers.grouped_attention import GroupedAttention
from hfq.layers.one_weight import OneWeight
from hfq.layers.products import SIDES, AttentionProducts
from hfq.layers.times import NoiseLevels
from hfq.reconstruction.direct import WholeModel
from hfq.reconstruction.static import input_options
from hfq.report import Report

__all__ = ["pack"]


def pack(
    model: nn.Module, sites: Sequence[Any], codes: Mapping[str, Sequence[Codes]], grids: Grids, levels: NoiseLevels,
    report: Report, *, cuts: Mapping[str, int], told: Mapping[str, Mapping[str, Any]],
) -> None:
    """Replace ``sites`` by packed layers, and let attentions compute on their grids.

    Args:
        codes: by site; two sets where the input channels are in halves.
        levels: of the grids; one alone serves every call.
        cuts: input channels of the first halves.
        told: what report rows say besides, by site; their error is that of the codes as they are now.
    """
    whole = WholeModel(model, report)
    for site in sites:
        if site.name not in codes:
            continue
        own, grid = codes[site.name], grids.inputs.get(site.name)
        plain = grid is not None and grid.labels is None
        extra = {key: value for key, value in told[site.name].items() if key != "error"}
        first = None if not plain else (grid.scale[:1], grid.zero[:1])  # type: ignore[union-attr]
        options = input_options(grid.spec if plain else None, first, extra=extra,
                                tokens=None if grid is None else grid.rows)  # type: ignore[union-attr]
        if len(own) > 1:
            options["second"] = SecondHalf(cuts[site.name], own[1], first)
            options["extra"] |= {"cut": cuts[site.name]}
        layer = whole.swap(site, own[0], asked=own[0].spec.to_dict(), **options)
        assert isinstance(layer, OneWeight)
        if grid is not None:
            _inputs(layer, grid, levels, report.rows[site.name])
    for name, sides in grids.sides.items():
        _attention(model, name, sides, grids.head_dims[name], levels, report)
    every = [*grids.inputs.values(), *(grid for sides in grids.sides.values() for grid in sides.values())]
    if any(grid.labels is not None or len(levels) > 1 for grid in every):
        times.install(model, levels)


def _inputs(layer: OneWeight, grid: Grid, levels: NoiseLevels, row: Any) -> None:
    """Store the grid of a layer's input; what it takes beside one range a tensor is in the report."""
    if grid.labels is not None:
        taps = math.prod(layer.kernel_size) if isinstance(layer, QConv2d) else 1
        part = _banks(grid, levels, grid.labels.repeat_interleave(taps))
        layer.group_inputs(part)
        row.bits = (row.bits or 0.0) + 8 * part.nbytes / row.numel
        row.asked = {"activation_bits": grid.spec.bits, **row.asked}
        row.extra["activation"] = part.describe()
    elif len(levels) > 1:
        layer.follow(levels)
        for key in layer.slots:
            layer.set_input(key, (grid.scale, grid.zero))
        row.bits = (row.bits or 0.0) + 40 * len(layer.slots) * (len(levels) - 1) / row.numel
        row.extra["levels"] = len(levels)


def _banks(grid: Grid, levels: NoiseLevels, labels: torch.Tensor | None = None) -> InputBanks:
    """The grid as a part; of one range a tensor without labels."""
    if grid.labels is None:
        none = torch.zeros(0, dtype=torch.int64)
        given: Any = [("tensor", none, scale.reshape(1), zero.reshape(1))
                      for scale, zero in zip(grid.scale, grid.zero, strict=True)]  # fmt: skip
    else:
        labels = grid.labels if labels is None else labels
        given = [("columns", labels, scale, zero) for scale, zero in zip(grid.scale, grid.zero, strict=True)]
    return InputBanks.of(given, grid.spec.bits, levels)


def _attention(
    model: nn.Module, name: str, sides: Mapping[str, Grid], head_dim: int, levels: NoiseLevels, report: Report
) -> None:
    soft = sides.get("probabilities")
    if any(grid.labels is not None for grid in sides.values()):
        if soft is not None and soft.labels is not None:
            raise QuantizationError(f"{name}: probabilities have one range a tensor")
        parts = {side: _banks(grid, levels) for side, grid in sides.items()}
        part: AttentionProducts = GroupedAttention(head_dim, parts, Probabilities(None))
        device = next((p.device for p in model.get_submodule(name).parameters()), torch.device("cpu"))
        part = part.to(device)
    else:
        follows = levels if len(levels) > 1 else None
        specs = {side: sides[side].spec if side in sides else None for side in SIDES}
        part = AttentionProducts(head_dim, levels=follows, **specs)  # type: ignore[arg-type]
        part.label = name
        for side, grid in sides.items():
            part.set_range(side, (grid.scale, grid.zero))
    products.install(model, name, part, report)
