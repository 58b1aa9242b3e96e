"""Formats of what a model computes with, whichever kind: uniform, two grids side by side, logarithmic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hfq.errors import ConfigError, QuantizationError
from hfq.formats import activation, log, twin
from hfq.formats.activation import ActivationSpec, Parameters
from hfq.formats.log import LogSpec
from hfq.formats.twin import TwinSpec

__all__ = ["FORMS", "Grid", "fake", "from_dict"]

Grid = ActivationSpec | LogSpec | TwinSpec
# How saved formats say of which kind they are.
FORMS: dict[str, type[ActivationSpec] | type[LogSpec] | type[TwinSpec]] = {
    "uniform": ActivationSpec, "log": LogSpec, "twin": TwinSpec,
}


def fake(
    x: torch.Tensor, spec: Grid, params: Parameters | None = None, factor: torch.Tensor | None = None
) -> torch.Tensor:
    """``x`` on its grid, in floats: same shape and dtype, with the gradients of the format's own ``fake``.

    Args:
        params: ``(scale, zero point or None)``; needed unless the grid is dynamic.
        factor: of uniform grids that have one.

    Raises:
        QuantizationError: parameters are missing, or not those of the format.
    """
    if isinstance(spec, ActivationSpec):
        return activation.fake(x, spec, params, factor)
    if params is None or factor is not None:
        raise QuantizationError(f"{spec}: this format takes a stored scale and no factor")
    return (log if isinstance(spec, LogSpec) else twin).fake(x, params[0], spec)  # type: ignore[attr-defined]


def from_dict(data: Mapping[str, Any]) -> Grid:
    """The format that ``to_dict`` gave; one that does not say of which kind it is ("form") is uniform.

    Raises:
        ConfigError: an unknown kind, or fields that it does not have.
    """
    given = dict(data)
    form = given.pop("form", "uniform")
    if form not in FORMS:
        raise ConfigError(f"form {form!r}: the checkpoint needs a newer hfq")
    return FORMS[form].from_dict(given)
