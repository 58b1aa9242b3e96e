"""Layers whose inputs get a range a token while they run, behind balanced channels; of one width, or of several."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hfq.formats import ActivationSpec, Codes, QuantSpec
from hfq.layers import swap, switched
from hfq.layers.inputs import join
from hfq.layers.online import OnlinePart
from hfq.layers.packed import PackedModule
from hfq.reconstruction.direct import site_matrix
from hfq.report import Report, Row
from hfq.rounding import nearest

__all__ = ["DynamicLayers"]


class DynamicLayers:
    """Packed layers of sites (linear, transposed).

    Args:
        spec_for: grid of a site's weights, but for its width.
        inputs_for: width of a site's inputs, 16 for floats.
        parts: what inputs go through first, by site; the weight is rounded once, behind all of it.
        extra: entries of the report rows, by site.
        tokens: rows that the sites have seen.
    """

    def __init__(
        self, spec_for: Callable[[str], QuantSpec], inputs_for: Callable[[str], int],
        parts: Mapping[str, Sequence[OnlinePart]], *, extra: Mapping[str, Mapping[str, Any]] | None = None,
        tokens: Mapping[str, int] | None = None,
    ) -> None:
        self.spec_for, self.inputs_for, self.parts = spec_for, inputs_for, parts
        self.extra, self.tokens = extra or {}, tokens or {}

    def codes(self, site: Any, bits: int) -> Codes:
        """The weight behind the online parts, to the nearest points of the grid of its rows."""
        weight, online = site_matrix(site).float(), join(self.parts.get(site.name))
        return nearest.solve(weight if online is None else online.to(weight.device).fold(weight),
                             self.spec_for(site.name).with_bits(bits))  # fmt: skip

    def layer(self, site: Any, bits: int) -> PackedModule:
        """The packed layer by itself; the model stays as it is."""
        holder = nn.Module()
        holder.add_module("layer", site.module)
        return self._swap(holder, "layer", site, bits, None)

    def pack(self, model: nn.Module, site: Any, widths: Sequence[int], edges: Sequence[float], report: Report) -> None:
        """Replace the site: one layer, or with several ``widths`` one that switches at ``edges`` of the timestep."""
        if len(widths) == 1:
            self._swap(model, site.name, site, widths[0], report)
            return
        holder = switched.install(model, site.name, widths, edges)
        rows = []
        for bits in sorted(set(widths)):
            scratch = Report()
            # The bias of each layer is its own: shared tensors cannot be saved.
            self._swap(holder, switched.child_name(bits), site, bits, scratch)
            rows += scratch.rows.values()
        wide = rows[-1]
        report.add(Row(
            site.name, kind=wide.kind, asked={**wide.asked, "bits": list(widths)}, numel=wide.numel,
            bits=sum(row.bits or 0.0 for row in rows), error=max(row.error or 0.0 for row in rows), tokens=wide.tokens,
            kernel=wide.kernel, extra={**wide.extra, "schedule": list(widths)},
        ))  # fmt: skip

    def _swap(self, model: nn.Module, name: str, site: Any, bits: int, report: Report | None) -> PackedModule:
        width, codes = self.inputs_for(site.name), self.codes(site, bits)
        inputs = None if width == 16 else ActivationSpec(width, symmetric=True)
        with torch.no_grad():
            return swap.swap(
                model, name, codes, report, online=copy.deepcopy(list(self.parts.get(site.name, ()))) or None,
                activation=inputs, tokens=self.tokens.get(site.name), extra=self.extra.get(site.name),
            )  # fmt: skip
