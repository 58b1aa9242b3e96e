"""LRP-QViT (arXiv 2401.11243): the relevance that reaches a layer from the predicted class says how many bits it gets;
norm outputs lose the outliers of their channels before their grids are made one and folded into norm and readers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfq.config import option
from hfq.errors import ConfigError
from hfq.report import Report
from hfq.widths import WidthsConfig

if TYPE_CHECKING:
    import torch

__all__ = ["LRPQViTConfig", "quantize"]


@dataclass(kw_only=True, eq=False, repr=False)
class LRPQViTConfig(WidthsConfig):
    """Mixed precision by relevance, and clipped grids of channels.

    ``bits`` is the mean width of the weights. A layer's inputs have the width of its weights, as far from
    ``activation_bits`` as that is from ``bits``. ``overrides`` with bits pin a layer.

    Args:
        mixed: choose widths; else all layers have ``bits``.
        widths: of the weights; ``None`` for one below to one above ``bits``.
        score: how relevance is counted: "abs", "signed" or "grad".
        objective: "error" lets relevant layers have the least squared steps, as errors go; "bits" gives them the most
            bits, and so trades a bit that quarters an error for one that makes another four times as large.
        mac_budget: also bound the mean of multiplications times both widths. Products of attentions have no weights:
            without it they keep ``activation_bits``.
        relevance_images: that relevance is averaged over, at most.
        range_images: that ranges are found on, at most: the first ones.
        clip_shares: quantiles at which channels of norm outputs may be clipped; one does not clip.
        clip_cap: largest range of a channel, in medians of all of them; ``None`` for none.
        softmax: grid of the probabilities: "sqrt2", "log2" or "uniform".
        log_zero: how powers have zero: "reserve" a code, or "none".
        attention: quantize both products of attentions (those that are not causal).
        scores: filled in by the run.
    """

    method = "lrp_qvit"
    supports_activation_bits = True

    activation_bits: int = option(4, range=(2, 8), also=(16,), per_module=True)
    calibration_samples: int = option(128, range=(1, 1 << 20))
    mixed: bool = True
    widths: Sequence[int] | None = None
    score: str = option("abs", choices=("abs", "signed", "grad"))
    objective: str = option("error", choices=("error", "bits"))
    mac_budget: bool = True
    relevance_images: int = option(128, range=(1, 1 << 20))
    range_images: int = option(32, range=(1, 1 << 20))
    clip_shares: Sequence[float] = (0.99, 0.995, 0.999, 0.9999, 1.0)
    clip_cap: float | None = option(None, range=(1.0, 1e6))
    softmax: str = option("sqrt2", choices=("sqrt2", "log2", "uniform"))
    log_zero: str = option("reserve", choices=("reserve", "none"))
    attention: bool = True
    scores: Mapping[str, float] | None = None

    def check(self) -> None:
        super().check()
        if self.widths is not None and not (self.widths and all(1 <= bits <= 8 for bits in self.widths)):
            raise ConfigError(f"widths={list(self.widths)}: widths from 1 to 8 are needed")
        if self.mixed and not self.fixed and self.bits < min(self.widths or [1]):
            raise ConfigError(f"bits={self.bits}: widths={list(self.widths)} have no mean below {min(self.widths)}; "
                              "raise bits to it, or allow smaller widths")
        if not self.clip_shares or not all(0.5 < share <= 1 for share in self.clip_shares):
            raise ConfigError(f"clip_shares={list(self.clip_shares)}: numbers above 0.5 and at most 1 are needed")


def quantize(model: Any, data: Any, config: LRPQViTConfig, report: Report) -> None:
    """Relevance, widths, and then block by block: clip, fold, round."""
    from hfq.allocation import cost, relevance
    from hfq.calibration import static, walk
    from hfq.graph import pairs
    from hfq.layers import routing
    from hfq.reconstruction import folded
    from hfq.reconstruction import static as pack

    plan = config.traced_plan(model, data)
    if not plan.sites:
        return
    if config.fixed:
        attentions = routing.find(model, config.one_call(model, data))
        products = [f"{name}.{product}" for name in attentions for product in ("scores", "values")]
        config.check_layers([*(site.name for site in plan.sites), *plan.skipped, *products])
    elif config.mixed and config.bits != 16:
        config.choose(None)
        config.choose(_allocate(plan, model, data, config, report))
    config.average_bits = cost.averages(plan.sites, config.spec_for)
    report.totals |= {name: getattr(config, name) for name in ("bit_map", "scores", "average_bits")}
    data = relevance.first(data, config.range_images)
    found = pairs.discover(plan, config.one_call(model, data), placement=config.placement, seed=config.seed)
    report.pairs += found.rows()
    rounding = pack.round_nearest(config.spec_for, "percentiles")

    def fold(rows: torch.Tensor, pair: Any, bits: int, shifts: bool) -> Any:
        return _clipped(rows, pair, bits, shifts, config)

    for step in walk.walk(plan, data, report=report, **config.walk_options()):
        folds = folded.behind_norms(step, found.proven("norm", step.block.name), report, config.seed)
        for stage in static.stages(step):
            if not stage.attention:
                folded.pack_group(step, stage.sites, folds, config.inputs_for, fold, rounding, seed=config.seed)
            elif config.attention and pack.attention_asked(stage, step, config.inputs_for):
                pack.pack_products(step, stage.attention, _products(stage.attention, config), report, seed=config.seed)
            step.settle()
    options = folded.outside_norms(plan, data, config.one_call(model, data), config.inputs_for, fold, report,
                                   seed=config.seed)
    pack.pack_outside(plan, config, data, report, observer="percentile", clip="percentiles", options=options)


def _allocate(plan: Any, model: Any, data: Any, config: LRPQViTConfig, report: Report) -> dict[str, dict[str, int]]:
    """Parts A to C: shares of relevance, and the integer program under both budgets."""
    from hfq.allocation import program, relevance

    found = relevance.shares(model, data, images=config.relevance_images, score=config.score)
    config.scores = found.shares
    units, sizes = _units(plan, found, config, report)
    moved = {name: sum(found.macs.get(member, 0.0) for member in members) for name, members in units.items()}
    share = {name: sum(found.shares.get(member, 0.0) for member in members) for name, members in units.items()}
    widths = sorted(set(config.widths or (bits for bits in (config.bits - 1, config.bits, config.bits + 1) if bits)))
    widths = [bits for bits in widths if bits <= 8]
    worth = {b: -float(b) if config.objective == "bits" else (2.0**b - 1) ** -2 for b in widths}
    scores = {name: {b: share[name] * worth[b] for b in widths} for name in units}
    costs = {"size": {name: {b: float(sizes[name] * b) for b in widths} for name in units}}
    budgets = {"size": float(config.bits * sum(sizes.values()))}
    if config.mac_budget and config.activation_bits != 16:
        costs["macs"] = {name: {b: moved[name] * b * _inputs(b, config) for b in widths} for name in units}
        budgets["macs"] = sum(moved.values()) * config.bits * config.activation_bits
    chosen = program.allocate(scores, costs, budgets)
    return {member: {"bits": bits, "activation_bits": _inputs(bits, config)}
            for name, bits in chosen.items() for member in units[name]}


def _units(plan: Any, found: Any, config: LRPQViTConfig, report: Report) -> tuple[dict[str, list[str]], dict[str, int]]:
    """What shares a width: sites that read one tensor, one site outside, one product of an attention."""
    groups = [group for block in plan.blocks for group in block.groups] + [[site] for site in plan.outside]
    units, sizes = {}, {}
    for group in groups:
        free = [site for site in group if "bits" not in config.override_for(site.name)]
        for site in [site for site in free if site.name not in found.shares]:
            report.note(f"{site.name} was not reached by relevance and keeps {config.bits} bits")
            free.remove(site)
        if free:
            units[free[0].name] = [site.name for site in free]
            sizes[free[0].name] = sum(site.numel for site in free)
    if config.attention and config.mac_budget and config.activation_bits != 16:
        for name in found.shares:
            inside = any(name.startswith(f"{block.name}.") for block in plan.blocks)
            if inside and name.endswith((".scores", ".values")) and "activation_bits" not in config.override_for(name):
                units[name], sizes[name] = [name], 0
    return units, sizes


def _inputs(bits: int, config: LRPQViTConfig) -> int:
    return 16 if config.activation_bits == 16 else min(8, max(2, config.activation_bits + bits - config.bits))


def _products(name: str, config: LRPQViTConfig) -> Any:
    """Part D, steps 4 and 5: both operands of a product have its width."""
    from hfq.reconstruction.static import Products

    return Products(config.inputs_for(f"{name}.scores"), config.softmax, zero=config.log_zero,
                    value_bits=config.inputs_for(f"{name}.values"))


def _clipped(rows: torch.Tensor, pair: Any, bits: int, shifts: bool, config: LRPQViTConfig) -> Any:
    """Part D, steps 2 and 3: clip every channel, one grid for all, folded."""
    from hfq.reconstruction.channels import clip_channels
    from hfq.reconstruction.folded import reader_weights
    from hfq.transforms import reparameterize

    scale, zero, share = clip_channels(rows, reader_weights(pair), bits, config.clip_shares, symmetric=not shifts,
                                       cap=config.clip_cap)
    grid = reparameterize.common_grid(scale, zero, bits)
    reparameterize.fold(pair, grid.ratio, grid.shift)
    extra = {"reparameterized": pair.sources[0].name, "shifted": shifts, "clip_share": share}
    return (rows.double() / grid.ratio + grid.shift).float(), grid.params, extra
