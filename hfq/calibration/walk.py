"""The walk: one block at a time, with its inputs, in execution order.

    for step in walk(plan, batches):
        hessians = hessian.collect(step)
        for site in step.block.sites:
            codes, _ = gptq.solve(site.weight, hessians[site.name].matrix, spec)
            step.swap(site, codes)

Before a step is handed out its block is materialised and (for the float stream) its float outputs are computed. After
the loop body the block is what it is now; the walk runs it to get the next inputs, writes the progress file and puts
the block back where it came from. Peak memory is one block and its activations, whatever the depth.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from hfq import kernels, memory
from hfq.calibration import ranks
from hfq.calibration.cache import ActivationCache, Slot, Store, Stored, TensorList, leaves, rebuild
from hfq.calibration.capture import calls_of, first_tensor, quiet, row_of
from hfq.calibration.chain import Stack, probe, skeleton
from hfq.calibration.progress import Progress, put_back, state_digest, whole
from hfq.calibration.step import Step
from hfq.errors import DataError, QuantizationError
from hfq.report import Report

__all__ = ["Step", "generator", "walk"]

Placement = Callable[[nn.Module], AbstractContextManager[Any]]
ProgressBar = Callable[[int, str], Any]
Restored = Callable[[Step, dict[str, torch.Tensor]], None]
DEFAULT_MEMORY = 4 << 30


def generator(seed: int, index: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random numbers of block ``index``: the same whether or not the blocks before it were done in this process."""
    mixed = hashlib.sha256(f"hfq:{seed}:{index}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(mixed[:8], "big") >> 1)


def walk(
    plan: Any,
    batches: Sequence[Mapping[str, Any]],
    *,
    streams: Sequence[str] = ("quantized",),
    driver: Literal["auto", "chain", "capture"] = "auto",
    placement: Placement | None = None,
    progress: ProgressBar | None = None,
    progress_dir: str | Path | None = None,
    fingerprint: Mapping[str, Any] | None = None,
    spill_dir: str | Path | None = None,
    memory_limit: int | None = DEFAULT_MEMORY,
    min_tokens: int = 0,
    report: Report | None = None,
    restored: Restored | None = None,
) -> Iterator[Step]:
    """Walk over the blocks of ``plan`` in execution order.

    Args:
        plan: ``graph.read(model)``.
        batches: forward keywords (``data.normalise``). Every process passes all of them and works on its share.
        streams: "quantized" (inputs as the packed blocks before produce them) and, if asked for, "float".
        driver: "chain" computes the inputs of a block from the outputs of the one before; "capture" records them in a
            forward pass of the whole model; "auto" takes the chain where it was checked to hold.
        placement: materialises an offloaded block, ``with placement(module): ...``.
        progress: ``progress(total, description)`` makes a bar with ``update()`` and ``close()``.
        progress_dir: folder for resuming; finished blocks found in it are installed, not handed out.
        fingerprint: what else the result depends on (config, versions); a folder of another run is refused.
        spill_dir: parent of the folder for activations over the limit; default the system's temporary folder.
        memory_limit: bytes of activations kept in memory.
        min_tokens: rows that every site has to see.
        report: receives the rows.
        restored: called with every block that is installed instead of handed out, and with its ``step.kept``.

    Raises:
        DataError: no data, or data that makes the model's activations NaN or infinite.
        QuantizationError: blocks that the data never reaches (without a report; with one they are refused rows), a
            forced chain that is none, or a site under the floor.
        CheckpointError: a progress folder of another run.
    """
    if not set(streams) <= {"quantized", "float"} or "quantized" not in streams:
        raise QuantizationError(f"streams={tuple(streams)}: ('quantized',) or ('quantized', 'float')")
    if driver not in ("auto", "chain", "capture"):
        raise QuantizationError(f"driver={driver!r}: 'auto', 'chain' or 'capture'")
    if len(batches) == 0:
        raise DataError("the walk needs calibration data: no batches were given")
    run = _Walk(plan, batches, "float" in streams, driver, placement or (lambda _: nullcontext()), report, min_tokens)
    run.restored = restored or run.restored
    return run.steps(progress, progress_dir, fingerprint or {}, spill_dir, memory_limit)


class _Walk:
    restored: Restored = staticmethod(lambda step, kept: None)

    def __init__(
        self,
        plan: Any,
        batches: Sequence[Mapping[str, Any]],
        floats: bool,
        driver: str,
        placement: Placement,
        report: Report | None,
        min_tokens: int,
    ) -> None:
        self.plan, self.model, self.floats, self.driver = plan, plan.model, floats, driver
        self.placement, self.report, self.min_tokens = placement, report, min_tokens
        self.all_batches = batches
        self.batches = ranks.Share(batches)
        self.saved: Progress | None = None
        self.store = Store()

    def steps(
        self,
        progress: ProgressBar | None,
        progress_dir: str | Path | None,
        fingerprint: Mapping[str, Any],
        spill_dir: str | Path | None,
        memory_limit: int | None,
    ) -> Iterator[Step]:
        self.store = Store(memory_limit, spill_dir)
        # On a CPU the fastest product of a packed layer rounds to 16 bits, on some machines: the stream would depend on
        # the machine. On a GPU the products have the dtype of the model.
        exact = nullcontext() if torch.cuda.is_available() else kernels.use(wna16="reference")
        with quiet(self.model), exact:
            yield from self._all(progress, progress_dir, fingerprint)

    def _all(
        self, progress: ProgressBar | None, progress_dir: str | Path | None, fingerprint: Mapping[str, Any]
    ) -> Iterator[Step]:
        stacks = self._stacks()
        names = [block.name for stack in stacks for block in stack.blocks]
        if progress_dir is not None:
            self.saved = Progress(progress_dir, self._fingerprint(fingerprint), names)
        bar = progress(len(names), "quantizing blocks") if progress is not None else None
        try:
            # The float model exists only before the first change, so all that is known of it is recorded now.
            known = [self._capture(stack) for stack in stacks] if self.floats and len(stacks) > 1 else None
            done = 0
            for number, stack in enumerate(stacks):
                drive = self._chain if stack.wiring is not None else self._record
                for step in drive(stack, known[number] if known else None, done, len(names)):
                    if step is not None:
                        yield step
                    memory.give_back()
                    if bar is not None:
                        bar.update()
                done += len(stack.blocks)
        finally:
            if bar is not None:
                bar.close()
            self.store.close()

    def _fingerprint(self, given: Mapping[str, Any]) -> dict[str, Any]:
        data = getattr(self.all_batches, "sha256", None)
        return {
            **given,
            "data": data,
            "batches": len(self.all_batches),
            "float stream": self.floats,
            "processes": ranks.count(),
        }

    def _stacks(self) -> list[Stack]:
        blocks = [block for block in self.plan.blocks if block.sites or getattr(block, "kept", ())]
        stacks, missed = probe(self.model, blocks, row_of(self.all_batches[0]), chains=self.driver != "capture")
        broken = [f"{stack.blocks[0].name}...: {stack.reason}" for stack in stacks if stack.wiring is None]
        if self.driver == "chain" and broken:
            raise QuantizationError(
                f"driver='chain' was asked for, but the blocks are no chain: {'; '.join(broken)}. Use driver='auto'"
            )
        if self.report is not None:
            for line in broken:
                self.report.note(f"inputs recorded block by block: {line}")
        sites = [site for block in missed for site in block.sites]
        reason = "the calibration data never reaches this module"
        if sites and self.report is None:
            raise QuantizationError(
                f"{reason}: {', '.join(site.name for site in sites[:8])}; give data that does, or skip these modules"
            )
        for site in sites:
            assert self.report is not None
            self.report.refuse(site.name, reason, kind=site.kind, numel=site.numel)
        return stacks

    # ---- chains

    def _capture(self, stack: Stack) -> tuple[list[list[Any]], list[list[Stored | None]]]:
        """Calls of every block (``calls[block][batch]``) and the stream that enters the first one, as the model is.

        For a stack that is no chain: the calls only, and ``stream`` holds the batch of each call.
        """
        calls: list[list[Any]] = [[] for _ in stack.blocks]
        stream: list[list[Any]] = [[] for _ in (self.batches if stack.wiring is not None else stack.blocks)]
        position = {block.name: i for i, block in enumerate(stack.blocks)}
        for number, batch in enumerate(self.batches):
            memo: dict[int, tuple[torch.Tensor, Stored]] = {}
            if stack.wiring is not None:
                trees = skeleton(self.model, stack, batch)
                given = dict(leaves(trees[0]))
                stream[number] = [
                    None if (t := given.get(path)) is None else self.store.put(t) for path in stack.wiring.inputs
                ]
                for i, tree in enumerate(trees):
                    calls[i].append(self._keep(tree, stack.wiring.inputs, memo))
                continue
            for name, tree in calls_of(self.model, stack.blocks, batch, stack.calls):
                calls[position[name]].append(self._keep(tree, {}, memo))
                stream[position[name]].append(number)
        return calls, stream

    def _keep(self, tree: Any, slots: Mapping[Any, int], memo: dict[int, tuple[torch.Tensor, Stored]]) -> Any:
        def keep(path: Any, tensor: torch.Tensor) -> Any:
            if path in slots:
                return Slot(slots[path])
            if id(tensor) in memo:
                memo[id(tensor)][1].references += 1
                return memo[id(tensor)][1]
            stored = self.store.put(tensor, shared=True)
            memo[id(tensor)] = (tensor, stored)
            return stored

        return rebuild(tree, keep)

    def _chain(self, stack: Stack, known: Any, done: int, total: int) -> Iterator[Step | None]:
        assert stack.wiring is not None
        calls, stream = self._capture(stack)
        float_calls, float_stream = known if known is not None else (calls, stream)
        for i, block in enumerate(stack.blocks):
            main = stack.wiring.slots[0][0]
            inputs = ActivationCache(self.store, calls[i], stream, main)
            floats = ActivationCache(self.store, float_calls[i], float_stream, main) if self.floats else None
            with self.placement(block.module):
                step = self._step(block, done + i, total, inputs, floats)
                next_floats: list[list[Stored | None]] = []
                if floats is not None:
                    next_floats = [self._advance(stack, step, n, floats) for n in range(len(floats))]
                    step._outputs = TensorList(
                        self.store, [tensors[0] for tensors in next_floats if tensors[0] is not None]
                    )
                yield from self._work(step)
                # Also after the last block: a NaN has to be found, and rows to be counted.
                following = [self._advance(stack, step, n, inputs) for n in range(len(inputs))]
                self._finish(step)
            self._free(stream)
            if float_stream is not stream:
                self._free(float_stream)
            inputs.release()
            if known is not None and floats is not None:
                floats.release()
            stream, float_stream = following, next_floats
        self._free(stream)
        self._free(float_stream)

    def _advance(self, stack: Stack, step: Step, number: int, inputs: ActivationCache) -> list[Stored | None]:
        """The slot tensors that call ``number`` hands to the next block."""
        assert stack.wiring is not None
        found = dict(leaves(step.output_tree(number, inputs)))
        return [None if (t := found.get(source)) is None else self.store.put(t) for _, source in stack.wiring.slots]

    def _free(self, stream: Sequence[Sequence[Stored | None]]) -> None:
        for tensors in stream:
            for stored in tensors:
                if stored is not None:
                    self.store.drop(stored)

    # ---- everything else

    def _record(self, stack: Stack, known: Any, done: int, total: int) -> Iterator[Step | None]:
        float_calls, batch_of = known if known is not None else self._capture(stack) if self.floats else (None, None)
        for i, block in enumerate(stack.blocks):
            alone = Stack([block], calls={block.name: stack.calls[block.name]})
            calls, numbers = self._capture(alone)
            main = first_tensor_of(calls[0])
            inputs = ActivationCache(self.store, calls[0], None, main, stack.writes)
            floats = None
            if float_calls is not None:
                floats = ActivationCache(self.store, float_calls[i], None, main, stack.writes)
            with self.placement(block.module):
                index = [int(n) for n in numbers[0]]  # type: ignore[call-overload]
                step = self._step(block, done + i, total, inputs, floats, index)
                if floats is not None:
                    targets = [self.store.put(step.call(n, floats)) for n in range(len(floats))]
                    step._outputs = TensorList(self.store, targets)
                    step._owned += targets
                yield from self._work(step)
                for n in range(len(inputs)):
                    step.output_tree(n)
                self._finish(step)
            inputs.release()
            if floats is not None:
                floats.release()

    def _step(
        self, block: Any, index: int, total: int, inputs: ActivationCache, floats: ActivationCache | None,
        batch_index: Sequence[int] | None = None,
    ) -> Step:
        return Step(
            self.model, block, index, total, self.batches, inputs, floats, report=self.report,
            min_tokens=self.min_tokens, batch_index=batch_index,
        )  # fmt: skip

    def _work(self, step: Step) -> Iterator[Step | None]:
        """Hand the step out, or install what an earlier run made of it."""
        if self.saved is not None and self.saved.has(step.block.name):
            step._before = None
            self.restored(step, self._restore(step, self.saved))
            yield None
            return
        self._open(step)
        yield step
        step.changed = True

    def _restore(self, step: Step, saved: Progress) -> dict[str, torch.Tensor]:
        """Install a finished block; returns what was saved beside it."""
        state = saved.install(step.block.name, held := whole(step.block), self.report)
        put_back(self.model, step.block, held)
        step.changed = True
        return state

    def _open(self, step: Step) -> None:
        """Refuse a damaged block, and remember what it was."""
        name, module = step.block.name, step.block.module
        for key, parameter in module.named_parameters():
            if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
                raise QuantizationError(f"{name}.{key} has NaN or infinite elements: the float model is damaged")
        step._before = state_digest(whole(step.block)) if self.saved is not None else None

    def _finish(self, step: Step, state: Mapping[str, torch.Tensor] | None = None) -> None:
        step.reduce_tokens()
        step.release()
        if self.saved is not None and step._before is not None:
            self.saved.write(step.block.name, whole(step.block), step._before, self.report,
                             {**step.kept, **(state or {})})


def first_tensor_of(calls: Sequence[Any]) -> Any:
    """Path of the hidden state in stored calls (``None`` when this process has no batch)."""
    for call in calls:
        shapes = rebuild(call, lambda _, stored: torch.empty(0, dtype=stored.dtype), Stored)
        return first_tensor(shapes)
    return None
