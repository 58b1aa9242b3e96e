"""Blocks that do the same steps have the same pairs: one analysis serves all of them, every one is proven by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from hfq.graph.absorb import Matrix, Norm
from hfq.graph.links import Link, Pair
from hfq.graph.trace import BlockCall, Trace, Value

__all__ = ["moved", "signature"]


def signature(trace: Trace, call: BlockCall) -> tuple[Any, ...]:
    """What a block did, free of its name: equal for two blocks exactly if their steps are wired alike."""
    prefix = call.block.name + "."
    numbers: dict[Value, int] = {}
    for value in call.entries:
        numbers.setdefault(value, len(numbers))
    steps = []
    for node in trace.inside(call):
        leaves = tree_flatten((node.args, node.kwargs))[0]
        wired = tuple(_leaf(leaf, numbers, prefix) for leaf in leaves)
        for value in node.outputs:
            numbers.setdefault(value, len(numbers))
        leaving = tuple(any(user.index >= call.stop for user in value.users) for value in node.outputs)
        shapes = tuple(value.shape for value in node.outputs)
        calls = len(trace.calls.get(node.op, ())) if node.kind != "op" else 0
        steps.append((node.kind, node.op.removeprefix(prefix), wired, shapes, leaving, calls))
    exits = tuple(numbers.get(value, -1) for value in call.exits)
    present = tuple(name for name, p in call.block.module.named_parameters())
    where = tuple(type(a).__name__ for a in call.args), tuple((k, type(v).__name__) for k, v in call.kwargs.items())
    return tuple(steps), exits, present, where


def _leaf(leaf: Any, numbers: dict[Value, int], prefix: str) -> Any:
    if not isinstance(leaf, Value):
        return repr(leaf) if isinstance(leaf, (int, float, str, bool, torch.dtype, type(None))) else type(leaf).__name__
    if leaf.parameter is not None:
        return leaf.parameter[0].removeprefix(prefix), leaf.parameter[1]
    return numbers.get(leaf, ("outside", leaf.shape))


def moved(pair: Pair, model: nn.Module, old: str, new: str) -> Pair:
    """The same pair in the block ``new``, not proven yet."""
    def name(text: str) -> str:
        return text.replace(old + ".", new + ".")

    def part(link_part: Matrix | Norm) -> Matrix | Norm:
        own = name(link_part.name)
        return replace(link_part, name=own, module=model.get_submodule(own))

    def links(found: list[Link]) -> list[Link]:
        return [Link(part(link.part), link.index) for link in found]

    return replace(
        pair, place=new, sources=links(pair.sources), readers=links(pair.readers), partners=links(pair.partners),
        norms=[part(norm) for norm in pair.norms],  # type: ignore[misc]
        blocks=[new if b == old else b for b in pair.blocks],
        reason=name(pair.reason + ".")[:-1], reader_heads=list(pair.reader_heads),
    )
