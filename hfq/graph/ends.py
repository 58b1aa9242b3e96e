"""The two ends of a residual stream outside its blocks: what writes its first state, and what reads its last one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hfq.graph.absorb import Matrix
from hfq.graph.links import Link, Pair
from hfq.graph.norms import probe
from hfq.graph.read import Plan
from hfq.graph.stream import Rotation, entry_of
from hfq.graph.trace import SAME, BlockCall, Trace, Value

__all__ = ["Ends", "ends_of"]


Placement = Callable[[nn.Module], AbstractContextManager[Any]]


@dataclass(eq=False)
class Ends:
    """What has to follow when the stream of a stack is rotated from its first state to its last.

    Attributes:
        writers: matrices whose outputs are the first state, or are added to it (embeddings).
        fold: the norm after the last block with its readers, as a pair; ``None`` if there is no norm.
        readers: matrices that read the last state, directly or behind that norm (heads).
        reason: why the ends cannot be rotated; empty if they can.
    """

    writers: list[Matrix] = field(default_factory=list)
    fold: Pair | None = None
    readers: list[Link] = field(default_factory=list)
    reason: str = ""

    @property
    def modules(self) -> list[str]:
        """Names of the modules that take part."""
        norm = [self.fold.sources[0].name] if self.fold is not None else []
        return list(dict.fromkeys([w.name for w in self.writers] + norm + [r.name for r in self.readers]))


def ends_of(plan: Plan, trace: Trace, pair: Pair, placement: Placement | None = None) -> Ends:
    """The ends of the stream of a proven rotation, read off a traced forward pass of the whole model.

    ``placement`` makes the weights of the norm after the last block available while it is examined.
    Nothing is proven: who rotates the ends compares the model's output before and after.
    """
    found = Ends()
    first, last = trace.blocks[pair.blocks[0]][0], trace.blocks[pair.blocks[-1]][0]
    found.reason = _front(plan, trace, first, pair, found) or _back(plan, trace, last, pair, found, placement)
    return found


def _front(plan: Plan, trace: Trace, call: BlockCall, pair: Pair, found: Ends) -> str:
    entry = entry_of(call)
    if entry is None:
        return "the first block takes no hidden state"
    queue, seen = [entry], {entry}
    while queue:
        value = queue.pop()
        node = value.node
        outside = [user for user in value.users if user.index < call.start and not set(user.outputs) & seen]
        later = [user for user in value.users if user.index >= call.stop]
        if outside or later or value in trace.exits:
            return f"the hidden state before {call.block.name} is used elsewhere too"
        if node is None:
            what = f"the parameter {'.'.join(value.parameter)}" if value.parameter else "an input of the model"
            return f"{what} is added in front of {call.block.name}"
        if node.kind == "site":
            matrix = _writer(plan, node.op, pair.width)
            if isinstance(matrix, str):
                return matrix
            if len(trace.calls.get(node.op, ())) != 1:
                return f"{node.op} is called several times"
            found.writers.append(matrix)
            continue
        allowed = node.kind == "op" and (node.op in SAME or node.op.rstrip("_") in ("add", "mul"))
        wide = [v for v in node.inputs if v.shape[-1:] == value.shape[-1:] and v.dtype.is_floating_point]
        others = [v for v in node.inputs if v not in wide]
        if not allowed or not wide or any(v.shape for v in others) or (node.op.startswith("mul") and len(wide) != 1):
            return f"the hidden state before {call.block.name} is a result of {node.op}"
        new = [v for v in wide if v not in seen]
        queue += new
        seen.update(new)
    return "" if found.writers else f"nothing writes the hidden state before {call.block.name}"


def _writer(plan: Plan, name: str, width: int) -> Matrix | str:
    site = plan.site(name)
    if site.kind not in ("embedding", "linear", "transposed") or site.out_features != width:
        return f"{name} ({site.kind}) writes the first hidden state"
    axes = (1, 0) if site.kind == "linear" else (0, 1)
    bias = "bias" if site.module._parameters.get("bias") is not None else None
    return Matrix(name, site.module, "weight", *axes, None if site.kind == "embedding" else bias)


def _back(
    plan: Plan, trace: Trace, call: BlockCall, pair: Pair, found: Ends, placement: Placement | None
) -> str:
    start: Value = call.exits[0]
    flow = Rotation(trace, pair.width, start)
    flow.run(trace.nodes[call.stop :], trace.exits)
    where = f"the hidden state after {call.block.name}"
    inside = [key[0] for key in flow.readers for block in plan.blocks if key[0].startswith(f"{block.name}.")]
    if flow.dead:
        return f"{where}: {flow.reason()}"
    if start in trace.exits or flow.out:
        return f"{where} is an output of the model"
    if flow.demands:
        return f"something is added to {where}"
    if inside:
        return f"{where} is read by {inside[0]} of another stack"
    if len(flow.norms) > 1 or not flow.readers:
        return f"{where} goes through {len(flow.norms)} norms to {len(flow.readers)} readers"
    for reader in flow.readers.values():
        if len(trace.calls.get(reader.name, ())) != reader.count:
            return f"{reader.name} also reads something else"
        module = plan.model.get_submodule(reader.name)
        bias = "bias" if module._parameters.get("bias") is not None else None
        matrix = Matrix(reader.name, module, reader.tensor, reader.input_axis, reader.output_axis, bias)
        found.readers.append(Link(matrix, torch.arange(pair.width)))
    if not flow.norms:
        return ""
    name = flow.norms[0]
    with (placement or nullcontext)(plan.model.get_submodule(name)):
        return _fold(plan, trace, name, pair, found)


def _fold(plan: Plan, trace: Trace, name: str, pair: Pair, found: Ends) -> str:
    calls = trace.calls[name]
    norm = probe(name, plan.model.get_submodule(name), calls[0])
    if isinstance(norm, str) or len(calls) != 1:
        return f"{name}: {norm}" if isinstance(norm, str) else f"{name} is called several times"
    if norm.centred and not pair.fix_ones:
        return f"{name} removes the mean, which the rotation moves"
    biased = all(link.part.bias_tensor is not None for link in found.readers)  # type: ignore[union-attr]
    found.fold = Pair("norm", "", sources=[Link(norm, torch.arange(pair.width))], readers=list(found.readers),
                      classes=pair.width, bias_moves=norm.bias is not None and biased)
    return ""
