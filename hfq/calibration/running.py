"""Running ends of what enters a site, call by call: ``end <- keep * end + (1 - keep) * end of the call``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hfq.calibration import ranks, static
from hfq.calibration.step import Step
from hfq.errors import QuantizationError

__all__ = ["observe"]

Ends = list[tuple[torch.Tensor, torch.Tensor]]


def observe(step: Step, sites: Sequence[Any], cuts: Mapping[str, int], *, keep: float = 0.95) -> dict[str, Ends]:
    """Smallest and largest element of the inputs of ``sites`` on the quantized stream, as running means.

    Args:
        cuts: channels of the first half of the inputs that are in two; these have two pairs of ends.
        keep: share of what was known before. Several processes average theirs.

    Raises:
        QuantizationError: a site was never reached.
    """
    ends: dict[str, list[torch.Tensor]] = {}

    def hook(site: Any, x: torch.Tensor) -> None:
        at = cuts.get(site.name)
        parts = [x] if at is None else [x[:, :at], x[:, at:]]
        now = torch.stack([torch.stack([part.min(), part.max()]) for part in parts]).double().cpu()
        old = ends.get(site.name)
        ends[site.name] = [now if old is None else keep * old[0] + (1 - keep) * now]

    with static.watching(sites, hook):
        for i in range(len(step)):
            step.call(i)
    found: dict[str, Ends] = {}
    for site in sites:
        own = ends[site.name][0] if site.name in ends else None
        gathered = [part for part in ranks.gather(own) if part is not None]
        if not gathered:
            raise QuantizationError(f"{site.name}: the data does not reach it: leave it out with "
                                    "modules_to_not_convert")
        mean = torch.stack(gathered).mean(0)
        found[site.name] = [(row[0], row[1]) for row in mean]
    return found
