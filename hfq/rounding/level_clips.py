"""Dynamic grids of inputs whose ends are learned for every noise level."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn

from hfq.errors import QuantizationError
from hfq.formats import ActivationSpec
from hfq.layers.times import NoiseLevels

__all__ = ["LearnedClips"]


class LearnedClips(nn.Module):
    """What the lower and the upper end of an input's range are multiplied with: ``whole * sigmoid(u)``, one ``u`` for
    each end (of symmetric grids one for both), input and noise level. A call learns those of its level alone.

    A level's numbers of all inputs are one parameter, as in :class:`hfq.rounding.level_steps.LearnedLevels`.

    Args:
        specs: dynamic grid with factors of each input, by name.
        levels: noise levels; the running call says which one counts (:mod:`hfq.layers.times`).
        start: of the sigmoid.
        whole: largest factor.
    """

    def __init__(
        self, specs: Mapping[str, ActivationSpec], levels: NoiseLevels, start: float = 0.95, whole: float = 0.95
    ) -> None:
        super().__init__()
        wrong = next((name for name, spec in specs.items() if not spec.dynamic or not spec.factor), None)
        if wrong is not None:
            raise QuantizationError(f"{wrong}: a dynamic range with factors is needed")
        if not 0 < start < 1 or not 0 < whole <= 1:
            raise QuantizationError(f"start={start}, whole={whole}: numbers above 0 and below 1 are needed")
        self.specs, self.levels, self.whole = dict(specs), levels, whole
        self._place = {name: number for number, name in enumerate(self.specs)}
        raw = torch.full((len(self.specs), 2), math.log(start / (1 - start)))
        self.raw = nn.ParameterList(nn.Parameter(raw.clone()) for _ in range(len(levels)))

    def at(self, name: str) -> torch.Tensor:
        """Factors ``[2]`` (symmetric: ``[1]``) of an input at the level of the running call.

        Raises:
            QuantizationError: no call is running, and there is more than one level.
        """
        return self._used(name, self.levels.index())

    def of(self, name: str) -> Callable[[], torch.Tensor]:
        """:meth:`at` as a function, for :func:`hfq.layers.fake.fake_inputs`."""
        return partial(self.at, name)

    def _used(self, name: str, index: int) -> torch.Tensor:
        ends = self.raw[index][self._place[name]][: 2 if self.specs[name].factor == 2 else 1]
        return self.whole * torch.sigmoid(ends)

    @torch.no_grad()
    def factors(self, name: str) -> torch.Tensor:
        """What is stored of an input: ``[levels, 2]`` (symmetric: ``[levels]``)."""
        found = torch.stack([self._used(name, index) for index in range(len(self.levels))])
        return found if self.specs[name].factor == 2 else found[:, 0]
