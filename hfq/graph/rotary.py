"""The table of a rotary embedding, found by what its module returns: two tensors whose squares add up to a constant."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hfq.errors import QuantizationError
from hfq.graph.trace import evaluating

__all__ = ["RotaryTable", "rotary_table"]

_NO = "no integer-only decoder can be made of this model: "


@dataclass(eq=False)
class RotaryTable:
    """Cosines and sines ``[positions, R]``; ``interleaved`` pairs channels ``2 i`` and ``2 i + 1``."""

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool = False


def rotary_table(model: nn.Module, call: Callable[[], Any], limit: int) -> RotaryTable | None:
    """The table of the module that returns two tensors with ``cos^2 + sin^2`` constant, for positions up to ``limit``.

    Raises:
        QuantizationError: the table depends on the length of the input, or its halves differ.
    """
    found: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if _is_table(output) and not any(module is m for m, _, _ in found):
            found.append((module, args, kwargs))

    with ExitStack() as stack:
        for module in model.modules():
            handle = module.register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        with evaluating(model):
            call()
    if not found:
        return None
    if len(found) > 1:
        raise QuantizationError(_NO + f"{len(found)} rotary tables")
    module, args, kwargs = found[0]
    with evaluating(model):
        tables = [_run_table(module, args, kwargs, length) for length in (min(8, limit), limit)]
    short, whole = tables
    if any(not torch.equal(a, b[: a.shape[0]]) for a, b in zip(short, whole, strict=True)):
        raise QuantizationError(_NO + "its rotary embedding depends on the length of the input")
    if not torch.isfinite(torch.cat(whole)).all() or float(torch.cat(whole).abs().max()) > 1.9:
        raise QuantizationError(_NO + "its rotary table has entries above 1.9")
    half = whole[0].shape[-1] // 2
    if all(torch.equal(t[:, :half], t[:, half:]) for t in whole):
        return RotaryTable(whole[0][:, :half].double().cpu(), whole[1][:, :half].double().cpu())
    if all(torch.equal(t[:, 0::2], t[:, 1::2]) for t in whole):
        return RotaryTable(whole[0][:, 0::2].double().cpu(), whole[1][:, 0::2].double().cpu(), interleaved=True)
    raise QuantizationError(_NO + "the two halves of its rotary table differ")


def _is_table(output: Any) -> bool:
    if not (isinstance(output, tuple) and len(output) == 2 and all(isinstance(t, torch.Tensor) for t in output)):
        return False
    a, b = output
    if a.shape != b.shape or not a.is_floating_point() or a.dim() < 2:
        return False
    total = a.double().square() + b.double().square()
    return float((total - total.flatten()[0]).abs().max()) < 1e-2 * float(total.flatten()[0]) > 0


def _run_table(module: nn.Module, args: Any, kwargs: Any, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    def other(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and not value.is_floating_point() and not value.is_complex():
            return torch.arange(length, device=value.device).expand(*value.shape[:-1], length)[:1]
        return value

    cos, sin = module(*map(other, args), **{key: other(value) for key, value in kwargs.items()})
    return cos.reshape(length, -1), sin.reshape(length, -1)
