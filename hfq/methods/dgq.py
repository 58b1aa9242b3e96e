"""DGQ (arXiv 2501.04304): outliers of activations are kept by grids of their own, groups along the wider axis at every
noise level; the grid of attention's probabilities follows the prompt, and the start token's column stays as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hfq.config import HfqConfig, option
from hfq.errors import ConfigError
from hfq.graph import select
from hfq.report import Report

__all__ = ["DGQConfig", "quantize"]

# The first and the last layer of a denoiser: neither weights nor inputs are quantized.
_ENDS = ("conv_in", "conv_out")


@dataclass(kw_only=True, eq=False, repr=False)
class DGQConfig(HfqConfig):
    """Outlier-preserving groups and attention-aware quantization; calibrate it on ``hfq.record_calls``.

    Args:
        groups: of an input (8 or 16); 1 is one grid a tensor.
        group_range: of a group: "minmax" covers its members, "mean" is the mean of their ranges.
        axis: which axis is in groups: "spread" the one whose ranges lie further apart, as published, "step" the one
            with the smaller steps, "rows" or "columns" always that one.
        time_aware: groups for every timestep of the calibration; else one set for all.
        attention: quantize both products of attentions.
        softmax: grid of the probabilities: "log2", or "uniform" from zero to their maximum.
        softmax_bits: of the probabilities; ``None``: those of the inputs; 16 for floats.
        softmax_maximum: "sample": each sample has its own, so that pictures do not depend on what is drawn beside them;
            "tensor": one for the call, as in the published code.
        start_token: attention to a text leaves the first key as it is: "always", "auto" (where it has more than half of
            the attention) or "never".
        renormalise: probabilities sum to one again behind their grid.
        weight_range: "mse" searches the shrunken range with the least error ``|w - q(w)| ** 2.4``, "max" covers all.
        steps, lr, batch_size: of learning the rounding of a unit; 0 steps round to nearest.
        penalty, penalty_start, penalty_end, warmup: of gates between 0 and 1.
    """

    method = "dgq"
    supports_activation_bits = True

    activation_bits: int = option(8, range=(2, 8), also=(16,), per_module=True)
    calibration_samples: int = option(3328, range=(1, 1 << 20))
    groups: int = option(8, range=(1, 256))
    group_range: str = option("minmax", choices=("minmax", "mean"))
    axis: str = option("spread", choices=("spread", "step", "rows", "columns"))
    time_aware: bool = True
    attention: bool = True
    softmax: str = option("log2", choices=("log2", "uniform"))
    softmax_bits: int | None = option(None, range=(2, 8), also=(16,))
    softmax_maximum: str = option("sample", choices=("sample", "tensor"))
    start_token: str = option("always", choices=("always", "auto", "never"))
    renormalise: bool = False
    weight_range: str = option("mse", choices=("mse", "max"))
    steps: int = option(20_000, range=(0, 1_000_000))
    lr: float = option(1e-3, range=(0.0, 1.0))
    batch_size: int = option(8, range=(1, 4096))
    penalty: float = option(0.01, range=(0.0, 1e3))
    penalty_start: float = option(20.0, range=(0.1, 100.0))
    penalty_end: float = option(2.0, range=(0.1, 100.0))
    warmup: float = option(0.2, range=(0.0, 0.99))

    def check(self) -> None:
        if self.group_size != -1:
            raise ConfigError(f"group_size={self.group_size}: dgq has one grid an output channel of the weights (-1); "
                              "groups are those of the inputs")

    def inputs_for(self, name: str) -> int:
        return self.value_for(name, "activation_bits")

    def spec_for(self, name: str) -> Any:
        kept = select.first_match(name, _ENDS) is not None and "bits" not in self.override_for(name)
        return None if kept else super().spec_for(name)

    def plan(self, model: Any, ask: Any = ()) -> Any:
        plan = super().plan(model, ask)
        plan.skipped.update({name: "the first and the last convolution stay float" for name in plan.skipped
                             if select.first_match(name, _ENDS) is not None and self.bits != 16})
        return plan


def quantize(model: Any, data: Any, config: DGQConfig, report: Report) -> None:
    """Part A: the weights of all units; then B and C: what enters them, and attention, at every noise level."""
    from hfq.calibration import extremes
    from hfq.layers import times
    from hfq.reconstruction import grouping

    plan = config.plan(model)
    if not plan.sites:
        return
    names = [site.name for site in plan.sites]
    levels = extremes.levels_of(model, data, each=config.time_aware)
    if config.steps:
        _learn(model, data, config, report)
    else:
        _round(plan, config, report)
    asked = [name for name in names if config.inputs_for(name) != 16 and report.rows[name].status == "packed"]
    if not asked:
        return
    seen = extremes.observe(model, data, asked, levels.nearest, attention=config.attention)  # 4
    how = grouping.Groups(config.groups, config.group_range, config.axis, config.seed, config.start_token)  # type: ignore[arg-type]
    times.install(model, levels)
    done = grouping.attach_inputs(model, seen, levels, config.inputs_for, how, report,
                                  allow_partial=config.allow_partial)  # 5 to 8
    for name, one in seen.attentions.items():  # 9 to 12
        inside = [config.inputs_for(layer) for layer in done if layer.startswith(f"{name}.")]
        if inside:
            bits = max(inside)
            grouping.attach_attention(model, name, one, levels, bits, how, _probabilities(config, bits), report)


def _round(plan: Any, config: DGQConfig, report: Report) -> None:
    """Step 1 alone."""
    from hfq.reconstruction.direct import WholeModel, nearest_site

    whole, clip = WholeModel(plan.model, report), "mse" if config.weight_range == "mse" else "none"
    for site in plan.sites:
        with config.placement(site.module):
            nearest_site(whole, site, config.spec_for(site.name), clip=clip)


def _learn(model: Any, data: Any, config: DGQConfig, report: Report) -> None:
    """Steps 1 and 2, unit by unit on the inputs that the units before it give with their rounded weights."""
    from hfq.calibration.reference import copy_of
    from hfq.reconstruction import learned_units, phases

    how = phases.Ranges(config.spec_for, config.inputs_for, config.weight_range, seed=config.seed)
    course = phases.Course(config.steps, config.lr, batch_size=config.batch_size, penalty=config.penalty,
                           sharp=(config.penalty_start, config.penalty_end), warmup=config.warmup)
    plan, full = (config.traced_plan(one, data, units=True) for one in (model, copy_of(model)))
    learned_units.learn(plan, full, data, how, course, report, seed=config.seed, **config.walk_options(),
                        after=lambda step, rounded: phases.pack(step, rounded, phases.Inputs(), how))


def _probabilities(config: DGQConfig, bits: int) -> Any:
    from hfq.formats.log import LogSpec
    from hfq.kernels.grouped_products import Probabilities
    from hfq.reconstruction.static import input_grid

    width = bits if config.softmax_bits is None else config.softmax_bits
    log = config.softmax == "log2"
    spec = None if width == 16 else LogSpec(width, "2", "none") if log else input_grid(width)
    return Probabilities(spec, config.softmax_maximum == "tensor", renormalise=config.renormalise)
