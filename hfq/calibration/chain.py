"""Stacks in which block i feeds block i + 1: found out on one row, then captured without running the blocks.

All blocks of a chain are captured at once by a *skeleton* pass: the model runs with every block of the stack replaced
by one that hands its input on, so that the keywords of all blocks (masks, position embeddings, encoder states) are
known for the price of the embeddings. Whether that is right is checked, not assumed: the recorded keywords must be
those of a real pass, and the tensors that change must be outputs of the block before.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hfq.calibration.cache import leaves, rebuild, structure
from hfq.calibration.capture import Stop, first_tensor, forward, recording

__all__ = ["Stack", "Wiring", "probe", "skeleton"]

TreePath = tuple[Any, ...]


@dataclass
class Wiring:
    """How a chain hangs together.

    Attributes:
        slots: (path in the call of a block, path in the output of the block before), the hidden state first.
        template: the output of one block on one row: its form, and tensors for what the skeleton cannot hand on.
    """

    slots: list[tuple[TreePath, TreePath]]
    template: Any

    @property
    def inputs(self) -> dict[TreePath, int]:
        return {path: k for k, (path, _) in enumerate(self.slots)}


@dataclass
class Stack:
    """The blocks of one stack in execution order, and how they are driven.

    Attributes:
        wiring: set when the stack is a chain.
        reason: why it is not.
        writes: a block changes its input in place, so that inputs are copied before every call.
        calls: how often each block runs in one forward pass.
    """

    blocks: list[Any]
    wiring: Wiring | None = None
    reason: str = ""
    calls: dict[str, int] = field(default_factory=dict)
    writes: bool = False


@dataclass
class _Record:
    tree: Any
    slots: dict[TreePath, TreePath]


class _Probe:
    """Watches one real pass: calls, order, and which inputs are outputs of the block before."""

    def __init__(self) -> None:
        self.order: list[Any] = []
        self.records: dict[str, _Record] = {}
        self.templates: dict[str, Any] = {}
        self.mutating: set[int] = set()
        self._last: dict[int, list[tuple[TreePath, torch.Tensor]]] = {}
        self._versions: dict[str, list[tuple[torch.Tensor, int]]] = {}

    def before(self, block: Any, tree: Any) -> None:
        follows = bool(self.order) and self.order[-1].stack == block.stack
        self.order.append(block)
        previous = self._last.pop(block.stack, []) if follows else []
        slots = {path: source for path, t in leaves(tree) if (source := _same_as(t, previous)) is not None}
        self.records.setdefault(block.name, _Record(rebuild(tree, lambda path, t: None if path in slots else t), slots))
        self._versions[block.name] = [(t, t._version) for _, t in leaves(tree)]

    def after(self, block: Any, output: Any) -> None:
        if any(t._version != version for t, version in self._versions.pop(block.name)):
            self.mutating.add(block.stack)
        self._last[block.stack] = list(leaves(output))
        self.templates.setdefault(block.name, output)


def _same_as(tensor: torch.Tensor, outputs: list[tuple[TreePath, torch.Tensor]]) -> TreePath | None:
    for path, other in outputs:
        if tensor is other:
            return path
    for path, other in outputs:
        if (
            tensor.shape == other.shape
            and tensor.dtype == other.dtype
            and tensor.numel() > 1
            and torch.equal(tensor, other.to(tensor.device))
        ):
            return path
    return None


def probe(
    model: nn.Module, blocks: Sequence[Any], row: Mapping[str, Any], *, chains: bool = True
) -> tuple[list[Stack], list[Any]]:
    """Run ``row`` once; returns the stacks in execution order and the blocks that never ran.

    A stack whose blocks take turns with those of others is several here: one for every run of blocks.
    """
    seen = _Probe()
    with recording(blocks, seen.before, seen.after):
        forward(model, row)
    stacks = _runs(seen.order)
    for stack in stacks:
        number = stack.blocks[0].stack
        stack.writes = number in seen.mutating
        stack.reason = "" if chains else "the capture driver was asked for"
        if chains:
            stack.wiring, stack.reason = _wire(number, stack, seen)
        if stack.wiring is not None and len(stack.blocks) > 1:
            stack.reason = _contradiction(model, stack, row, seen)
            stack.wiring = None if stack.reason else stack.wiring
    reached = {id(block) for block in seen.order}
    return stacks, [block for block in blocks if id(block) not in reached]


def _runs(order: Sequence[Any]) -> list[Stack]:
    """The blocks in the order in which they ran, a stack for every run of one; a stack with a block that runs several
    times stays whole."""
    again = {block.stack for block, times in Counter(order).items() if times > 1}
    found: dict[Any, Stack] = {}
    for place, block in enumerate(order):
        if place == 0 or order[place - 1].stack != block.stack:
            run = place
        stack = found.setdefault(block.stack if block.stack in again else (block.stack, run), Stack([]))
        if block.name not in stack.calls:
            stack.blocks.append(block)
        stack.calls[block.name] = stack.calls.get(block.name, 0) + 1
    return list(found.values())


def _wire(number: int, stack: Stack, seen: _Probe) -> tuple[Wiring | None, str]:
    if max(stack.calls.values()) > 1:
        return None, "a block runs several times in one forward pass"
    if number in seen.mutating:
        return None, "a block changes its input in place"
    template = seen.templates[stack.blocks[0].name]
    if any(structure(seen.templates[block.name]) != structure(template) for block in stack.blocks):
        return None, "the blocks return different structures"
    if len(stack.blocks) == 1:
        return Wiring([(first_tensor(seen.records[stack.blocks[0].name].tree), first_tensor(template))], template), ""
    found = [seen.records[block.name].slots for block in stack.blocks[1:]]
    if not found[0] or any(slots != found[0] for slots in found):
        return None, "the input of a block is not the output of the block before"
    return Wiring(sorted(found[0].items(), key=lambda item: str(item[1])), template), ""


def _contradiction(model: nn.Module, stack: Stack, row: Mapping[str, Any], seen: _Probe) -> str:
    """Compare a skeleton pass with the real one; the reason why the chain does not hold, or an empty string."""
    assert stack.wiring is not None
    try:
        trees = skeleton(model, stack, row)
    except RuntimeError as error:
        return f"the model does not run without its blocks: {error}"
    inputs = stack.wiring.inputs
    for position, (block, tree) in enumerate(zip(stack.blocks, trees, strict=True)):
        blank = inputs if position else {}
        got, real = _without(tree, blank), _without(seen.records[block.name].tree, blank)
        if structure(got) != structure(real):
            return f"{block.name} is called differently when the blocks before it really run"
        for (path, a), (_, b) in zip(leaves(got), leaves(real), strict=True):
            if a.shape != b.shape or not _close(a, b):
                return f"{'.'.join(map(str, path[1:]))} of {block.name} depends on the blocks before it"
    return ""


def _without(tree: Any, paths: Mapping[TreePath, int]) -> Any:
    return rebuild(tree, lambda path, leaf: None if path in paths else leaf)


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    return torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-5, equal_nan=True)


@contextlib.contextmanager
def _stubs(stack: Stack) -> Iterator[None]:
    """Every block but the last hands its input on, in the structure that the block returns."""
    wiring = stack.wiring
    assert wiring is not None
    sources = {out: path for path, out in wiring.slots}

    def stub(*args: Any, **kwargs: Any) -> Any:
        given = dict(leaves((args, kwargs)))

        def fill(path: TreePath, tensor: torch.Tensor) -> torch.Tensor:
            source = sources.get(path)
            passed = None if source is None else given.get(source)
            return tensor if passed is None else passed

        return rebuild(wiring.template, fill)

    missing = object()
    saved = [(block.module, block.module.__dict__.get("forward", missing)) for block in stack.blocks[:-1]]
    try:
        for module, _ in saved:
            module.__dict__["forward"] = stub
        yield
    finally:
        for module, old in saved:
            if old is missing:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = old


def skeleton(model: nn.Module, stack: Stack, batch: Mapping[str, Any]) -> list[Any]:
    """``(args, kwargs)`` of every block of the stack; slot leaves of later blocks hold the first block's tensors."""
    trees: dict[str, Any] = {}
    last = stack.blocks[-1]

    def before(block: Any, tree: Any) -> None:
        trees[block.name] = tree
        if block is last:
            raise Stop

    with recording(stack.blocks, before), _stubs(stack):
        forward(model, batch)
    if len(trees) != len(stack.blocks):
        raise RuntimeError(f"only {len(trees)} of {len(stack.blocks)} blocks were reached")
    return [trees[block.name] for block in stack.blocks]
