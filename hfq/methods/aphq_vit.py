"""APHQ-ViT (arXiv 2504.02508): uniform grids, learned block by block against a loss that weighs every element of a
block's output with how sharply the prediction bends there; perceptrons get a ReLU before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hfq.config import HfqConfig, option
from hfq.errors import ConfigError
from hfq.report import Report

__all__ = ["APHQViTConfig", "quantize"]


@dataclass(kw_only=True, eq=False, repr=False)
class APHQViTConfig(HfqConfig):
    """Average perturbation Hessian, perceptron reconstruction, and learned rounding with dropped quantization.

    Args:
        mlp: replace the activation of every perceptron by a ReLU and fit its linears to what they gave before.
        mlp_steps, mlp_lr: of that; ``batch_size`` is that of both loops.
        clamp_share: part of the positive numbers behind the old activation that is not clamped while fitting; ``None``:
            0.98 for 2 and 4 bits of inputs, else 0.99.
        clamp_weight: of the loss with the clamp.
        hessian: weights of the errors of a block: "average" over the images, as published; "sample" and "squared"
            (gradients): each image its own; "none".
        perturbation: how far outputs are moved for it; in units of their size with ``perturbation_relative``.
        perturbation_signs: move every element by a random sign instead of all alike.
        temperature: of the logits in that loss.
        steps, lr, lr_activation: of learning a block: gates of the weights, and steps of the inputs.
        drop: probability of leaving a rounding out, and of an input from the float stream.
        penalty, penalty_start, penalty_end, warmup: of gates between 0 and 1.
        loss_norm: "init" divides a block's loss by its first value; "unit_mean" is the earlier published form.
        candidates, rounds, search_rows: of searching grids by the error of products.
        attention_candidates: of each end of a range of an operand of attention.
        attention: quantize both products of attentions (those that are not causal).
    """

    method = "aphq_vit"
    supports_activation_bits = True

    activation_bits: int = option(4, range=(2, 8), also=(16,), per_module=True)
    calibration_samples: int = option(1024, range=(1, 1 << 20))
    calibration_batch_size: int = option(32, range=(1, 1 << 16))
    seed: int = option(3407, range=(0, 2**63 - 1))
    mlp: bool = True
    mlp_steps: int = option(20_000, range=(0, 1_000_000))
    mlp_lr: float = option(4e-5, range=(0.0, 1.0))
    clamp_share: float | None = option(None, range=(0.5, 1.0))
    clamp_weight: float = option(2.0, range=(0.0, 1e3))
    hessian: str = option("average", choices=("average", "sample", "squared", "none"))
    perturbation: float = option(1e-6, range=(1e-12, 1.0))
    perturbation_relative: bool = False
    perturbation_signs: bool = False
    temperature: float = option(20.0, range=(1e-3, 1e3))
    steps: int = option(20_000, range=(0, 1_000_000))
    lr: float = option(1e-3, range=(0.0, 1.0))
    lr_activation: float = option(4e-5, range=(0.0, 1.0))
    batch_size: int = option(32, range=(1, 4096))
    drop: float = option(0.5, range=(0.0, 1.0))
    penalty: float = option(0.01, range=(0.0, 1e3))
    penalty_start: float = option(20.0, range=(0.1, 100.0))
    penalty_end: float = option(2.0, range=(0.1, 100.0))
    warmup: float = option(0.2, range=(0.0, 0.99))
    loss_norm: str = option("init", choices=("init", "unit_mean"))
    candidates: int = option(128, range=(2, 1 << 16))
    rounds: int = option(3, range=(0, 100))
    search_rows: int = option(4096, range=(1, 1 << 24))
    attention_candidates: int = option(129, range=(2, 1 << 16))
    attention: bool = True

    def check(self) -> None:
        if self.group_size != -1 or self.symmetric:
            raise ConfigError("aphq_vit has one asymmetric grid an output channel: group_size=-1, symmetric=False")

    def inputs_for(self, name: str) -> int:
        return self.value_for(name, "activation_bits")


def quantize(model: Any, data: Any, config: APHQViTConfig, report: Report) -> None:
    """Rebuild the perceptrons; then, block by block: find grids, learn, pack."""
    from hfq.calibration.perturbation import Probe
    from hfq.calibration.reference import Reference, copy_of
    from hfq.calibration.walk import walk
    from hfq.graph import pairs, trace

    plan = config.plan(model)
    if not plan.sites:
        return
    full = copy_of(model)
    probe = Probe(full, data, temperature=config.temperature, delta=config.perturbation, seed=config.seed,
                  relative=config.perturbation_relative, signs=config.perturbation_signs)
    found = trace.order_groups(plan, config.one_call(model, data))
    rebuilt = _perceptrons(plan, data, found, probe, config, report) if config.mlp else set()  # 0 and 1
    plan = config.traced_plan(model, data)
    proven = pairs.discover(plan, config.one_call(model, data), placement=config.placement, seed=config.seed)
    report.pairs += proven.rows()
    with Reference(config.plan(full), data) as floats:
        for step in walk(plan, data, streams=("quantized", "float"), report=report, **config.walk_options()):
            unit = _calibrated(step, proven, rebuilt, config, report)  # 2
            _reconstruct(step, unit, floats.step(step.block.name), probe, config, report)  # 3
    _outside(plan, full, probe, data, config, report)


def _perceptrons(plan: Any, data: Any, found: Any, probe: Any, config: APHQViTConfig, report: Report) -> set[str]:
    """Step 1: the second linears of the perceptrons that have a ReLU now. Every block learns on the float stream."""
    from hfq.calibration.walk import generator, walk
    from hfq.graph import perceptrons
    from hfq.reconstruction import losses, perceptron

    every = {block.name: perceptrons.find(plan, found, block) for block in plan.blocks}
    asked = {site.name for site in plan.sites if config.inputs_for(site.name) != 16}
    every = {name: [p for p in own if {p.first, p.second} <= asked] for name, own in every.items()}
    options = config.walk_options()
    if options["progress_dir"] is not None:
        options["progress_dir"] = f"{options['progress_dir']}/perceptrons"
    for step in walk(plan, data, streams=("quantized", "float"), report=report, **options):
        for names in every[step.block.name]:
            weight = losses.unit_rms(probe.average(probe.model.get_submodule(names.second)))
            bits = config.inputs_for(names.second)
            share = config.clamp_share or (0.98 if bits in (2, 4) else 0.99)
            done = perceptron.rebuild(
                step, names, weight, share=share, clamped=config.clamp_weight, steps=config.mlp_steps,
                lr=config.mlp_lr, batch_size=config.batch_size, generator=generator(config.seed, -1 - step.index),
            )  # fmt: skip
            report.note(f"{names.activation} is a ReLU now: the loss of its perceptron went from {done.before:.4g} to "
                        f"{done.after:.4g}, its largest number from {done.largest_before:.4g} to {done.largest:.4g}")
    return {names.second for own in every.values() for names in own}


def _grids(config: APHQViTConfig) -> Any:
    from hfq.reconstruction.units import Grids

    return Grids(config.spec_for, config.inputs_for, config.candidates, config.rounds, config.search_rows,
                 config.attention_candidates, config.seed)


def _calibrated(step: Any, proven: Any, rebuilt: set[str], config: APHQViTConfig, report: Report) -> Any:
    """Step 2: grids of one block, on what enters it in the float model with the new perceptrons."""
    from hfq.calibration import static
    from hfq.reconstruction import folded, units
    from hfq.reconstruction.static import attention_asked

    unit, grids = units.Unit(), _grids(config)
    folds = folded.behind_norms(step, proven.proven("norm", step.block.name), report, config.seed)
    for stage in sorted(static.stages(step), key=lambda stage: bool(stage.attention)):  # linears first, all of them
        if not stage.attention:
            zero = 0 if any(site.name in rebuilt for site in stage.sites) else None
            units.calibrate_group(unit, step, stage.sites, grids, folds, folded.fold_by_mean, zero=zero)
        elif config.attention and attention_asked(stage, step, config.inputs_for):
            units.calibrate_products(unit, step, stage.attention, config.activation_bits, grids, report)
    return unit


def _loss(probe: Any, module: Any, outputs: Any, config: APHQViTConfig) -> tuple[Any, Any]:
    from hfq.reconstruction.sensitivity import loss_at

    return loss_at(probe, module, outputs, config.hessian, over_tokens=config.loss_norm == "unit_mean")


def _course(config: APHQViTConfig) -> Any:
    from hfq.reconstruction.drop import Course

    sharp, relative = (config.penalty_start, config.penalty_end), 2.0 if config.loss_norm == "init" else None
    return Course(config.steps, config.batch_size, config.lr, config.lr_activation, config.drop, config.penalty, sharp,
                  config.warmup, relative)


def _reconstruct(step: Any, unit: Any, floats: Any, probe: Any, config: APHQViTConfig, report: Report) -> None:
    """Step 3: learn gates and steps of a block against the float model's own, and pack it."""
    from hfq.calibration.walk import generator
    from hfq.reconstruction import drop, loop, units

    loss, targets = _loss(probe, probe.model.get_submodule(step.block.name), floats.outputs, config)
    found = drop.fit(step, unit, loss, _course(config), targets=targets, float_inputs=floats.inputs,
                     generator=generator(config.seed, step.index), seed=config.seed + step.index)
    report.curves[step.block.name] = loop.thinned(found.curve)
    units.pack(step, unit, step.block.sites, **found.told())


def _outside(plan: Any, full: Any, probe: Any, data: Any, config: APHQViTConfig, report: Report) -> None:
    """Patch merging and, where they are asked for, patch embedding and head; a head learns the prediction itself."""
    from hfq import graph
    from hfq.calibration import sequence
    from hfq.calibration.walk import generator
    from hfq.reconstruction import folded, losses, outside

    model, usual = plan.model, graph.read(full).skipped
    for number, site in enumerate(sequence.order(model, data[0], plan.outside)):
        head = usual.get(site.name, "").startswith("head")

        def loss_of(module: Any, outputs: Any, head: bool = head) -> tuple[Any, Any]:
            return (losses.divergence, outputs) if head else _loss(probe, module, outputs, config)

        outside.reconstruct(
            model, full, data, site, _grids(config), _course(config), loss_of, folded.mean_grid,
            config.one_call(model, data), report, generator=generator(config.seed, len(plan.blocks) + number),
            seed=config.seed + number,
        )  # fmt: skip
