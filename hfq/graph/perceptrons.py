"""Two linears with an elementwise function between them and nothing else: found by the data flow of a traced pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from hfq.graph.read import Block, Plan
from hfq.graph.trace import SAME, Node, Trace, Value

__all__ = ["Perceptron", "find"]


@dataclass(frozen=True)
class Perceptron:
    """Names of the modules: ``second(activation(first(x)))``."""

    first: str
    activation: str
    second: str


def find(plan: Plan, trace: Trace, block: Block) -> list[Perceptron]:
    """The perceptrons of a block, in order of execution.

    The activation is a module without parameters that treats every element alike; nothing else reads what lies
    between the two linears, and each of the three runs once. Gated forms have a second branch and are none.
    """
    modules, found = dict(plan.model.named_modules()), []
    sites = {site.name for site in (*block.sites, *block.kept) if site.kind == "linear"}
    for name in sites:
        calls = trace.calls.get(name, [])
        if len(calls) != 1 or len(calls[0].outputs) != 1:
            continue
        middle, second = _follow(calls[0].outputs[0], sites, name)
        if second and middle and len(trace.calls[second]) == 1 and _elementwise(modules.get(middle)):
            found.append((calls[0].index, Perceptron(name, middle, second)))
    return [one for _, one in sorted(found, key=lambda pair: pair[0])]


def _follow(value: Value, sites: set[str], start: str) -> tuple[str, str]:
    """The one module that computes on ``value``, and the linear that alone reads the result; empty if there is none."""
    middle, frontier, seen = "", [value], set[int]()
    readers: set[str] = set()
    while frontier:
        for node in frontier.pop().users:
            if node.index in seen:
                continue
            seen.add(node.index)
            owner = _owner(node, sites)
            if owner == "site":
                readers.add(node.op)
            elif owner and (middle in ("", owner)):
                middle = owner
                frontier += node.outputs
            elif node.op in SAME:
                frontier += node.outputs
            else:
                return "", ""
    return (middle, readers.pop()) if len(readers) == 1 and start not in readers else ("", "")


def _owner(node: Node, sites: set[str]) -> str:
    if node.kind == "site":
        return "site" if node.op in sites else ""
    return node.module if node.kind == "op" and node.op not in SAME else ""


@torch.no_grad()
def _elementwise(module: nn.Module | None) -> bool:
    """Whether a module without parameters treats every element of its input alike."""
    if module is None or next(module.parameters(), None) is not None or module.training:
        return False
    x = torch.linspace(-3, 3, 64).reshape(2, 32)
    try:
        whole, single = module(x), torch.cat([module(part.reshape(1, 1)) for part in x.flatten()])
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    return isinstance(whole, torch.Tensor) and whole.shape == x.shape and bool(
        torch.allclose(whole.flatten(), single.flatten(), atol=1e-6))
