"""Pairs through a gated unit: ``silu(gate(x)) * up(x)``, where the activation can take a scale of its own.

With a positive ``s`` a channel, gate's outputs times ``s`` and up's divided by it leave the product as it is once the
activation is ``x * sigmoid(x / s)``. That is no plain change of weights, so these pairs stand apart from
``pairs.discover``: whoever applies one has to replace the activation too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hfq.graph.absorb import Matrix
from hfq.graph.links import Link, Pair, apply_scale
from hfq.graph.proof import TOLERANCE, BlockCopy, relative_error
from hfq.graph.prove import RERUN_ERRORS
from hfq.graph.read import Plan
from hfq.graph.trace import BlockCall, Node, Trace, Value, evaluating, order_groups, root

__all__ = ["discover_gates"]


def discover_gates(plan: Plan, call: Callable[[], Any] | Trace, *, placement: Any = None, seed: int = 0) -> list[Pair]:
    """Find and prove the gated units of every block.

    Args:
        plan: of ``graph.read``; gets its order and groups.
        call: runs one forward pass of the whole model; or a recorded trace.
        placement: makes a block's weights available while it is examined.
        seed: of the random scales.

    Returns:
        Pairs of kind "gate": ``sources`` is up (divided by the scale), ``partners`` is gate (multiplied),
        ``activation`` the name of the module between gate and the product. Refused ones have a reason.
    """
    trace = order_groups(plan, call)
    generator = torch.Generator().manual_seed(seed)
    found = []
    with evaluating(plan.model):
        for block in plan.blocks:
            calls = trace.blocks.get(block.name, [])
            pairs = _propose(plan, trace, calls[0]) if len(calls) == 1 else []
            if any(not pair.reason for pair in pairs):
                if placement is None:
                    _prove(pairs, calls[0], generator)
                else:
                    with placement(block.module):
                        _prove(pairs, calls[0], generator)
            found += pairs
    return found


def _propose(plan: Plan, trace: Trace, call: BlockCall) -> list[Pair]:
    pairs = []
    for node in trace.inside(call):
        if node.kind != "op" or node.op.rstrip("_") != "silu":
            continue
        gate, product = _writer(node.inputs[0]), _only_user(node.outputs[0])
        if gate is None or product is None or product.op.rstrip("_") != "mul":
            continue
        others = [value for value in product.inputs if root(value) is not root(node.outputs[0])]
        up = _writer(others[0]) if len(others) == 1 else None
        if up is None or up is gate:
            continue
        pair = Pair("gate", call.block.name, through="silu", positive=True, activation=node.module)
        for links, site in ((pair.sources, up), (pair.partners, gate)):
            matrix = _matrix(plan, site)
            links.append(Link(matrix, torch.arange(matrix.outputs)))
        pair.classes = pair.sources[0].part.outputs  # type: ignore[union-attr]
        _check(pair, plan, trace, node, gate, up)
        pairs.append(pair)
    return pairs


def _check(pair: Pair, plan: Plan, trace: Trace, node: Node, gate: Node, up: Node) -> None:
    """Refuse what the proof on one input cannot see."""
    inside = [other for other in trace.nodes if other.module == node.module]
    module = plan.model.get_submodule(node.module)
    own = [n for n in trace.calls if n.startswith(node.module + ".")]
    if len(inside) != 1 or own or next(module.parameters(), None) is not None:
        pair.refuse(f"silu is computed inside {node.module}, which does more than that: it cannot take a scale")
    elif any(len(trace.calls.get(site.op, ())) != 1 for site in (gate, up)):
        pair.refuse(f"{gate.op} or {up.op} is called several times")
    elif any(_only_user(site.outputs[0]) is None for site in (gate, up)):
        pair.refuse(f"the output of {gate.op} or of {up.op} is used elsewhere too")


def _matrix(plan: Plan, node: Node) -> Matrix:
    module = plan.model.get_submodule(node.op)
    axes = (0, 1) if hasattr(module, "nf") else (1, 0)
    return Matrix(node.op, module, "weight", *axes, "bias" if module._parameters.get("bias") is not None else None)


def _writer(value: Value) -> Node | None:
    """The linear whose whole output ``value`` is."""
    start = root(value)
    node = start.node
    if node is None or node.kind != "site" or start.shape[-1] != value.shape[-1]:
        return None
    weight = getattr(node.function, "weight", None)
    return node if weight is not None and weight.dim() == 2 and node.inputs[0].dtype.is_floating_point else None


def _only_user(value: Value) -> Node | None:
    """The one step that reads ``value``, through reshapes and casts."""
    while len(value.users) == 1:
        node = value.users[0]
        if node.kind != "op" or not node.outputs or root(node.outputs[0]) is not root(value):
            return node
        value = node.outputs[0]
    return None


def _prove(pairs: list[Pair], call: BlockCall, generator: torch.Generator) -> None:
    try:
        copy = BlockCopy(call)
        for pair in pairs:
            if not pair.reason:
                _prove_one(pair, copy, generator)
    except RERUN_ERRORS as error:
        for pair in pairs:
            if not pair.reason and not pair.proven:
                pair.refuse(f"{call.block.name} cannot be run again in float64: {type(error).__name__}: {error}")


def _prove_one(pair: Pair, copy: BlockCopy, generator: torch.Generator) -> None:
    scale = torch.empty(pair.classes, dtype=torch.float64).uniform_(-0.7, 0.7, generator=generator).exp()

    def scaled(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return args[0] * torch.sigmoid(args[0] * scale.to(args[0].device))

    handle = copy.own(pair.activation).register_forward_hook(scaled)
    try:
        with copy.undone(pair.modules):
            apply_scale(pair, scale, copy.own)  # up * scale, gate / scale
            error = relative_error(copy.run(), copy.reference)
    finally:
        handle.remove()
    if error > TOLERANCE:
        pair.refuse(f"a random scale changes the block's output by {error:.1e}", error)
    else:
        pair.proven, pair.error = True, error
