"""One traced forward pass: which tensor every site, norm and operation reads and writes.

Operations are recorded below autograd (``TorchDispatchMode``), where there are few of them and every spelling of a
product or an addition is the same operation. Sites and norms are recorded as one node each. No activation is kept,
only shapes, integer tensors (they are indices) and the arguments of the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from hfq.errors import QuantizationError
from hfq.graph.read import Block, Plan, Site, is_norm

__all__ = ["BlockCall", "Node", "Trace", "Value", "evaluating", "order_groups", "record", "root"]

# Operations whose result holds the same numbers as their input: two sites that read them read the same tensor.
SAME = {"view", "_unsafe_view", "reshape", "alias", "detach", "clone", "_to_copy", "contiguous", "lift_fresh",
        "unsqueeze", "squeeze", "expand"}


@dataclass(eq=False)
class Value:
    """A tensor of the traced pass. ``data`` is kept for integer and boolean tensors only."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    node: Node | None = None
    parameter: tuple[str, str] | None = None
    data: torch.Tensor | None = None
    users: list[Node] = field(default_factory=list)


@dataclass(eq=False)
class Node:
    """One step: an operation ("op"), a call of a site ("site") or of a norm ("norm").

    ``op`` is the name of the operation or of the module; ``args`` and ``kwargs`` hold a ``Value`` in place of a tensor.
    """

    index: int
    kind: str
    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[Value]
    outputs: list[Value]
    module: str
    function: Callable[..., Any] | None = None
    recorded: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def __repr__(self) -> str:
        return f"{self.index}:{self.op}@{self.module}"


@dataclass(eq=False)
class BlockCall:
    """One call of a block: nodes ``[start, stop)``, the values that enter and leave, and the arguments themselves."""

    block: Block
    start: int
    stop: int
    entries: list[Value]
    exits: list[Value]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(eq=False)
class Trace:
    """Everything that one forward pass did, in order."""

    nodes: list[Node] = field(default_factory=list)
    blocks: dict[str, list[BlockCall]] = field(default_factory=dict)
    reads: dict[str, list[Value]] = field(default_factory=dict)
    calls: dict[str, list[Node]] = field(default_factory=dict)
    exits: list[Value] = field(default_factory=list)

    def inside(self, call: BlockCall) -> list[Node]:
        return self.nodes[call.start:call.stop]


def root(value: Value) -> Value:
    """The value whose numbers ``value`` holds, through reshapes and casts."""
    while value.node is not None and value.node.kind == "op" and value.node.op in SAME and value.node.inputs:
        value = value.node.inputs[0]
    return value


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, restored afterwards module by module."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def record(plan: Plan, call: Callable[[], Any]) -> Trace:
    """Run ``call`` once in evaluation mode without gradients and record what happens in ``plan.model``.

    Raises:
        QuantizationError: ``call`` did not run the model.
    """
    recorder = _Recorder(plan)
    try:
        recorder.attach()
        with evaluating(plan.model), recorder:
            call()
    finally:
        recorder.detach()
    if not recorder.finished:
        raise QuantizationError("the call that was to be traced did not run the model: pass a function that runs "
                                "plan.model once on a small input")
    return recorder.trace


def order_groups(plan: Plan, call: Callable[[], Any] | Trace) -> Trace:
    """Fill in the order of execution and the groups of sites that read the same tensor.

    Args:
        plan: changed in place: ``blocks``, every ``block.sites``, ``block.groups``, ``site.executed``.
        call: runs one forward pass of the whole model; or a trace that was already recorded.

    Returns:
        The trace.
    """
    trace = call if isinstance(call, Trace) else record(plan, call)
    order = {name: position for position, name in enumerate(trace.reads)}
    for site in plan.every_site:
        site.executed = site.name in order
        site.bypassed = site.executed and not trace.reads[site.name]
    for block in plan.blocks:
        block.sites.sort(key=lambda site: order.get(site.name, len(order)))
        groups: dict[int | str, list[Site]] = {}
        for site in block.sites:
            reads = trace.reads.get(site.name)
            groups.setdefault(id(root(reads[0])) if reads else site.name, []).append(site)
        block.groups = list(groups.values())
    first = {name: calls[0].start for name, calls in trace.blocks.items()}
    plan.blocks.sort(key=lambda block: first.get(block.name, len(trace.nodes)))
    return trace


class _Recorder(TorchDispatchMode):
    """Builds a Trace; hooks on every module say where in the model an operation happens."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.trace = Trace()
        self.finished = False
        self._plan = plan
        self._values: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._stack: list[str] = []
        self._modules = dict(plan.model.named_modules())
        self._parameters = {id(p): (name, key) for name, module in self._modules.items()
                            for key, p in module._parameters.items() if p is not None}
        self._blocks = {block.name: block for block in plan.blocks}
        self._sites = {site.name: site for site in plan.every_site}
        self._opaque: list[tuple[str, Any, Any]] = []
        self._open: dict[str, tuple[int, list[Value], Any, Any]] = {}
        self._handles: list[Any] = []

    # -- hooks -------------------------------------------------------------------------------------------------------
    def attach(self) -> None:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_pre_hook(self._enter(name), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave(name), with_kwargs=True, prepend=True))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _is_opaque(self, name: str) -> bool:
        site = self._sites.get(name)
        return site.kind != "experts" if site is not None else is_norm(self._modules[name])

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._stack.append(name)
            if self._opaque:
                return
            if name in self._sites:
                self._note_read(name, args, kwargs)
            if name in self._blocks:
                values = [self.value(t) for t in _tensors((args, kwargs))]
                self._open[name] = (len(self.trace.nodes), values, self._keep(args), self._keep(kwargs))
            if self._is_opaque(name):
                self._opaque.append((name, args, kwargs))
        return hook

    def _keep(self, tree: Any) -> Any:
        self._opaque.append(("", None, None))  # a copy is no step of the model, and no reader of what it copies
        kept = keep(tree)
        self._opaque.pop()
        return kept

    def _note_read(self, name: str, args: Any, kwargs: Any) -> None:
        floating = [t for t in _tensors((args, kwargs)) if t.is_floating_point()] or _tensors((args, kwargs))
        if floating:
            self.trace.reads.setdefault(name, []).append(self.value(floating[0]))

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._stack.pop()
            if self._opaque and self._opaque[-1][0] == name:
                self._opaque.pop()
                self._add_module(name, args, kwargs, output)
            elif self._opaque:
                return
            if name in self._open:
                start, entries, kept_args, kept_kwargs = self._open.pop(name)
                call = BlockCall(self._blocks[name], start, len(self.trace.nodes), entries,
                                 [self.value(t) for t in _tensors(output)], kept_args, kept_kwargs)
                self.trace.blocks.setdefault(name, []).append(call)
            if name == "":
                self.finished = True
                self.trace.exits = [self.value(t) for t in _tensors(output)]
        return hook

    def _add_module(self, name: str, args: Any, kwargs: Any, output: Any) -> None:
        kind = "site" if name in self._sites else "norm"
        node = self._node(kind, name, args, kwargs, self._modules[name])
        if kind == "norm":
            node.recorded = (self._keep(args), self._keep(kwargs))
        self._outputs(node, output)
        self.trace.calls.setdefault(name, []).append(node)

    # -- operations --------------------------------------------------------------------------------------------------
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._opaque or not self._stack:
            return func(*args, **kwargs)
        node = self._node("op", func._schema.name.split("::")[-1], args, kwargs, func)
        if func._schema.is_mutable:
            for value in node.inputs:  # what an integer tensor held before it is written
                value.data = None if value.data is None else value.data.clone()
        output = func(*args, **kwargs)
        if func._schema.is_mutable:
            self._mutate(node, func, args, kwargs)
        self._outputs(node, output)
        return output

    def _mutate(self, node: Node, func: Any, args: Any, kwargs: Any) -> None:
        """Written tensors become new values; other views of the same memory become results of an unknown step."""
        written = [args[i] if i < len(args) else kwargs.get(argument.name)
                   for i, argument in enumerate(func._schema.arguments)
                   if argument.alias_info is not None and argument.alias_info.is_write]
        for tensor in _tensors(written):
            memory = tensor.untyped_storage()._cdata
            for other in list(self._values.keys()):
                if other is not tensor and _memory(other) == memory:
                    stale = self._node("op", "write through an alias", (other, tensor), {}, None)
                    self._outputs(stale, other)
            self._values[tensor] = self._new(tensor, node)
            node.outputs.append(self._values[tensor])

    def _node(self, kind: str, op: str, args: Any, kwargs: Any, function: Any) -> Node:
        mapped = tree_map(self._ref, (tuple(args), dict(kwargs)))
        inputs = [leaf for leaf in tree_flatten(mapped)[0] if isinstance(leaf, Value)]
        module = self._stack[-1] if self._stack else ""
        node = Node(len(self.trace.nodes), kind, op, mapped[0], mapped[1], inputs, [], module, function)
        for value in inputs:
            value.users.append(node)
        self.trace.nodes.append(node)
        for value in inputs:
            if value.parameter is not None and value.parameter[0] in self._sites:
                self._note_bypass(value.parameter, inputs)
        return node

    def _note_bypass(self, parameter: tuple[str, str], inputs: list[Value]) -> None:
        """A weight that is read without calling its module was executed all the same."""
        site = self._sites[parameter[0]]
        if parameter[1] in site.tensors and site.name not in self.trace.reads:
            self.trace.reads[site.name] = []

    def _ref(self, leaf: Any) -> Any:
        return self.value(leaf) if isinstance(leaf, torch.Tensor) else leaf

    def _outputs(self, node: Node, output: Any) -> None:
        for tensor in _tensors(output):
            if tensor in self._values and self._values[tensor].node is node:
                continue
            self._values[tensor] = self._new(tensor, node)
            node.outputs.append(self._values[tensor])

    def _new(self, tensor: torch.Tensor, node: Node | None) -> Value:
        plain = not (tensor.is_floating_point() or tensor.is_complex())
        return Value(tuple(tensor.shape), tensor.dtype, node, data=tensor if plain else None)

    def value(self, tensor: torch.Tensor) -> Value:
        """The value of a tensor; parameters are recognised by identity, also those that were just moved here."""
        found = self._values.get(tensor)
        if found is None:
            found = self._new(tensor, None)
            found.parameter = self._parameters.get(id(tensor)) or self._moved_parameter(tensor)
            self._values[tensor] = found
        return found

    def _moved_parameter(self, tensor: torch.Tensor) -> tuple[str, str] | None:
        """Offloading replaces parameters during the pass: look at the modules that are running."""
        for name in reversed(self._stack):
            for key, parameter in self._modules[name]._parameters.items():
                if parameter is tensor:
                    return name, key
        return None


def _memory(tensor: torch.Tensor) -> int | None:
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return None  # sparse and meta-like tensors have no memory to share


def _tensors(tree: Any) -> list[torch.Tensor]:
    """All tensors of a tree of tuples, lists, dicts and dataclass-like outputs."""
    found: list[torch.Tensor] = []
    for leaf in tree_flatten(tree)[0]:
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif isinstance(leaf, dict):
            found += _tensors(dict(leaf))
    return found


def keep(tree: Any) -> Any:
    """A copy of the arguments of a module, to run it again: tensors cloned, caches left out (they remember a run)."""
    def copy(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return leaf.detach().clone()
        return None if _is_cache(leaf) else leaf
    return tree_map(copy, tree, is_leaf=_is_cache)


def _is_cache(leaf: Any) -> bool:
    return callable(getattr(leaf, "update", None)) and not isinstance(leaf, (dict, set))
