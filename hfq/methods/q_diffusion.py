"""Q-Diffusion (arXiv 2302.04304): learned rounding of UNets, calibrated over the whole denoising trajectory, with the
two halves of a shortcut behind a skip on grids of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hfq.config import HfqConfig, option
from hfq.errors import ConfigError
from hfq.graph import select
from hfq.report import Report

__all__ = ["QDiffusionConfig", "quantize"]

_TIME = ("time_embedding", "time_embed", "timestep_embedder", "time_proj")


@dataclass(kw_only=True, eq=False, repr=False)
class QDiffusionConfig(HfqConfig):
    """Rounding learned unit by unit, then the steps of inputs; calibrate it on ``hfq.record_calls``.

    Args:
        split_shortcut: grids of their own for both halves of a layer's input that joins a skip.
        weight_range, activation_range: "mse" searches the shrunken range with the least error ``|x - q(x)| ** 2.4``,
            "max" covers everything.
        activation_symmetric: no zero points of inputs.
        running_ranges: ranges of inputs from running means of their ends over all calls.
        softmax_bits: of the probabilities of attention; 16 for floats.
        attention: quantize both products of attentions.
        steps, lr: of learning the rounding of a unit.
        activation_steps, lr_activation: of learning the steps of its inputs.
        batch_size: rows of a step, both.
        penalty, penalty_start, penalty_end, warmup: of gates between 0 and 1.
        loss_axis: "sum" sums errors over axis 1 of a unit's output, "mean" takes the mean.
        keep_time_embedding: leave the layers that embed the timestep in floats.
    """

    method = "q_diffusion"
    supports_activation_bits = True

    activation_bits: int = option(8, range=(2, 8), also=(16,), per_module=True)
    calibration_samples: int = option(5120, range=(1, 1 << 20))
    split_shortcut: bool = True
    weight_range: str = option("mse", choices=("mse", "max"))
    activation_range: str = option("mse", choices=("mse", "max"))
    activation_symmetric: bool = False
    running_ranges: bool = False
    softmax_bits: int = option(8, range=(2, 8), also=(16,))
    attention: bool = True
    steps: int = option(20_000, range=(0, 1_000_000))
    lr: float = option(1e-3, range=(0.0, 1.0))
    activation_steps: int = option(5_000, range=(0, 1_000_000))
    lr_activation: float = option(4e-4, range=(0.0, 1.0))
    batch_size: int = option(32, range=(1, 4096))
    penalty: float = option(0.01, range=(0.0, 1e3))
    penalty_start: float = option(20.0, range=(0.1, 100.0))
    penalty_end: float = option(2.0, range=(0.1, 100.0))
    warmup: float = option(0.2, range=(0.0, 0.99))
    loss_axis: str = option("sum", choices=("sum", "mean"))
    keep_time_embedding: bool = False

    def check(self) -> None:
        if self.group_size != -1:
            raise ConfigError(f"group_size={self.group_size}: q_diffusion has one grid an output channel (-1)")

    @classmethod
    def fast(cls, **fields: Any) -> QDiffusionConfig:
        """A tenth of the steps."""
        return cls(**{"steps": 2_000, "activation_steps": 500, **fields})

    def inputs_for(self, name: str) -> int:
        return self.value_for(name, "activation_bits")

    def spec_for(self, name: str) -> Any:
        kept = self.keep_time_embedding and select.first_match(name, _TIME) is not None
        return None if kept and "bits" not in self.override_for(name) else super().spec_for(name)

    def plan(self, model: Any, ask: Any = ()) -> Any:
        """Every convolution and linear, the first and the last ones too."""
        from hfq import graph

        every = [site.name for site in graph.read(model).every_site if site.kind in ("conv", "linear", "transposed")]
        return super().plan(model, [*ask, *select.exactly(every)])


def quantize(model: Any, data: Any, config: QDiffusionConfig, report: Report) -> None:
    """Learn the rounding of every unit, in the order of execution; then the steps of its inputs, and pack it."""
    from hfq.calibration.reference import copy_of
    from hfq.graph import joins
    from hfq.reconstruction import learned_units, phases

    plan = config.traced_plan(model, data, units=True)
    if not plan.sites:
        return
    full = copy_of(model)
    cuts = joins.find(plan, _trace(plan, model, data, config)) if config.split_shortcut else {}
    how, course = _ranges(config, cuts), _course(config)
    behind = any(config.inputs_for(site.name) != 16 for site in plan.sites)

    def pack(step: Any, rounded: Any) -> None:
        phases.pack(step, rounded, phases.Inputs(), how)

    rounded = learned_units.learn(
        plan, config.traced_plan(full, data, units=True), data, how, course, report, seed=config.seed,
        after=None if behind else pack, **config.walk_options("weights"),
    )  # 7
    if behind:
        _inputs(model, full, data, how, course, rounded, config, report)


def _inputs(
    model: Any, full: Any, data: Any, how: Any, course: Any, rounded: Any, config: QDiffusionConfig, report: Report
) -> None:
    """Step 8: the same units again, with hard weights; what enters and should leave is the float model's."""
    from hfq.calibration.reference import Reference
    from hfq.calibration.walk import generator, walk
    from hfq.reconstruction import loop, phases

    plan = config.traced_plan(model, data, units=True)
    with Reference(config.traced_plan(full, data, units=True), data) as floats:
        for step in walk(plan, data, report=report, **config.walk_options("inputs")):
            inputs = phases.measure(step, list(rounded), how, config.attention)
            curve = phases.fit_inputs(step, inputs, floats.step(step.block.name), course, how,
                                      generator(config.seed, -1 - step.index))
            report.curves[f"{step.block.name} inputs"] = loop.thinned(curve)
            phases.pack(step, rounded, inputs, how)


def _trace(plan: Any, model: Any, data: Any, config: QDiffusionConfig) -> Any:
    from hfq.graph import trace

    return trace.record(plan, config.one_call(model, data))


def _ranges(config: QDiffusionConfig, cuts: Any) -> Any:
    from hfq.reconstruction.phases import Ranges

    return Ranges(config.spec_for, config.inputs_for, config.weight_range, config.activation_range,
                  config.activation_symmetric, config.running_ranges, config.softmax_bits, cuts=cuts, seed=config.seed)


def _course(config: QDiffusionConfig) -> Any:
    from hfq.reconstruction.phases import Course

    sharp = (config.penalty_start, config.penalty_end)
    return Course(config.steps, config.lr, config.activation_steps, config.lr_activation, config.batch_size,
                  config.penalty, sharp, config.warmup, config.loss_axis == "sum")

