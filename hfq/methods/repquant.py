"""RepQuant (arXiv 2402.05628): quantizers that are rich while they are calibrated, and plain when they run. Channel
grids of norm outputs become one grid, folded into norm and readers; the grid of the softmax has powers of sqrt(2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfq.config import HfqConfig, option
from hfq.report import Report

if TYPE_CHECKING:
    import torch

__all__ = ["RepQuantConfig", "quantize"]


@dataclass(kw_only=True, eq=False, repr=False)
class RepQuantConfig(HfqConfig):
    """Scale reparameterization with learned clipping and weight reconstruction.

    Args:
        reparameterize: grids of the channels of norm outputs, folded into one; else one grid a tensor from the start.
        clip: learn both bounds of every such channel before the fold.
        clip_steps, clip_lr, clip_start: of learning them.
        clip_batch: rows a step.
        reconstruction: how weights are rounded behind quantized inputs: "gptq" or "nearest".
        percdamp, act_order: of "gptq".
        ridge: fit weights to quantized inputs by least squares before rounding, held to the old ones by this share of
            the mean square of an input; ``None`` does not.
        weight_clip: how the range of a weight channel is found.
        softmax: grid of the probabilities: "sqrt2", "log2" or "uniform".
        log_zero: how powers have zero: "reserve" a code, or "none".
        attention: quantize both products of attentions (those that are not causal).
    """

    method = "repquant"
    supports_activation_bits = True

    activation_bits: int = option(4, range=(2, 8), also=(16,), per_module=True)
    calibration_samples: int = option(32, range=(1, 1 << 20))
    reparameterize: bool = True
    clip: bool = True
    clip_steps: int = option(500, range=(0, 100_000))
    clip_lr: float = option(5e-3, range=(0.0, 1.0))
    clip_start: float = option(0.98, range=(0.1, 0.9999))
    clip_batch: int = option(2048, range=(1, 1 << 20))
    reconstruction: str = option("gptq", choices=("gptq", "nearest"))
    percdamp: float = option(0.01, range=(0.0, 1.0))
    act_order: bool = False
    ridge: float | None = option(None, range=(0.0, 1e6))
    weight_clip: str = option("mse", choices=("none", "mse", "percentile", "percentiles"))
    softmax: str = option("sqrt2", choices=("sqrt2", "log2", "uniform"))
    log_zero: str = option("reserve", choices=("reserve", "none"))
    attention: bool = True

    def inputs_for(self, name: str) -> int:
        return self.value_for(name, "activation_bits")


def quantize(model: Any, data: Any, config: RepQuantConfig, report: Report) -> None:
    """Walk the blocks; within a block every stage is calibrated behind the finished ones."""
    from hfq.calibration import static, walk
    from hfq.graph import pairs
    from hfq.reconstruction.static import Products, attention_asked, pack_products

    plan = config.plan(model)
    found = pairs.discover(plan, config.one_call(model, data), placement=config.placement, seed=config.seed)
    report.pairs += found.rows()
    products = None
    if config.attention and config.activation_bits != 16:
        products = Products(config.activation_bits, config.softmax, zero=config.log_zero)
    for step in walk.walk(plan, data, report=report, **config.walk_options()):
        folds = _folds(step, found.proven("norm", step.block.name), config, report)
        for stage in static.stages(step):
            if stage.attention:
                if products is not None and attention_asked(stage, step, config.inputs_for):
                    pack_products(step, stage.attention, products, report, seed=config.seed)  # step 5
            else:
                _sites(step, stage.sites, folds, config, report)
            step.settle()
    _outside(plan, data, config, report)


def _folds(step: Any, proven: list[Any], config: RepQuantConfig, report: Report) -> dict[str, tuple[Any, bool]]:
    """For each reader of a norm its pair, and whether the norm may shift."""
    from hfq.transforms import reparameterize

    if not config.reparameterize or not proven or not len(step):
        return {}
    args, kwargs = step.inputs[0]
    reasons = reparameterize.prove_shifts(step.block, args, kwargs, proven, seed=config.seed)
    packed = {site.name for site in step.block.sites}
    folds = {}
    for pair in proven:
        name = pair.sources[0].name
        reason = reasons[name]
        bare = [r.name for r in pair.readers if r.part.bias_tensor is None and r.name not in packed]
        if bare and not reason:
            reason = f"{bare[0]} stays float and has no bias"
        if reason:
            report.note(f"{name}: channels are scaled and not shifted: {reason}")
        folds.update({reader.name: (pair, not reason) for reader in pair.readers})
    return folds


def _sites(step: Any, sites: Any, folds: Any, config: RepQuantConfig, report: Report) -> None:
    """Steps 0 to 4 for sites that read one tensor."""
    from hfq.calibration import ranges, static
    from hfq.calibration.walk import generator
    from hfq.layers.fake import fake_inputs
    from hfq.reconstruction import static as pack
    from hfq.reconstruction.columns import Solver

    wanted = [s for s in sites if s.kind in ("linear", "transposed", "conv") and config.inputs_for(s.name) != 16]
    options: dict[str, dict[str, Any]] = {}
    if wanted:
        rows = static.observe_inputs(step, wanted, seed=config.seed)[wanted[0].name]
        bits = min(config.inputs_for(site.name) for site in wanted)
        pair, shifts = folds.get(wanted[0].name, (None, False))
        params, extra = None, {}
        if pair is not None and {r.name for r in pair.readers} >= {site.name for site in wanted}:
            random = generator(config.seed, step.index)
            rows, params, extra = _reparameterize(rows, pair, bits, shifts, config, random)
        for site in wanted:
            spec = pack.input_grid(config.inputs_for(site.name))
            own = params if params is not None and spec.bits == bits else ranges.fit(rows, spec)
            options[site.name] = pack.input_options(spec, own, extra=extra)
            if config.ridge is not None and site.kind == "linear":
                _refit(site.module, rows, spec, own, config.ridge)
    grids = {s.module: options[s.name]["activation"] for s in wanted}
    with fake_inputs(grids, params={s.module: options[s.name]["activation_params"] for s in wanted}):
        if config.reconstruction == "gptq":  # on the inputs as they will be
            solver = Solver(percdamp=config.percdamp, act_order=config.act_order, static_groups=config.act_order,
                            clip=config.weight_clip)
            pack.round_columns(config.spec_for, solver)(step, sites, options)
        else:
            pack.round_nearest(config.spec_for, config.weight_clip)(step, sites, options)


def _reparameterize(
    rows: torch.Tensor, pair: Any, bits: int, shifts: bool, config: RepQuantConfig, random: Any
) -> tuple[torch.Tensor, Any, dict[str, Any]]:
    """Grids of the channels (step 0), their learned bounds (step 1), and the fold (step 2)."""
    from hfq.calibration import ranges
    from hfq.reconstruction.channels import learn_bounds
    from hfq.transforms import reparameterize

    scale, zero = ranges.fit_channels(rows, bits, symmetric=not shifts)
    extra: dict[str, Any] = {"reparameterized": pair.sources[0].name, "shifted": shifts}
    if config.clip:
        weights = [link.part.weight.movedim(link.part.input_axis, -1).flatten(0, -2) for link in pair.readers]
        bounds = learn_bounds(
            rows, weights, scale, zero, bits, steps=config.clip_steps, lr=config.clip_lr, start=config.clip_start,
            batch=config.clip_batch, symmetric=not shifts, generator=random,
        )  # fmt: skip
        scale, zero = bounds.scale, bounds.zero_point
        extra |= {"clip_before": float(f"{bounds.before:.6g}"), "clip_after": float(f"{bounds.after:.6g}")}
    grid = reparameterize.common_grid(scale, zero, bits)
    reparameterize.fold(pair, grid.ratio, grid.shift)
    return (rows.double() / grid.ratio + grid.shift).float(), grid.params, extra


def _refit(module: Any, rows: torch.Tensor, spec: Any, params: Any, share: float) -> None:
    from hfq.formats import activation
    from hfq.reconstruction.channels import refit

    module.weight.data.copy_(refit(module.weight, rows, activation.fake(rows, spec, params), share))


def _outside(plan: Any, data: Any, config: RepQuantConfig, report: Report) -> None:
    """Sites between the stacks (patch merging) in the finished model; a norm that feeds one is folded the same way."""
    from hfq.calibration import static
    from hfq.calibration.walk import generator
    from hfq.reconstruction import static as pack
    from hfq.transforms import reparameterize

    options, call = {}, config.one_call(plan.model, data)
    for number, site in enumerate(plan.outside):
        bits = config.inputs_for(site.name)
        if bits == 16 or site.kind != "linear" or not config.reparameterize:
            continue
        pair, reason = reparameterize.outside_pair(plan.model, site, call, seed=config.seed)
        if pair is None:
            report.note(f"{site.name}: one grid for its inputs from the start: {reason}")
            continue
        rows = static.observe_outside(plan.model, data, [site], seed=config.seed)[site.name]
        random = generator(config.seed, len(plan.blocks) + number)
        _, params, extra = _reparameterize(rows, pair, bits, pair.sources[0].part.bias is not None, config, random)
        options[site.name] = pack.input_options(pack.input_grid(bits), params, extra=extra, tokens=rows.shape[0])
    pack.pack_outside(plan, config, data, report, observer="percentile", clip=config.weight_clip, options=options)
