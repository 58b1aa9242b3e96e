"""Weights that are rounded to nearest while a model is trained, on grids searched anew every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hfq.formats import QuantSpec, affine
from hfq.rounding import nearest

__all__ = ["FakeWeights"]


class FakeWeights:
    """A change of merged weights for :class:`hfq.training.student.Student`; gradients pass rounding straight through.

    Args:
        specs: grid of each linear or transposed site, by site.
        clip, norm, grid: search of the ranges, as :func:`hfq.rounding.nearest.grid_of` takes it; ranges are constants.
        every: steps between two searches of a weight's ranges.
    """

    def __init__(
        self, specs: Mapping[Any, QuantSpec], *, clip: str = "mse", norm: float = 2.0, grid: int = 100, every: int = 1
    ) -> None:
        self._sites = {f"{site.name}.weight": (spec, site.kind == "transposed") for site, spec in specs.items()}
        self._options: dict[str, Any] = {"clip": clip, "norm": norm, "grid": grid}
        self._every = every
        self._grids: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self._ages: dict[str, int] = {}

    def __call__(self, name: str, weight: torch.Tensor, begin: bool) -> torch.Tensor:
        """The weight on its grid, in its layout; other parameters as they are."""
        if name not in self._sites:
            return weight
        spec, turned = self._sites[name]
        matrix = weight.t() if turned else weight
        if begin:
            age = self._ages.get(name, 0)
            if age % self._every == 0:
                self._grids[name] = nearest.grid_of(matrix.detach(), spec, **self._options)
            self._ages[name] = age + 1
        scale, zero = self._grids[name]
        fake = affine.fake(matrix, scale, zero, spec)
        return fake.t() if turned else fake
