"""RSQ (arXiv 2503.01820): rotate the model, scale calibration tokens by their importance, quantize with GPTQ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hfq.config import HfqConfig, option
from hfq.errors import ConfigError
from hfq.report import Report

__all__ = ["RSQConfig", "quantize", "rotate"]

_STRATEGIES = ("attncon", "actnorm", "actdiff", "tokensim", "tokenfreq", "firstn", "firstlastn", "uniform")


@dataclass(kw_only=True, eq=False, repr=False)
class RSQConfig(HfqConfig):
    """RSQ weights.

    Args:
        strategy: what makes a token important; "attncon" is the attention it receives in the block that is quantized,
            "uniform" gives every token weight 1 (then this is GPTQ on the rotated model).
        r_min, r_max: range of the importance after min-max normalisation in each sequence. The scripts of the paper
            use 0.005; 0.1 is its best value without rotation.
        expansion: every sequence also in ``expansion - 1`` circular shifts, so that important tokens occur everywhere.
        rotate: Hadamard rotation of the residual stream and of the heads, folded into the weights.
        online: also transform the inputs of the projections that write to the stream, while the model runs.
        percdamp: share of the mean diagonal added to the Hessian's diagonal.
        clip: search of a group's range, "mse" with the norm ``clip_norm`` in steps of ``1 / clip_grid``, or "none".
        weigh_clip: weigh that search with the Hessian's diagonal (not in the paper).
        act_order, static_groups: columns with the largest inputs first; with groups, whose grids then have to be found
            before.
        refine: rounds of descent on the same objective after the column loop (not in the paper).
    """

    method = "rsq"

    bits: int = option(3, range=(1, 8), also=(16,), per_module=True)
    symmetric: bool = option(True, per_module=True)
    calibration_samples: int = option(256, range=(1, 1 << 20))
    calibration_seqlen: int = option(4096, range=(1, 1 << 20))
    strategy: str = option("attncon", choices=_STRATEGIES)
    r_min: float = option(0.005, range=(0.0, 1e6))
    r_max: float = option(1.0, range=(1e-6, 1e6))
    expansion: int = option(1, range=(1, 256))
    rotate: bool = option(True)
    online: bool = option(True)
    percdamp: float = option(0.01, range=(0.0, 1.0))
    clip: str = option("mse", choices=("none", "mse"))
    clip_norm: float = option(2.4, range=(0.5, 8.0))
    clip_grid: int = option(100, range=(1, 1000))
    weigh_clip: bool = option(False)
    act_order: bool = option(False)
    static_groups: bool = option(False)
    refine: int = option(0, range=(0, 100))

    def check(self) -> None:
        if self.r_min > self.r_max:
            raise ConfigError(f"r_min={self.r_min} is above r_max={self.r_max}")
        if self.act_order and self.group_size > 0 and not self.static_groups:
            raise ConfigError("act_order=True with groups needs static_groups=True: columns are taken out of order")


def rotate(model: Any, plan: Any, data: Any, config: RSQConfig, report: Report) -> dict[str, Any]:
    """Step 1: the same function in a basis without outliers; returns the online transforms by site name."""
    from hfq.transforms.spread import spread_outliers

    return spread_outliers(
        model, plan, config.one_call(model, data), seed=config.seed, online=config.online,
        placement=config.placement, report=report,
    )


def quantize(model: Any, data: Any, config: RSQConfig, report: Report) -> None:
    """Steps 1 to 5 of the specification, block by block on the quantized stream."""
    from hfq.calibration import importance
    from hfq.calibration.walk import walk
    from hfq.reconstruction.columns import Solver, solve_block
    from hfq.reconstruction.direct import pack_outside

    plan = config.traced_plan(model, data)
    online = rotate(model, plan, data, config, report) if config.rotate else {}
    data = importance.expand(data, config.expansion)
    solver = Solver(
        percdamp=config.percdamp, act_order=config.act_order, static_groups=config.static_groups, clip=config.clip,
        norm=config.clip_norm, grid=config.clip_grid, weigh_clip=config.weigh_clip, refine=config.refine,
    )
    for step in walk(plan, data, report=report, **config.walk_options()):
        weights = None
        if config.strategy != "uniform":
            weights = importance.weights(step, config.strategy, config.r_min, config.r_max)
        solve_block(step, config.spec_for, solver, weights=weights, online=online)
    pack_outside(plan, config, report, clip=config.clip)
