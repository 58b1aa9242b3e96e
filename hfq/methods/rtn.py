"""Round to nearest: every weight to the closest point of its group's grid. The baseline; no data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hfq.config import HfqConfig, option
from hfq.formats import Codes, QuantSpec
from hfq.report import Report
from hfq.rounding import nearest

__all__ = ["RTNConfig", "encode", "quantize"]


@dataclass(kw_only=True, eq=False, repr=False)
class RTNConfig(HfqConfig):
    """Round-to-nearest weights.

    Args:
        clip: how the range of a group is found: "none" (its extremes), "mse" (the shrunken range with the least
            error) or "percentile".
    """

    method = "rtn"
    needs_calibration = False

    clip: str = option("none", choices=("none", "mse", "percentile"), per_module=True)


def encode(weight: Any, spec: QuantSpec, config: RTNConfig, name: str) -> Codes:
    """Codes of one matrix ``[N, K]``; lets a loader quantize tensor by tensor."""
    return nearest.solve(weight, spec, clip=config.value_for(name, "clip"))


def quantize(model: Any, data: Any, config: RTNConfig, report: Report) -> None:
    """Replace every asked site of ``model`` by its packed layer, in place."""
    plan = config.plan(model)
    for block in plan.blocks:
        with config.placement(block.module):
            for site in block.sites:
                _pack(model, site, config, report)
    for site in plan.outside:
        with config.placement(site.module):
            _pack(model, site, config, report)


def _pack(model: Any, site: Any, config: RTNConfig, report: Report) -> None:
    from hfq.layers import swap

    spec = config.spec_for(site.name)
    asked = spec.to_dict()
    if site.kind == "experts":
        codes = {
            param: [encode(expert, spec, config, site.name) for expert in getattr(site.module, param).detach()]
            for param in site.tensors
        }
        swap.swap_experts(model, site.name, codes, report, asked=asked)
    elif site.kind in ("linear", "transposed", "embedding"):
        weight = site.weight.detach()
        codes = encode(weight.t() if site.kind == "transposed" else weight, spec, config, site.name)
        swap.swap(model, site.name, codes, report, asked=asked)
    else:
        reason = f"no packed layer for sites of kind {site.kind!r}"
        report.refuse(site.name, reason, kind=site.kind, asked=asked, numel=site.numel)
