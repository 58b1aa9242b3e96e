"""Packed layers computed as the float layers that they stand for, inputs not rounded: for comparisons."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from hfq.layers.kinds import to_float
from hfq.layers.packed import PackedModule

__all__ = ["exact_inputs"]


@contextmanager
def exact_inputs(model: nn.Module) -> Iterator[None]:
    """Inside the block, layers that quantize their inputs do not, and dequantize their weight for every call.

    Rounded inputs make a model a step function of its input: two ways to compute one number, which differ in the last
    bit, then end far apart. Whether they are the same computation is asked without rounding.
    """
    changed: list[tuple[nn.Module, str, Any]] = []
    try:
        for module in model.modules():
            if isinstance(module, PackedModule) and getattr(module, "activation", None) is not None:
                # accelerate puts its own forward in front and keeps the layer's under another name
                name = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
                changed.append((module, name, vars(module).get(name)))
                vars(module)[name] = _Float(module)
        yield
    finally:
        for module, name, before in changed:
            if before is None:
                del vars(module)[name]
            else:
                vars(module)[name] = before


class _Float:
    """The forward of the float layer that a packed one stands for."""

    def __init__(self, module: PackedModule) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return to_float(self.module, None)(*args, **kwargs)
