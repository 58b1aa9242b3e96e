"""Hooks that are functions of the module that they hang on, so that a deep copy of a model uses its own tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["unhook"]


def unhook(module: nn.Module, *functions: Callable[..., Any]) -> None:
    """Take these functions off the calls of ``module``, before and after its own forward; others stay."""
    flags = {"_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
             "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called")}  # fmt: skip
    for hooks, others in flags.items():
        for key in [key for key, hook in getattr(module, hooks).items() if hook in functions]:
            for each in (hooks, *others):
                getattr(module, each).pop(key, None)
