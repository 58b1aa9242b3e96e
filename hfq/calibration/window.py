"""A window of adjacent blocks in a walk: its inputs, its targets, and running it as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from hfq.calibration.cache import ActivationCache, Slot, Stored, TensorList, leaves, rebuild
from hfq.calibration.capture import device_of, first_tensor
from hfq.calibration.chain import Stack
from hfq.calibration.outliers import InputRanges
from hfq.calibration.step import Step
from hfq.errors import CheckpointError, QuantizationError

__all__ = ["Run", "Tree", "Window", "check_left", "outputs_of"]

Tree = tuple[tuple[Any, ...], dict[str, Any]]
Run = Callable[[int, Step, tuple[Any, ...], dict[str, Any]], Any]


class Window:
    """Adjacent blocks, materialised on their devices.

    Attributes:
        index: number of the window's first block in the walk.
        steps: the blocks that are not finished, in order; ``step.swap`` packs a site. Only the first has inputs yet.
        entering: those that no earlier window of this process held.
        fitted: an interrupted run has fitted this window already: blocks only have to leave.
        learners: what was kept for each block, by name.
        ranges: input ranges by name of the block, if they were asked for.
        targets: what the float blocks make of the float stream: hidden states, one tensor a call.
    """

    def __init__(
        self, steps: list[Step], entering: list[Step], learners: dict[str, nn.Module], ranges: dict[str, InputRanges],
        targets: TensorList, stack: Stack,
    ) -> None:  # fmt: skip
        self.steps, self.entering, self.learners, self.ranges = steps, entering, learners, ranges
        self.targets, self.index, self.fitted = targets, steps[0].index, False
        self._slots = stack.wiring.slots if stack.wiring is not None else []
        self._leave: Callable[[], Iterator[Step]] = lambda: iter(())
        self._restored: dict[str, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.steps[0].inputs)

    @property
    def name(self) -> str:
        """For messages."""
        first, last = self.steps[0].block.name, self.steps[-1].block.name
        return first if first == last else f"{first} to {last}"

    def keep(self, step: Step, learner: nn.Module) -> None:
        """Keep ``learner`` until the block leaves, in the state that an interrupted run left it in."""
        prefix = f"{step.block.name}:"
        state = {key.removeprefix(prefix): t for key, t in self._restored.items() if key.startswith(prefix)}
        if state:
            try:
                learner.load_state_dict(state)
            except RuntimeError as error:
                raise CheckpointError(f"the saved state of {step.block.name} does not fit: {error}") from error
        self.learners[step.block.name] = learner

    def leaving(self) -> Iterator[Step]:
        """The blocks that leave, each with its inputs; the loop body packs them. Every one has to be taken."""
        return self._leave()

    def mask(self, i: int) -> torch.Tensor | None:
        """Padding mask of call ``i`` as :meth:`hfq.calibration.step.Step.mask` gives it."""
        return self.steps[0].mask(i)

    @property
    def inputs(self) -> Sequence[Tree]:
        """Calls of the whole window in the quantized stream: ``((call of block 0, call of block 1, ...), {})``.

        Where a call takes an output of the block before, it holds a marker that :meth:`through` fills.
        """
        return _Calls(self.steps)

    def through(self, calls: Sequence[Tree], run: Run) -> torch.Tensor:
        """Hidden output of the window: ``run(number, step, args, kwargs)`` computes one block after the other.

        Args:
            calls: what ``inputs[i]`` holds as its arguments.
        """
        output: Any = None
        for number, (step, call) in enumerate(zip(self.steps, calls, strict=True)):
            if number:
                found = dict(leaves(output))
                call = rebuild(call, lambda _, slot, found=found: found[self._slots[slot.index][1]], Slot)
            args, kwargs = call
            output = run(number, step, args, kwargs)
        return dict(leaves(output))[first_tensor(output)]


class _Calls(Sequence[Tree]):
    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return len(self.steps[0].inputs)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        later = [self._rest(step.inputs, index) for step in self.steps[1:]]
        return (self.steps[0].inputs[index], *later), {}

    @staticmethod
    def _rest(cache: ActivationCache, index: int) -> Tree:
        return rebuild(cache.calls[index], lambda _, stored: cache.store.get(stored), Stored)


def check_left(window: Window, leaving: Sequence[Step], left: Sequence[Step]) -> None:
    if len(left) != len(leaving):
        missing = [step.block.name for step in leaving[len(left) :]]
        raise QuantizationError(f"{missing} had to leave the window: take every step of window.leaving()")


def outputs_of(window: Window) -> Iterator[torch.Tensor]:
    """What the blocks of the window, as they are, make of the quantized stream: hidden states without gradients."""
    device = device_of(window.steps[0].block.module)
    for calls, _ in window.inputs:
        moved = rebuild(calls, lambda _, t: t.to(device))
        with torch.no_grad():
            yield window.through(moved, lambda _, step, args, kwargs: step.block.module(*args, **kwargs))
