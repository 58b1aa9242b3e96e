"""How the channels of one tensor travel through the operations that follow.

Every tensor downstream of a source gets a shadow: an integer tensor of its shape that says, element by element, which
source channel it is proportional to. Reshapes, permutations, slices and gathers are replayed on the shadow itself, so
heads, fused projections and windows need no special case. An operation that does not commute with scaling a channel
kills the channels it touches, with the reason. Operations unknown here kill as well: nothing is assumed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from hfq.graph import ops
from hfq.graph.shadow import NONE, Classes, collapse
from hfq.graph.trace import Node, Trace, Value

__all__ = ["Contraction", "Flow", "Reader"]

@dataclass(eq=False)
class Reader:
    """A weight that multiplies the source's channels: ``channels[k]`` is the source channel of its input ``k``."""

    name: str
    tensor: str
    input_axis: int
    output_axis: int
    channels: torch.Tensor
    count: int = 1


@dataclass(eq=False)
class Contraction:
    """Channels summed against another activation: ``q`` or ``k`` of attention. ``channels`` is ``[..., d]``."""

    node: Node
    operand: int
    channels: torch.Tensor


@dataclass(eq=False)
class Flow:
    """What became of the channels of a source.

    Attributes:
        width: number of source channels.
        readers: by (module, tensor).
        dead: channel → why a scale on it cannot be followed (every reason met).
        marks: what lies on the way of some channels: "positive" (a ReLU, only positive scales commute), "product" (an
            elementwise product with another tensor).
        altered: something other than moving elements lies on the way, so that a constant added to the source does not
            arrive as the same constant.
        heads: sets of channels that attention weights mixed as a whole, ``[n, d]``, if any.
        biases: parameters added to the source before it is used, (module, name).
    """

    trace: Trace
    width: int
    owner: str = ""
    classes: Classes = field(init=False)
    readers: dict[tuple[str, str], Reader] = field(default_factory=dict)
    dead: dict[int, list[str]] = field(default_factory=dict)
    deaths: list[tuple[Node, str]] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)
    marks: dict[str, set[int]] = field(default_factory=dict)
    altered: bool = False
    heads: list[torch.Tensor] = field(default_factory=list)
    biases: set[tuple[str, str]] = field(default_factory=set)
    shadows: dict[Value, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.classes = Classes(self.width)

    # -- running -----------------------------------------------------------------------------------------------------
    def seed(self, value: Value, axis: int = -1) -> None:
        """Make ``value`` a source: channel ``j`` at position ``j`` of ``axis``."""
        shape = [1] * len(value.shape)
        shape[axis] = value.shape[axis]
        self.shadows[value] = torch.arange(self.width).reshape(shape).expand(value.shape)

    def run(self, nodes: Sequence[Node], exits: Iterable[Value] = ()) -> Flow:
        """Follow the seeds through ``nodes`` (the call of a block); what leaves the block alive dies."""
        for node in nodes:
            if any(value in self.shadows for value in node.inputs):
                self._step(node)
        stop = nodes[-1].index if nodes else 0
        out = set(exits)
        for value, shadow in list(self.shadows.items()):
            if value in out or any(user.index > stop for user in value.users):
                self.leave(value, shadow)
        return self

    def leave(self, value: Value, shadow: torch.Tensor) -> None:
        self.kill(shadow, "leaves the block", None)

    def alive(self) -> torch.Tensor:
        """Channels (ascending) that end in readers and nowhere else."""
        reached = torch.zeros(self.width, dtype=torch.bool)
        for reader in self.readers.values():
            reached[reader.channels[reader.channels >= 0]] = True
        lost = {self.classes.find(channel) for channel in self.dead}
        lost |= {self.classes.find(c) for c in torch.nonzero(~reached).flatten().tolist()}
        return torch.tensor([c for c in range(self.width) if self.classes.find(c) not in lost], dtype=torch.long)

    def kill(self, shadow: torch.Tensor, reason: str, node: Node | None) -> None:
        channels = _channels(shadow)
        if node is not None and channels:
            self.deaths.append((node, reason))
        for channel in channels:
            reasons = self.dead.setdefault(channel, [])
            if reason not in reasons:
                reasons.append(reason)

    def reason(self) -> str:
        """The most common first reason for which channels died."""
        reasons = [found[0] for found in self.dead.values()]
        return max(sorted(set(reasons)), key=reasons.count) if reasons else "no linear layer reads it"

    def _step(self, node: Node) -> None:
        if node.kind == "site":
            self._site(node)
        elif node.kind == "norm":
            self._norm(node)
        else:
            handler = ops.handler_of(node.op)
            if handler is not None:
                handler(self, node)
            else:
                self.stop(node, f"passes through {node.op.rstrip('_')}")

    def stop(self, node: Node, reason: str) -> None:
        for value in node.inputs:
            if value in self.shadows:
                self.kill(self.shadows[value], reason + ops.where(node), node)

    def put(self, node: Node, shadow: torch.Tensor, output: int = 0) -> None:
        if output < len(node.outputs) and bool((shadow >= 0).any()):
            self.shadows[node.outputs[output]] = shadow

    def read(self, node: Node, key: tuple[str, str], axes: tuple[int, int], shadow: torch.Tensor, axis: int) -> None:
        """A weight reads ``shadow``, whose channels lie on ``axis``."""
        channels = collapse(shadow, (axis,))
        if channels is None:
            self.stop(node, f"{key[0]} reads channels that differ from row to row")
            return
        found = self.readers.get(key)
        if found is None:
            self.readers[key] = Reader(*key, *axes, channels)
        elif torch.equal(found.channels, channels):
            found.count += 1
        else:
            self.stop(node, f"{key[0]} reads two different sets of channels")

    # -- what the operations ask -------------------------------------------------------------------------------------
    def mark(self, what: str, shadow: torch.Tensor, node: Node) -> None:
        self.marks.setdefault(what, set()).update(_channels(shadow))

    def contract(self, node: Node, operand: int, channels: torch.Tensor) -> None:
        self.contractions.append(Contraction(node, operand, channels))

    def join(self, a: torch.Tensor, b: torch.Tensor, node: Node) -> torch.Tensor:
        """Shadow of a sum: both channels at a position must share a scale; a live one and a foreign one cannot."""
        for mine, other in ((a, b), (b, a)):
            foreign = (mine >= 0) & (other == NONE)
            if bool(foreign.any()):
                self.kill(mine[foreign], "added to another tensor" + ops.where(node), node)
        both = (a >= 0) & (b >= 0) & (a != b)
        if bool(both.any()):
            self.classes.unite(a[both], b[both])
        return torch.maximum(a, b)

    def foreign(self, node: Node, shadow: torch.Tensor, other: Value | None) -> None:
        """A tensor that does not depend on the source (``None``: a number) is added."""
        self.kill(shadow, "added to another tensor" + ops.where(node), node)

    def bare_norm(self, node: Node) -> None:
        """A normalisation that is called as a function."""
        self.stop(node, "normalised")

    # -- modules -----------------------------------------------------------------------------------------------------
    def _site(self, node: Node) -> None:
        shadow = self.shadows.get(node.inputs[0])
        weight = getattr(node.function, "weight", None)
        if shadow is None or weight is None or weight.dim() != 2:
            self.stop(node, f"read by {node.op}, which is no matrix product over channels")
            return
        axes = (0, 1) if hasattr(node.function, "nf") else (1, 0)
        self.read(node, (node.op, "weight"), axes, shadow, -1)

    def _norm(self, node: Node) -> None:
        self.stop(node, f"normalised by {node.op}")


def _channels(shadow: torch.Tensor) -> list[int]:
    return [channel for channel in torch.unique(shadow).tolist() if channel >= 0]
