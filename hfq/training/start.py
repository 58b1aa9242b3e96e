"""Scales that start from what they divide: large activations, moved into the weights in part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hfq.training.loop import mean_loss
from hfq.training.student import Student

__all__ = ["smooth_scales"]

_FLOOR = 1e-5


@torch.no_grad()
def smooth_scales(
    student: Student, batches: Sequence[Mapping[str, Any]], alpha: float = 0.5, *, rows: int | None = None
) -> list[str]:
    """Set scales to ``max|x|^alpha / max|w|^(1 - alpha)`` of each channel that they divide.

    Maxima are those of the transformed model, so that scales behind a rotation start from rotated activations. Scales
    whose channels are mixed afterwards (by a rotation of heads, or online) stay as they are.

    Args:
        student: computes without quantized inputs.
        batches: forward keywords.
        alpha: share of the difficulty that moves into the weights.
        rows: of the batches; default all.

    Returns:
        The scales that were set.
    """
    transform = student.transform
    readers: dict[str, list[tuple[str, Any]]] = {}
    for name, edits in transform.edits.items():
        for number, edit in enumerate(edits):
            mixed = any(later.how in ("turn", "mix") and later.axis == edit.axis for later in edits[number + 1 :])
            if edit.how == "multiply" and edit.stage in ("norm", "values", "hidden") and not mixed:
                readers.setdefault(edit.site, []).append((name, edit))
    maxima: dict[str, torch.Tensor] = {}
    modules = {name.rpartition(".")[0] for found in readers.values() for name, _ in found}
    handles = [student.model.get_submodule(name).register_forward_pre_hook(_maximum(maxima, name))
               for name in modules]  # fmt: skip
    student.start()
    try:
        mean_loss(lambda batch: _run(student, batch), batches, rows)
    finally:
        student.drop()
        for handle in handles:
            handle.remove()
    done = []
    for site, found in readers.items():
        values = transform.transforms[site].values
        inputs, columns = torch.zeros_like(values), torch.zeros_like(values)
        for name, edit in found:
            weight = transform([name])[name]
            if weight.dim() != 2 or name.rpartition(".")[0] not in maxima:
                continue
            index = edit.index.to(values.device)
            used = index >= 0
            most = weight.abs().amax(1 - edit.axis).to(values)
            columns.scatter_reduce_(0, index[used], most[used], "amax")
            inputs.scatter_reduce_(0, index[used], maxima[name.rpartition(".")[0]].to(values)[used], "amax")
        if bool((inputs > 0).any()):
            values.copy_(inputs.clamp(min=_FLOOR) ** alpha / columns.clamp(min=_FLOOR) ** (1 - alpha))
            done.append(site)
    transform.keep_positive()
    return done


def _run(student: Student, batch: Mapping[str, Any]) -> tuple[float, int]:
    with student.running():
        student(batch)
    return 0.0, 1


def _maximum(maxima: dict[str, torch.Tensor], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        most = args[0].detach().abs().flatten(0, -2).amax(0).float()
        maxima[name] = most if name not in maxima else torch.maximum(maxima[name], most)

    return hook
