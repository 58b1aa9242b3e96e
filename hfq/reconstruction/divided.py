"""Inputs of one block quantized with column factors: measured, moved into the weights, counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hfq.calibration import ranks
from hfq.calibration.columns import ColumnMaxima, Rounding, watching
from hfq.calibration.step import Step
from hfq.formats import ActivationSpec, QuantSpec, activation, affine
from hfq.graph.pairs import PairReport
from hfq.layers.joint import FLOOR
from hfq.rounding import nearest
from hfq.transforms.divide import Division, divide_inputs

__all__ = ["EXPONENTS", "Group", "count_rounding", "divide", "groups_of", "measure", "search", "swap_options"]

# Exponents that a search tries besides the one that was asked for.
EXPONENTS = (0.0, 0.15, 0.35, 0.55, 0.75, 1.0)
SAMPLES = 512


@dataclass
class Group:
    """Linears of a block that read the same tensor, and what is done to it.

    Attributes:
        sites: the linears whose inputs are quantized.
        bits: width of the codes of their inputs, by name.
        exponent: share of the token in the step.
        top: largest magnitude of each channel, ``[K]``.
        kept: some rows of the input.
        division: how the column factor was moved.
        shares: what :func:`count_rounding` found.
    """

    sites: list[Any]
    bits: dict[str, int]
    exponent: float
    top: torch.Tensor | None = None
    kept: list[torch.Tensor] = field(default_factory=list)
    division: Division | None = None
    shares: dict[str, Any] = field(default_factory=dict)

    @property
    def factor(self) -> torch.Tensor:
        """``c ** (1 - exponent)``, float32 ``[K]``: what the input is divided by."""
        assert self.top is not None
        return self.top.double().clamp(min=FLOOR).pow(1 - self.exponent).float()

    @property
    def extra(self) -> dict[str, Any]:
        """Entries of the report row of each site."""
        found: dict[str, Any] = {"alpha": self.exponent, **self.shares}
        if self.division is not None:
            found |= {"folded": self.division.into or None, "online": self.division.reason or None}
        return found


def groups_of(step: Step, bits_for: Callable[[str], int], exponent: float) -> list[Group]:
    """The groups of the block with quantized inputs; linears and transposed ones only."""
    made = []
    for sites in step.block.groups:
        bits = {site.name: bits_for(site.name) for site in sites if site.kind in ("linear", "transposed")}
        chosen = [site for site in sites if bits.get(site.name, 16) != 16]
        if chosen:
            made.append(Group(chosen, {site.name: bits[site.name] for site in chosen}, exponent))
    return made


def measure(step: Step, groups: Sequence[Group], *, percentile: float = 100.0, samples: int = 0) -> None:
    """Run the block and fill in ``top`` (ones where no token arrives) and ``kept``, about ``samples`` rows."""
    each = -(-samples // max(len(step), 1)) if samples else 0
    maxima = [ColumnMaxima(percentile, each) for _ in groups]
    updates = {group.sites[0].module: seen.update for group, seen in zip(groups, maxima, strict=True)}
    for i in range(len(step)):
        with watching(step, i, updates):
            step.call(i)
    for group, seen in zip(groups, maxima, strict=True):
        top = seen.reduce()
        group.top = torch.ones(group.sites[0].in_features) if top is None else top
        group.kept = seen.kept


def search(groups: Sequence[Group], spec_for: Callable[[str], QuantSpec], clip: str = "none") -> None:
    """Give each group the exponent whose quantized inputs and weights give the nearest outputs on the kept rows."""
    for group in groups:
        asked = group.exponent
        options = [asked, *(one for one in EXPONENTS if one != asked)]
        losses = torch.tensor([_loss(group, exponent, spec_for, clip) for exponent in options], dtype=torch.float64)
        group.exponent = options[int(ranks.sum_(losses).argmin())]


@torch.no_grad()
def _loss(group: Group, exponent: float, spec_for: Callable[[str], QuantSpec], clip: str) -> float:
    group.exponent = exponent
    if not group.kept:
        return 0.0
    rows, total = torch.cat(group.kept), 0.0
    factor = group.factor.to(rows.device)
    for site in group.sites:
        weight = site.weight.detach().float()
        weight = weight.t() if site.kind == "transposed" else weight
        codes = nearest.solve(weight * factor.to(weight.device), spec_for(site.name), clip=clip)
        inputs = activation.fake(rows / factor, ActivationSpec(group.bits[site.name], symmetric=True))
        total += float((inputs @ affine.dequantize(codes).t() - rows @ weight.t()).double().square().sum())
    return total


def divide(step: Step, groups: Sequence[Group], pairs: PairReport, *, fold: bool) -> None:
    """Move the column factors into the weights; the block computes the same."""
    for group in groups:
        if group.exponent == 1:  # a factor of ones
            group.division = Division(torch.ones(group.sites[0].in_features))
        else:
            group.division = divide_inputs(group.sites, group.factor, pairs, step.block.name, fold=fold)


def count_rounding(step: Step, groups: Sequence[Group], *, raw_tokens: bool = False) -> None:
    """Run the block and fill in the shares of elements that round to zero, with column factors and without.

    Args:
        raw_tokens: steps from the token before the division, ``max ** exponent``, so that codes may leave the grid.
    """
    counts = []
    for group in groups:
        columns = None if group.division is None else group.division.vector
        counts.append(Rounding(min(group.bits.values()), columns, group.exponent if raw_tokens else None))
    updates = {group.sites[0].module: count.update for group, count in zip(groups, counts, strict=True)}
    for i in range(len(step)):
        with watching(step, i, updates):
            step.call(i)
    for group, count in zip(groups, counts, strict=True):
        group.shares = count.reduce()


def swap_options(groups: Sequence[Group], make: Callable[[Group, Any], Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """``make(group, site)`` for every site, with the report's entries: what ``solve_block`` takes as ``options``."""
    return {site.name: {"extra": group.extra, **make(group, site)} for group in groups for site in group.sites}
