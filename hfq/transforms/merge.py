"""Parallel branches merged into one convolution, by the model's own code, and proven on its outputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from hfq.errors import QuantizationError

__all__ = ["merge_branches", "unmerged"]

# What libraries call the method that merges the branches of a module.
METHODS = ("reparameterize", "switch_to_deploy")


def unmerged(model: nn.Module) -> list[str]:
    """Names of the modules (of the model: the empty name) that can merge branches and have not."""
    found: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") or outer == "" for outer in found):
            continue
        if any(callable(getattr(module, method, None)) for method in METHODS) and not _merged(module):
            found.append(name)
    return found


def _merged(module: nn.Module) -> bool:
    told = getattr(module, "deploy", getattr(getattr(module, "config", None), "deploy", None))
    return bool(told)


def merge_branches(
    model: nn.Module, outputs: Callable[[], torch.Tensor], *, tolerance: float = 1e-4
) -> list[str]:
    """Merge the parallel branches of every module that says how to, in place.

    Args:
        outputs: runs the model once, gives what it computes as one tensor.
        tolerance: largest relative difference of the outputs.

    Returns:
        Names of the modules that merged; the model itself has the empty name.

    Raises:
        QuantizationError: a module is in training mode (its normalisations follow the batch), or the outputs changed.
    """
    names = unmerged(model)
    if not names:
        return []
    training = [name for name, m in model.named_modules()
                if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]  # fmt: skip
    if training:
        raise QuantizationError(f"{training[0]} (and {len(training) - 1} more) is in training mode, it normalises with "
                                "each batch: call model.eval() first")
    before = outputs()
    for name in names:
        module = model.get_submodule(name)
        method = next(m for m in METHODS if callable(getattr(module, m, None)))
        getattr(module, method)()
    after = outputs()
    error = float((before - after).norm() / before.norm().clamp(min=1e-30))
    if not error <= tolerance:
        raise QuantizationError(f"merging the branches of {names[0] or type(model).__name__} changes the output "
                                f"by {error:.2g}: the model is now damaged, load it again")
    return names
