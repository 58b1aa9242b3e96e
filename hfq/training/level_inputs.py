"""Everything that a denoiser multiplies on learned grids: inputs of layers and both products of attentions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from hfq.calibration.level_grids import Grid, Grids
from hfq.formats import activation
from hfq.formats.activation import Parameters
from hfq.layers import attention
from hfq.layers.fake import fake_inputs
from hfq.layers.products import AttentionProducts
from hfq.layers.times import NoiseLevels
from hfq.rounding.level_steps import LearnedLevels

__all__ = ["LevelInputs"]


class LevelInputs:
    """The learned steps of all grids of a model, and the context in which it computes on them. Zero points stay.

    Args:
        model: a denoiser.
        grids: where they begin.
        levels: noise levels of the grids; the running call says which one counts.
        apart: inputs whose steps are parameters of their own, for a stage that trains these alone.
    """

    def __init__(self, model: nn.Module, grids: Grids, levels: NoiseLevels, apart: Collection[str] = ()) -> None:
        self.model, self.start, self.levels = model, grids, levels
        flat = {name: grid for name, grid in grids.inputs.items()}
        flat |= {_key(name, side): grid for name, sides in grids.sides.items() for side, grid in sides.items()}
        self._flat, self._tables = flat, {}
        for inside in (True, False):
            names = [name for name in flat if (name in apart) == inside]
            table = LearnedLevels({name: flat[name].spec for name in names},
                                  {name: (flat[name].scale, flat[name].zero) for name in names}, levels,
                                  floor=_FLOOR, learn_zero=False)  # fmt: skip
            self._tables |= dict.fromkeys(names, table)
            setattr(self, "apart" if inside else "others", table)

    apart: LearnedLevels
    others: LearnedLevels

    def given(self, name: str) -> Parameters:
        """Scale and zero point of an input or operand in the running call, as they broadcast to it."""
        grid, (scale, zero) = self._flat[name], self._tables[name].at(name)
        if grid.labels is None:
            return scale, zero
        shape = (1, -1, 1, 1) if grid.axis == 1 else (-1,)
        labels = grid.labels.to(scale.device)
        return scale[labels].reshape(shape), zero[labels].reshape(shape)  # type: ignore[index]

    def learned(self) -> Grids:
        """The grids as they are now."""
        return Grids({name: self._now(name, grid) for name, grid in self.start.inputs.items()},
                     {name: {side: self._now(_key(name, side), grid) for side, grid in sides.items()}
                      for name, sides in self.start.sides.items()}, self.start.head_dims)  # fmt: skip

    def _now(self, name: str, grid: Grid) -> Grid:
        scale, zero = self._tables[name].params(name)
        return replace(grid, scale=scale, zero=zero)

    @contextmanager
    def simulated(self) -> Iterator[None]:
        """Inside, inputs and operands are on their grids; gradients reach the steps."""
        modules = {name: self.model.get_submodule(name) for name in self.start.inputs}
        specs = {module: self._flat[name].spec for name, module in modules.items()}
        params = {module: self._reader(name) for name, module in modules.items()}
        try:
            for name, sides in self.start.sides.items():
                part = AttentionProducts(self.start.head_dims[name])
                part.rounded = self._rounding(name, sides)
                attention.install(self.model, name, part)
            with fake_inputs(specs, params=params):
                yield
        finally:
            if self.start.sides:
                attention.uninstall(self.model)

    def _reader(self, name: str) -> Callable[[], Parameters]:
        return lambda: self.given(name)

    def _rounding(self, name: str, sides: Mapping[str, Grid]) -> Callable[[str, torch.Tensor], torch.Tensor]:
        def rounded(side: str, x: torch.Tensor) -> torch.Tensor:
            if side not in sides:
                return x
            scale, zero = self.given(_key(name, side))
            return activation.fake(x, sides[side].spec, (scale.to(x.device), zero.to(x.device)))  # type: ignore[union-attr]

        return rounded


_FLOOR = 1e-8  # as published: no step is smaller


def _key(name: str, side: str) -> str:
    return f"{name}/{side}"
