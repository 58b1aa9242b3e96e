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
    from hfq.reconstruction import folded
    from hfq.reconstruction import static as pack

    plan = config.plan(model)
    found = pairs.discover(plan, config.one_call(model, data), placement=config.placement, seed=config.seed)
    report.pairs += found.rows()
    products = None
    if config.attention and config.activation_bits != 16:
        products = pack.Products(config.activation_bits, config.softmax, zero=config.log_zero)
    refit = None if config.ridge is None else _refit(config.ridge)
    for step in walk.walk(plan, data, report=report, **config.walk_options()):
        proven = found.proven("norm", step.block.name) if config.reparameterize else []
        folds = folded.behind_norms(step, proven, report, config.seed)
        for stage in static.stages(step):
            if not stage.attention:
                folded.pack_group(step, stage.sites, folds, config.inputs_for, _fold(config, step.index),
                                  _rounding(config), seed=config.seed, before=refit)  # steps 0 to 4
            elif products is not None and pack.attention_asked(stage, step, config.inputs_for):
                pack.pack_products(step, stage.attention, products, report, seed=config.seed)  # step 5
            step.settle()
    options = {}
    if config.reparameterize:  # patch merging, in the finished model
        options = folded.outside_norms(plan, data, config.one_call(model, data), config.inputs_for,
                                       _fold(config, len(plan.blocks)), report, seed=config.seed)
    pack.pack_outside(plan, config, data, report, observer="percentile", clip=config.weight_clip, options=options)


def _fold(config: RepQuantConfig, index: int) -> Any:
    """Steps 0 to 2 as a fold; ``index`` tells the random numbers of one block from those of another."""
    from hfq.calibration.walk import generator

    def fold(rows: torch.Tensor, pair: Any, bits: int, shifts: bool) -> tuple[torch.Tensor, Any, dict[str, Any]]:
        return _reparameterize(rows, pair, bits, shifts, config, generator(config.seed, index))

    return fold


def _rounding(config: RepQuantConfig) -> Any:
    """Steps 3 and 4: weights rounded behind their inputs as they will be."""
    from hfq.layers.fake import fake_inputs
    from hfq.reconstruction import static as pack
    from hfq.reconstruction.columns import Solver

    if config.reconstruction == "gptq":
        solver = Solver(percdamp=config.percdamp, act_order=config.act_order, static_groups=config.act_order,
                        clip=config.weight_clip)
        how = pack.round_columns(config.spec_for, solver)
    else:
        how = pack.round_nearest(config.spec_for, config.weight_clip)

    def rounding(step: Any, sites: Any, options: Any) -> None:
        given = {site.module: options[site.name] for site in sites if site.name in options}
        with fake_inputs({module: told["activation"] for module, told in given.items()},
                         params={module: told["activation_params"] for module, told in given.items()}):  # fmt: skip
            how(step, sites, options)

    return rounding


def _reparameterize(
    rows: torch.Tensor, pair: Any, bits: int, shifts: bool, config: RepQuantConfig, random: Any
) -> tuple[torch.Tensor, Any, dict[str, Any]]:
    """Grids of the channels (step 0), their learned bounds (step 1), and the fold (step 2)."""
    from hfq.calibration import ranges
    from hfq.reconstruction.channels import learn_bounds
    from hfq.reconstruction.folded import reader_weights
    from hfq.transforms import reparameterize

    scale, zero = ranges.fit_channels(rows, bits, symmetric=not shifts)
    extra: dict[str, Any] = {"reparameterized": pair.sources[0].name, "shifted": shifts}
    if config.clip:
        bounds = learn_bounds(
            rows, reader_weights(pair), scale, zero, bits, steps=config.clip_steps, lr=config.clip_lr,
            start=config.clip_start, batch=config.clip_batch, symmetric=not shifts, generator=random,
        )  # fmt: skip
        scale, zero = bounds.scale, bounds.zero_point
        extra |= {"clip_before": float(f"{bounds.before:.6g}"), "clip_after": float(f"{bounds.after:.6g}")}
    grid = reparameterize.common_grid(scale, zero, bits)
    reparameterize.fold(pair, grid.ratio, grid.shift)
    return (rows.double() / grid.ratio + grid.shift).float(), grid.params, extra


def _refit(share: float) -> Any:
    """The weight of a linear, fitted to its coded inputs."""
    from hfq.formats import activation
    from hfq.reconstruction.channels import refit

    def before(site: Any, rows: torch.Tensor, spec: Any, params: Any) -> None:
        if site.kind == "linear":
            weight = site.module.weight
            weight.data.copy_(refit(weight, rows, activation.fake(rows, spec, params), share))

    return before
