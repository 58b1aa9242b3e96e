"""Running a module in float64, whatever its code casts to: a claim about a model is checked far below rounding."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from hfq.graph.trace import BlockCall, keep

__all__ = ["TOLERANCE", "BlockCopy", "double_copy", "double_precision", "random_rotation", "relative_error"]

TOLERANCE = 1e-6
_LOWER = {torch.float16, torch.bfloat16, torch.float32}
_CASTS = {"float": torch.Tensor.double, "half": torch.Tensor.double, "bfloat16": torch.Tensor.double}


class _Double(TorchFunctionMode):
    """Casts to a lower precision become casts to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = _CASTS.get(getattr(func, "__name__", ""), func)
        args = tuple(torch.float64 if _is_lower(a) else a for a in args)
        kwargs = {k: torch.float64 if _is_lower(a) else a for k, a in (kwargs or {}).items()}
        return func(*args, **kwargs)


class _GroupedProducts(TorchDispatchMode):
    """Grouped products exist for lower precisions only: one product a group."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name != "aten::_grouped_mm" or args[0].dtype != torch.float64:
            return func(*args, **kwargs)
        rows, weights = args[:2]
        ends = (args[2] if len(args) > 2 else kwargs["offs"]).tolist()
        if rows.dim() != 2 or weights.dim() != 3:
            raise NotImplementedError("a grouped product of other shapes than [rows, k] and [groups, k, n]")
        out = rows.new_zeros(rows.shape[0], weights.shape[-1])
        for group, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            out[start:end] = rows[start:end] @ weights[group]
        return out


def _is_lower(argument: Any) -> bool:
    return isinstance(argument, torch.dtype) and argument in _LOWER


@contextmanager
def double_precision() -> Iterator[None]:
    """Everything inside computes in float64, without gradients."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), warnings.catch_warnings(), _GroupedProducts(), _Double():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(before)


def double_copy(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode with floating parameters and buffers in float64."""
    return copy.deepcopy(module).double().eval()


def to_double(tree: Any) -> Any:
    """A fresh copy of recorded arguments with floating tensors in float64."""
    return tree_map(lambda leaf: leaf.double() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf,
                    keep(tree))


def relative_error(found: Any, expected: Any) -> float:
    """Largest ``||a - b|| / ||b||`` over the floating tensors of two outputs of the same structure."""
    pairs = zip(floats(found), floats(expected), strict=True)
    doubles = ((a.detach().double(), b.detach().double()) for a, b in pairs)
    errors = [float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in doubles]
    return max((e if e == e else float("inf") for e in errors), default=float("inf"))


def floats(tree: Any) -> list[torch.Tensor]:
    """The floating tensors of an output."""
    found = []
    for leaf in tree_flatten(tree)[0]:
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            found.append(leaf)
        elif isinstance(leaf, dict):
            found += floats(dict(leaf))
    return found


def random_rotation(size: int, generator: torch.Generator, fix_ones: bool = False, rank: int = 16) -> torch.Tensor:
    """An orthogonal float64 matrix ``[size, size]``: two reflections in random subspaces (not symmetric).

    With ``fix_ones`` the subspaces are orthogonal to the vector of ones, which the product then leaves in place.
    """
    reflections = []
    for _ in range(2):
        basis = torch.randn(size, max(1, min(rank, size // 2)), generator=generator, dtype=torch.float64)
        if fix_ones:
            basis = basis - basis.mean(0)
        if size > 1:  # a single channel that must fix the ones vector has no other rotation
            basis = torch.linalg.qr(basis)[0]
        reflections.append(basis)
    u, w = reflections
    return torch.eye(size, dtype=torch.float64) - 2 * (u @ u.t() + w @ w.t() - 2 * u @ (u.t() @ w) @ w.t())


class BlockCopy:
    """A float64 copy of one block with the arguments of one call, to try changes on."""

    def __init__(self, call: BlockCall) -> None:
        self.name = call.block.name
        self.module = double_copy(call.block.module)
        self._args, self._kwargs = call.args, call.kwargs
        self.reference = self.run()

    def run(self, rotation: torch.Tensor | None = None) -> Any:
        """The output; with ``rotation``, for the hidden state (first argument or ``hidden_states``) times it."""
        args, kwargs = to_double(self._args), to_double(self._kwargs)
        with double_precision():
            if rotation is not None:
                if "hidden_states" in kwargs:
                    kwargs["hidden_states"] = kwargs["hidden_states"] @ rotation
                else:
                    args = (args[0] @ rotation, *args[1:])
            return self.module(*args, **kwargs)

    def own(self, name: str) -> nn.Module:
        """The copy's module for the model's module ``name``."""
        return self.module.get_submodule(name[len(self.name) + 1:] if name != self.name else "")

    @contextmanager
    def undone(self, names: Iterable[str]) -> Iterator[None]:
        """Parameters of the modules ``names`` that are changed inside are restored afterwards."""
        modules = [self.own(name) for name in dict.fromkeys(names)]
        saved = [(p, p.detach().clone()) for m in modules for p in m._parameters.values() if p is not None]
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, before in saved:
                    parameter.copy_(before)
