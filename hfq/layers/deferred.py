"""A tensor that has shape, dtype and device at once and its content when somebody computes with it.

Model code reads ``layer.weight.dtype`` in hundreds of places and now and then computes with the weight. A packed layer
answers the first for nothing and the second with the dequantized matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

__all__ = ["Deferred"]


class Deferred(torch.Tensor):
    """Read-only; every operation runs on a freshly made plain tensor.

    Args:
        make: gives the content, of exactly this shape, dtype and device.
        parameter: stand in for an ``nn.Parameter`` (an ``isinstance`` check holds).
    """

    _make: Callable[[], torch.Tensor]
    # transformers initialises weights in place unless they carry this mark: there is nothing to initialise here.
    _is_hf_initialized = True
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, make: Callable[[], torch.Tensor] | torch.Tensor, shape: tuple[int, ...] = (),
        dtype: torch.dtype = torch.float32, device: torch.device | None = None, parameter: bool = False, *,
        requires_grad: bool = False,
    ) -> torch.Tensor:
        if isinstance(make, torch.Tensor):
            # accelerate, which moves a parameter by ``type(old)(moved, requires_grad=...)``: what moved is plain data.
            return torch.nn.Parameter(make, requires_grad)
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device, requires_grad=False)
        self._make = make
        if parameter:
            self._is_param = True
        return self

    def materialise(self) -> torch.Tensor:
        """The content, a plain tensor."""
        return self._make()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        for position, argument in enumerate(func._schema.arguments):
            written = argument.alias_info is not None and argument.alias_info.is_write
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            if written and isinstance(given, Deferred):
                raise RuntimeError(
                    f"{func}: this tensor stands for packed data and cannot be written in place; "
                    "assign a new tensor to the layer, or call its restore() first"
                )
        args, kwargs = tree_map_only(Deferred, Deferred.materialise, (args, kwargs))
        return func(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Deferred(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def numpy(self, *, force: bool = False) -> Any:
        return self.materialise().numpy(force=force)

    def tolist(self) -> Any:
        return self.materialise().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        content = self.materialise().detach().clone()
        copied = torch.nn.Parameter(content, requires_grad=False) if getattr(self, "_is_param", False) else content
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        content = self.materialise().detach()
        content = torch.nn.Parameter(content, False) if getattr(self, "_is_param", False) else content
        return content.__reduce_ex__(protocol)
