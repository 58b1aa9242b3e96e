"""Norms of a whole float model shifted and smoothed into their readers, and what is packed outside the blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from hfq.calibration import static
from hfq.graph import pairs, trace
from hfq.graph.links import Pair
from hfq.layers import swap
from hfq.reconstruction.folded import reader_weights
from hfq.reconstruction.static import input_grid
from hfq.reconstruction.stepsize import Reader, Search, joint
from hfq.report import Report
from hfq.transforms import centre, reparameterize

__all__ = ["fold_norms", "groups", "pack_outside", "units"]


def fold_norms(
    plan: Any, batches: Sequence[Mapping[str, Any]], call: Callable[[], Any], config: Any, report: Report,
    search: Search,
) -> dict[str, str]:
    """Trace the plan, and shift and scale the channels of every norm whose readers are quantized; reader → norm.

    Args:
        config: gives ``smooth``, ``shift``, ``alpha``, ``alphas``, ``tail``, ``inputs_for(name)``, ``spec_for(name)``,
            ``placement`` and ``seed``.
    """
    traced = trace.order_groups(plan, call)
    if not config.smooth:
        return {}
    found = pairs.discover(plan, call, placement=config.placement, seed=config.seed)
    report.pairs += found.rows()
    asked = {site.name: site for site in plan.sites if config.inputs_for(site.name) != 16}
    proven: list[tuple[Pair, bool]] = []
    for block in plan.blocks:
        own = [pair for pair in found.proven("norm", block.name) if any(link.name in asked for link in pair.readers)]
        calls = traced.blocks.get(block.name)
        if own and calls:
            proven += _shifting(block, calls[0], own, {site.name for site in plan.sites}, config, report)
    for site in plan.outside:
        if site.name in asked and site.kind == "linear":
            pair, reason = reparameterize.outside_pair(plan.model, site, call, seed=config.seed)
            if pair is None:
                report.note(f"{site.name}: its input is not smoothed: {reason}")
            else:
                shifts = config.shift and pair.sources[0].part.bias is not None  # type: ignore[union-attr]
                proven.append((pair, shifts))
    names = {link.name for pair, _ in proven for link in pair.readers}
    sites = [site for site in plan.every_site if site.name in names]
    rows = static.observe_outside(plan.model, batches, sites, seed=config.seed) if sites else {}
    readers = {}
    for pair, shifts in proven:
        own_rows = next((rows[link.name] for link in pair.readers if link.name in rows), None)
        if own_rows is None:
            report.note(f"{pair.sources[0].name}: the data does not reach its readers: it is not smoothed")
            continue
        scale, middle = _channels(own_rows, pair, shifts, asked, config, search)
        reparameterize.fold(pair, scale, -middle / scale)
        readers.update({link.name: pair.sources[0].name for link in pair.readers})
    return readers


def _shifting(
    block: Any, call: Any, own: Sequence[Pair], packed: set[str], config: Any, report: Report
) -> list[tuple[Pair, bool]]:
    """Each pair, and whether its norm may shift."""
    if not config.shift:
        return [(pair, False) for pair in own]
    reasons = reparameterize.prove_shifts(block, call.args, call.kwargs, own, seed=config.seed)
    found = []
    for pair in own:
        name = pair.sources[0].name
        reason = reasons[name]
        bare = [link.name for link in pair.readers
                if link.part.bias_tensor is None and link.name not in packed]  # type: ignore[union-attr]
        reason = reason or (f"{bare[0]} stays float and has no bias" if bare else "")
        if reason:
            report.note(f"{name}: channels are scaled and not shifted: {reason}")
        found.append((pair, not reason))
    return found


def _channels(
    rows: torch.Tensor, pair: Pair, shifts: bool, asked: Mapping[str, Any], config: Any, search: Search
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and middle of each channel; of several strengths the one with the least error of the readers' outputs."""
    weights = reader_weights(pair)
    middle = centre.centre(rows, config.tail) if shifts else torch.zeros(rows.shape[1], dtype=torch.float64)
    if not config.alphas:
        return centre.smooth(rows, weights, middle, config.alpha), middle
    bits = min(config.inputs_for(link.name) for link in pair.readers if link.name in asked)
    best: tuple[float, Any] = (float("inf"), None)
    quick = Search(min(search.count, 20), max(search.low, 0.3), search.high, 1)
    for alpha in config.alphas:
        scale = centre.smooth(rows, weights, middle, alpha)
        x = ((rows.double() - middle) / scale).float()
        readers = [Reader((weight.double().cpu() * scale).float(), config.spec_for(link.name))
                   for weight, link in zip(weights, pair.readers, strict=True) if link.name in asked]
        error = joint(x, readers, input_grid(bits, symmetric=True), quick)[2]
        if error < best[0]:
            best = (error, scale)
    return best[1], middle


def groups(plan: Any, caches: Mapping[str, Any]) -> list[list[Any]]:
    """Sites with caches, by the tensor that they read, those outside the blocks one by one."""
    found = [[site for site in group if site.name in caches] for block in plan.blocks for group in block.groups]
    return [group for group in [*found, *([site] for site in plan.outside if site.name in caches)] if group]


def units(
    grouped: Sequence[Sequence[Any]], caches: Mapping[str, Any], config: Any
) -> tuple[dict[str, int], dict[str, list[int]], dict[str, dict[str, dict[int, float]]]]:
    """Start, widths and costs of what may be lowered: weights of each site, inputs of each group.

    What ``overrides`` say keeps its width and costs nothing.
    """
    every = list(range(config.lowest, config.max_bits + 1))
    start: dict[str, int] = {}
    widths: dict[str, list[int]] = {}
    costs: dict[str, dict[str, dict[int, float]]] = {"weights": {}, "inputs": {}}
    for group in grouped:
        entries = [("weights", site.name, [site], float(site.numel), "bits") for site in group]
        entries.append(("inputs", group[0].name, list(group), caches[group[0].name].elements, "activation_bits"))
        for what, name, members, size, option in entries:
            given = [config.override_for(site.name) for site in members]
            said = [values[option] for values in given if option in values]
            fixed = said[0] if said else 16 if what == "inputs" and config.activation_bits == 16 else None
            unit = f"{what}:{name}"
            start[unit], widths[unit] = (config.max_bits, every) if fixed is None else (fixed, [fixed])
            if fixed is None:
                costs[what][unit] = {bits: size * bits for bits in every}
    return start, widths, {what: table for what, table in costs.items() if table}


def pack_outside(
    plan: Any, batches: Sequence[Mapping[str, Any]], caches: Mapping[str, Any], config: Any, report: Report,
    pack: Callable[[Any, Sequence[Any]], None],
) -> None:
    """Sites outside the blocks: those with caches by ``pack(step, [site])``, the others rounded to nearest."""
    from hfq.reconstruction import static as direct

    reason = "outside the blocks: calibrated in the float model"
    for site in [site for site in plan.outside if site.name in caches]:
        step = SimpleNamespace(report=report)
        step.swap = lambda site, codes, **more: swap.swap(
            plan.model, site.name, codes, report, reason=reason, tokens=caches[site.name].inputs.shape[0], **more)
        with config.placement(site.module):
            pack(step, [site])
        plan.outside.remove(site)
    direct.pack_outside(plan, config, batches, report, observer="mse", symmetric=True, clip="mse")
