"""All rotations that a model allows, at once: the stream, the heads, and online in front of what writes the stream."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from hfq.errors import QuantizationError
from hfq.graph import pairs as graph_pairs
from hfq.graph.absorb import Matrix
from hfq.graph.links import Pair
from hfq.graph.read import Plan, Site
from hfq.layers.online import Hadamard
from hfq.report import Report
from hfq.transforms.rotate import Placement, online_input, rotate_heads, rotate_stream

__all__ = ["spread_outliers"]


def spread_outliers(
    model: nn.Module,
    plan: Plan,
    call: Callable[[], Any],
    *,
    seed: int = 0,
    kind: str = "hadamard",
    heads: bool = True,
    online: bool = True,
    placement: Placement | None = None,
    report: Report | None = None,
) -> dict[str, Hadamard]:
    """Rotate ``model`` in place wherever that was proven to leave its function as it is.

    Args:
        plan: of ``graph.read``; gets its order and groups.
        call: runs one forward pass of the whole model on a small input.
        seed: of the random signs.
        kind: of the rotation of the stream, "hadamard" or "random".
        heads: rotate the values of every head, folded into the value and the output projection.
        online: transform the inputs of the linears that write to a rotated stream, while the model runs.
        placement: makes a block's weights available while they change.
        report: receives every pair, proven or refused with its reason, and a note for what was not rotated.

    Returns:
        The online transforms by site name, for the packed layers.
    """
    generator = torch.Generator().manual_seed(seed)
    found = graph_pairs.discover(plan, call, placement=placement, seed=seed)
    rotated = rotate_stream(model, plan, found, kind=kind, generator=generator, call=call, placement=placement)
    if heads:
        rotate_heads(model, plan, found, generator=generator, placement=placement)
    parts: dict[str, Hadamard] = {}
    for pair in rotated if online else []:
        for site in _writers(plan, pair):
            with placement(site.module) if placement is not None else nullcontext():
                try:
                    parts[site.name] = online_input(site, generator=generator)
                except QuantizationError as error:
                    if report is not None:
                        report.note(f"no online transform: {error}")
    if report is not None:
        report.pairs = [pair.to_dict() for pair in found]
        for pair in found.refused("rotation"):
            report.note(f"the stream of {pair.place} is not rotated: {pair.reason}")
    return parts


def _writers(plan: Plan, pair: Pair) -> list[Site]:
    """Linears inside the blocks of ``pair`` whose outputs are added to the stream, in the order of the plan."""
    names = {link.part.name for link in pair.sources if isinstance(link.part, Matrix)}
    inside = [site for block in plan.blocks if block.name in pair.blocks for site in block.sites]
    return [site for site in inside if site.name in names and site.kind in ("linear", "transposed")]
