"""Attention that a module leaves to a processor object, as in diffusers.

Whatever processor the module has, its call of ``scaled_dot_product_attention`` is caught while the module runs, and
goes where the calls of transformers' attention interface go. Nothing of the processors is copied or replaced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hfq.errors import QuantizationError

__all__ = ["catch", "catching", "has_processor", "release"]

Attend = Callable[..., Any]


def has_processor(module: nn.Module) -> bool:
    """Whether ``module`` computes its attention by a processor that can be set."""
    return callable(getattr(module, "set_processor", None)) and callable(getattr(module, "processor", None))


def catch(module: nn.Module, attend: Attend) -> None:
    """From now on ``attend(inner, module, query, key, value, mask, **options)`` computes what ``module`` attends to.

    ``inner`` takes the same arguments but the first, and computes as before.
    """
    if not hasattr(module, "_hfq_caught"):
        module.__class__ = _caught(type(module), attend)


def release(module: nn.Module) -> None:
    """Undo :func:`catch`."""
    plain = getattr(module, "_hfq_caught", None)
    if plain is not None:
        module.__class__ = plain


@contextmanager
def catching(model: nn.Module, attend: Attend) -> Iterator[None]:
    """:func:`catch` for every module of ``model`` with a processor, and back."""
    todo = [module for module in model.modules() if has_processor(module) and not hasattr(module, "_hfq_caught")]
    try:
        for module in todo:
            catch(module, attend)
        yield
    finally:
        for module in todo:
            release(module)


@functools.cache
def _caught(cls: type[nn.Module], attend: Attend) -> type[nn.Module]:
    """A subclass of ``cls`` under the same name. Not its forward but its call is another: offloading replaces the
    first one."""

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        mode = _Catch(self, attend)
        with mode:
            output = cls.__call__(self, *args, **kwargs)
        stands_in = "forward" in self.__dict__ and not hasattr(self, "_old_forward")
        if not mode.caught and not stands_in and "hfq_attention" in self._modules:
            processor = type(getattr(self, "processor", None)).__name__
            raise QuantizationError(f"{cls.__name__}: {processor} does not compute with scaled_dot_product_attention, "
                                    "so quantized attention cannot take its place: set another processor")
        return output

    body = {"__call__": __call__, "_hfq_caught": cls, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), body)


class _Catch(TorchFunctionMode):
    """Sends the scaled dot products of one module through ``attend``."""

    def __init__(self, module: nn.Module, attend: Attend) -> None:
        super().__init__()
        self.module, self.attend, self.caught = module, attend, False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.caught = True
        return self._attend(*args, **(kwargs or {}))

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> torch.Tensor:
        if scale is not None:  # of the queries, so that whoever watches sees the scores that are computed
            query = query * (scale * query.shape[-1] ** 0.5)

        def inner(_: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **options: Any) -> Any:
            found = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, enable_gqa=enable_gqa)
            return found.transpose(1, 2), None

        output, _ = self.attend(inner, self.module, query, key, value, attn_mask, is_causal=is_causal,
                                dropout=dropout_p)  # fmt: skip
        return output.transpose(1, 2).to(query.dtype)
