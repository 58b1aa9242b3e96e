"""What each operation does to the channels of a followed tensor: handlers ``(flow, node)`` by name of the operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

from hfq.graph.operands import CASTS, MOVES, is_zero, parameter_axes, parameter_of
from hfq.graph.shadow import NONE, ZERO, collapse, is_constant, only
from hfq.graph.trace import Node, Value

if TYPE_CHECKING:
    from hfq.graph.flow import Flow

__all__ = ["CONTRACTED", "handler_of"]

CONTRACTED = "multiplied with another activation and summed"

_SHAPE_ONLY = {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones",
               "new_empty", "new_full", "sym_size", "sym_stride", "sym_numel"}
_POSITIVE = {"relu", "leaky_relu", "abs", "threshold", "prelu"}
_PRODUCTS = {"mm", "bmm", "matmul", "addmm", "baddbmm", "linear", "_grouped_mm", "mv", "dot"}


def handler_of(op: str) -> Callable[[Flow, Node], None] | None:
    """The rule for an operation, in place or not; ``None`` for an operation that is not known here."""
    if op.startswith("_scaled_dot_product") or op == "scaled_dot_product_attention":
        return _attention
    return _HANDLERS.get(op) or _HANDLERS.get(op.rstrip("_"))


def where(node: Node) -> str:
    return f" in {node.module}" if node.module else ""


def _replayed(flow: Flow, node: Node, leaf: Any) -> Any:
    if not isinstance(leaf, Value):
        return leaf
    return flow.shadows.get(leaf, leaf.data)


def _move(flow: Flow, node: Node) -> None:
    if node.op in CASTS:
        flow.put(node, flow.shadows[node.inputs[0]])
        return
    if node.op in ("view", "_unsafe_view", "reshape"):  # the memory of the shadow is laid out in another way
        flow.put(node, flow.shadows[node.inputs[0]].reshape(node.outputs[0].shape))
        return
    if node.inputs[0] not in flow.shadows or any(v in flow.shadows for v in node.inputs[1:]):
        flow.stop(node, f"indexes by values through {node.op}")
        return
    args, kwargs = tree_map(lambda leaf: _replayed(flow, node, leaf), (node.args, node.kwargs))
    if node.function is None or any(leaf is None and isinstance(orig, Value) for leaf, orig in
                                    zip(tree_flatten(args)[0], tree_flatten(node.args)[0], strict=True)):
        flow.stop(node, f"moved in an unknown way by {node.op}")
        return
    result = node.function(*args, **kwargs)
    for position, shadow in enumerate(result if isinstance(result, (tuple, list)) else (result,)):
        flow.put(node, shadow, position)


def _pass(flow: Flow, node: Node) -> None:
    flow.put(node, flow.shadows[node.inputs[0]].expand(node.outputs[0].shape))


def _positive(flow: Flow, node: Node) -> None:
    if node.op.rstrip("_") in ("threshold", "prelu") and any(node.args[1:]):
        flow.stop(node, f"passes through {node.op.rstrip('_')}")
        return
    flow.altered = True
    flow.mark("positive", flow.shadows[node.inputs[0]], node)
    _pass(flow, node)


def _multiply(flow: Flow, node: Node) -> None:
    operands = [value for value in node.inputs if value in flow.shadows]
    others = [value for value in node.inputs if value not in flow.shadows]
    divided = node.op.rstrip("_") == "div" and (len(node.args) < 2 or node.args[1] in operands)
    if len(operands) != 1 or divided:
        flow.stop(node, f"multiplied with itself or divided by ({node.op.rstrip('_')})")
        return
    flow.altered = True
    if any(value.shape and value.shape[-1] > 1 for value in others):
        flow.mark("product", flow.shadows[operands[0]], node)
    shape = node.outputs[0].shape
    flow.put(node, _broadcast(flow.shadows[operands[0]], shape))


def _broadcast(shadow: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return shadow.expand(shape)


def _add(flow: Flow, node: Node) -> None:
    tensors = [value for value in node.args[:2] if isinstance(value, Value)]
    shape = node.outputs[0].shape
    live = [flow.shadows[value].expand(shape) for value in tensors if value in flow.shadows]
    rest = [value for value in tensors if value not in flow.shadows]
    if len(live) == 2:
        flow.put(node, flow.join(live[0], live[1], node))
        flow.altered = True
        return
    if rest and is_zero(rest[0]):
        flow.put(node, live[0])
        return
    key = parameter_of(rest[0]) if rest else None
    if key is not None and flow.owner and key[0] == flow.owner:
        flow.biases.add(key)
        flow.put(node, live[0])
        return
    flow.foreign(node, live[0], rest[0] if rest else None)


def _join_tensors(flow: Flow, node: Node) -> None:
    parts = node.args[0]
    shadows = []
    for value in parts:
        shadow = flow.shadows.get(value)
        if shadow is None:
            flow.altered = flow.altered or not is_zero(value)
            shadow = torch.full(value.shape, ZERO if is_zero(value) else NONE, dtype=torch.long)
        shadows.append(shadow)
    assert node.function is not None
    flow.put(node, node.function(shadows, *node.args[1:], **node.kwargs))


def _pad(flow: Flow, node: Node) -> None:
    value = node.args[2] if len(node.args) > 2 else node.kwargs.get("value", 0)
    flow.altered = True
    shadow = torch.nn.functional.pad(flow.shadows[node.inputs[0]], node.args[1], value=ZERO if value == 0 else NONE)
    flow.put(node, shadow)


def _masked_fill(flow: Flow, node: Node) -> None:
    value = node.args[2]
    if node.inputs[0] not in flow.shadows or isinstance(value, Value) or value != 0:
        flow.stop(node, f"overwritten by {node.op.rstrip('_')}")
        return
    flow.altered = True
    _pass(flow, node)


def _where(flow: Flow, node: Node) -> None:
    shape = node.outputs[0].shape
    if node.args[0] in flow.shadows:
        flow.stop(node, "decides a condition")
        return
    shadows = []
    for value in node.args[1:3]:
        if isinstance(value, Value) and value in flow.shadows:
            shadows.append(flow.shadows[value].expand(shape))
        else:
            zero = is_zero(value) if isinstance(value, Value) else value == 0
            shadows.append(torch.full(shape, ZERO if zero else NONE, dtype=torch.long))
    flow.altered = True
    flow.put(node, flow.join(shadows[0], shadows[1], node))


def _reduce(flow: Flow, node: Node) -> None:
    shadow = flow.shadows[node.inputs[0]]
    dims = node.args[1] if len(node.args) > 1 else None
    dims = list(range(shadow.dim())) if dims is None else [dims] if isinstance(dims, int) else list(dims)
    dims = sorted({d % shadow.dim() for d in dims} or range(shadow.dim()))
    if not is_constant(shadow, dims):
        flow.stop(node, f"summed over channels by {node.op}")
        return
    flow.altered = True
    flow.put(node, only(shadow, dims).reshape(node.outputs[0].shape))


def _scan(flow: Flow, node: Node) -> None:
    shadow = flow.shadows[node.inputs[0]]
    if not is_constant(shadow, [node.args[1] % shadow.dim()]):
        flow.stop(node, f"summed over channels by {node.op}")
        return
    flow.altered = True
    flow.put(node, shadow)


def _scatter(flow: Flow, node: Node) -> None:
    """``index_add``, ``index_copy``, ``index_put``: rows of a source written into a tensor of zeros."""
    base, source = node.args[0], node.args[3 if node.op.startswith("index_add") or "copy" in node.op else 2]
    if not isinstance(source, Value) or any(v in flow.shadows for v in node.inputs if v not in (base, source)):
        flow.stop(node, f"indexes by values through {node.op}")
        return
    adds = node.op.startswith("index_add") or (len(node.args) > 3 and node.args[3] is True)
    target = flow.shadows.get(base)
    if target is None:
        target = torch.full(base.shape, ZERO if is_zero(base) else NONE, dtype=torch.long)
    shadow = flow.shadows.get(source)
    if shadow is None:
        shadow = torch.full(source.shape, ZERO if is_zero(source) else NONE, dtype=torch.long)
    written = target.clone()
    places = node.args[1] if "put" in node.op else [node.args[2]]
    indices = [place.data if isinstance(place, Value) else place for place in places]
    if "put" in node.op:
        written.index_put_(tuple(slice(None) if i is None else i for i in indices), shadow)  # type: ignore[arg-type]
    else:
        written.index_copy_(node.args[1], indices[0], shadow)
    flow.altered = True
    flow.put(node, flow.join(target, written, node) if adds else written)


def _product(flow: Flow, node: Node) -> None:
    """Matrix products: a parameter reads channels, attention weights mix rows, or two activations meet."""
    values = [value for value in node.args if isinstance(value, Value)]
    added = values.pop(0) if node.op in ("addmm", "baddbmm") else None
    if node.op == "linear" and len(values) == 3:
        added = values.pop()
    if added is not None and added in flow.shadows:
        flow.stop(node, f"added inside {node.op}")
        return
    left, right = values[:2]
    live = [position for position, value in enumerate((left, right)) if value in flow.shadows]
    # The axis that is summed: the last one on the left; on the right the one before it (but the last for `linear`).
    axes_summed = (-1, -1 if node.op == "linear" or len(right.shape) == 1 else -2)
    if len(live) == 2:  # query and key of a fused projection
        for position in live:
            _contract(flow, node, position, flow.shadows[values[position]], axes_summed[position])
        return
    if not live:
        return
    position = live[0]
    shadow, other, summed = flow.shadows[values[position]], values[1 - position], axes_summed[position]
    weight = parameter_axes(other)
    if weight is not None:
        key, axes = weight
        other_summed, kept = ((-1, -2) if node.op == "linear" else (-2, -1)) if position == 0 else (-1, -2)
        if len(axes) >= 2 and axes[other_summed] is not None and axes[kept] is not None:
            flow.read(node, key, (axes[other_summed], axes[kept]), shadow, summed)  # type: ignore[arg-type]
            return
    if is_constant(shadow, [summed % shadow.dim()]):
        _mix(flow, node, shadow, summed)
        return
    _contract(flow, node, position, shadow, summed)


def _mix(flow: Flow, node: Node, shadow: torch.Tensor, summed: int) -> None:
    """Rows mixed by weights that do not depend on the channel: the channels keep their place."""
    flow.altered = True
    row = only(shadow, [summed % shadow.dim()], keepdim=True)
    _note_heads(flow, collapse(row, (*range(shadow.dim() - 2), -1)) if summed == -2 else None)
    flow.put(node, row.expand(node.outputs[0].shape))


def _note_heads(flow: Flow, channels: torch.Tensor | None) -> None:
    if channels is not None and channels.dim() >= 1:
        flow.heads.append(torch.unique(channels.reshape(-1, channels.shape[-1]), dim=0))


def _contract(flow: Flow, node: Node, position: int, shadow: torch.Tensor, summed: int) -> None:
    axes = [d for d in range(shadow.dim()) if d - shadow.dim() != (-1 if summed == -2 else -2)]
    channels = collapse(shadow, tuple(axes))
    if channels is not None:
        flow.contract(node, position, channels)
    flow.kill(shadow, CONTRACTED + where(node), node)


def _attention(flow: Flow, node: Node) -> None:
    """Fused attention ``(q, k, v, ...)``, each ``[batch, heads, tokens, d]``."""
    query, key, value = node.args[:3]
    for position, operand in enumerate((query, key)):
        if operand in flow.shadows:
            _contract(flow, node, position, flow.shadows[operand], -1)
    others = [leaf for leaf in tree_flatten((node.args[3:], node.kwargs))[0] if isinstance(leaf, Value)]
    if any(leaf in flow.shadows for leaf in others):
        flow.stop(node, "used as an attention mask")
    shadow = flow.shadows.get(value)
    if shadow is None:
        return
    if not is_constant(shadow, [shadow.dim() - 2]):
        flow.kill(shadow, "mixed by attention" + where(node), node)
        return
    row = only(shadow, [shadow.dim() - 2], keepdim=True)
    _note_heads(flow, collapse(row, (*range(1, shadow.dim() - 2), -1)))
    repeats = node.outputs[0].shape[1] // shadow.shape[1] if shadow.dim() == 4 else 1
    if repeats > 1:
        row = row.repeat_interleave(repeats, dim=1)
    flow.altered = True
    flow.put(node, row.expand(node.outputs[0].shape))


def _nothing(flow: Flow, node: Node) -> None:
    flow.altered = True
    _pass(flow, node)


def _bare_norm(flow: Flow, node: Node) -> None:
    flow.bare_norm(node)


def _ignore(flow: Flow, node: Node) -> None:
    """Only the shape of the tensor is used."""


_HANDLERS: dict[str, Callable[[Flow, Node], None]] = {
    **dict.fromkeys(MOVES, _move), **dict.fromkeys(_POSITIVE, _positive), **dict.fromkeys(_PRODUCTS, _product),
    **dict.fromkeys(_SHAPE_ONLY, _ignore),
    **dict.fromkeys(("native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm"), _bare_norm),
    "mul": _multiply, "div": _multiply, "add": _add, "sub": _add, "neg": _nothing, "dropout": _pass,
    "cat": _join_tensors, "stack": _join_tensors, "constant_pad_nd": _pad, "masked_fill": _masked_fill,
    "where": _where, "sum": _reduce, "mean": _reduce, "cumsum": _scan,
    "index_add": _scatter, "index_copy": _scatter, "index_put": _scatter,
}
