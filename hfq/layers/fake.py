"""Float modules that see quantized inputs: for calibration and training, before anything is packed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hfq.errors import QuantizationError
from hfq.formats import ActivationSpec, activation, grids
from hfq.formats.twin import TwinSpec

__all__ = ["Drop", "fake_halves", "fake_inputs", "fake_outputs"]

Given = activation.Parameters | Callable[[], activation.Parameters]


class Drop:
    """Leaves the rounding of single elements out, at random, in passes that record gradients.

    Args:
        share: probability with which an element keeps its unrounded value.
        seed: of the draws; every device draws its own.
    """

    def __init__(self, share: float, seed: int = 0) -> None:
        self.share, self.seed = share, seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __call__(self, x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        """``x`` where the draw says so, else ``rounded``."""
        if not self.share or not torch.is_grad_enabled():
            return rounded
        if x.device not in self._generators:
            self._generators[x.device] = torch.Generator(x.device).manual_seed(self.seed)
        draw = torch.rand(x.shape, generator=self._generators[x.device], device=x.device)
        return torch.where(draw < self.share, x, rounded)


@contextmanager
def fake_inputs(
    modules: Mapping[nn.Module, ActivationSpec | TwinSpec | None],
    factors: Mapping[nn.Module, torch.Tensor | Callable[[], torch.Tensor]] | None = None,
    params: Mapping[nn.Module, Given] | None = None,
    drop: Drop | None = None,
) -> Iterator[None]:
    """Inside the block, the first input of each module is quantized and dequantized before the module sees it.

    Args:
        modules: the grid of each module; ``None`` leaves it alone.
        factors: number of one element (two for two factors) for the grids that have a factor, or a function that gives
            it anew at every call; gradients reach it.
        params: ``(scale, zero_point)`` for the static grids, or a function that gives them anew at every call;
            gradients reach both.
        drop: leaves the rounding of single elements out.

    Raises:
        QuantizationError: a factor or stored parameters are missing, or given for a grid that takes none.
    """
    factors, params = factors or {}, params or {}
    handles, memo = [], _Memo()
    try:
        for module, spec in modules.items():
            if spec is None:
                continue
            if bool(spec.factor) != (module in factors) or spec.dynamic == (module in params):
                what = "a factor" if spec.dynamic else "stored parameters"
                raise QuantizationError(f"{type(module).__name__}: {what} and its activation format do not agree")
            handles.append(module.register_forward_pre_hook(
                _hook(spec, params.get(module), factors.get(module), memo, drop), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def fake_halves(modules: Mapping[nn.Module, tuple[int, ActivationSpec, Sequence[Given]]]) -> Iterator[None]:
    """Inside the block, the input ``[B, C, ...]`` of each module is quantized in two halves on grids of their own.

    Args:
        modules: channels of the first half, the static grid of both, and ``(scale, zero_point)`` of each or a function
            that gives them anew at every call; gradients reach both.
    """
    def before(at: int, spec: ActivationSpec, given: Sequence[Given]) -> Any:
        def hook(_: nn.Module, args: tuple) -> tuple:
            halves = args[0][:, :at], args[0][:, at:]
            now = [one() if callable(one) else one for one in given]
            fakes = [activation.fake(x, spec, params) for x, params in zip(halves, now, strict=True)]
            return (torch.cat(fakes, 1), *args[1:])

        return hook

    handles = [module.register_forward_pre_hook(before(*how)) for module, how in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def fake_outputs(modules: Mapping[nn.Module, ActivationSpec]) -> Iterator[None]:
    """Inside the block, the output of each module (one tensor) is quantized and dequantized, on a dynamic grid."""
    handles = [module.register_forward_hook(lambda _, args, output, spec=spec: activation.fake(output, spec))
               for module, spec in modules.items()]  # fmt: skip
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Memo:
    """The last tensor that was quantized: layers that read one tensor on one grid share the result.

    A layer that asks a second time gets a fresh one: the gradients of two passes must not meet in one graph.
    """

    def __init__(self) -> None:
        self.source: torch.Tensor | None = None
        self.result: torch.Tensor | None = None
        self.key: Any = None
        self.served: set[int] = set()

    def fake(self, module: nn.Module, x: torch.Tensor, spec: ActivationSpec) -> torch.Tensor:
        key = (spec, x._version, torch.is_grad_enabled())
        if self.source is not x or self.key != key or self.result is None or id(module) in self.served:
            self.source, self.key, self.result, self.served = x, key, activation.fake(x, spec), set()
        self.served.add(id(module))
        return self.result


def _hook(
    spec: ActivationSpec | TwinSpec, params: Given | None, factor: torch.Tensor | Callable[[], torch.Tensor] | None,
    memo: _Memo, drop: Drop | None,
) -> Any:
    def fake(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        shared = params is None and factor is None
        rounded = memo.fake(module, x, spec) if shared else alone(x)
        return rounded if drop is None else drop(x, rounded)

    def alone(x: torch.Tensor) -> torch.Tensor:
        now = params() if callable(params) else params
        given = None if now is None else tuple(t if t is None else t.to(x.device) for t in now)
        return grids.fake(x, spec, given, factor() if callable(factor) else factor)  # type: ignore[arg-type]

    def quantize(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (fake(module, args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: fake(module, kwargs[name])}

    return quantize
