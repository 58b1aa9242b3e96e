"""Which weights can change together without changing the model: found by data flow, proven in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from hfq.errors import ConfigError, QuantizationError
from hfq.graph.absorb import Matrix, Norm, matrix_of
from hfq.graph.links import Link, Pair, PairReport
from hfq.graph.norms import probe
from hfq.graph.proof import BlockCopy
from hfq.graph.propose import Candidates, propose
from hfq.graph.prove import RERUN_ERRORS, prove_pairs, prove_rotation
from hfq.graph.read import Block, Plan
from hfq.graph.reuse import moved, signature
from hfq.graph.stream import BlockStream, block_stream, taps
from hfq.graph.trace import BlockCall, Trace, evaluating, order_groups

__all__ = ["Link", "Pair", "PairReport", "discover"]

Placement = Callable[[nn.Module], AbstractContextManager[Any]]


def discover(
    plan: Plan,
    call: Callable[[], Any] | Trace,
    *,
    explicit: Sequence[Mapping[str, Any]] = (),
    placement: Placement | None = None,
    seed: int = 0,
) -> PairReport:
    """Find and prove the pairs of every block; also fills in the order and the groups of ``plan``.

    Args:
        plan: of ``graph.read``.
        call: runs one forward pass of the whole model on a small input; or a recorded trace.
        explicit: pairs to check besides those that are found, each ``{"kind": "norm" | "vo" | "updown" | "direct" |
            "qk", "source": name, "readers": [names]}`` with, optionally, ``"rows": [start, stop]`` of the source's
            outputs and ``"positive": True``. A pair with the same kind and source as a found one replaces it.
        placement: makes a block's weights available while it is examined (offloaded models).
        seed: of the random changes.

    Returns:
        Proven pairs and refused ones with their reasons. The model is not changed.

    Raises:
        ConfigError: an explicit pair names something unknown.
        QuantizationError: ``call`` does not run the model.
    """
    trace = order_groups(plan, call)
    examiner = _Examiner(plan, trace, explicit, seed)
    report, streams = PairReport(), {}
    with evaluating(plan.model):
        for block in plan.blocks:
            calls = trace.blocks.get(block.name, [])
            if len(calls) != 1:
                report.pairs.append(Pair("block", block.name).refuse(f"the block ran {len(calls)} times, not once"))
                continue
            with (placement or _stay)(block.module):
                pairs, stream = examiner.examine(calls[0])
            report.pairs += pairs
            streams[block.name] = (stream, calls[0])
    for stack in plan.stacks:
        report.pairs += _stack_rotation(trace, stack, streams)
    _check_explicit(report, explicit)
    return report


def _stay(module: nn.Module) -> AbstractContextManager[Any]:
    return nullcontext()


class _Examiner:
    """Pairs of one block after the other; equal blocks are analysed once."""

    def __init__(self, plan: Plan, trace: Trace, explicit: Sequence[Mapping[str, Any]], seed: int) -> None:
        self.plan, self.trace, self.explicit = plan, trace, explicit
        self.generator = torch.Generator().manual_seed(seed)
        self.shared = _shared_parameters(plan.model)
        self._known: dict[Any, tuple[str, list[Pair], Pair]] = {}

    def propose(self, call: BlockCall) -> tuple[list[Pair], Pair]:
        """Candidates of a block, and its part of the stream's rotation as a pair of its own."""
        key, name = signature(self.trace, call), call.block.name
        if key not in self._known:
            candidates = propose(self.plan, self.trace, call)
            stream = block_stream(self.plan, self.trace, call, candidates.norms)
            self._known[key] = name, candidates.pairs, _rotation_pair(self.plan, stream, candidates)
        old, pairs, rotation = self._known[key]
        model = self.plan.model
        return [moved(pair, model, old, name) for pair in pairs], moved(rotation, model, old, name)

    def examine(self, call: BlockCall) -> tuple[list[Pair], Pair]:
        pairs, rotation = self.propose(call)
        pairs = _with_explicit(self.plan, self.trace, call, pairs, self.explicit)
        missing = [site.name for site in (*call.block.sites, *call.block.kept) if not site.executed]
        if missing:
            names = ", ".join(missing[:3]) + (" and more" if missing[3:] else "")
            reason = f"the traced forward pass did not reach {names}"
            return [pair if pair.reason else pair.refuse(reason) for pair in pairs], rotation.refuse(reason)
        for pair in (*pairs, rotation):
            _refuse_shared(pair, self.shared)
        try:
            copy = BlockCopy(call)
            prove_pairs(pairs, copy, self.generator)
            prove_rotation(rotation, pairs, copy, self.generator)
        except RERUN_ERRORS as error:
            reason = f"{call.block.name} cannot be run again by itself in float64: {type(error).__name__}: {error}"
            for pair in (*pairs, rotation):
                if not pair.reason:
                    pair.refuse(reason)
        return pairs, rotation


# -- rotation of the stream ------------------------------------------------------------------------------------------
def _rotation_pair(plan: Plan, stream: BlockStream, candidates: Candidates) -> Pair:
    pair = Pair("rotation", stream.block.name, width=stream.width, fix_ones=stream.centred, blocks=[stream.block.name])
    whole = torch.arange(stream.width)
    for reader in stream.readers:
        module = plan.model.get_submodule(reader.name)
        matrix = Matrix(reader.name, module, reader.tensor, reader.input_axis, reader.output_axis)
        pair.readers.append(Link(matrix, whole))
    for writer in stream.writers:
        module = plan.model.get_submodule(writer.key[0])
        bias = writer.bias or ("bias" if module._parameters.get("bias") is not None else None)
        pair.sources.append(Link(Matrix(writer.key[0], module, writer.key[1], *writer.axes, bias), whole))
    pair.norms = [norm for name in stream.norms if isinstance(norm := candidates.norms.get(name), Norm)]
    pair.reason = stream.reason
    return pair


def _stack_rotation(trace: Trace, stack: list[Block], found: Mapping[str, tuple[Pair, BlockCall]]) -> list[Pair]:
    """One pair for a whole stack from the pairs of its blocks."""
    parts = [found[block.name] for block in stack if block.name in found]
    place = stack[0].name.rpartition(".")[0] or stack[0].name
    pair = Pair("rotation", place, blocks=[block.name for block in stack])
    if not parts:
        return [pair.refuse("no block of the stack ran exactly once")]
    for part, _ in parts:
        pair.sources += part.sources
        pair.readers += part.readers
        pair.norms += part.norms
    pair.width = parts[0][0].width
    pair.fix_ones = any(part.fix_ones for part, _ in parts)
    reasons = [part.reason for part, _ in parts if not part.proven]
    if len(parts) != len(stack):
        reasons.append("a block of the stack did not run exactly once")
    if any(part.width != pair.width for part, _ in parts):
        reasons.append("the blocks of the stack differ in width")
    if not reasons:
        reasons = [reason] if (reason := taps(trace, [call for _, call in parts])) else []
    if reasons:
        return [pair.refuse(reasons[0])]
    pair.proven, pair.error = True, max(part.error or 0.0 for part, _ in parts)
    return [pair]


# -- parameters that belong to several modules -----------------------------------------------------------------------
def _shared_parameters(model: nn.Module) -> set[int]:
    seen: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                seen[id(parameter)] = seen.get(id(parameter), 0) + 1
    return {key for key, count in seen.items() if count > 1}


def _refuse_shared(pair: Pair, shared: set[int]) -> None:
    for link in (*pair.sources, *pair.readers, *pair.partners):
        own = link.part.module._parameters.get(link.tensor)
        if own is not None and id(own) in shared and not pair.reason:
            pair.refuse(f"the weight of {link.name} belongs to another module too")


# -- pairs named by the user -----------------------------------------------------------------------------------------
_FIELDS = {"kind", "source", "readers", "rows", "positive"}


def _check_explicit(report: PairReport, explicit: Iterable[Mapping[str, Any]]) -> None:
    for wanted in explicit:
        if report.find(wanted["kind"], wanted["source"]) is None:
            raise ConfigError(f"explicit pair {dict(wanted)}: {wanted['source']!r} lies in no block that ran")


def _with_explicit(
    plan: Plan, trace: Trace, call: BlockCall, pairs: list[Pair], explicit: Sequence[Mapping[str, Any]]
) -> list[Pair]:
    for wanted in explicit:
        unknown = set(wanted) - _FIELDS
        if unknown or not {"kind", "source", "readers"} <= set(wanted):
            raise ConfigError(f"explicit pair {dict(wanted)}: needs kind, source, readers; may have rows, positive")
        if not str(wanted["source"]).startswith(call.block.name + "."):
            continue
        pair = _explicit_pair(plan, trace, call, wanted)
        same = [i for i, p in enumerate(pairs) if p.kind == pair.kind and p.sources[0].name == wanted["source"]
                and p.sources[0].rows == pair.sources[0].rows]
        for index in reversed(same):
            del pairs[index]
        pairs.insert(same[0] if same else len(pairs), pair)
    return pairs


def _explicit_pair(plan: Plan, trace: Trace, call: BlockCall, wanted: Mapping[str, Any]) -> Pair:
    kind, source = wanted["kind"], str(wanted["source"])
    if kind not in ("norm", "vo", "updown", "direct", "qk"):
        raise ConfigError(f"explicit pair {dict(wanted)}: kind must be norm, vo, updown, direct or qk")
    try:
        others = [matrix_of(plan.site(name)) for name in wanted["readers"]]
        part: Matrix | Norm | str = _norm_of(plan, trace, source) if kind == "norm" else matrix_of(plan.site(source))
    except (AttributeError, QuantizationError) as error:
        raise ConfigError(f"explicit pair {dict(wanted)}: {error}") from error
    if isinstance(part, str):
        raise ConfigError(f"explicit pair {dict(wanted)}: {source} cannot be folded: {part}")
    size = part.outputs if isinstance(part, Matrix) else len(part.get_gain())
    start, stop = wanted.get("rows", (0, size))
    count = stop - start
    if not 0 <= start < stop <= size or any((m.outputs if kind == "qk" else m.inputs) != count for m in others):
        raise ConfigError(f"explicit pair {dict(wanted)}: {count} channels of the source do not fit the readers")
    index = torch.full((size,), -1)
    index[start:stop] = torch.arange(count)
    links = [Link(matrix, torch.arange(count)) for matrix in others]
    pair = Pair(kind, call.block.name, sources=[Link(part, index)], classes=count)
    pair.positive = bool(wanted.get("positive"))
    if kind == "qk":
        pair.partners = links
    else:
        pair.readers = links
    return pair


def _norm_of(plan: Plan, trace: Trace, name: str) -> Norm | str:
    nodes = trace.calls.get(name)
    if not nodes:
        raise QuantizationError(f"{name} is no norm that ran")
    return probe(name, plan.model.get_submodule(name), nodes[0])
