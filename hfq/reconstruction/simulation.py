"""A float model that computes as if its linears were quantized, at widths that change from one moment to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hfq.calibration import gradients
from hfq.calibration.gradients import Rows
from hfq.formats import ActivationSpec, Codes, QuantSpec, affine
from hfq.formats.twin import TwinSpec
from hfq.reconstruction.direct import site_matrix
from hfq.reconstruction.stepsize import Input, Reader, Search, fake, inputs_alone, joint

__all__ = ["Simulation"]


class Simulation:
    """Inside (``with``), weights and inputs are on their grids; afterwards everything is as before.

    Units are called ``weights:<site>`` and ``inputs:<first site of the group>``; 16 bits are floats. Steps are searched
    when a unit first has a width, and kept.

    Args:
        groups: sites (linear, transposed) that read one tensor.
        caches: inputs and gradients of each site.
        weight_spec: grid of a site at a width.
        input_spec: grid of a group's inputs at a width.
    """

    def __init__(
        self, model: nn.Module, groups: Sequence[Sequence[Any]], caches: Mapping[str, Rows],
        weight_spec: Callable[[str, int], QuantSpec], input_spec: Callable[[Sequence[Any], int], Any], search: Search,
        *, weighted: bool = True,
    ) -> None:
        self.model, self.groups, self.caches, self.search = model, groups, caches, search
        self.weight_spec, self.input_spec, self.weighted = weight_spec, input_spec, weighted
        self.floats = {site.name: site.weight.detach() for group in groups for site in group}
        self.matrices = {site.name: site_matrix(site).clone() for group in groups for site in group}
        self.codes: dict[tuple[str, int], Codes] = {}
        self.ranges: dict[tuple[str, int], Input] = {}
        self.installed: dict[str, int] = {}
        self.inputs: dict[str, Input | None] = {}
        self.handles: list[Any] = []

    @property
    def units(self) -> list[str]:
        return [unit for group in self.groups
                for unit in (*(f"weights:{site.name}" for site in group), f"inputs:{group[0].name}")]  # fmt: skip

    def reader(self, site: Any, spec: QuantSpec) -> Reader:
        return Reader(self.matrices[site.name], spec, self.caches[site.name].gradients if self.weighted else None)

    def __enter__(self) -> Simulation:
        for group in self.groups:
            for site in group:
                def before(_: nn.Module, args: Any, kwargs: Any, name: str = group[0].name) -> Any:
                    given = self.inputs.get(name)
                    if given is None:
                        return None
                    if args:
                        return (fake(args[0], given), *args[1:]), kwargs
                    first = next(iter(kwargs))
                    return args, {**kwargs, first: fake(kwargs[first], given)}

                self.handles.append(site.module.register_forward_pre_hook(before, with_kwargs=True))
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()
        for group in self.groups:
            for site in group:
                site.weight.data = self.floats[site.name]
        self.handles, self.installed, self.inputs = [], {}, {}

    @torch.no_grad()
    def set(self, bits: Mapping[str, int]) -> None:
        """Make every unit compute at its width."""
        for group in self.groups:
            for site in group:
                width = bits[f"weights:{site.name}"]
                if self.installed.get(site.name) != width:
                    site.weight.data = self._weight(site, width)
                    self.installed[site.name] = width
            width = bits[f"inputs:{group[0].name}"]
            self.inputs[group[0].name] = None if width == 16 else self._range(group, width)

    def loss(
        self, bits: Mapping[str, int], batches: Sequence[Mapping[str, Any]], wanted: Sequence[torch.Tensor]
    ) -> float:
        """Mean divergence of the predictions from ``wanted`` at these widths."""
        self.set(bits)
        return gradients.divergence(self.model, batches, wanted)

    def _weight(self, site: Any, width: int) -> torch.Tensor:
        whole = self.floats[site.name]
        if width == 16:
            return whole
        key = (site.name, width)
        if key not in self.codes:
            spec = self.weight_spec(*key)
            _, [found], _ = joint(self.caches[site.name].inputs, [self.reader(site, spec)], None, self.search)
            self.codes[key] = found
        value = affine.dequantize(self.codes[key])
        return (value.t() if site.kind == "transposed" else value).to(whole.device, whole.dtype)

    def _range(self, group: Sequence[Any], width: int) -> Input:
        key = (group[0].name, width)
        if key not in self.ranges:
            spec: ActivationSpec | TwinSpec = self.input_spec(group, width)
            readers = [self.reader(site, self.weight_spec(site.name, 8)) for site in group]
            self.ranges[key] = inputs_alone(self.caches[group[0].name].inputs, readers, spec, self.search)
        return self.ranges[key]
