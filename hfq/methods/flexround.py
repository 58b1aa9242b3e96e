"""FlexRound (arXiv 2306.00317) and its low-rank form LRQ (arXiv 2407.11534): rounding learned by division, block by
block, against the float block's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfq.config import HfqConfig, option
from hfq.errors import ConfigError
from hfq.report import Report

if TYPE_CHECKING:
    from torch import nn

__all__ = ["FlexRoundConfig", "quantize"]


@dataclass(kw_only=True, eq=False, repr=False)
class FlexRoundConfig(HfqConfig):
    """Weights whose rounding is learned through element-wise division.

    The released settings for language models: 512 sequences of 1024 tokens, 5000 steps a block, learning rates from
    5e-4 (13B and larger, W3 and W4A8) to 3e-3 (7B, W4A16), 5e-4 to 9e-4 for ``mode="lrq"``.

    Args:
        mode: "full" learns one divisor a weight, "lrq" a low-rank matrix of divisors (less overfitting).
        rank: of "lrq"; ``None`` is 1024, or 2048 where both sides of a matrix are at least 8192.
        steps: optimiser steps a block.
        lr: learning rate of all divisors and scales; falls to 0 on a cosine.
        scale_lr: learning rate of the grid; ``None`` takes ``lr``. With few steps a tenth of ``lr`` is better: a scale
            moves all weights of its channel at once.
        batch_size: sequences (or images) a step.
        clipping: search range and zero point of the initial grid instead of taking minimum and maximum.
        clip: another initial grid: the shrunken range of least error ("mse"); not together with ``clipping``.
        start: "nearest" as published; "gptq" starts from the codes of the column solver on the block's inputs, which
            needs a smaller learning rate (5e-4) and far fewer steps. Experts always start from nearest.
        learn_scale, row_factor: learn the grid, and one more factor a channel.
        input_mix: probability with which an input element comes from the float stream (the paper's image models: 0.5).
        loss: "sum" (over axis 1, as released), "mse", "relative" or "token_relative".
        mixed_precision: run the block in bfloat16; divisors, scales and loss stay in float32.
        holdout: share of the samples that picks the best step instead of being trained on.
        patience: end a block after so many of its ten checks without improvement; ``None`` never.
    """

    method = "flexround"

    calibration_samples: int = option(512, range=(1, 1 << 20))
    calibration_seqlen: int = option(1024, range=(1, 1 << 20))
    mode: str = option("full", choices=("full", "lrq"), per_module=True)
    rank: int | None = option(None, range=(1, 1 << 16), per_module=True)
    steps: int = option(5000, range=(0, 1_000_000))
    lr: float = option(3e-3, range=(0.0, 1.0))
    scale_lr: float | None = option(None, range=(0.0, 1.0))
    batch_size: int = option(2, range=(1, 4096))
    clipping: bool = option(False, per_module=True)
    clip: str = option("none", choices=("none", "mse"), per_module=True)
    start: str = option("nearest", choices=("nearest", "gptq"))
    learn_scale: bool = True
    row_factor: bool = True
    input_mix: float = option(0.0, range=(0.0, 1.0))
    loss: str = option("sum", choices=("sum", "mse", "relative", "token_relative"))
    mixed_precision: bool = False
    holdout: float = option(0.0, range=(0.0, 0.9))
    patience: int | None = option(None, range=(1, 1000))

    def check(self) -> None:
        if self.start == "gptq" and (self.clipping or self.clip != "none"):
            raise ConfigError("start='gptq' takes the grid of its solver: clip and clipping cannot also be set")
        if self.clipping and self.clip != "none":
            raise ConfigError(
                f"clipping=True searches the grid in two dimensions: clip={self.clip!r} cannot also be set"
            )


def quantize(model: Any, data: Any, config: FlexRoundConfig, report: Report) -> None:
    """Walk the blocks with both streams; learn each block's rounding jointly, then pack it."""
    import torch

    from hfq.calibration.walk import generator, walk
    from hfq.reconstruction import block, loop
    from hfq.reconstruction.direct import pack_outside

    plan = config.plan(model)
    for step in walk(plan, data, streams=("quantized", "float"), report=report, **config.walk_options()):
        random = generator(config.seed, step.index)
        quantizers = _quantizers(step, config, random, report)
        curve = block.fit(
            step, quantizers, steps=config.steps, lr=_rates(config), batch_size=config.batch_size, loss=config.loss,
            mix=config.input_mix, autocast=torch.bfloat16 if config.mixed_precision else None, holdout=config.holdout,
            patience=config.patience, generator=random,
        )  # fmt: skip
        report.curves[step.block.name] = loop.thinned(curve)
        _pack(step, quantizers, config)
    pack_outside(plan, config, report, clip=config.clip)


def _rates(config: FlexRoundConfig) -> Any:
    grid = config.lr if config.scale_lr is None else config.scale_lr
    return lambda name, _: grid if name.endswith("log_scale") else config.lr


def _quantizers(step: Any, config: FlexRoundConfig, random: Any, report: Report) -> dict[str, nn.Module]:
    """One learned rounding a weight; for a bank of experts one an expert."""
    from hfq.reconstruction.direct import expert_matrices
    from hfq.rounding.flexround import Stack

    found: dict[str, nn.Module] = {}
    begun = _solved(step, config) if config.start == "gptq" else {}
    for site in step.block.sites:
        if site.kind == "experts":
            for name in site.tensors:
                bank = expert_matrices(site, name)
                found[f"{site.name}.{name}"] = Stack([_quantizer(w, site.name, config, random) for w in bank])
        elif site.kind in ("linear", "transposed"):
            weight = site.weight.detach()
            matrix = weight.t() if site.kind == "transposed" else weight
            found[site.name] = _quantizer(matrix, site.name, config, random, begun.get(site.name))
        else:
            reason, asked = f"no packed layer for sites of kind {site.kind!r}", config.spec_for(site.name).to_dict()
            report.refuse(site.name, reason, kind=site.kind, asked=asked, numel=site.numel)
    return found


def _solved(step: Any, config: FlexRoundConfig) -> dict[str, Any]:
    """Codes of the column solver for the linears of a block, all on the inputs that the float block gives them."""
    from hfq.calibration import hessian
    from hfq.rounding import gptq

    sites = [site for site in step.block.sites if site.kind in ("linear", "transposed")]
    moments = hessian.collect(step, sites)
    factors: dict[int, Any] = {}
    found = {}
    for site in sites:
        matrix = moments[site.name].matrix
        if id(matrix) not in factors:
            factors[id(matrix)] = gptq.factorise(matrix, act_order=True, name=site.name)
        weight = site.weight.detach()
        found[site.name], _ = gptq.solve(
            weight.t() if site.kind == "transposed" else weight, factors[id(matrix)], config.spec_for(site.name),
            clip="mse", weigh_clip=True, static_groups=True, refine=4, name=site.name,
        )  # fmt: skip
    return found


def _quantizer(weight: Any, name: str, config: FlexRoundConfig, random: Any, codes: Any = None) -> nn.Module:
    from hfq.rounding import nearest
    from hfq.rounding.flexround import DivisorRounding, initial_grid

    spec, rank = config.spec_for(name), None
    if config.value_for(name, "mode") == "lrq":
        rank = config.value_for(name, "rank") or (2048 if min(weight.shape) >= 8192 else 1024)
    clip = config.value_for(name, "clip")
    if codes is not None:
        grid = None
    elif clip == "none":
        grid = initial_grid(weight.float(), spec, clipping=config.value_for(name, "clipping"))
    else:
        grid = nearest.grid_of(weight, spec, clip=clip)
    return DivisorRounding(
        weight,
        spec,
        grid=grid,
        rank=rank,
        learn_scale=config.learn_scale,
        row_factor=config.row_factor,
        generator=random,
        codes=codes,
    )


def _pack(step: Any, quantizers: dict[str, Any], config: FlexRoundConfig) -> None:
    for site in step.block.sites:
        asked = config.spec_for(site.name).to_dict()
        if site.kind == "experts":
            stacks = {name: quantizers[f"{site.name}.{name}"] for name in site.tensors}
            step.swap_experts(site, {name: stack.codes() for name, stack in stacks.items()}, asked=asked)
        elif site.name in quantizers:
            q = quantizers[site.name]
            shifts = q.shifts().abs()
            extra = {
                "clamped_share": round(q.clamped_share(), 6),
                "moved_share": round(float((shifts > 0).float().mean()), 6),
                "moved_far_share": round(float((shifts > 1).float().mean()), 6),
            }
            step.swap(site, q.codes(), asked=asked, extra=extra)
