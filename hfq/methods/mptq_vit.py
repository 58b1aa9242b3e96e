"""MPTQ-ViT (arXiv 2401.14895): norm outputs made symmetric and smoothed, two grids after a GELU whose ratio comes from
the data, and widths lowered one step at a time where it costs least for what it saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfq.config import option
from hfq.errors import ConfigError
from hfq.report import Report
from hfq.widths import WidthsConfig

if TYPE_CHECKING:
    import torch

__all__ = ["MPTQViTConfig", "quantize"]


@dataclass(kw_only=True, eq=False, repr=False)
class MPTQViTConfig(WidthsConfig):
    """Shifted smoothing, two grids after a GELU, and greedy mixed precision.

    Args:
        smooth: shift and scale the channels of norm outputs into norm and readers.
        shift: with ``smooth``: make channels symmetric first; else they are scaled only.
        alpha: how much of the size of a channel goes into the weights. ``alphas`` to try by the error of the outputs.
        tail: share of a channel's elements that its middle leaves out at either end.
        twin: two grids for what a GELU gives; else one symmetric grid.
        metric: "hessian" weighs errors of outputs with squared gradients, "mse" does not.
        candidates, low, high, rounds: of the search of steps, multiples of those that cover everything.
        search_rows: rows of a layer's inputs that a search sees.
        range_images: that steps are searched on, at most: the first ones.
        target_bits: mean width of weights (by their number) and of inputs (by their elements) that widths are lowered
            to from ``max_bits``, not below ``min_bits``; ``None`` leaves ``bits`` and ``activation_bits``, which
            products of attentions have in any case.
            In the fully quantized mode ``min_bits`` is 4, else 3, unless given.
        greedy_images: that the loss of a move is measured on, at most.
        attention: quantize both products of attentions (those that are not causal).
        fully_quantized: also what norms and softmax read and the sums that enter blocks, at ``stream_bits`` each.
        moves: filled in by the run.
    """

    method = "mptq_vit"
    supports_activation_bits = True

    activation_bits: int = option(4, range=(2, 8), also=(16,), per_module=True)
    symmetric: bool = option(True, per_module=True)
    calibration_samples: int = option(128, range=(1, 1 << 20))
    smooth: bool = True
    shift: bool = True
    alpha: float = option(0.5, range=(0.0, 1.0))
    alphas: Sequence[float] | None = None
    tail: float = option(0.0, range=(0.0, 0.4))
    twin: bool = True
    metric: str = option("hessian", choices=("hessian", "mse"))
    candidates: int = option(100, range=(1, 1 << 16))
    low: float = option(0.01, range=(1e-4, 1.0))
    high: float = option(1.2, range=(0.5, 4.0))
    rounds: int = option(3, range=(1, 100))
    search_rows: int = option(512, range=(1, 1 << 24))
    range_images: int = option(32, range=(1, 1 << 20))
    target_bits: float | None = option(None, range=(2.0, 8.0))
    max_bits: int = option(8, range=(2, 8))
    min_bits: int | None = option(None, range=(2, 8))
    greedy_images: int = option(128, range=(1, 1 << 20))
    attention: bool = True
    fully_quantized: bool = False
    stream_bits: int = option(8, range=(2, 8))
    moves: Sequence[Any] | None = None

    def check(self) -> None:
        super().check()
        if self.lowest > self.max_bits:
            raise ConfigError(f"min_bits={self.lowest} is above max_bits={self.max_bits}")
        if self.target_bits is not None and self.target_bits < self.lowest:
            raise ConfigError(f"target_bits={self.target_bits}: at least min_bits={self.lowest} is needed")
        if self.alphas is not None and not (self.alphas and all(0 <= a <= 1 for a in self.alphas)):
            raise ConfigError(f"alphas={list(self.alphas)}: numbers from 0 to 1 are needed")
        if self.fully_quantized and (self.activation_bits == 16 or not self.attention):
            raise ConfigError("fully_quantized needs attention=True and activation_bits below 16")

    @property
    def lowest(self) -> int:
        """The least width that the run may choose."""
        return self.min_bits if self.min_bits is not None else 4 if self.fully_quantized else 3


def quantize(model: Any, data: Any, config: MPTQViTConfig, report: Report) -> None:
    """Fold all norms, cache inputs and gradients of the float model, choose widths, search steps, pack."""
    from hfq.allocation import cost, relevance
    from hfq.calibration import gradients, static, walk
    from hfq.reconstruction import smoothed, sums
    from hfq.reconstruction import static as pack
    from hfq.reconstruction.stepsize import Search

    plan = config.plan(model)
    if not plan.sites:
        return
    search, places = Search(config.candidates, config.low, config.high, config.rounds), sums.places(plan)
    images = relevance.first(data, config.range_images)
    folded = smoothed.fold_norms(plan, images, config.one_call(model, data), config, report, search)  # part A
    sites = [site for site in plan.sites if site.kind in ("linear", "transposed")]
    caches = gradients.collect(model, images, sites, rows=config.search_rows, seed=config.seed)
    if config.fixed:
        config.check_layers([*(site.name for site in plan.sites), *plan.skipped])
    elif config.target_bits is not None:
        config.choose(None)
        config.choose(_lower(plan, data, caches, folded, config, search))  # part D
    config.average_bits = cost.averages(plan.sites, config.spec_for)
    report.totals |= {name: getattr(config, name) for name in ("bit_map", "moves", "average_bits")}
    products = None
    if config.attention and config.activation_bits != 16:
        products = pack.Products(config.activation_bits, "twin", symmetric=True, observer="mse",
                                 score_bits=config.stream_bits if config.fully_quantized else None)
    for step in walk.walk(plan, images, report=report, **config.walk_options()):
        for stage in static.stages(step):
            if not stage.attention:
                _pack(step, stage.sites, caches, folded, config, search)
            elif products is not None and pack.attention_asked(stage, step, config.inputs_for):
                pack.pack_products(step, stage.attention, products, report, seed=config.seed)
            step.settle()
    smoothed.pack_outside(plan, images, caches, config, report,
                          lambda step, group: _pack(step, group, caches, folded, config, search))
    if config.fully_quantized:
        sums.round_stream(plan, places, images, config.stream_bits, report, seed=config.seed)


def _form(rows: torch.Tensor, bits: int, behind_norm: bool, config: MPTQViTConfig) -> Any:
    """The grid of inputs ``rows``: two grids for what a GELU gives."""
    from hfq.formats.twin import TwinSpec
    from hfq.reconstruction.static import input_grid

    if config.twin and not behind_norm and -0.2 < float(rows.min()) < 0:
        return TwinSpec(bits, 0)
    return input_grid(bits, symmetric=True)


def _pack(step: Any, sites: Sequence[Any], caches: Any, folded: Any, config: MPTQViTConfig, search: Any) -> None:
    """Parts B and C for sites that read one tensor."""
    from hfq.reconstruction import static as pack
    from hfq.reconstruction.direct import site_matrix
    from hfq.reconstruction.stepsize import Reader, joint

    known = [site for site in sites if site.name in caches]
    for bits in sorted({config.inputs_for(site.name) for site in known}):
        group = [site for site in known if config.inputs_for(site.name) == bits]
        rows = caches[group[0].name].inputs
        readers = [Reader(site_matrix(site), config.spec_for(site.name),
                          caches[site.name].gradients if config.metric == "hessian" else None) for site in group]
        spec = None if bits == 16 else _form(rows, bits, group[0].name in folded, config)
        given, codes, _ = joint(rows, readers, spec, search)
        options = {} if given is None else {"activation": given[0], "activation_params": given[1]}
        for site, one in zip(group, codes, strict=True):
            extra = {"folded": folded[site.name]} if site.name in folded else {}
            step.swap(site, one, asked=one.spec.to_dict(), extra=extra, **options)
    others = [site for site in sites if site.name not in caches]
    if others:
        pack.pack_sites(step, others, config.inputs_for, pack.round_nearest(config.spec_for, "mse"), observer="mse",
                        symmetric=True, seed=config.seed)


def _lower(plan: Any, data: Any, caches: Any, folded: Any, config: MPTQViTConfig, search: Any) -> dict[str, Any]:
    """Part D: from ``max_bits`` everywhere down to the target, by the divergence from the float predictions."""
    from hfq.allocation import lowering, relevance
    from hfq.calibration import gradients
    from hfq.reconstruction import smoothed
    from hfq.reconstruction.simulation import Simulation

    images = relevance.first(data, config.greedy_images)
    wanted = gradients.predictions(plan.model, images)
    groups = smoothed.groups(plan, caches)

    def form(group: Sequence[Any], bits: int) -> Any:
        return _form(caches[group[0].name].inputs, bits, group[0].name in folded, config)

    simulation = Simulation(plan.model, groups, caches, lambda name, bits: config.spec_for(name).with_bits(bits), form,
                            search, weighted=config.metric == "hessian")
    start, widths, costs = smoothed.units(groups, caches, config)
    budget = {what: config.target_bits * sum(row[config.max_bits] for row in table.values()) / config.max_bits
              for what, table in costs.items()}
    with simulation:
        found = lowering.lower(start, widths, lambda bits: simulation.loss(bits, images, wanted), costs, budget)
    config.moves = [[move.name, move.bits, float(f"{move.metric:.6g}")] for move in found.moves]
    return {site.name: {"bits": found.bits[f"weights:{site.name}"],
                        "activation_bits": found.bits[f"inputs:{group[0].name}"]}
            for group in groups for site in group}
