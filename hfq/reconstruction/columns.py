"""Second-order rounding of one block: Hessians of its sites, column-by-column solutions, packed layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hfq.calibration import hessian
from hfq.calibration.step import Step
from hfq.formats import PER_TENSOR, Codes, QuantSpec
from hfq.reconstruction.direct import embedding_spec, expert_matrices, nearest_site, site_matrix, unpackable
from hfq.rounding import nearest
from hfq.rounding.gptq import Factor, factorise, solve, solve_many

__all__ = ["Solver", "solve_block", "solve_sites"]


@dataclass(frozen=True)
class Solver:
    """How the matrices of a block are rounded; see :func:`hfq.rounding.gptq.solve` for the single options.

    Attributes:
        sequential: solve the groups of sites in execution order, each on inputs that the groups before it have already
            been quantized for ("true sequential"); otherwise all sites see the float block.
    """

    percdamp: float = 0.01
    act_order: bool = False
    static_groups: bool = False
    clip: str = "none"
    norm: float = 2.4
    grid: int = 100
    weigh_clip: bool = False
    refine: int = 0
    block_size: int = 128
    sequential: bool = True

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the column loop."""
        names = ("static_groups", "clip", "norm", "grid", "weigh_clip", "refine", "block_size")
        return {name: getattr(self, name) for name in names}

    def factorise(self, matrix: torch.Tensor, name: str) -> Factor:
        return factorise(matrix, percdamp=self.percdamp, act_order=self.act_order, name=name)


def solve_block(
    step: Step,
    spec_for: Callable[[str], QuantSpec],
    solver: Solver,
    *,
    weights: Sequence[torch.Tensor] | None = None,
    online: Mapping[str, nn.Module] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Replace every site of the step's block by its packed layer, in place.

    Args:
        spec_for: grid of a site, by name.
        weights: importance of the tokens, ``[B, T]`` a call, as ``hessian.collect`` takes it.
        online: transforms that a packed layer applies to its input, by site name; the float weight has their inverse
            folded in already.
        options: what else ``step.swap`` is told of a linear, by site name (activation formats, report entries).
    """
    swaps = {name: {"online": part, "folded": True} for name, part in (online or {}).items()}
    for name, more in (options or {}).items():
        swaps[name] = {**swaps.get(name, {}), **more}
    for sites in step.block.groups if solver.sequential else [step.block.sites]:
        solve_sites(step, sites, spec_for, solver, weights=weights, options=swaps)
        step.settle()


def solve_sites(
    step: Step,
    sites: Sequence[Any],
    spec_for: Callable[[str], QuantSpec],
    solver: Solver,
    *,
    weights: Sequence[torch.Tensor] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """:func:`solve_block` for some sites of the block, on the inputs that they have now.

    Convolutions without a second moment are rounded to nearest, and their rows say why.
    """
    reasons = {site.name: hessian.no_moment(site) for site in sites}
    for site in (site for site in sites if reasons[site.name]):
        told = {"reason": f"rounded to nearest: {reasons[site.name]}", **(options or {}).get(site.name, {})}
        nearest_site(step, site, spec_for(site.name), clip=solver.clip, norm=solver.norm, options=told)
    sites = [site for site in sites if not reasons[site.name]]
    if not sites:
        return
    moments = hessian.collect(step, sites, weights)
    for shared in _together(sites, moments, spec_for):
        if shared[0].kind == "experts":
            _experts(step, shared[0], moments[shared[0].name], spec_for(shared[0].name), solver, options or {})
        elif shared[0].kind == "embedding":
            _embedding(step, shared[0], moments[shared[0].name], spec_for(shared[0].name), solver)
        else:
            _linears(step, shared, moments, spec_for(shared[0].name), solver, options or {})


def _together(
    sites: Sequence[Any], moments: Mapping[str, Any], spec_for: Callable[[str], QuantSpec]
) -> list[list[Any]]:
    """Linears that share a Hessian and a grid are solved in one pass over the columns."""
    found: dict[Any, list[Any]] = {}
    for site in sites:
        spec = spec_for(site.name)
        alone = site.kind not in ("linear", "transposed") or spec.group_size == PER_TENSOR
        found.setdefault(site.name if alone else (id(moments[site.name]), spec), []).append(site)
    return list(found.values())


def _linears(
    step: Step,
    sites: Sequence[Any],
    moments: Mapping[str, Any],
    spec: QuantSpec,
    solver: Solver,
    swaps: Mapping[str, Mapping[str, Any]],
) -> None:
    names = ", ".join(site.name for site in sites)
    if reason := unpackable(sites[0]):
        for site in sites:
            assert step.report is not None
            step.report.refuse(site.name, reason, kind=site.kind, asked=spec.to_dict(), numel=site.numel)
        return
    found = moments[sites[0].name]
    factor = solver.factorise(found.matrix, names)
    matrices = [site_matrix(site) for site in sites]
    solutions = solve_many(matrices, factor, spec, name=names, **solver.options())
    for site, (codes, stats) in zip(sites, solutions, strict=True):
        options = dict(swaps.get(site.name, {}))
        extra = {**_rounded(stats), **options.pop("extra", {})}
        asked = {**spec.to_dict(), **options.pop("asked", {})}
        step.swap(site, codes, asked=asked, tokens=found.tokens, extra=extra, **options)


def _experts(
    step: Step, site: Any, moments: Mapping[str, Any], spec: QuantSpec, solver: Solver,
    swaps: Mapping[str, Mapping[str, Any]],
) -> None:
    codes: dict[str, list[Codes]] = {}
    for name in site.tensors:
        bank = expert_matrices(site, name)
        codes[name] = []
        for number, matrix in enumerate(bank):
            label = f"{site.name}.{name}[{number}]"
            factor = solver.factorise(moments[name][number].matrix, label)
            codes[name].append(solve(matrix, factor, spec, name=label, **solver.options())[0])
    options = dict(swaps.get(site.name, {}))
    step.swap_experts(site, codes, asked={**spec.to_dict(), **options.pop("asked", {})}, **options)


def _embedding(step: Step, site: Any, moments: Any, spec: QuantSpec, solver: Solver) -> None:
    # Each row is read alone: its second moment is the identity, for which rounding to nearest is optimal.
    weight = site.weight.detach()
    codes = nearest.solve(weight, embedding_spec(weight, spec), clip=solver.clip, norm=solver.norm)
    step.swap(site, codes, asked=spec.to_dict(), tokens=moments.tokens)


def _rounded(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Statistics for the report, short enough to read."""
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in stats.items()}
