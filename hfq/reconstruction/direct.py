"""Rounding of single sites without data: all of round-to-nearest, and what other methods do outside the blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hfq.formats import QuantSpec, twolevel
from hfq.layers import swap
from hfq.report import Report
from hfq.rounding import nearest

__all__ = [
    "WholeModel", "embedding_spec", "expert_matrices", "nearest_block", "nearest_site", "pack_outside", "site_matrix",
    "unpackable",
]  # fmt: skip


@dataclass
class WholeModel:
    """Replaces sites of a model without a walk over it: stands where a walk's step does.

    Attributes:
        block: of the plan, where a whole one is packed.
    """

    model: nn.Module
    report: Report
    block: Any = None

    def swap(self, site: Any, codes: Any, **options: Any) -> nn.Module:
        """Replace the module of ``site`` by its packed layer, see :func:`hfq.layers.swap.swap`."""
        return swap.swap(self.model, site.name, codes, self.report, **options)

    def swap_experts(self, site: Any, codes: Mapping[str, Any], **options: Any) -> nn.Module:
        """Replace a bank of experts, see :func:`hfq.layers.swap.swap_experts`."""
        return swap.swap_experts(self.model, site.name, codes, self.report, **options)


def unpackable(site: Any) -> str:
    """Why there is no packed layer for a site; empty if there is one."""
    flat = site.kind in ("linear", "transposed", "embedding", "experts")
    if flat or (site.kind == "conv" and isinstance(site.module, nn.Conv2d)):
        return ""
    return f"no packed layer for sites of kind {site.kind!r} ({type(site.module).__name__})"


def site_matrix(site: Any) -> torch.Tensor:
    """The float weight of a site with one weight as ``[out, in]``; taps of a convolution are inputs."""
    weight: torch.Tensor = site.weight.detach()
    return weight.t() if site.kind == "transposed" else weight.flatten(1) if site.kind == "conv" else weight


def expert_matrices(site: Any, name: str) -> torch.Tensor:
    """Parameter ``name`` of a bank of experts as ``[E, out, in]``; some banks keep ``[E, in, out]``."""
    bank: torch.Tensor = getattr(site.module, name).detach()
    return bank.transpose(1, 2) if site.in_by_out else bank


def embedding_spec(weight: torch.Tensor, spec: QuantSpec) -> QuantSpec:
    """``spec`` with scales of the weight's own dtype.

    An embedding holds the first tensors of most models, and libraries take a model's dtype from its first
    floating-point tensor: scales of another dtype would change what the model computes in, and is saved as.
    """
    return replace(spec, scale_dtype=str(weight.dtype).removeprefix("torch."))


def nearest_block(
    step: Any, spec_for: Callable[[str], QuantSpec], *, online: Mapping[str, nn.Module] | None = None, **options: Any
) -> None:
    """Replace every site of a walk's step by its packed layer, rounded to nearest.

    Args:
        spec_for: grid of a site, by name.
        online: transforms that a packed layer applies to its input, by site name, folded into the float weight already.
        options: of :func:`hfq.rounding.nearest.grid_of`.
    """
    online = online or {}
    for site in step.block.sites:
        folded = {"online": online[site.name], "folded": True} if site.name in online else {}
        nearest_site(step, site, spec_for(site.name), options=folded, **options)


def nearest_site(
    step: Any, site: Any, spec: QuantSpec, *, whole_scales: bool = False, options: Mapping[str, Any] | None = None,
    **search: Any,
) -> None:
    """Replace one site by its packed layer, every weight at the closest point of its group's grid; a refused row of the
    report if there is no such layer.

    Args:
        step: of a walk, or :class:`WholeModel`.
        whole_scales: snap the scales of a row's groups to small multiples of one step, and round again.
        options: what else ``step.swap`` (``step.swap_experts``) is told.
        search: of :func:`hfq.rounding.nearest.grid_of`.
    """
    more = dict(options or {})
    more["asked"] = {**spec.to_dict(), **more.get("asked", {})}

    def codes(matrix: torch.Tensor, grid: QuantSpec = spec) -> Any:
        found = nearest.solve(matrix, grid, **search)
        return twolevel.requantize(matrix, found) if whole_scales else found

    if site.kind == "experts":
        banks = {name: [codes(matrix) for matrix in expert_matrices(site, name)] for name in site.tensors}
        step.swap_experts(site, banks, **more)
    elif why := unpackable(site):
        step.report.refuse(site.name, why, kind=site.kind, asked=spec.to_dict(), numel=site.numel)
    else:
        grid = embedding_spec(site.weight, spec) if site.kind == "embedding" else spec
        step.swap(site, codes(site_matrix(site), grid), **more)


def pack_outside(
    plan: Any, config: Any, report: Report, *, clip: str = "none",
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Round the sites outside the blocks to nearest: a walk over blocks has no inputs for them.

    Args:
        config: gives ``spec_for(name)`` and ``placement(module)``.
        options: of :func:`hfq.layers.swap.swap`, by site name.
    """
    whole, plain = WholeModel(plan.model, report), "outside the blocks: rounded to nearest, without calibration"
    for site in plan.outside:
        with config.placement(site.module):
            nearest_site(whole, site, config.spec_for(site.name), clip=clip,
                         options={"reason": plain, **(options or {}).get(site.name, {})})
