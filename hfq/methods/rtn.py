"""Round to nearest: every weight to the closest point of its group's grid. The baseline; no data for weights alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hfq.config import HfqConfig, option
from hfq.report import Report

__all__ = ["RTNConfig", "quantize"]


@dataclass(kw_only=True, eq=False, repr=False)
class RTNConfig(HfqConfig):
    """Round-to-nearest weights, and with ``activation_bits`` inputs on stored ranges, which calibration data gives.

    Args:
        clip: how the range of a group is found: "none" (its extremes), "mse" (the shrunken range with the least
            error) or "percentile".
        observer: how the range of an input is found: "minmax", "percentile" (the best of three), "mse" or "kl".
        activation_symmetric: no zero points of inputs.
        attention: quantize both products of attention modules too, to ``activation_bits`` (attention that is not
            causal).
    """

    method = "rtn"
    supports_kv_bits = True
    supports_activation_bits = True
    stored_inputs = True  # as ranges of this model alone: another method does not carry them
    needs_calibration = False

    clip: str = option("none", choices=("none", "mse", "percentile"), per_module=True)
    observer: str = option("minmax", choices=("minmax", "percentile", "mse", "kl"))
    activation_symmetric: bool = False
    attention: bool = True

    @property
    def wants_data(self) -> bool:
        from hfq.reconstruction.static import asks_inputs

        return asks_inputs(self) or super().wants_data


def quantize(model: Any, data: Any, config: RTNConfig, report: Report) -> None:
    """Replace every asked site of ``model`` by its packed layer, in place."""
    from hfq.reconstruction.direct import WholeModel, nearest_site
    from hfq.reconstruction.static import asks_inputs

    if asks_inputs(config):
        _with_inputs(model, data, config, report)
        return
    plan, whole = config.plan(model), WholeModel(model, report)
    places = [(block.module, block.sites) for block in plan.blocks] + [(site.module, [site]) for site in plan.outside]
    for module, sites in places:
        with config.placement(module):
            for site in sites:
                clip = config.value_for(site.name, "clip")
                nearest_site(whole, site, config.spec_for(site.name), clip=clip)


def _with_inputs(model: Any, data: Any, config: RTNConfig, report: Report) -> None:
    """Walk the blocks on the quantized stream: each range is that of what enters the packed model."""
    from hfq.calibration.walk import walk
    from hfq.reconstruction import static

    plan = config.traced_plan(model, data, units=True)
    rounding = static.round_nearest(config.spec_for, lambda name: config.value_for(name, "clip"))
    attention = None
    if config.attention and config.activation_bits != 16:
        attention = static.Products(config.activation_bits, symmetric=config.activation_symmetric,
                                    observer=config.observer)
    for step in walk(plan, data, report=report, **config.walk_options()):
        static.pack_block(step, lambda name: config.value_for(name, "activation_bits"), rounding, plan=attention,
                          observer=config.observer, symmetric=config.activation_symmetric, seed=config.seed)
    static.pack_outside(plan, config, data, report, observer=config.observer, symmetric=config.activation_symmetric,
                        clip=config.clip)
