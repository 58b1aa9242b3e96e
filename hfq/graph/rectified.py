"""Which sites have a ReLU, and nothing else, behind them: by the data flow of one traced pass."""

from __future__ import annotations

from hfq.graph.read import Plan
from hfq.graph.trace import SAME, Trace, Value

__all__ = ["before_relu"]

_RELU = {"relu", "relu_"}


def before_relu(plan: Plan, trace: Trace) -> set[str]:
    """Names of the sites that run once and whose output is read by a ReLU alone."""
    names = {site.name for site in plan.every_site}
    found = set()
    for name, calls in trace.calls.items():
        if name in names and len(calls) == 1 and len(calls[0].outputs) == 1:
            value = calls[0].outputs[0]
            if value not in trace.exits and _only_relu(value):
                found.add(name)
    return found


def _only_relu(value: Value) -> bool:
    if not value.users:
        return False
    for node in value.users:
        if node.kind == "op" and node.op in SAME:
            if not all(_only_relu(out) for out in node.outputs):
                return False
        elif node.kind != "op" or node.op not in _RELU:
            return False
    return True
