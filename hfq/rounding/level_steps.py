"""Static grids of inputs whose scale and zero point are learned for every noise level."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from hfq.errors import QuantizationError
from hfq.formats import ActivationSpec
from hfq.formats.activation import Parameters
from hfq.layers.times import NoiseLevels
from hfq.rounding.learned_step import straight

__all__ = ["LearnedLevels"]


class LearnedLevels(nn.Module):
    """Scales and zero points of several inputs, one pair a noise level; a call learns those of its level alone.

    A level's numbers of all inputs are one parameter: an optimiser of the Adam kind moves whatever part of a parameter
    it ever saw a gradient of, and leaves a parameter without a gradient as it is.

    Args:
        specs: static grid of each input, by name.
        start: ``(scale, zero point or None)`` of each, ``[1]`` for all levels or ``[levels]``.
        levels: noise levels; the running call says which one counts (:mod:`hfq.layers.times`).
        floor: scales count as this at least; below it, gradients still pass.
        learn_zero: zero points are learned too, as floats. Whole numbers within the grid are used, gradients pass
            straight through.
    """

    def __init__(
        self, specs: Mapping[str, ActivationSpec], start: Mapping[str, Parameters], levels: NoiseLevels,
        floor: float = 1e-6, learn_zero: bool = True,
    ) -> None:
        super().__init__()
        self.specs, self.levels, self.floor = dict(specs), levels, floor
        self._place = {name: number for number, name in enumerate(self.specs)}
        wrong = next((name for name, spec in self.specs.items() if spec.dynamic or name not in start), None)
        if wrong is not None:
            raise QuantizationError(f"{wrong}: a stored range to start from is needed")
        scale, zero = (self._table([start[name][part] for name in self.specs]) for part in (0, 1))
        self.scale = nn.ParameterList(nn.Parameter(column.clone()) for column in scale)
        self.zero_point = nn.ParameterList(nn.Parameter(column.clone(), requires_grad=learn_zero) for column in zero)

    def _table(self, given: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """``[levels, inputs]`` float32."""
        rows = [torch.zeros(1) if one is None else one.detach().float().reshape(-1).cpu() for one in given]
        wrong = next((n for n in map(len, rows) if n not in (1, len(self.levels))), None)
        if wrong is not None:
            raise QuantizationError(f"{wrong} ranges for {len(self.levels)} noise levels")
        return torch.stack([row.expand(len(self.levels)) for row in rows] or [torch.empty(len(self.levels), 0)], 1)

    def at(self, name: str) -> Parameters:
        """``(scale [1], zero point [1] or None)`` of an input at the level of the running call, as they will be stored.

        Raises:
            QuantizationError: no call is running, and there is more than one level.
        """
        return self._used(name, self.levels.index())

    def of(self, name: str) -> Callable[[], Parameters]:
        """:meth:`at` as a function, for :func:`hfq.layers.fake.fake_inputs`."""
        return partial(self.at, name)

    def _used(self, name: str, index: int) -> Parameters:
        place, spec = self._place[name], self.specs[name]
        scale, zero = self.scale[index][place].reshape(1), self.zero_point[index][place].reshape(1)
        scale = straight(scale, scale.detach().clamp(min=self.floor))
        return scale, None if spec.symmetric else straight(zero, zero.detach().round().clamp(0, spec.max_code))

    @torch.no_grad()
    def params(self, name: str) -> Parameters:
        """What is stored of an input: scale and zero point ``[levels]``."""
        found = [self._used(name, index) for index in range(len(self.levels))]
        scale, zero = torch.cat([one for one, _ in found]), [one for _, one in found]
        return scale, None if zero[0] is None else torch.cat(zero)  # type: ignore[arg-type]
