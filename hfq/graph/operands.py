"""What an operand is: a parameter (or a part of one), or zeros."""

from __future__ import annotations

from hfq.graph.trace import Value

__all__ = ["CASTS", "MOVES", "is_zero", "parameter_axes", "parameter_of"]

# Each element of the result is one element of the input (or a constant): the operation can be replayed on a shadow.
MOVES = {
    "view", "_unsafe_view", "reshape", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "select", "slice",
    "split", "split_with_sizes", "chunk", "unbind", "narrow", "clone", "detach", "alias", "contiguous", "_to_copy",
    "lift_fresh", "roll", "flip", "index", "index_select", "gather", "repeat", "unfold", "flatten", "movedim",
    "diagonal", "repeat_interleave", "unsafe_split", "unsafe_chunk", "view_as", "expand_as", "to",
}
CASTS = {"_to_copy", "to", "clone", "contiguous", "lift_fresh", "detach", "alias"}
_ZEROS = {"zeros", "zeros_like", "new_zeros", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}


def parameter_of(value: Value) -> tuple[str, str] | None:
    """The parameter that ``value`` is, or is a part of."""
    found = parameter_axes(value)
    return found[0] if found else None


def parameter_axes(value: Value) -> tuple[tuple[str, str], tuple[int | None, ...]] | None:
    """Parameter and, for every axis of ``value``, the axis of the parameter that it runs along (whole, in order)."""
    if value.parameter is not None:
        return value.parameter, tuple(range(len(value.shape)))
    node = value.node
    if node is None or node.kind != "op" or node.op not in MOVES or not node.inputs:
        return None
    below = parameter_axes(node.inputs[0])
    if below is None:
        return None
    key, axes = below
    if node.op in CASTS:
        return key, axes
    # Replay on a small tensor whose entries are coordinates would not survive gathers of whole matrices: by operation.
    rank = len(axes)
    if node.op == "t":
        return key, axes[::-1]
    if node.op == "transpose":
        order = list(range(rank))
        a, b = (d % rank for d in node.args[1:3])
        order[a], order[b] = order[b], order[a]
        return key, tuple(axes[d] for d in order)
    if node.op == "permute":
        return key, tuple(axes[d % rank] for d in node.args[1])
    if node.op == "select":
        dim = node.args[1] % rank
        return key, tuple(a for d, a in enumerate(axes) if d != dim)
    if node.op == "index" and len([i for i in node.args[1] if i is not None]) == 1 and node.args[1][0] is not None:
        return key, (None,) * node.args[1][0].data.dim() + axes[1:] if node.args[1][0].data is not None else ()
    if node.op == "unsqueeze":
        dim = node.args[1] % (rank + 1)
        return key, (*axes[:dim], None, *axes[dim:])
    return None


def is_zero(value: Value) -> bool:
    """Whether a tensor was made of zeros (or not filled yet) and only moved since."""
    node = value.node
    while node is not None and node.kind == "op" and node.op in MOVES and node.inputs:
        node = node.inputs[0].node
    if node is None:
        return False
    if node.op in ("full", "full_like", "new_full"):
        return any(isinstance(a, (int, float)) and a == 0 for a in node.args[1:])
    return node.op in _ZEROS
