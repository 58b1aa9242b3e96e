"""Convolutions that read two tensors put side by side: the halves come from different depths, with other ranges."""

from __future__ import annotations

from hfq.graph.read import Plan
from hfq.graph.trace import Trace, Value, root

__all__ = ["find"]


def find(plan: Plan, trace: Trace) -> dict[str, int]:
    """Name of each convolution whose input is two tensors joined along the channels → channels of the first.

    In a UNet these are the shortcuts behind the skips: what follows a norm reads the norm's output, not the joint. A
    site that is called with joints of several sizes is left out.
    """
    found: dict[str, int] = {}
    for site in plan.sites:
        sizes = {_first(value) for value in trace.reads.get(site.name, ()) if site.kind == "conv"}
        size = next(iter(sizes)) if len(sizes) == 1 else None
        if size is not None:
            found[site.name] = size
    return found


def _first(value: Value) -> int | None:
    """Channels of the first of two tensors that ``value`` joins; ``None`` if it joins none."""
    node = root(value).node
    if node is None or node.kind != "op" or node.op != "cat" or len(node.inputs) != 2:
        return None
    shape = node.inputs[0].shape
    along = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return shape[1] if along % len(shape) == 1 else None
