"""Float modules that see quantized inputs: for calibration and training, before anything is packed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hfq.errors import QuantizationError
from hfq.formats import ActivationSpec, activation

__all__ = ["fake_inputs"]


@contextmanager
def fake_inputs(
    modules: Mapping[nn.Module, ActivationSpec | None],
    factors: Mapping[nn.Module, torch.Tensor] | None = None,
    params: Mapping[nn.Module, activation.Parameters] | None = None,
) -> Iterator[None]:
    """Inside the block, the first input of each module is quantized and dequantized before the module sees it.

    Args:
        modules: the grid of each module; ``None`` leaves it alone.
        factors: number of one element for the grids that have a factor; gradients reach it.
        params: ``(scale, zero_point)`` for the static grids; gradients reach the scale.

    Raises:
        QuantizationError: a factor or stored parameters are missing, or given for a grid that takes none.
    """
    factors, params = factors or {}, params or {}
    handles = []
    try:
        for module, spec in modules.items():
            if spec is None:
                continue
            if spec.factor != (module in factors) or spec.dynamic == (module in params):
                what = "a factor" if spec.dynamic else "stored parameters"
                raise QuantizationError(f"{type(module).__name__}: {what} and its activation format do not agree")
            handles.append(module.register_forward_pre_hook(
                _hook(spec, params.get(module), factors.get(module)), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(spec: ActivationSpec, params: activation.Parameters | None, factor: torch.Tensor | None) -> Any:
    def quantize(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (activation.fake(args[0], spec, params, factor), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: activation.fake(kwargs[name], spec, params, factor)}

    return quantize
