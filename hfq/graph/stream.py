"""The residual stream of a stack: what reads it, what writes it, and whether a rotation of it can pass every block."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hfq.graph import ops
from hfq.graph.absorb import Norm
from hfq.graph.flow import Flow, Reader
from hfq.graph.operands import MOVES, is_zero
from hfq.graph.propose import Source, block_sources
from hfq.graph.read import Block, Plan
from hfq.graph.shadow import ZERO
from hfq.graph.trace import SAME, BlockCall, Node, Trace, Value, root

__all__ = ["BlockStream", "Rotation", "block_stream", "entry_of", "taps"]


class Rotation(Flow):
    """Follows a tensor that is rotated as a whole along its last axis: what is not linear in whole rows stops it."""

    def __init__(self, trace: Trace, width: int, entry: Value) -> None:
        super().__init__(trace, width)
        self.entry = entry
        self.seed(entry)
        self.norms: list[str] = []
        self.centred = False
        self.demands: list[tuple[Node, Value]] = []
        self.out: list[Value] = []
        self.whole = torch.arange(width)

    def is_whole(self, shadow: torch.Tensor) -> bool:
        return shadow.shape[-1:] == (self.width,) and bool(((shadow == self.whole) | (shadow == ZERO)).all())

    def put(self, node: Node, shadow: torch.Tensor, output: int = 0) -> None:
        moved = node.kind == "op" and node.op in (*MOVES, "cat", "stack", "constant_pad_nd")
        if not moved and not self.is_whole(shadow):
            self.stop(node, f"{node.op.rstrip('_')} acts on parts of the stream")
            return
        super().put(node, shadow, output)

    def read(self, node: Node, key: tuple[str, str], axes: tuple[int, int], shadow: torch.Tensor, axis: int) -> None:
        if not torch.equal(shadow.amax([d for d in range(shadow.dim()) if d != axis % shadow.dim()]), self.whole):
            self.stop(node, f"{key[0]} reads a part of the stream")
            return
        super().read(node, key, axes, shadow, axis)

    def mark(self, what: str, shadow: torch.Tensor, node: Node) -> None:
        text = {"positive": f"passes through {node.op.rstrip('_')}", "product": "multiplied channel by channel"}
        self.kill(shadow, text[what] + ops.where(node), node)

    def contract(self, node: Node, operand: int, channels: torch.Tensor) -> None:
        """Killed by the caller."""

    def join(self, a: torch.Tensor, b: torch.Tensor, node: Node) -> torch.Tensor:
        if bool(((a >= 0) & (b >= 0) & (a != b)).any()):
            self.kill(a, "two channels of the stream are added" + ops.where(node), node)
        return super().join(a, b, node)

    def foreign(self, node: Node, shadow: torch.Tensor, other: Value | None) -> None:
        if other is None:
            self.kill(shadow, "a number is added" + ops.where(node), node)
            return
        self.demands.append((node, other))
        self.put(node, shadow)

    def bare_norm(self, node: Node) -> None:
        weighted = any(isinstance(a, Value) for a in node.args[1:])
        if weighted or not self.is_whole(self.shadows[node.inputs[0]]):
            self.stop(node, "normalised by weights that belong to no norm module")
            return
        self.centred = self.centred or "layer_norm" in node.op
        self.put(node, self.shadows[node.inputs[0]])

    def leave(self, value: Value, shadow: torch.Tensor) -> None:
        if value is self.entry:
            return  # another reader of the stream before this block: `taps` looks at it
        if not self.is_whole(shadow):
            self.kill(shadow, "a part of the stream leaves the block", None)
        self.out.append(value)

    def _norm(self, node: Node) -> None:
        shadow = self.shadows.get(node.inputs[0])
        if shadow is None or not self.is_whole(shadow) or any(v in self.shadows for v in node.inputs[1:]):
            self.stop(node, f"normalised by {node.op} in parts")
            return
        if node.op not in self.norms:
            self.norms.append(node.op)
        self.put(node, shadow)


@dataclass(eq=False)
class BlockStream:
    """Readers, writers and norms of the stream in one block, or the reason why it cannot be rotated."""

    block: Block
    width: int = 0
    readers: list[Reader] = field(default_factory=list)
    writers: list[Source] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    centred: bool = False
    exits: list[Value] = field(default_factory=list)
    reason: str = ""


def entry_of(call: BlockCall) -> Value | None:
    """The hidden state that enters: the argument ``hidden_states``, or the first argument if it is floating."""
    position = 0 if call.args and isinstance(call.args[0], torch.Tensor) else None
    if isinstance(call.kwargs.get("hidden_states"), torch.Tensor):
        before = [v for k, v in call.kwargs.items() if isinstance(v, torch.Tensor)]
        count = sum(isinstance(a, torch.Tensor) for a in call.args)
        position = count + next(i for i, v in enumerate(before) if v is call.kwargs["hidden_states"])
    if position is None or position >= len(call.entries):
        return None
    entry = call.entries[position]
    return entry if entry.dtype.is_floating_point and entry.shape else None


def block_stream(plan: Plan, trace: Trace, call: BlockCall, norms: dict[str, Norm | str]) -> BlockStream:
    """Follow the stream through a block; whatever is added to it must be written by a matrix of the block."""
    entry = entry_of(call)
    if entry is None:
        return BlockStream(call.block, reason="the block takes no floating hidden state as its first argument")
    sources = block_sources(plan, trace, call)
    found = BlockStream(call.block, entry.shape[-1])
    writers: dict[tuple[str, str], Source] = {}
    for _ in range(len(sources) + 2):
        flow = Rotation(trace, found.width, entry)
        for writer in writers.values():
            for value, axis in writer.outputs:
                flow.seed(value, axis)
        flow.run(trace.inside(call), call.exits)
        before = len(writers)
        for node, value in flow.demands:
            reason = _collect(value, sources, call, found.width, writers)
            if reason:
                found.reason = f"{reason} is added to the stream{ops.where(node)}"
                return found
        if len(writers) == before:
            break
    return _finish(found, flow, writers, call, norms)


def _finish(
    found: BlockStream, flow: Rotation, writers: dict[tuple[str, str], Source], call: BlockCall,
    norms: dict[str, Norm | str],
) -> BlockStream:
    found.readers, found.writers = list(flow.readers.values()), list(writers.values())
    found.norms, found.exits = flow.norms, flow.out
    probed = [norms.get(name, "it was not probed") for name in flow.norms]
    found.centred = flow.centred or any(isinstance(norm, Norm) and norm.centred for norm in probed)
    bad = next((f"{n}: {norm}" for n, norm in zip(flow.norms, probed, strict=True) if isinstance(norm, str)), None)
    if flow.dead:
        found.reason = flow.reason()
    elif flow.demands:
        where = ops.where(flow.demands[0][0])
        found.reason = f"what is added to the stream{where} is not written by a matrix as a whole"
    elif bad:
        found.reason = bad
    elif not call.exits or call.exits[0] not in flow.out:
        found.reason = "the stream is not the first output of the block"
    elif any(value is not call.exits[0] for value in flow.out):
        found.reason = "the block hands out the stream twice"
    return found


def _collect(
    start: Value, sources: dict[tuple[str, str], Source], call: BlockCall, width: int,
    writers: dict[tuple[str, str], Source],
) -> str:
    """Walk back from a tensor that is added to the stream to the matrices that write it; a text if there are none."""
    by_output = {value: source for source in sources.values() for value, _ in source.outputs}
    queue, seen = [start], {start}
    while queue:
        value = queue.pop()
        source = by_output.get(value)
        if source is not None:
            if source.width != width:
                return f"the output of {source.key[0]} ({source.width} channels, not {width})"
            writers[source.key] = source
            continue
        node = value.node
        if is_zero(value):
            continue
        if node is None or node.index < call.start:
            name = f"the parameter {'.'.join(value.parameter)}" if value.parameter else "another input of the block"
            return name
        for operand in node.inputs:
            wide = operand.dtype.is_floating_point and operand.shape[-1:] == (width,) and operand.parameter is None
            if wide and operand not in seen:
                seen.add(operand)
                queue.append(operand)
        if not any(v in seen or v in by_output for v in node.inputs):
            return f"the result of {node.op}"
    return ""


def taps(trace: Trace, calls: list[BlockCall]) -> str:
    """Who else reads the stream between the blocks of a stack; empty if nobody does."""
    for call, following in zip(calls, calls[1:], strict=False):
        entry = entry_of(following)
        if entry is None or root(entry) is not root(call.exits[0]):
            return f"{following.block.name} does not continue where {call.block.name} ends"
        queue = [call.exits[0]]
        while queue:
            value = queue.pop()
            if value in trace.exits:
                return f"the hidden state after {call.block.name} is an output of the model"
            for user in value.users:
                if following.start <= user.index < following.stop or user.index < call.stop:
                    continue
                if user.kind == "op" and user.op in SAME:
                    queue += user.outputs
                    continue
                return f"the hidden state after {call.block.name} is also read by {user.op}{ops.where(user)}"
    return ""
