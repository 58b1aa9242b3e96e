"""Static grids of inputs whose scale and zero point are learned for every noise level."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import accumulate

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
        start: ``(scale, zero point or None)`` of each, ``[1]`` for all levels or ``[levels]``. An input in groups has
            ``[1 or levels, groups]``; zero points that are not learned may lie off its grid.
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
        self.specs, self.levels, self.floor, self.learn_zero = dict(specs), levels, floor, learn_zero
        wrong = next((name for name, spec in self.specs.items() if spec.dynamic or name not in start), None)
        if wrong is not None:
            raise QuantizationError(f"{wrong}: a stored range to start from is needed")
        given = [start[name] for name in self.specs]
        self.grouped = {name for name in self.specs if start[name][0].dim() > 1}
        scales = [self._table(scale) for scale, _ in given]
        zeros = [torch.zeros_like(scale) if zero is None else self._table(zero)
                 for scale, (_, zero) in zip(scales, given, strict=True)]  # fmt: skip
        ends = list(accumulate((scale.shape[1] for scale in scales), initial=0))
        self._place = {name: slice(*ends[i : i + 2]) for i, name in enumerate(self.specs)}
        scale, zero = (torch.cat(part, 1) if part else torch.empty(len(levels), 0) for part in (scales, zeros))
        self.scale = nn.ParameterList(nn.Parameter(column.clone()) for column in scale)
        self.zero_point = nn.ParameterList(nn.Parameter(column.clone(), requires_grad=learn_zero) for column in zero)

    def _table(self, given: torch.Tensor) -> torch.Tensor:
        """``[levels, groups]`` float32."""
        rows = given.detach().float().cpu()
        rows = rows.reshape(-1, 1) if rows.dim() < 2 else rows
        if len(rows) not in (1, len(self.levels)):
            raise QuantizationError(f"{len(rows)} ranges for {len(self.levels)} noise levels")
        return rows.expand(len(self.levels), -1)

    def at(self, name: str) -> Parameters:
        """``(scale [1 or groups], zero point of that shape or None)`` of an input at the level of the running call, as
        they will be stored.

        Raises:
            QuantizationError: no call is running, and there is more than one level.
        """
        return self._used(name, self.levels.index())

    def of(self, name: str) -> Callable[[], Parameters]:
        """:meth:`at` as a function, for :func:`hfq.layers.fake.fake_inputs`."""
        return partial(self.at, name)

    def _used(self, name: str, index: int) -> Parameters:
        place, spec = self._place[name], self.specs[name]
        scale, zero = self.scale[index][place], self.zero_point[index][place]
        scale = straight(scale, scale.detach().clamp(min=self.floor))
        if spec.symmetric:
            return scale, None
        return scale, straight(zero, zero.detach().round().clamp(0, spec.max_code)) if self.learn_zero else zero

    @torch.no_grad()
    def params(self, name: str) -> Parameters:
        """What is stored of an input: scale and zero point ``[levels]``, in groups ``[levels, groups]``."""
        found = [self._used(name, index) for index in range(len(self.levels))]
        parts = [None if part[0] is None else torch.stack(part) for part in zip(*found, strict=True)]
        return tuple(part if part is None or name in self.grouped else part[:, 0] for part in parts)  # type: ignore[return-value]
