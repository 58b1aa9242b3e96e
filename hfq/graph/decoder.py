"""Whether a model is a plain pre-norm decoder, and who plays which part in it: read off one traced forward pass.

No architecture is known by name: attention, gated units and norms are found by data flow, the rotary table by what its
module returns. What was read is then computed again from the parts alone (:mod:`hfq.graph.twin`) and compared with the
model; a model that computes anything else (softcapping, a scaled embedding, parallel blocks, ...) does not pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hfq.errors import QuantizationError
from hfq.graph.absorb import Norm
from hfq.graph.links import Pair
from hfq.graph.norms import probe
from hfq.graph.pairs import PairReport
from hfq.graph.read import Block, Plan, Site
from hfq.graph.rotary import RotaryTable, rotary_table
from hfq.graph.trace import Node, Trace, root

__all__ = ["Decoder", "DecoderBlock", "read_decoder"]

_KNOWN = {"silu": "silu", "relu": "relu"}
_OTHER = ("gelu", "sigmoid", "tanh", "hardswish", "mish", "pow", "square", "leaky_relu", "elu", "softplus")


@dataclass(eq=False)
class DecoderBlock:
    """Names of the parts of a block (qualified); ``gate`` and the norms of query and key may be missing."""

    name: str
    norm1: Norm
    query: str
    key: str
    value: str
    out: str
    norm2: Norm
    up: str
    down: str
    gate: str | None = None
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    heads: int = 0
    groups: int = 0
    size: int = 0
    scaling: float = 1.0
    activation: str = "silu"
    scale: str | None = None  # of the module that is the activation, where it has one of its own


@dataclass(eq=False)
class Decoder:
    """A decoder with an output head.

    Attributes:
        model: the model.
        body: name of the module that holds embedding, blocks and final norm.
        embed: name of the token embedding.
        positions, offset: name of a table of learned positions and the row of position 0.
        stack: name of the container of the blocks.
        blocks: in order.
        norm: before the head.
        head: name of the output head.
        rotary: its table.
        limit: number of positions.
    """

    model: nn.Module
    body: str
    embed: str
    stack: str
    blocks: list[DecoderBlock]
    norm: Norm
    head: str
    rotary: RotaryTable | None = None
    positions: str | None = None
    offset: int = 0
    limit: int = 0
    error: float = float("nan")
    sites: list[str] = field(default_factory=list)


def read_decoder(plan: Plan, trace: Trace, pairs: PairReport, call: Callable[[], Any], limit: int) -> Decoder:
    """Find the parts of the decoder that ``plan.model`` is. Whoever uses it proves it (:func:`hfq.graph.twin.prove`).

    Args:
        plan, trace: of the model, with the trace of one forward pass.
        pairs: of ``graph.pairs.discover`` on them.
        call: runs one forward pass (again: the rotary table is taken from it).
        limit: positions that the model is made for.

    Raises:
        QuantizationError: it is none, or has a part that is not supported; says which.
    """
    model = plan.model
    if len(plan.stacks) != 1:
        raise _no(f"the model has {len(plan.stacks)} stacks of blocks, one is needed")
    blocks = plan.stacks[0]
    made = [_block(plan, trace, pairs, block) for block in blocks]
    stack = blocks[0].name.rpartition(".")[0]
    outside = {site.name: site for site in plan.every_site
               if not any(site.name.startswith(f"{b.name}.") for b in blocks)}
    head = _head(outside, trace, blocks)
    embeddings = [site for site in outside.values() if site.kind == "embedding" and site.executed]
    embed, positions = _embeddings(embeddings, trace)
    others = [name for name, site in outside.items() if site.executed and name not in (head, embed, positions)]
    if others:
        raise _no(f"{others[0]} multiplies activations outside of the blocks")
    norm = _norm_before(plan, trace, trace.reads[head][0])
    if norm is None:
        raise _no(f"{head} does not read a norm")
    names = [embed, stack, norm.name, *([positions] if positions else [])]
    body = _common(names)
    if not body or head.startswith(f"{body}.") or not _holds_all(model, body, names):
        raise _no("no module holds the embedding, the blocks and the final norm and leaves the output head out")
    rotary = rotary_table(model, call, limit)
    if rotary is not None:
        limit = rotary.cos.shape[0]
    offset = 0
    if positions is not None:
        offset = int(getattr(model.get_submodule(positions), "offset", 0))
        limit = min(limit, int(model.get_submodule(positions).num_embeddings) - offset)  # type: ignore[arg-type]
    if rotary is None and positions is None:
        raise _no("neither a rotary embedding nor a table of positions was found")
    return Decoder(model, body, embed, stack, made, norm, head, rotary, positions, offset, limit)


def _no(reason: str) -> QuantizationError:
    return QuantizationError(f"no integer-only decoder can be made of this model: {reason}")


def _common(names: list[str]) -> str:
    parts = [name.split(".")[:-1] for name in names]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


def _holds_all(model: nn.Module, body: str, names: list[str]) -> bool:
    inside = {name for name, _ in model.get_submodule(body).named_modules()}
    return all(name.removeprefix(f"{body}.") in inside for name in names)


def _head(outside: dict[str, Site], trace: Trace, blocks: list[Block]) -> str:
    last = max(call.stop for block in blocks for call in trace.blocks.get(block.name, ()))
    found = [name for name, site in outside.items() if site.kind == "linear"
             and any(node.index >= last for node in trace.calls.get(name, ()))]
    if len(found) != 1:
        raise _no(f"{len(found)} linear layers follow the last block, one output head is needed")
    return found[0]


def _embeddings(found: list[Site], trace: Trace) -> tuple[str, str | None]:
    """The token embedding is called with what the model was given, a table of positions with something computed."""
    if not found:
        raise _no("no token embedding was called")
    if len(found) > 2:
        raise _no(f"{len(found)} embeddings are added")
    order = sorted(found, key=lambda site: trace.calls[site.name][0].index)
    tokens = max(order, key=lambda site: site.module.num_embeddings)  # type: ignore[arg-type, return-value]
    rest = [site.name for site in order if site is not tokens]
    return tokens.name, rest[0] if rest else None


def _norm_before(plan: Plan, trace: Trace, value: Any) -> Norm | None:
    node = root(value).node
    if node is None or node.kind != "norm":
        return None
    norm = probe(node.op, plan.model.get_submodule(node.op), node)
    if isinstance(norm, str):
        raise _no(f"{node.op}: {norm}")
    return norm


# -- one block -------------------------------------------------------------------------------------------------------
def _block(plan: Plan, trace: Trace, pairs: PairReport, block: Block) -> DecoderBlock:
    where = block.name
    calls = trace.blocks.get(where, [])
    if len(calls) != 1:
        raise _no(f"{where} ran {len(calls)} times")
    sites = sorted((*block.sites, *block.kept), key=lambda site: site.name)
    odd = next((site for site in sites if site.kind != "linear"), None)
    if odd is not None:
        raise _no(f"{odd.name} is a {odd.kind} layer: only linear layers are supported in a block")
    nodes = trace.inside(calls[0])
    groups = _groups(trace, [site.name for site in sites])
    shape = [len(group) for group in groups]
    if shape not in ([3, 1, 2, 1], [3, 1, 1, 1]):
        raise _no(f"{where} has groups of {shape} linear layers that read the same input; query, key and value, then "
                  "output, then gate and up (or up alone), then down are needed")
    value = _value(pairs, where, groups)
    query, key = _query_key(pairs, groups[0], value.sources[0].name)
    activation, gate, up = _unit(nodes, groups[2], pairs, where)
    norm1, norm2 = (_norm_before(plan, trace, trace.reads[group[0]][0]) for group in (groups[0], groups[2]))
    if norm1 is None or norm2 is None:
        raise _no(f"{where}: its {'attention' if norm1 is None else 'MLP'} does not read a norm (no pre-norm block)")
    assert value.heads is not None
    size = int(value.heads.shape[1])
    out: Any = plan.model.get_submodule(groups[1][0])
    made = DecoderBlock(
        where, norm1, query, key, value.sources[0].name, groups[1][0], norm2, up, groups[3][0], gate,
        groups=int(value.heads.shape[0]), size=size, activation=activation,
        heads=out.weight.shape[1] // size,
    )
    _head_norms(plan, nodes, made)
    attention = plan.model.get_submodule(query.rpartition(".")[0])
    made.scaling = float(getattr(attention, "scaling", size**-0.5))
    made.scale = _own_scale(plan, nodes, where) if activation == "silu" else None
    return made


def _groups(trace: Trace, names: list[str]) -> list[list[str]]:
    found: dict[int, list[str]] = {}
    for name in sorted(names, key=lambda n: trace.calls[n][0].index if trace.calls.get(n) else -1):
        if len(trace.calls.get(name, ())) != 1 or not trace.reads.get(name):
            raise _no(f"{name} is called {len(trace.calls.get(name, ()))} times")
        found.setdefault(id(root(trace.reads[name][0])), []).append(name)
    return list(found.values())


def _value(pairs: PairReport, where: str, groups: list[list[str]]) -> Pair:
    found = [p for p in pairs.proven("vo", where) if p.heads is not None and p.sources[0].name in groups[0]
             and [link.name for link in p.readers] == groups[1]]
    if len(found) != 1:
        refused = [p.reason for p in pairs.refused("vo", where)]
        raise _no(f"{where}: the way from the values to the output projection was not found"
                  + (f" ({refused[0]})" if refused else ""))
    return found[0]


def _query_key(pairs: PairReport, group: list[str], value: str) -> tuple[str, str]:
    rest = [name for name in group if name != value]
    for pair in pairs:
        if pair.kind == "qk" and pair.sources and {pair.sources[0].name, *(k.name for k in pair.partners)} == set(rest):
            return pair.sources[0].name, pair.partners[0].name
    return rest[0], rest[1]  # with norms in between there is no pair: the order of the calls, which the proof checks


def _unit(nodes: list[Node], group: list[str], pairs: PairReport, where: str) -> tuple[str, str | None, str]:
    """The activation of the MLP with its gate and up."""
    ops = [node.op.rstrip("_") for node in nodes if node.kind == "op"]
    found = [_KNOWN[op] for op in ops if op in _KNOWN]
    other = next((op for op in ops if op in _OTHER and not (op == "sigmoid" and "silu" in _KNOWN and _scaled(nodes))),
                 None)
    if _scaled(nodes):
        found = ["silu"]
    if other is not None or len(set(found)) != 1:
        raise _no(f"{where}: its activation is {other or ', '.join(found) or 'unknown'}; silu and relu are supported")
    if len(group) == 1:
        if found[0] != "relu":
            raise _no(f"{where}: an MLP without gate needs relu, this one has {found[0]}")
        return "relu", None, group[0]
    sources = {pair.sources[0].name: pair for pair in pairs.proven("updown", where)}
    ups = [name for name in group if name in sources and not sources[name].positive]
    if len(ups) != 1:
        raise _no(f"{where}: gate and up of its MLP cannot be told apart")
    return found[0], next(name for name in group if name != ups[0]), ups[0]


def _scaled(nodes: list[Node]) -> bool:
    """A SiLU that was given scales of its own (``x * sigmoid(x / s)``)."""
    return any(n.kind == "op" and n.op == "sigmoid" and n.inputs and n.inputs[0].node is not None
               and n.inputs[0].node.op == "div" for n in nodes)


def _own_scale(plan: Plan, nodes: list[Node], where: str) -> str | None:
    """Name of the activation module if it has a vector of scales."""
    for node in nodes:
        module = plan.model.get_submodule(node.module)
        if node.kind == "op" and node.op == "sigmoid" and isinstance(getattr(module, "scale", None), torch.Tensor):
            return node.module
    return None


def _head_norms(plan: Plan, nodes: list[Node], made: DecoderBlock) -> None:
    for node in nodes:
        if node.kind != "norm" or node.op in (made.norm1.name, made.norm2.name):
            continue
        source = root(node.inputs[0]).node
        name = "" if source is None else source.op
        if name not in (made.query, made.key) or node.outputs[0].shape[-1] != made.size:
            raise _no(f"{node.op} is a norm in another place than before attention, before the MLP, or on the heads of "
                      "query and key")
        norm = probe(node.op, plan.model.get_submodule(node.op), node)
        if isinstance(norm, str):
            raise _no(f"{node.op}: {norm}")
        setattr(made, "query_norm" if name == made.query else "key_norm", norm)
    if (made.query_norm is None) != (made.key_norm is None):
        raise _no(f"{made.name}: only one of query and key has a norm")
