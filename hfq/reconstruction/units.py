"""What is learned of a block whose inputs have stored grids: gates of its weights, steps of its inputs and products.

A :class:`Unit` is filled group by group on the float stream (:func:`calibrate_group`, :func:`calibrate_products`),
trained as a whole (:func:`hfq.reconstruction.drop.fit`), and packed (:func:`pack`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hfq.calibration import operands, search, static
from hfq.calibration.step import Step
from hfq.formats import QuantSpec, activation
from hfq.graph.links import Pair
from hfq.layers import attention, products
from hfq.layers.fake import Drop, fake_inputs
from hfq.layers.products import AttentionProducts
from hfq.reconstruction.direct import site_matrix, unpackable
from hfq.reconstruction.folded import Fold
from hfq.reconstruction.static import input_grid, input_options
from hfq.report import Report
from hfq.rounding.learned_step import LearnedStep
from hfq.rounding.lowrank import GatedRounding
from hfq.transforms import reparameterize

__all__ = [
    "Grids", "Unit", "calibrate_group", "calibrate_products", "calibrate_rows", "foldable", "pack", "rounding_of",
    "simulated", "store", "swap_options",
]  # fmt: skip


@dataclass(frozen=True)
class Grids:
    """How grids are asked for and searched.

    Attributes:
        spec_for: grid of a site's weight.
        bits_for: width of its inputs; 16 for floats.
        count: candidates of a grid.
        rounds: of searching weights and inputs in turn.
        rows: of the input that a search sees, at most.
        ends: candidates of each end of an operand of attention.
        seed: of samples.
    """

    spec_for: Callable[[str], QuantSpec]
    bits_for: Callable[[str], int]
    count: int = 128
    rounds: int = 3
    rows: int = 4096
    ends: int = 129
    seed: int = 0


@dataclass
class Unit:
    """What is learned.

    Attributes:
        roundings: of the weights, by site.
        inputs: steps of the inputs, by site; sites that read one tensor share theirs.
        sides: steps of the sides of attentions, by attention and side.
        told: what the report rows say, by site.
    """

    roundings: dict[str, GatedRounding] = field(default_factory=dict)
    inputs: dict[str, LearnedStep] = field(default_factory=dict)
    sides: dict[str, dict[str, LearnedStep]] = field(default_factory=dict)
    told: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def steps(self) -> list[LearnedStep]:
        """Every step once."""
        every = [*self.inputs.values(), *(step for sides in self.sides.values() for step in sides.values())]
        return list(dict.fromkeys(every))


def rounding_of(site: Any, spec: QuantSpec, grid: tuple[torch.Tensor, torch.Tensor | None]) -> GatedRounding:
    """Gates on a fixed grid; soft, they give the weight itself."""
    weight = site.weight.detach()
    matrix = weight.t() if site.kind == "transposed" else weight
    return GatedRounding(matrix, spec, rank=None, learn_scale=False, grid=grid)


def calibrate_group(
    unit: Unit, step: Step, sites: Sequence[Any], grids: Grids, folds: Mapping[str, tuple[Pair, bool]], fold: Fold, *,
    zero: int | None = None,
) -> None:
    """Grids of sites that read one tensor, found on the float stream, after the fold of the norm in front of them.

    A norm is folded only where all its readers are among the sites and weights and inputs have one width.

    Args:
        zero: the inputs' zero point where it is known.
    """
    plain = [site for site in sites if not _refused(site, grids, step.report)]
    for bits in sorted({grids.bits_for(site.name) for site in plain}):
        own = [site for site in plain if grids.bits_for(site.name) == bits]
        limit = grids.rows * own[0].in_features
        rows = static.observe_inputs(step, own, limit=limit, seed=grids.seed, inputs=step.float_inputs)[own[0].name]
        pair, shifts = folds.get(own[0].name, (None, False))
        extra: dict[str, Any] = {}
        if pair is not None and foldable(own, pair, grids):
            rows, _, extra = fold(rows, pair, bits, shifts)
        calibrate_rows(unit, own, rows, grids, zero=zero, extra=extra)


def foldable(sites: Sequence[Any], pair: Pair, grids: Grids) -> bool:
    """Whether the norm of a pair feeds all of ``sites``, has not been folded, and all widths are one."""
    widths = {width for site in sites for width in (grids.bits_for(site.name), grids.spec_for(site.name).bits)}
    fed = {link.name for link in pair.readers} >= {site.name for site in sites}
    norm = pair.sources[0].part.module
    return fed and len(widths) == 1 and not reparameterize.is_folded(norm)


def calibrate_rows(
    unit: Unit, sites: Sequence[Any], rows: torch.Tensor, grids: Grids, *, zero: int | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Grids of ``sites``, which all read ``rows`` ``[N, K]`` with one width, and what is learned of them."""
    bits = grids.bits_for(sites[0].name)
    spec = None if bits == 16 else input_grid(bits)
    specs = [grids.spec_for(site.name) for site in sites]
    found = search.Search(rows, [site_matrix(site) for site in sites], specs, spec, count=grids.count, zero=zero)
    # The rows of a convolution are positions of its input, not what it multiplies with.
    found.run(0 if any(site.kind == "conv" for site in sites) else grids.rounds)
    learned = None if found.params is None else LearnedStep(spec, found.params, search.FLOOR)  # type: ignore[arg-type]
    for site, weight_spec, grid in zip(sites, specs, found.grids, strict=True):
        unit.roundings[site.name] = rounding_of(site, weight_spec, grid)
        unit.told[site.name] = dict(extra or {})
        if learned is not None:
            unit.inputs[site.name] = learned


def _refused(site: Any, grids: Grids, report: Report | None) -> bool:
    """Add a refused row for a site that has no packed layer, or no stored range."""
    why = "experts have no stored ranges" if site.kind == "experts" else unpackable(site)
    if why and report is not None:
        report.refuse(site.name, why, kind=site.kind, asked=grids.spec_for(site.name).to_dict(), numel=site.numel)
    return bool(why)


def calibrate_products(unit: Unit, step: Step, name: str, bits: int, grids: Grids, report: Report | None) -> None:
    """Quantize the two products of an attention of the block, with ranges found on the float stream."""
    model = step.model
    if products.causal(model.get_submodule(name)):
        if report is not None:
            report.note(products.NOT_CAUSAL)
        return

    def run() -> None:
        for i in range(len(step)):
            step.call(i, step.float_inputs)

    sample, spec = operands.observe(model, name, run, seed=grids.seed), input_grid(bits)
    part = AttentionProducts(sample.query.shape[-1], **dict.fromkeys(products.SIDES, spec))
    part.label = name
    unit.sides[name] = {}
    for sides, pair in sample.products.items():
        for side, params in zip(sides, operands.search(*pair, (spec, spec), steps=grids.ends, rounds=grids.rounds),
                                strict=True):  # fmt: skip
            part.set_range(side, params)
            unit.sides[name][side] = LearnedStep(spec, params, search.FLOOR)
    products.install(model, name, part, report)


@contextmanager
def simulated(model: nn.Module, unit: Unit, sites: Mapping[str, Any], drop: Drop | None = None) -> Iterator[None]:
    """Inside, inputs of the unit's sites and operands of its attentions are on the grids as they are learned.

    Args:
        sites: by name.
        drop: leaves the rounding of single elements out.
    """
    drop = drop or Drop(0.0)
    modules = {name: sites[name].module for name in unit.inputs}

    def on(steps: Mapping[str, LearnedStep]) -> Callable[[str, torch.Tensor], torch.Tensor]:
        return lambda side, x: drop(x, activation.fake(x, steps[side].spec, steps[side]())) if side in steps else x

    parts = {name: attention.installed(model.get_submodule(name)) for name in unit.sides}
    try:
        for name, part in parts.items():
            part.rounded = on(unit.sides[name])  # type: ignore[union-attr]
        with fake_inputs({modules[name]: step.spec for name, step in unit.inputs.items()},
                         params={modules[name]: step for name, step in unit.inputs.items()}, drop=drop):  # fmt: skip
            yield
    finally:
        for part in parts.values():
            part.rounded = None  # type: ignore[union-attr]


def store(model: nn.Module, sides: Mapping[str, Mapping[str, LearnedStep]]) -> None:
    """Give attentions the steps that were learned of their sides."""
    for name, steps in sides.items():
        part = attention.installed(model.get_submodule(name))
        for side, learned in steps.items():
            part.set_range(side, learned.params())  # type: ignore[union-attr]


def pack(step: Step, unit: Unit, sites: Sequence[Any], **told: Any) -> None:
    """Harden the gates, store the steps, and replace the sites by packed layers.

    Args:
        told: for all report rows.
    """
    store(step.model, unit.sides)
    for site in sites:
        rounding = unit.roundings.get(site.name)
        if rounding is None:
            continue
        rounding.harden()
        step.swap(site, rounding.codes(), **swap_options(unit, site, **told))


def swap_options(unit: Unit, site: Any, **told: Any) -> dict[str, Any]:
    """What ``swap`` is told of a site whose gates are hard."""
    rounding, learned = unit.roundings[site.name], unit.inputs.get(site.name)
    extra = {**rounding.statistics(), **unit.told.get(site.name, {}), **told}
    grid = (None, None) if learned is None else (learned.spec, learned.params())
    return input_options(*grid, extra=extra, asked=rounding.spec.to_dict())
