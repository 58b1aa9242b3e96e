"""GPTQ (arXiv 2210.17323): column-by-column rounding with error feedback. A baseline of the tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hfq.config import HfqConfig, option
from hfq.errors import ConfigError
from hfq.report import Report

__all__ = ["GPTQConfig", "quantize"]


@dataclass(kw_only=True, eq=False, repr=False)
class GPTQConfig(HfqConfig):
    """GPTQ weights.

    Args:
        percdamp: share of the mean diagonal that is added to the Hessian's diagonal (again, up to 49 times, while it
            cannot be factorised).
        act_order: columns with the largest inputs first; with groups it needs ``static_groups``.
        static_groups: grids from the original weight, not from the weight as updated when its group begins.
        sequential: solve the sites of a block in execution order, each on the inputs that the ones before it leave.
        clip: search of a group's range: "none" (its extremes), "mse" (norm ``clip_norm``, steps of
            ``1 / clip_grid``, weighed with the Hessian's diagonal if ``weigh_clip``) or "percentile".
        observer: with ``activation_bits``, how the stored range of an input is found: "minmax", "percentile", "mse" or
            "kl".
        activation_symmetric: no zero points of inputs.
        attention: quantize both products of attention modules too, to ``activation_bits`` (attention that is not
            causal).
    """

    method = "gptq"
    supports_kv_bits = True
    supports_activation_bits = True
    stored_inputs = True  # as ranges of this model alone: another method does not carry them

    percdamp: float = option(0.01, range=(0.0, 1.0))
    act_order: bool = option(False)
    static_groups: bool = option(False)
    sequential: bool = option(True)
    clip: str = option("none", choices=("none", "mse", "percentile"))
    clip_norm: float = option(2.0, range=(0.5, 8.0))
    clip_grid: int = option(100, range=(1, 1000))
    weigh_clip: bool = option(False)
    observer: str = option("minmax", choices=("minmax", "percentile", "mse", "kl"))
    activation_symmetric: bool = False
    attention: bool = True

    def check(self) -> None:
        if self.act_order and self.group_size > 0 and not self.static_groups:
            raise ConfigError(
                "act_order=True with groups needs static_groups=True: a group's grid has to be known before its "
                "columns, which are taken out of order"
            )


def quantize(model: Any, data: Any, config: GPTQConfig, report: Report) -> None:
    """Walk the blocks on the quantized stream and solve each site against the Hessian of its inputs."""
    from hfq.calibration.walk import walk
    from hfq.reconstruction import static
    from hfq.reconstruction.columns import Solver, solve_block
    from hfq.reconstruction.direct import pack_outside

    plan = config.traced_plan(model, data, units=True)
    solver = Solver(
        percdamp=config.percdamp, act_order=config.act_order, static_groups=config.static_groups, clip=config.clip,
        norm=config.clip_norm, grid=config.clip_grid, weigh_clip=config.weigh_clip, sequential=config.sequential,
    )
    if static.asks_inputs(config):
        _with_inputs(plan, data, config, report, solver)
        return
    for step in walk(plan, data, report=report, **config.walk_options()):
        solve_block(step, config.spec_for, solver)
    pack_outside(plan, config, report)


def _with_inputs(plan: Any, data: Any, config: GPTQConfig, report: Report, solver: Any) -> None:
    """The same, each group of sites behind the stored ranges of those before it."""
    from hfq.calibration.walk import walk
    from hfq.reconstruction import static

    attention = None
    if config.attention and config.activation_bits != 16:
        attention = static.Products(config.activation_bits, symmetric=config.activation_symmetric,
                                    observer=config.observer)
    rounding = static.round_columns(config.spec_for, solver)
    for step in walk(plan, data, report=report, **config.walk_options()):
        static.pack_block(step, lambda name: config.value_for(name, "activation_bits"), rounding, plan=attention,
                          observer=config.observer, symmetric=config.activation_symmetric, seed=config.seed)
    static.pack_outside(plan, config, data, report, observer=config.observer, symmetric=config.activation_symmetric,
                        clip=config.clip)
