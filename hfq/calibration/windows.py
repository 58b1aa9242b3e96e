"""A walk over windows of adjacent blocks that overlap: several blocks at a time, and what flows into and out of them.

    for window in windows.walk(plan, batches, size=2, overlap=1):
        for step in window.entering:
            window.keep(step, learner_of(step))
        if not window.fitted:
            fit(window)
        for step in window.leaving():
            pack(step, window.learners[step.block.name])

A block enters once, stays in memory for all windows that hold it, and leaves packed. What was learned about a block
lives in ``window.learners`` until it leaves, and in the progress file of the block before it. Peak memory is that of
the blocks of one window and three of its activations: what enters it in the quantized stream, what the float stream
makes of its end, and (while it is being fitted) what the float blocks make of the quantized stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from hfq.calibration.cache import ActivationCache, Stored, TensorList
from hfq.calibration.chain import Stack
from hfq.calibration.outliers import InputRanges
from hfq.calibration.step import Step
from hfq.calibration.walk import DEFAULT_MEMORY, Placement, ProgressBar, _Walk
from hfq.calibration.window import Window, check_left, outputs_of
from hfq.errors import DataError, QuantizationError
from hfq.report import Report

__all__ = ["Window", "outputs_of", "starts", "walk"]

Observe = Callable[[Any], Mapping[str, nn.Module]]


def starts(blocks: int, size: int, overlap: int) -> list[int]:
    """First block of every window over a stack of ``blocks``; the last window reaches its end."""
    found = [0]
    while found[-1] + size < blocks:
        found.append(found[-1] + size - overlap)
    return found


def walk(
    plan: Any,
    batches: Sequence[Mapping[str, Any]],
    *,
    size: int = 2,
    overlap: int = 1,
    observe: Observe | None = None,
    driver: Literal["auto", "chain", "capture"] = "auto",
    placement: Placement | None = None,
    progress: ProgressBar | None = None,
    progress_dir: str | Path | None = None,
    fingerprint: Mapping[str, Any] | None = None,
    spill_dir: str | Path | None = None,
    memory_limit: int | None = DEFAULT_MEMORY,
    min_tokens: int = 0,
    report: Report | None = None,
) -> Iterator[Window]:
    """Walk over windows of ``size`` blocks, ``overlap`` of which the next window holds too.

    Windows do not reach over the end of a stack. Blocks that do not feed each other come in windows of one.

    Args:
        observe: names of modules of a block (a ``graph.Block``) whose input ranges are wanted; they are in
            ``window.ranges``, measured on the float stream.
        driver, placement, ...: as in :func:`hfq.calibration.walk.walk`; both streams are always there.

    Raises:
        QuantizationError: sizes that make no windows, or what the plain walk raises.
        DataError: no data.
    """
    if size < 1 or not 0 <= overlap < size:
        raise QuantizationError(f"size={size}, overlap={overlap}: a window of one block at least, and less overlap")
    if len(batches) == 0:
        raise DataError("the walk needs calibration data: no batches were given")
    place = placement or (lambda _: nullcontext())
    run = _Windows(plan, batches, True, driver, place, report, min_tokens)
    run.size, run.overlap, run.observe = size, overlap, observe
    settings = {**(fingerprint or {}), "window": size, "overlap": overlap}
    return run.steps(progress, progress_dir, settings, spill_dir, memory_limit)  # type: ignore[return-value]


class _Stream:
    """The tensors of one stream at one place; two streams may hold the same ones."""

    def __init__(self, tensors: list[list[Stored | None]]) -> None:
        self.tensors = tensors


class _Windows(_Walk):
    size, overlap = 1, 0
    observe: Observe | None = None

    def _chain(self, stack: Stack, known: Any, done: int, total: int) -> Iterator[Any]:
        yield from _Run(self, stack, known, done, total).windows()

    def _record(self, stack: Stack, known: Any, done: int, total: int) -> Iterator[Any]:
        if self.report is not None and self.size > 1:
            self.report.note(f"{stack.blocks[0].name}...: windows of one block, because {stack.reason}")
        for step in super()._record(stack, known, done, total):
            if step is None:
                yield None
                continue
            watch = self._watch(step)
            if watch is not None and step.float_inputs is not None:
                for n in range(len(step.float_inputs)):
                    with watch.watching(step.float_inputs.hidden(n), step.mask(n)):
                        step.call(n, step.float_inputs)
                watch.reduce()
            ranges = {} if watch is None else {step.block.name: watch}
            window = Window([step], [step], {}, ranges, step.outputs, stack)
            left: list[Step] = []
            window._leave = lambda left=left, step=step: iter(left.append(step) or (step,))
            yield window
            check_left(window, [step], left)

    def _watch(self, step: Step) -> InputRanges | None:
        modules = {} if self.observe is None else self.observe(step.block)
        return InputRanges(modules) if modules else None


class _Run:
    """The windows of one chain."""

    def __init__(self, walk: _Windows, stack: Stack, known: Any, done: int, total: int) -> None:
        assert stack.wiring is not None
        self.walk, self.stack, self.done, self.total = walk, stack, done, total
        self.main = stack.wiring.slots[0][0]
        self.calls, stream = walk._capture(stack)
        self.float_calls, float_stream = known if known is not None else (self.calls, stream)
        self.shared = known is None
        self.stream = _Stream(stream)
        self.frontier = self.stream if self.shared else _Stream(float_stream)
        self.places: dict[int, ExitStack] = {}
        self.open: list[Step] = []
        self.learners: dict[str, nn.Module] = {}
        self.ranges: dict[str, InputRanges] = {}
        self.restored: dict[str, torch.Tensor] = {}

    def windows(self) -> Iterator[Window | None]:
        blocks, walk = self._count(), self.walk
        first = starts(blocks, walk.size, walk.overlap)
        entered, entering = 0, list[Step]()
        try:
            for number, start in enumerate(first):
                for i in range(entered, min(start + walk.size, blocks)):
                    step = self._enter(i)
                    if self._is_finished(step):
                        self._skip(step)
                        yield None
                    else:
                        entering.append(step)
                        self.open.append(step)
                entered = max(entered, min(start + walk.size, blocks))
                end = first[number + 1] if number + 1 < len(first) else blocks
                leaving = [step for step in self.open if step.index - self.done < end]
                if leaving:
                    yield from self._window(entering, leaving, fitted=leaving[0].index - self.done > start)
                    entering = []
        finally:
            for place in self.places.values():
                place.close()
        self._free(self.stream, None)
        self._free(self.frontier, self.stream)

    def _count(self) -> int:
        """How many blocks the windows reach over: those behind the last one with sites are left out, if nothing
        comes after them."""
        last = max(i for i, block in enumerate(self.stack.blocks) if block.sites or i == 0) + 1
        return last if self.done + len(self.stack.blocks) == self.total else len(self.stack.blocks)

    def _window(self, entering: list[Step], leaving: list[Step], fitted: bool) -> Iterator[Window | None]:
        targets = [tensors[0] for tensors in self.frontier.tensors if tensors[0] is not None]
        hidden = TensorList(self.walk.store, targets)
        window = Window(list(self.open), entering, self.learners, self.ranges, hidden, self.stack)
        window.fitted, window._restored = fitted, self.restored
        left: list[Step] = []

        def leave() -> Iterator[Step]:
            for step in leaving:
                step.inputs.stream = self.stream.tensors
                yield step
                self._leave(step)
                left.append(step)

        window._leave = leave
        self.open[0].inputs.stream = self.stream.tensors
        yield window
        check_left(window, leaving, left)
        self.restored = {}
        yield from [None] * (len(leaving) - 1)

    def _is_finished(self, step: Step) -> bool:
        return self.walk.saved is not None and self.walk.saved.has(step.block.name)

    def _enter(self, i: int) -> Step:
        """Materialise block ``i`` and run it, as it is, on the float stream."""
        walk, block, store = self.walk, self.stack.blocks[i], self.walk.store
        self.places[i] = ExitStack()
        self.places[i].enter_context(walk.placement(block.module))
        inputs = ActivationCache(store, self.calls[i], [], self.main)
        floats = ActivationCache(store, self.float_calls[i], self.frontier.tensors, self.main)
        step = walk._step(block, self.done + i, self.total, inputs, floats)
        finished = self._is_finished(step)
        if not finished:
            walk._open(step)
        watch = None if finished else walk._watch(step)
        following = []
        for n in range(len(floats)):
            seen = nullcontext()
            if watch is not None:
                hidden = floats.hidden(n)
                seen = watch.watching(hidden, step.mask(n, tuple(hidden.shape)))
            with seen:
                following.append(walk._advance(self.stack, step, n, floats))
        if watch is not None:
            watch.reduce()
            self.ranges[block.name] = watch
        old, self.frontier = self.frontier, _Stream(following)
        self._free(old, self.stream)
        if not self.shared:
            floats.release()
        step.float_inputs = None
        return step

    def _skip(self, step: Step) -> None:
        """Install a finished block and take the quantized stream through it."""
        assert self.walk.saved is not None
        step.inputs.stream = self.stream.tensors
        step._before = None
        self.restored = self.walk._restore(step, self.walk.saved)
        self._pass(step, {})

    def _leave(self, step: Step) -> None:
        """The quantized stream goes on through the packed block, which is then put back and never touched again."""
        step.changed = True
        name = step.block.name
        self.open.remove(step)
        self.learners.pop(name, None)
        self.ranges.pop(name, None)
        waiting = [other.block.name for other in self.open if other.block.name in self.learners]
        state = {f"{n}:{key}": t for n in waiting for key, t in self.learners[n].state_dict().items()}
        self._pass(step, state)

    def _pass(self, step: Step, state: dict[str, torch.Tensor]) -> None:
        following = [self.walk._advance(self.stack, step, n, step.inputs) for n in range(len(step.inputs))]
        self.walk._finish(step, state)
        self.places.pop(step.index - self.done).close()
        old, self.stream = self.stream, _Stream(following)
        self._free(old, self.frontier)
        step.inputs.release()

    def _free(self, stream: _Stream, other: _Stream | None) -> None:
        """Drop what a stream held, unless the other stream is at the same place."""
        if stream is not other:
            self.walk._free(stream.tensors)
