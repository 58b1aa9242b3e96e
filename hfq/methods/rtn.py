"""Round to nearest: every weight to the closest point of its group's grid. The baseline; no data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hfq.config import HfqConfig, option
from hfq.report import Report

__all__ = ["RTNConfig", "quantize"]


@dataclass(kw_only=True, eq=False, repr=False)
class RTNConfig(HfqConfig):
    """Round-to-nearest weights.

    Args:
        clip: how the range of a group is found: "none" (its extremes), "mse" (the shrunken range with the least
            error) or "percentile".
    """

    method = "rtn"
    supports_kv_bits = True
    needs_calibration = False

    clip: str = option("none", choices=("none", "mse", "percentile"), per_module=True)


def quantize(model: Any, data: Any, config: RTNConfig, report: Report) -> None:
    """Replace every asked site of ``model`` by its packed layer, in place."""
    from hfq.reconstruction.direct import pack_nearest

    plan = config.plan(model)
    places = [(block.module, block.sites) for block in plan.blocks] + [(site.module, [site]) for site in plan.outside]
    for module, sites in places:
        with config.placement(module):
            for site in sites:
                clip = config.value_for(site.name, "clip")
                pack_nearest(model, site, config.spec_for(site.name), report, clip=clip)
