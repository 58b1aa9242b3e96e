"""Sites behind a norm: the norm's channels are scaled and shifted, then the sites are packed with a range of their own.

A recipe gives a :data:`Fold`: what is to be done with the rows of a norm's output. Sites whose input comes from no such
norm get a range as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hfq.calibration import ranges, static
from hfq.calibration.step import Step
from hfq.formats import ActivationSpec
from hfq.formats.activation import Parameters
from hfq.graph.links import Pair
from hfq.reconstruction.static import Round, input_grid, input_options
from hfq.report import Report
from hfq.transforms import reparameterize

__all__ = ["Fold", "behind_norms", "fold_by_mean", "mean_grid", "outside_norms", "pack_group", "reader_weights"]

# ``(rows, pair, bits, may shift)`` to the rows as they are now, their range (``None``: to be found), and what a report
# row says. Norm and readers are changed in place.
Fold = Callable[[torch.Tensor, Pair, int, bool], tuple[torch.Tensor, Parameters | None, dict[str, Any]]]


def behind_norms(step: Step, proven: Sequence[Pair], report: Report, seed: int = 0) -> dict[str, tuple[Pair, bool]]:
    """For each reader of a proven norm its pair, and whether the norm may shift; reasons become notes."""
    if not proven or not len(step):
        return {}
    args, kwargs = step.inputs[0]
    reasons = reparameterize.prove_shifts(step.block, args, kwargs, proven, seed=seed)
    packed = {site.name for site in step.block.sites}
    found = {}
    for pair in proven:
        name = pair.sources[0].name
        reason = reasons[name]
        bare = [link.name for link in pair.readers
                if link.part.bias_tensor is None and link.name not in packed]  # type: ignore[union-attr]
        if bare and not reason:
            reason = f"{bare[0]} stays float and has no bias"
        if reason:
            report.note(f"{name}: channels are scaled and not shifted: {reason}")
        found.update({link.name: (pair, not reason) for link in pair.readers})
    return found


def mean_grid(rows: torch.Tensor, pair: Pair, bits: int, shifts: bool) -> reparameterize.Grid:
    """The mean of the grids of the norm's channels, folded into norm and readers."""
    grid = reparameterize.common_grid(*ranges.fit_channels(rows, bits, symmetric=not shifts), bits)
    reparameterize.fold(pair, grid.ratio, grid.shift)
    return grid


def fold_by_mean(
    rows: torch.Tensor, pair: Pair, bits: int, shifts: bool
) -> tuple[torch.Tensor, Parameters | None, dict[str, Any]]:
    """:func:`mean_grid` as a :data:`Fold` that leaves the range of what comes out to be found."""
    grid = mean_grid(rows, pair, bits, shifts)
    extra = {"reparameterized": pair.sources[0].name, "shifted": shifts}
    return (rows.double() / grid.ratio + grid.shift).float(), None, extra


def reader_weights(pair: Pair) -> list[torch.Tensor]:
    """Weights of the readers, ``[out, K]`` each."""
    return [link.part.weight.movedim(link.part.input_axis, -1).flatten(0, -2)  # type: ignore[union-attr]
            for link in pair.readers]  # fmt: skip


def pack_group(
    step: Step, sites: Sequence[Any], folds: Mapping[str, tuple[Pair, bool]], bits_for: Callable[[str], int],
    fold: Fold, pack: Round, *, seed: int = 0,
    before: Callable[[Any, torch.Tensor, ActivationSpec, Parameters], None] | None = None,
) -> None:
    """Pack ``sites``, which read one tensor, after the fold of the norm in front of them if all of them read it.

    Args:
        before: may change the weight of a site for the grid of its inputs: ``(site, inputs, format, range)``.
    """
    wanted = [s for s in sites if s.kind in ("linear", "transposed", "conv") and bits_for(s.name) != 16]
    options: dict[str, dict[str, Any]] = {}
    if wanted:
        rows = static.observe_inputs(step, wanted, seed=seed)[wanted[0].name]
        bits = min(bits_for(site.name) for site in wanted)
        pair, shifts = folds.get(wanted[0].name, (None, False))
        params, extra = None, {}
        if pair is not None and {link.name for link in pair.readers} >= {site.name for site in wanted}:
            rows, params, extra = fold(rows, pair, bits, shifts)
        for site in wanted:
            spec = input_grid(bits_for(site.name))
            own = params if params is not None and spec.bits == bits else ranges.fit(rows, spec)
            options[site.name] = input_options(spec, own, extra=extra)
            if before is not None:
                before(site, rows, spec, own)
    pack(step, sites, options)


def outside_norms(
    plan: Any, data: Sequence[Mapping[str, Any]], call: Callable[[], Any], bits_for: Callable[[str], int], fold: Fold,
    report: Report, *, seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Options of ``swap`` for the linears outside the blocks that read a norm directly, folded the same way."""
    options: dict[str, dict[str, Any]] = {}
    for site in plan.outside:
        bits = bits_for(site.name)
        if bits == 16 or site.kind != "linear":
            continue
        pair, reason = reparameterize.outside_pair(plan.model, site, call, seed=seed)
        if pair is None:
            report.note(f"{site.name}: one grid for its inputs from the start: {reason}")
            continue
        rows = static.observe_outside(plan.model, data, [site], seed=seed)[site.name]
        shifts = pair.sources[0].part.bias is not None  # type: ignore[union-attr]
        rows, params, extra = fold(rows, pair, bits, shifts)
        spec = input_grid(bits)
        own = ranges.fit(rows, spec) if params is None else params
        options[site.name] = input_options(spec, own, extra=extra, tokens=rows.shape[0])
    return options
