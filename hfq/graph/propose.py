"""Candidates for pairs inside one block, read off the flow of every norm's and every matrix's output channels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from hfq.graph.absorb import Matrix, Norm
from hfq.graph.flow import Contraction, Flow, Reader
from hfq.graph.links import Link, Pair
from hfq.graph.norms import probe
from hfq.graph.operands import parameter_axes
from hfq.graph.ops import CONTRACTED
from hfq.graph.read import Plan
from hfq.graph.shadow import Classes
from hfq.graph.trace import BlockCall, Node, Trace, Value

__all__ = ["Candidates", "Source", "block_sources", "propose"]


@dataclass(eq=False)
class Source:
    """A matrix that writes channels: every call of it in the block."""

    key: tuple[str, str]
    outputs: list[tuple[Value, int]]
    width: int
    axes: tuple[int, int]
    bias: str | None


@dataclass(eq=False)
class Candidates:
    """The block's pairs that await their proof, and the norms that were probed (a text where one is no norm)."""

    pairs: list[Pair]
    norms: dict[str, Norm | str]


class _Block:
    """One block in a trace, with the names that proposals need."""

    def __init__(self, plan: Plan, trace: Trace, call: BlockCall) -> None:
        self.plan, self.trace, self.call = plan, trace, call
        self.nodes = trace.inside(call)
        self.name = call.block.name
        self.sources = block_sources(plan, trace, call)
        self.flows: dict[tuple[str, str], Flow] = {}

    def flow(self, outputs: Iterable[tuple[Value, int]], width: int, owner: str = "") -> Flow:
        flow = Flow(self.trace, width, owner)
        for value, axis in outputs:
            flow.seed(value, axis)
        return flow.run(self.nodes, self.call.exits)

    def matrix(self, key: tuple[str, str], axes: tuple[int, int], bias: str | None = None) -> Matrix:
        """The matrix that a weight is; a site's weight takes the site's bias along."""
        module = self.plan.model.get_submodule(key[0])
        if key[1] == "weight" and bias is None:
            bias = "bias" if module._parameters.get("bias") is not None else None
        return Matrix(key[0], module, key[1], *axes, bias)

    def link(self, reader: Reader, labels: torch.Tensor) -> Link:
        """``labels`` maps source channels to classes."""
        found = torch.where(reader.channels >= 0, labels[reader.channels.clamp_min(0)], -1)
        return Link(self.matrix((reader.name, reader.tensor), (reader.input_axis, reader.output_axis)), found)

    def repeated(self, readers: Iterable[Reader]) -> str | None:
        """A reader that also reads something else in the same forward pass cannot be scaled."""
        for reader in readers:
            calls = len(self.trace.calls.get(reader.name, ()))
            if calls and calls != reader.count:
                return f"{reader.name} is called {calls} times and reads this tensor {reader.count} times"
        return None


def block_sources(plan: Plan, trace: Trace, call: BlockCall) -> dict[tuple[str, str], Source]:
    """Every matrix product with a parameter inside a call of a block, in execution order."""
    found: dict[tuple[str, str], Source] = {}
    for node in trace.inside(call):
        source = _site_source(node) if node.kind == "site" else _parameter_source(node) if node.kind == "op" else None
        if source is not None:
            known = found.setdefault(source.key, source)
            if known is not source:
                known.outputs += source.outputs
    return found


def _site_source(node: Node) -> Source | None:
    weight = getattr(node.function, "weight", None)
    if weight is None or weight.dim() != 2 or not node.outputs or not node.inputs[0].dtype.is_floating_point:
        return None
    axes = (0, 1) if hasattr(node.function, "nf") else (1, 0)
    return Source((node.op, "weight"), [(node.outputs[0], -1)], node.outputs[0].shape[-1], axes, None)


def _parameter_source(node: Node) -> Source | None:
    """A product of an activation with a parameter outside a site: routers, expert tensors, functional linears."""
    if node.op not in ("mm", "bmm", "matmul", "addmm", "baddbmm", "linear", "_grouped_mm") or not node.outputs:
        return None
    values = [value for value in node.args if isinstance(value, Value)]
    added = values.pop(0) if node.op in ("addmm", "baddbmm") else values.pop() if len(values) > 2 else None
    bias = added.parameter[1] if added is not None and added.parameter else None
    for position, value in enumerate(values[:2]):
        weight = parameter_axes(value)
        if weight is None or len(weight[1]) < 2:
            continue
        summed, kept = (-2, -1) if position == 1 and node.op != "linear" else (-1, -2)
        axes = weight[1][summed], weight[1][kept]
        if axes[0] is not None and axes[1] is not None:
            out = node.outputs[0]
            axis = -1 if position == 1 else -2
            return Source(weight[0], [(out, axis)], out.shape[axis], (axes[0], axes[1]), bias)
    return None


def propose(plan: Plan, trace: Trace, call: BlockCall) -> Candidates:
    """All candidates of a block; those without a reason still have to be proven."""
    block = _Block(plan, trace, call)
    norms, pairs = _norm_pairs(block)
    pairs += _scale_pairs(block)
    pairs += _query_key_pairs(block)
    pairs += _refused(block, pairs)
    return Candidates(pairs, norms)


# -- norm → readers --------------------------------------------------------------------------------------------------
def _norm_pairs(block: _Block) -> tuple[dict[str, Norm | str], list[Pair]]:
    calls: dict[str, list[Node]] = {}
    for node in block.nodes:
        if node.kind == "norm":
            calls.setdefault(node.op, []).append(node)
    probed: dict[str, Norm | str] = {}
    pairs = []
    for name, nodes in calls.items():
        probed[name] = norm = probe(name, block.plan.model.get_submodule(name), nodes[0])
        width = nodes[0].outputs[0].shape[-1]
        pair = Pair("norm", block.name, classes=width)
        part = norm if isinstance(norm, Norm) else Norm(name, block.plan.model.get_submodule(name))
        pair.sources = [Link(part, torch.arange(width))]
        pairs.append(pair)
        if isinstance(norm, str):
            pair.refuse(norm)
            continue
        flow = block.flow([(node.outputs[0], -1) for node in nodes], width)
        pair.readers = [block.link(reader, torch.arange(width)) for reader in flow.readers.values()]
        repeated = block.repeated(flow.readers.values())
        if len(block.trace.calls[name]) != len(nodes):
            pair.refuse(f"{name} is also called outside this call of the block")
        elif len(flow.alive()) != width or repeated:
            pair.refuse(repeated or flow.reason())
        pair.positive = bool(flow.marks.get("positive"))
        biased = all(isinstance(link.part, Matrix) and link.part.bias_tensor is not None for link in pair.readers)
        pair.bias_moves = norm.bias is not None and not flow.altered and biased
    return probed, pairs


# -- matrix → matrix -------------------------------------------------------------------------------------------------
def _scale_pairs(block: _Block) -> list[Pair]:
    pairs = []
    for key, source in block.sources.items():
        flow = block.flows[key] = block.flow(source.outputs, source.width, key[0])
        alive = flow.alive()
        for channels, names in _by_readers(alive, flow):
            readers = [reader for name, reader in flow.readers.items() if name in names]
            pairs.append(_scale_pair(block, source, flow, channels, readers))
    return pairs


def _by_readers(alive: torch.Tensor, flow: Flow) -> list[tuple[torch.Tensor, set[tuple[str, str]]]]:
    """Channels that end in the same readers, in order."""
    if not len(alive):
        return []
    names = list(flow.readers)
    hit = torch.stack([torch.isin(alive, flow.readers[name].channels) for name in names])
    patterns, which = torch.unique(hit, dim=1, return_inverse=True)
    return [(alive[which == i], {n for n, used in zip(names, patterns[:, i].tolist(), strict=True) if used})
            for i in range(patterns.shape[1])]


def _scale_pair(block: _Block, source: Source, flow: Flow, channels: torch.Tensor, readers: list[Reader]) -> Pair:
    labels = torch.full((source.width,), -1)
    labels[channels] = flow.classes.labels(channels)
    own = set(channels.tolist())
    heads = _heads(flow, own)
    positive, product = (bool(flow.marks.get(mark, set()) & own) for mark in ("positive", "product"))
    mixed = any(bool((h >= 0).any()) and own & set(h.flatten().tolist()) for h in flow.heads)
    kind, through = (("vo", "attention") if mixed else ("updown", "product") if product
                     else ("updown", "relu") if positive else ("direct", ""))
    biases = {key[1] for key in flow.biases}
    bias = source.bias or (biases.pop() if len(biases) == 1 else None)
    pair = Pair(kind, block.name, classes=int(labels.max()) + 1, through=through, positive=positive, heads=heads)
    pair.sources = [Link(block.matrix(source.key, source.axes, bias), labels)]
    pair.readers = [block.link(reader, labels) for reader in readers]
    if heads is not None:
        pair.reader_heads = [_reader_heads(reader, heads) for reader in readers]
    repeated = block.repeated(readers)
    calls = len(block.trace.calls.get(source.key[0], ()))
    if repeated or biases:
        pair.refuse(repeated or f"several biases are added to {source.key[0]}")
    elif calls > len(source.outputs):
        pair.refuse(f"{source.key[0]} is also called outside this block")
    return pair


def _heads(flow: Flow, own: set[int]) -> torch.Tensor | None:
    """Sets of channels that attention moves as a whole, if they partition the channels of the pair."""
    rows = [row for found in flow.heads for row in found.tolist() if set(row) <= own]
    unique = list(dict.fromkeys(tuple(row) for row in rows))
    covered = [channel for row in unique for channel in row]
    if not unique or len({len(row) for row in unique}) != 1 or sorted(covered) != sorted(own) or len(unique[0]) < 2:
        return None
    return torch.tensor(unique)


def _reader_heads(reader: Reader, heads: torch.Tensor) -> torch.Tensor:
    """Input positions ``[m, d]`` of a reader, in the order of the channels of each head."""
    places: dict[int, list[int]] = {}
    for position, channel in enumerate(reader.channels.tolist()):
        places.setdefault(channel, []).append(position)
    rows = []
    for row in heads.tolist():
        copies = min(len(places.get(channel, [])) for channel in row)
        rows += [[places[channel][copy] for channel in row] for copy in range(copies)]
    return torch.tensor(rows)


# -- query ↔ key -----------------------------------------------------------------------------------------------------
def _query_key_pairs(block: _Block) -> list[Pair]:
    meetings: dict[tuple[tuple[str, str], tuple[str, str]], list[tuple[Contraction, Contraction]]] = {}
    sides: dict[int, dict[int, tuple[tuple[str, str], Contraction]]] = {}
    for key, flow in block.flows.items():
        for contraction in flow.contractions:
            sides.setdefault(contraction.node.index, {})[contraction.operand] = (key, contraction)
    for operands in sides.values():
        if len(operands) == 2:
            (query, left), (key, right) = operands[0], operands[1]
            meetings.setdefault((query, key), []).append((left, right))
    return [pair for keys, met in meetings.items() if (pair := _query_key(block, *keys, met)) is not None]


def _query_key(
    block: _Block, query: tuple[str, str], key: tuple[str, str], met: list[tuple[Contraction, Contraction]]
) -> Pair | None:
    fused = query == key
    widths = block.sources[query].width, block.sources[key].width
    offset = 0 if fused else widths[0]
    classes = Classes(offset + widths[1])
    for flow, start, width in ((block.flows[query], 0, widths[0]), (block.flows[key], offset, widths[1])):
        for channel in range(width):
            classes.union(start + channel, start + flow.classes.find(channel))
    queries, keys = torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    for left, right in met:
        a, b = _aligned(left.channels, right.channels)
        if bool(((a < 0) != (b < 0)).any()):
            return None  # a channel meets a constant
        a, b = a[a >= 0], b[b >= 0] + offset
        classes.unite(a, b)
        queries, keys = torch.cat((queries, a)), torch.cat((keys, b))
    queries = _members(queries, block.flows[query])
    keys = _members(keys - offset, block.flows[key]) + offset
    only_here = all(_only_contracted(block.flows[k], channels - start, {c[side].node.index for c in met})
                    for k, channels, start, side in ((query, queries, 0, 0), (key, keys, offset, 1)))
    if not only_here or bool(torch.isin(queries, keys).any()):
        return None
    together = torch.cat((queries, keys))
    labels = torch.full((offset + widths[1],), -1)
    labels[together] = classes.labels(together)
    members = {classes.find(int(c)) for c in together}
    if any(classes.find(c) in members and labels[c] < 0 for c in range(len(labels))):
        return None  # a channel of the same class goes elsewhere
    pair = Pair("qk", block.name, classes=int(labels.max()) + 1, through="attention")
    sources = block.sources
    first, second = labels[: widths[0]].clone(), labels[offset:].clone()
    if fused:
        first[keys], second[queries] = -1, -1
    pair.sources = [Link(block.matrix(query, sources[query].axes, sources[query].bias), first)]
    pair.partners = [Link(block.matrix(key, sources[key].axes, sources[key].bias), second)]
    return pair


def _members(channels: torch.Tensor, flow: Flow) -> torch.Tensor:
    """All channels that share a scale with one of ``channels`` (rotary embeddings mix two)."""
    roots = {flow.classes.find(int(channel)) for channel in torch.unique(channels)}
    return torch.tensor([c for c in range(flow.width) if flow.classes.find(c) in roots], dtype=torch.long)


def _aligned(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Channels of query and key at equal places; keys are repeated where several heads share them."""
    if a.dim() == b.dim() and a.dim() >= 2 and a.shape[-2] != b.shape[-2] and a.shape[-2] % b.shape[-2] == 0:
        b = b.repeat_interleave(a.shape[-2] // b.shape[-2], dim=-2)
    a, b = torch.broadcast_tensors(a, b)
    return a.flatten(), b.flatten()


def _only_contracted(flow: Flow, channels: torch.Tensor, nodes: set[int]) -> bool:
    """Whether these channels are used in the given products and nowhere else."""
    for channel in channels.tolist():
        if any(not reason.startswith(CONTRACTED) for reason in flow.dead.get(channel, ())):
            return False
    read = [bool(torch.isin(reader.channels, channels).any()) for reader in flow.readers.values()]
    others = [c.channels for c in flow.contractions if c.node.index not in nodes]
    return not any(read) and not any(bool(torch.isin(other, channels).any()) for other in others)


# -- what looks like a pair and is none ------------------------------------------------------------------------------
def _refused(block: _Block, pairs: list[Pair]) -> list[Pair]:
    """Chains that a reader of the table will look for, with the operation that breaks them."""
    sources = {(pair.kind, link.name, link.tensor) for pair in pairs for link in (*pair.sources, *pair.partners)}
    taken = {(link.name, link.tensor) for pair in pairs if pair.kind in ("updown", "vo", "direct")
             for link in pair.readers}
    found: dict[tuple[str, str, str], Pair] = {}
    for key, flow in block.flows.items():
        for node, reason in flow.deaths:
            if not reason.startswith(("passes through", "normalised")):
                continue
            kind, reached = _reached(block, node)
            if kind == "" or (kind, *key) in sources or reached in taken:
                continue
            pair = Pair(kind, block.name).refuse(reason)
            source = block.sources[key]
            pair.sources = [Link(block.matrix(key, source.axes, source.bias), torch.arange(source.width))]
            if reached in block.sources:
                matrix = block.matrix(reached, block.sources[reached].axes)
                pair.readers = [Link(matrix, torch.arange(matrix.inputs))]
            found.setdefault((kind, *key), pair)
    return list(found.values())


def _reached(block: _Block, start: Node) -> tuple[str, tuple[str, str]]:
    """What the result of ``start`` arrives at first: a matrix ("updown") or attention ("qk", "vo")."""
    known = {*start.outputs, *start.inputs}
    for node in block.nodes[start.index - block.call.start + 1:]:
        tensors = [v for v in node.inputs if v.dtype.is_floating_point and v.shape and v.parameter is None]
        reached = [v for v in tensors if v in known]
        if not reached:
            continue
        if node.op.startswith("_scaled_dot_product"):
            position = next(i for i, v in enumerate(node.args) if isinstance(v, Value) and v in reached)
            return ("qk" if position < 2 else "vo" if position == 2 else ""), ("", "")
        source = _site_source(node) if node.kind == "site" else _parameter_source(node)
        if source is not None and not set(start.inputs) & set(reached):
            return "updown", source.key
        if node.kind == "site" or (node.op.rstrip("_") in ("add", "sub") and len(reached) < len(tensors)):
            continue
        known.update(node.outputs)
    return "", ("", "")
