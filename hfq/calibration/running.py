"""Running ends of what enters a site, call by call: ``end <- keep * end + (1 - keep) * end of the call``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hfq.calibration import ranks, static
from hfq.calibration.capture import forward, quiet
from hfq.calibration.step import Step
from hfq.errors import DataError, QuantizationError

__all__ = ["Ends", "RunningEnds", "observe", "observe_model"]

Ends = list[tuple[torch.Tensor, torch.Tensor]]


class RunningEnds:
    """Smallest and largest element of the inputs of sites, as running means over calls.

    Args:
        cuts: channels of the first half of the inputs that are in two; these have two pairs of ends.
        keep: share of what was known before. Several processes average theirs.
        zero: every call's range contains zero.
        without_first: sites whose inputs' first token does not count.
    """

    def __init__(
        self, cuts: Mapping[str, int], *, keep: float = 0.95, zero: bool = False, without_first: Sequence[str] = (),
    ) -> None:
        self.cuts, self.keep, self.zero, self.without_first = cuts, keep, zero, frozenset(without_first)
        self.ends: dict[str, torch.Tensor] = {}
        self.elements: dict[str, int] = {}  # of one row of the batch

    def __call__(self, site: Any, x: torch.Tensor) -> None:
        x = x[:, 1:] if site.name in self.without_first else x
        at = self.cuts.get(site.name)
        parts = [x] if at is None else [x[:, :at], x[:, at:]]
        now = torch.stack([torch.stack([part.min(), part.max()]) for part in parts]).detach().double().cpu()
        if not bool(torch.isfinite(now).all()):
            raise DataError(f"{site.name}: an observed activation has NaN or infinite elements")
        if self.zero:
            now = torch.stack([now[:, 0].clamp(max=0), now[:, 1].clamp(min=0)], 1)
        old = self.ends.get(site.name)
        self.ends[site.name] = now if old is None else self.keep * old + (1 - self.keep) * now
        self.elements[site.name] = max(self.elements.get(site.name, 0), x.numel() // max(x.shape[0], 1))

    def found(self, sites: Sequence[Any]) -> dict[str, Ends]:
        """The ends of ``sites``; to be called once, by every process.

        Raises:
            QuantizationError: a site was never reached.
        """
        found: dict[str, Ends] = {}
        for site in sites:
            gathered = [part for part in ranks.gather(self.ends.get(site.name)) if part is not None]
            if not gathered:
                raise QuantizationError(f"{site.name}: the data does not reach it: leave it out with "
                                        "modules_to_not_convert")
            mean = torch.stack(gathered).mean(0)
            found[site.name] = [(row[0], row[1]) for row in mean]
        return found


def observe(step: Step, sites: Sequence[Any], cuts: Mapping[str, int], *, keep: float = 0.95) -> dict[str, Ends]:
    """:class:`RunningEnds` of ``sites`` of a block on the quantized stream."""
    ends = RunningEnds(cuts, keep=keep)
    with static.watching(sites, ends):
        for i in range(len(step)):
            step.call(i)
    return ends.found(sites)


@torch.no_grad()
def observe_model(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], sites: Sequence[Any], ends: RunningEnds
) -> dict[str, Ends]:
    """The ends of ``sites`` in whole passes of ``model`` as it is, each with zero in its range if ``ends`` says so."""
    with quiet(model), static.watching(sites, ends):
        for i in ranks.share(len(batches)):
            forward(model, batches[i])
    return ends.found(sites)
