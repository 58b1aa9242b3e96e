"""A float copy of a model beside the one that changes: its blocks in step with a walk, and its own passes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hfq.calibration.cache import rebuild
from hfq.calibration.step import Step
from hfq.calibration.walk import walk
from hfq.errors import QuantizationError

__all__ = ["Reference", "copy_of"]


def copy_of(model: nn.Module) -> nn.Module:
    """A float32 copy that needs no gradients, in evaluation mode; it also takes inputs of the model's own dtype.

    Raises:
        QuantizationError: a weight is not in memory.
    """
    for name, p in model.named_parameters():
        if p.is_meta:
            raise QuantizationError(f"{name} is offloaded: a copy of the model is needed beside it, both in memory")
    made = copy.deepcopy(model)
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in made.parameters()):
        made = made.to(torch.float32)
        made.register_forward_pre_hook(_widen, with_kwargs=True)
    return made.requires_grad_(False).eval()


def _widen(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    return rebuild((args, kwargs), lambda _, t: t.float() if t.is_floating_point() and t.dtype.itemsize < 4 else t)


class Reference:
    """A context in which the blocks of a model that stays as it is can be had one after the other.

    It has to be entered before the walk that it goes along with begins, and be left after that.

    Args:
        plan: of the model.
        batches: the same as those of the walk.
    """

    def __init__(self, plan: Any, batches: Sequence[Mapping[str, Any]]) -> None:
        self.plan, self.batches = plan, batches
        self._steps: Iterator[Step] = iter(())
        self._now: Step | None = None

    def __enter__(self) -> Reference:
        if self.plan.blocks and len(self.batches):
            self._steps = walk(self.plan, self.batches)
            self._now = next(self._steps, None)
        return self

    def __exit__(self, *_: Any) -> None:
        if hasattr(self._steps, "close"):
            self._steps.close()

    def step(self, name: str) -> Step:
        """The block ``name``; blocks before the last one that was asked for are gone.

        Raises:
            QuantizationError: there is no such block from here on.
        """
        while self._now is not None and self._now.block.name != name:
            self._now = next(self._steps, None)
        if self._now is None:
            raise QuantizationError(f"the float model has no block {name!r} after those that were asked for")
        return self._now
