"""Which expert each product inside a bank of experts belongs to, and which tokens its rows are."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from hfq.calibration.step import routing
from hfq.errors import QuantizationError

__all__ = ["Bank"]

_PRODUCTS = {nn.functional.linear: 1, torch.matmul: 1, torch.Tensor.matmul: 1, torch.Tensor.__matmul__: 1, torch.mm: 1}


class Bank(TorchFunctionMode):
    """Sees which expert's matrix each product inside a bank of experts uses, and with which rows."""

    def __init__(self, site: Any, collector: Any) -> None:
        super().__init__()
        self.site, self.collector = site, collector
        self.parameters = {name: getattr(site.module, name) for name in site.tensors}
        self.slices: dict[str, tuple[torch.Tensor, int]] = {}
        self.order: list[torch.Tensor] = []
        self.handles: list[Any] = []
        self.saved: tuple[Any, Any] | None = None

    def __enter__(self) -> Any:
        # Fused implementations hide the experts; the plain loop over them is the reference.
        config: Any = getattr(self.site.module, "config", None)
        if getattr(config, "_experts_implementation", "eager") not in (None, "eager"):
            self.saved = (config, config._experts_implementation)
            config._experts_implementation = "eager"
        self.handles.append(self.site.module.register_forward_pre_hook(self._enter_bank, with_kwargs=True))
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        for handle in self.handles:
            handle.remove()
        if self.saved is not None:
            self.saved[0]._experts_implementation = self.saved[1]

    def _enter_bank(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.hidden = args[0] if args else kwargs["hidden_states"]
        self.chosen = routing(module, args, kwargs)
        self.token_of: dict[int, torch.Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is torch.Tensor.__getitem__:
            for name, parameter in self.parameters.items():
                if args[0] is parameter and out.ndim == 2:
                    self.slices[name] = (out, int(args[1]))
        elif func in _PRODUCTS:
            second = args[1] if len(args) > 1 else kwargs.get("weight")
            for name, (matrix, expert) in self.slices.items():
                if second is matrix:
                    self._add(name, expert, args[0])
        return out

    def _add(self, name: str, expert: int, x: torch.Tensor) -> None:
        if self.collector.off:
            return
        rows = x.reshape(-1, x.shape[-1])
        total = self.collector.sum_of(self.site.name, name, expert)
        weights, keep = self.collector.rows(self.hidden.reshape(-1, self.hidden.shape[-1]))
        if weights is None and keep is None:
            if self.collector.weights is not None:
                raise QuantizationError(
                    f"{self.site.name}: its rows are not those of the block, so tokens cannot be weighted"
                )
            total.add(rows, None, None)
            return
        tokens = self._tokens(expert, rows)
        total.add(
            rows,
            None if weights is None else weights.to(tokens.device)[tokens],
            None if keep is None else keep.to(tokens.device)[tokens],
        )

    def _tokens(self, expert: int, rows: torch.Tensor) -> torch.Tensor:
        """Which tokens the rows of an expert are: found for its first product by comparing, then remembered."""
        if expert not in self.token_of:
            if self.chosen is None:
                raise QuantizationError(
                    f"{self.site.name}: the routing is not visible, so padded or weighted tokens cannot be told apart"
                )
            hit = self.chosen == expert
            hidden = self.hidden.reshape(-1, self.hidden.shape[-1])
            for tokens in (torch.where(hit.t())[1], torch.where(hit)[0]):
                if tokens.shape[0] == rows.shape[0] and (
                    rows.shape[-1] != hidden.shape[-1] or torch.equal(hidden[tokens], rows)
                ):
                    self.token_of[expert] = tokens
                    break
            else:
                raise QuantizationError(f"{self.site.name}: the rows of expert {expert} do not match the routing")
        return self.token_of[expert]
