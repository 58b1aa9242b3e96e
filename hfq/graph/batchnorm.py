"""Which batch normalisation reads what convolution, and nothing else does: by the data flow of one traced pass."""

from __future__ import annotations

from torch import nn

from hfq.graph.read import Plan
from hfq.graph.trace import Node, Trace

__all__ = ["after_convolutions"]


def after_convolutions(plan: Plan, trace: Trace) -> dict[str, str]:
    """Name of the normalisation → name of the convolution whose output it alone reads, in order of execution.

    Both run once, so that nothing else depends on the convolution's own output.
    """
    modules = dict(plan.model.named_modules())
    found = {}
    for name, calls in trace.calls.items():
        if not isinstance(modules.get(name), nn.Conv2d) or len(calls) != 1 or len(calls[0].outputs) != 1:
            continue
        value = calls[0].outputs[0]
        readers = {_norm_of(node, modules) for node in value.users}
        norm = readers.pop() if len(readers) == 1 else None
        if norm is None or value in trace.exits or _calls(trace, norm) != 1:
            continue
        if modules[norm].num_features == modules[name].out_channels:
            found[norm] = name
    return found


def _norm_of(node: Node, modules: dict[str, nn.Module]) -> str | None:
    """The batch normalisation that a step is, or belongs to (one without parameters is recorded as its operation)."""
    name = node.op if node.kind == "norm" else node.module if node.kind == "op" else ""
    return name if isinstance(modules.get(name), nn.modules.batchnorm._BatchNorm) else None


def _calls(trace: Trace, norm: str) -> int:
    if norm in trace.calls:
        return len(trace.calls[norm])
    return sum(node.kind == "op" and node.module == norm and "batch_norm" in node.op for node in trace.nodes)
