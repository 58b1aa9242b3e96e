"""Rounding of single sites without data: all of round-to-nearest, and what other methods do outside the blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hfq.formats import QuantSpec, twolevel
from hfq.layers import swap
from hfq.report import Report
from hfq.rounding import nearest

__all__ = [
    "embedding_spec", "expert_matrices", "nearest_block", "nearest_site", "pack_nearest", "pack_outside",
    "site_matrix", "unpackable",
]  # fmt: skip


def pack_nearest(
    model: nn.Module, site: Any, spec: QuantSpec, report: Report, *, clip: str = "none", reason: str = ""
) -> None:
    """Replace ``site`` by a packed layer with every weight at the closest point of its group's grid.

    A kind of site that has no packed layer becomes a refused row of the report.
    """
    asked = spec.to_dict()
    if site.kind == "experts":
        codes = {
            name: [nearest.solve(matrix, spec, clip=clip) for matrix in expert_matrices(site, name)]
            for name in site.tensors
        }
        swap.swap_experts(model, site.name, codes, report, asked=asked, reason=reason)
    elif why := unpackable(site):
        report.refuse(site.name, why, kind=site.kind, asked=asked, numel=site.numel)
    else:
        spec = embedding_spec(site.weight, spec) if site.kind == "embedding" else spec
        codes = nearest.solve(site_matrix(site), spec, clip=clip)
        swap.swap(model, site.name, codes, report, asked=asked, reason=reason)


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
    """Replace one site of a walk's step by its packed layer, rounded to nearest; a refused row if there is none.

    Args:
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


def pack_outside(plan: Any, config: Any, report: Report, *, clip: str = "none") -> None:
    """Round the sites outside the blocks to nearest: a walk over blocks has no inputs for them.

    ``config`` gives ``spec_for(name)`` and ``placement(module)``.
    """
    spec_for: Callable[[str], QuantSpec] = config.spec_for
    for site in plan.outside:
        with config.placement(site.module):
            pack_nearest(plan.model, site, spec_for(site.name), report, clip=clip,
                         reason="outside the blocks: rounded to nearest, without calibration")
