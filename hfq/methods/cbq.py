"""CBQ (arXiv 2312.07950): windows of blocks reconstructed together, low-rank learned rounding, outliers cut first."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from hfq.config import HfqConfig, option
from hfq.errors import ConfigError
from hfq.report import Report

if TYPE_CHECKING:
    from torch import nn

__all__ = ["CBQConfig", "quantize"]


@dataclass(kw_only=True, eq=False, repr=False)
class CBQConfig(HfqConfig):
    """Weights (and activations) learned over windows of adjacent blocks.

    Args:
        window, overlap: blocks that are optimised together, and how many of them the next window optimises again.
        epochs: passes over the calibration data a window; ``steps`` says the optimiser steps instead.
        batch_size: samples a step.
        rounding: "lowrank" learns up or down from a product of ``rank``; "full" from one number a weight; "nearest"
            learns the step only.
        anchored: rounding starts at the float weight (hardened: round to nearest) instead of one half everywhere.
        straight: use hardened gates in the forward pass and soft ones in the backward pass.
        lr, scale_lr, factor_lr: learning rates of the rounding, of the weights' steps (relative to their start) and of
            the factors of activation ranges; on a cosine.
        kl: weight of the divergence of softmaxed hidden states next to the mean squared error.
        same_input: also compare with the float blocks on the quantized stream.
        penalty, beta_start, beta_end, warmup: weight of the term that drives gates to 0 and 1 (a mean over weights),
            its exponent's course, and the share of the steps without it.
        truncate: cut the outliers of each weight row off before anything else.
        smooth: scale outlier channels of activations into the weights; ``None``: if activations are quantized.
        detector: "paper", or the released "vendor" form, with ``reach`` and ``balance`` as its two weights.
        attention_bits: width of queries, keys and values; ``None``: ``activation_bits`` up to 6 bits, else off.
        mixed_precision: run the blocks in bfloat16; what is learned and the loss stay in float32.
    """

    method = "cbq"
    supports_activation_bits: ClassVar[bool] = True

    calibration_samples: int = option(128, range=(1, 1 << 20))
    calibration_seqlen: int = option(2048, range=(1, 1 << 20))
    window: int = option(2, range=(1, 64))
    overlap: int = option(1, range=(0, 63))
    epochs: float = option(3.0, range=(0.0, 1e4))
    steps: int | None = option(None, range=(0, 1_000_000))
    batch_size: int = option(1, range=(1, 4096))
    rounding: str = option("lowrank", choices=("lowrank", "full", "nearest"), per_module=True)
    rank: int = option(5, range=(1, 1 << 16), per_module=True)
    anchored: bool = True
    straight: bool = False
    lr: float = option(1e-4, range=(0.0, 1.0))
    scale_lr: float = option(1e-4, range=(0.0, 1.0))
    factor_lr: float = option(1e-6, range=(0.0, 1.0))
    kl: float = option(1.0, range=(0.0, 1e6))
    same_input: bool = True
    penalty: float = option(0.01, range=(0.0, 1e6))
    beta_start: float = option(20.0, range=(1.0, 1e3))
    beta_end: float = option(2.0, range=(1.0, 1e3))
    warmup: float = option(0.2, range=(0.0, 1.0))
    truncate: bool = True
    smooth: bool | None = None
    detector: str = option("paper", choices=("paper", "vendor"))
    reach: float = option(1.5, range=(0.0, 100.0))
    balance: float = option(1.0, range=(0.0, 100.0))
    attention_bits: int | None = option(None, range=(2, 8), also=(16,))
    mixed_precision: bool = False

    def check(self) -> None:
        if self.overlap >= self.window:
            raise ConfigError(f"overlap={self.overlap}: less than window={self.window} is allowed")
        if self.bits == 16 and self.attention_bits not in (None, 16):
            raise ConfigError(f"attention_bits={self.attention_bits} and bits=16: queries, keys and "
                              "values are quantized where weights are: bits=8 or less")

    @property
    def smooths(self) -> bool:
        return self.activation_bits != 16 if self.smooth is None else self.smooth

    @property
    def attention(self) -> int:
        """Width of queries, keys and values after the default."""
        if self.attention_bits is not None:
            return self.attention_bits
        return self.activation_bits if self.activation_bits <= 6 else 16


def quantize(model: Any, data: Any, config: CBQConfig, report: Report) -> None:
    """Walk over windows with both streams; learn the blocks of each together, then pack those that leave."""
    import torch

    from hfq.calibration import windows
    from hfq.calibration.outliers import RULES
    from hfq.calibration.walk import generator
    from hfq.formats import ActivationSpec
    from hfq.reconstruction import balance, learners, loop
    from hfq.reconstruction import window as reconstruct
    from hfq.reconstruction.direct import pack_outside
    from hfq.rounding.lowrank import sharpness

    plan = config.plan(model)
    rule = replace(RULES[config.detector], reach=config.reach, balance=config.balance)
    pairs = _pairs(model, plan, data, config, report)
    attentions = _attentions(model, data, config, report)
    observe = None if pairs is None else lambda block: balance.measurable(pairs, block.name)
    steps = windows.walk(
        plan, data, size=config.window, overlap=config.overlap, observe=observe, report=report, **config.walk_options()
    )
    course = {"start": config.beta_start, "end": config.beta_end, "warmup": config.warmup}
    for window in steps:
        for step in window.entering:
            ratios = learners.truncation(step, rule) if config.truncate else {}
            ranges = window.ranges.get(step.block.name)
            if pairs is not None and ranges is not None:
                balance.balance(pairs, step.block.name, ranges, rule, report)
            window.keep(step, _learner(step, ratios, config))
            if attentions:
                learners.quantize_attention(step, attentions, ActivationSpec(config.attention))
        if not window.fitted:
            curve = reconstruct.fit(
                window, steps=config.steps, epochs=config.epochs, lr=functools.partial(_rate, config),
                batch_size=config.batch_size, kl=config.kl, same_input=config.same_input,
                penalty=functools.partial(sharpness, **course), penalty_weight=config.penalty,
                generator=generator(config.seed, window.index),
                autocast=torch.bfloat16 if config.mixed_precision else None,
            )  # fmt: skip
            if curve:
                report.curves[window.steps[0].block.name] = loop.thinned(curve)
        for step in window.leaving():
            learners.pack(step, window.learners[step.block.name], lambda name: config.spec_for(name).to_dict())
    pack_outside(plan, config, report)


def _rate(config: CBQConfig, name: str, _: Any) -> float:
    return {"step": config.scale_lr, "factor": config.factor_lr}.get(name.rpartition(".")[2], config.lr)


def _pairs(model: Any, plan: Any, data: Any, config: CBQConfig, report: Report) -> Any:
    """What outlier channels can be moved through, or ``None``."""
    if not config.smooths or not plan.blocks:
        return None
    from hfq.graph import pairs

    found = pairs.discover(plan, config.one_call(model, data), placement=config.placement, seed=config.seed)
    report.pairs = found.rows()
    return found


def _attentions(model: Any, data: Any, config: CBQConfig, report: Report) -> dict[str, int]:
    """Attention modules whose queries, keys and values are to be quantized, with the width of their heads."""
    if config.attention == 16 or config.bits == 16:
        return {}
    from hfq.reconstruction.learners import head_widths

    found = head_widths(model, config.one_call(model, data))
    why = "no attention goes through transformers' attention interface: its queries, keys and values stay float"
    if not found and config.attention_bits is not None:
        report.refuse("attention", f"{why} (attention_bits=16 says so)", kind="attention")
    elif not found:
        report.note(why)
    return found


def _learner(step: Any, ratios: Mapping[str, Any], config: CBQConfig) -> nn.Module:
    from hfq.calibration.walk import generator
    from hfq.formats import ActivationSpec
    from hfq.reconstruction.learners import learner_of

    random = generator(config.seed, -1 - step.index)  # not the numbers that the window draws its samples with

    def options(name: str) -> dict[str, Any]:
        kind, rank = (config.value_for(name, key) for key in ("rounding", "rank"))
        return {"rank": {"lowrank": rank, "full": None, "nearest": 0}[kind], "anchored": config.anchored,
                "straight": config.straight, "generator": random}  # fmt: skip

    def inputs(name: str) -> ActivationSpec | None:
        bits = config.value_for(name, "activation_bits")
        return None if bits == 16 else ActivationSpec(bits, factor=True)

    return learner_of(step, config.spec_for, options, inputs_for=inputs, ratios=ratios)
