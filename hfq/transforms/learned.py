"""Which rotations and scales a model allows, made into a :class:`TransformSet` from its proven pairs.

Sites: the residual stream of every stack, the values of every key-value head, scales after the norms of a rotated
stream, between value and output, query and key, up and down projections, and Hadamard transforms in front of what
writes the stream. What was asked for and cannot be proven is left out, and said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hfq.errors import QuantizationError
from hfq.graph.absorb import Matrix, Norm
from hfq.graph.links import Link, Pair, apply_fold
from hfq.graph.pairs import PairReport
from hfq.graph.read import Plan, Site
from hfq.kernels import hadamard
from hfq.layers.online import Hadamard
from hfq.report import Report
from hfq.transforms import init
from hfq.transforms.fold import check_plan, folds_of
from hfq.transforms.sites import Edit, Rotation, Scale, Stream, TransformSet

__all__ = ["Sites", "build", "head_groups"]

Placement = Callable[[nn.Module], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Sites:
    """Which transforms to make.

    Attributes:
        stream, heads: rotations of the residual streams, and of the values of each key-value head.
        norms, values, hidden: scales after the stream's norms, between value and output, between up and down.
        gates: scales between gate and up, through the SiLU between them.
        queries: scales between query and key: "tied" (one for both members of a rotary pair), "free" (one a channel;
            with rotary embeddings that is not the same function), "none".
        online: Hadamard transforms in front of "down" (what writes the stream behind the feed-forward part), "all"
            (everything that writes the stream) or "none".
        start: where rotations start, see :func:`hfq.transforms.init.start`.
    """

    stream: bool = True
    heads: bool = True
    norms: bool = True
    values: bool = True
    hidden: bool = True
    gates: bool = False
    queries: str = "tied"
    online: str = "down"
    start: str = "womi"


def build(
    model: nn.Module,
    plan: Plan,
    pairs: PairReport,
    sites: Sites,
    *,
    generator: torch.Generator | None = None,
    gates: Sequence[Pair] = (),
    placement: Placement | None = None,
    report: Report | None = None,
) -> TransformSet:
    """Fold the norms of the streams that will be rotated (in place, float64) and make the transforms.

    The transforms change nothing yet: merge them with the set's ``forward``, or write them with ``apply_``.

    Args:
        model, plan, pairs: the model, its traced plan and the pairs that ``graph.pairs.discover`` proved.
        generator: of the random starts.
        gates: what ``graph.gates.discover_gates`` found, for ``sites.gates``.
        placement: makes a block's weights available (offloaded models).
        report: gets a note for every kind of transform that had to be left out.

    Raises:
        QuantizationError: the plan belongs to another model, or an option is unknown.
    """
    check_plan(model, plan)
    if sites.queries not in ("tied", "free", "none") or sites.online not in ("down", "all", "none"):
        raise QuantizationError(f"queries={sites.queries!r}: tied, free or none is needed; online={sites.online!r}: "
                                "down, all or none")
    made = _Builder(plan, pairs, sites, generator, placement or (lambda _: nullcontext()), report)
    made.streams()
    made.blocks()
    if sites.gates:
        made.gates(gates)
    made.online()
    return made.set


class _Builder:
    def __init__(
        self, plan: Plan, pairs: PairReport, sites: Sites, generator: torch.Generator | None, placement: Placement,
        report: Report | None,
    ) -> None:
        self.plan, self.pairs, self.sites, self.placement, self.report = plan, pairs, sites, placement, report
        self.generator = generator
        self.set = TransformSet()
        floats = [p.dtype for p in plan.model.parameters() if p.is_floating_point()]
        self.dtype = torch.float64 if floats and all(dtype == torch.float64 for dtype in floats) else torch.float32

    def note(self, what: str, refused: list[Pair]) -> None:
        """One line for each reason, with the number of places that it holds for."""
        reasons: dict[str, list[str]] = {}
        for pair in refused:
            # The same reason in every block is one line.
            reason = (pair.reason or "it was not proven").replace(f"{pair.place}.", "").replace(f" in {pair.place}", "")
            if pair.place not in reasons.setdefault(reason, []):
                reasons[reason].append(pair.place)
        for reason, places in reasons.items():
            where = places[0] + (f" and {len(places) - 1} more" if len(places) > 1 else "")
            if self.report is not None:
                self.report.note(f"no {what} in {where}: {reason}")

    def edit(self, link: Link, axis: int | None = None, **fields: Any) -> None:
        """An edit of a matrix along its input axis (default), or of anything along ``axis``."""
        part = link.part
        assert isinstance(part, Matrix)
        axis = part.input_axis if axis is None else axis
        self.set.edit(part.module, Edit(f"{part.name}.{part.tensor}", axis, **fields))

    def outputs(self, link: Link, **fields: Any) -> None:
        """An edit of a matrix along its output axis, and of its bias."""
        part = link.part
        assert isinstance(part, Matrix)
        self.edit(link, part.output_axis, **fields)
        if part.bias:
            self.set.edit(part.module, Edit(f"{part.name}.{part.bias}", -1, **fields))

    # -- the streams -------------------------------------------------------------------------------------------------
    def streams(self) -> None:
        if not self.sites.stream:
            return
        self.note("rotation of the stream", self.pairs.refused("rotation"))
        for pair in self.pairs.proven("rotation"):
            for name in pair.blocks:
                with self.placement(self.plan.block(name).module):
                    for fold in folds_of(self.pairs, pair, name):
                        apply_fold(fold)
            needs = self.sites.start in ("womi", "klt")
            cov = init.covariance(self._rows(pair)) if needs else None
            start = init.start(self.sites.start, pair.width, cov, self.generator)
            start = init.keep_ones(start) if pair.fix_ones else start
            key = self.set.add(f"stream.{pair.place}", Rotation(start[None], fix_ones=pair.fix_ones, dtype=self.dtype))
            self.set.streams.append(Stream(pair, key, pair.blocks[0], pair.blocks[-1]))
            for link in pair.sources:
                self.outputs(link, site=key, how="turn", stage="stream")
            for link in pair.readers:
                self.edit(link, site=key, how="turn", stage="stream")
            for norm in pair.norms:
                if norm.bias is not None:
                    self.set.edit(norm.module, Edit(f"{norm.name}.{norm.bias}", -1, key, "turn", "stream"))

    def _rows(self, pair: Pair) -> Iterator[torch.Tensor]:
        """The rows of everything that reads the stream: ``[outputs, width]``."""
        for name in pair.blocks:
            with self.placement(self.plan.block(name).module):
                for link in pair.readers:
                    if link.name.startswith(name + "."):
                        part = link.part
                        weight = part.weight.detach()  # type: ignore[union-attr]
                        yield weight.movedim(part.input_axis, -1).reshape(-1, pair.width)  # type: ignore[union-attr]

    # -- inside the blocks -------------------------------------------------------------------------------------------
    def blocks(self) -> None:
        wanted = self.sites
        for block in self.plan.blocks:
            proven = [pair for pair in self.pairs if pair.place == block.name and pair.proven]
            with self.placement(block.module):
                for number, pair in enumerate(proven):
                    name = f"{block.name}.{number}"
                    if pair.kind == "vo":
                        if wanted.values:
                            self._scale(pair, f"values.{name}", "values")
                        if wanted.heads and pair.rotates and pair.heads is not None:
                            self._heads(pair, f"heads.{name}")
                    elif pair.kind == "updown" and wanted.hidden:
                        self._scale(pair, f"hidden.{name}", "hidden")
                    elif pair.kind == "qk" and wanted.queries != "none":
                        self._scale(pair if wanted.queries == "tied" else _untied(pair), f"queries.{name}", "queries")
                    elif pair.kind == "norm" and wanted.norms:
                        self._norm(pair, f"norm.{name}")
        kinds = {"vo": ("scale between value and output", wanted.values or wanted.heads),
                 "updown": ("scale between up and down", wanted.hidden),
                 "qk": ("scale between query and key", wanted.queries != "none"),
                 "norm": ("scale after the norm", wanted.norms)}  # fmt: skip
        for kind, (what, asked) in kinds.items():
            if asked:
                self.note(what, self.pairs.refused(kind))

    def _scale(self, pair: Pair, name: str, stage: str) -> None:
        """Sources (and bias) divided, readers multiplied; partners, which meet the source in a product, multiplied."""
        key = self.set.add(name, Scale(pair.classes, dtype=self.dtype))
        for link in pair.sources:
            self.outputs(link, site=key, how="divide", stage=stage, index=link.index)
        for link in pair.readers:
            self.edit(link, site=key, how="multiply", stage=stage, index=link.index)
        for link in pair.partners:
            self.outputs(link, site=key, how="multiply", stage=stage, index=link.index)

    def gates(self, found: Sequence[Pair]) -> None:
        for number, pair in enumerate(found):
            if pair.proven:
                self._scale(pair, f"gates.{pair.place}.{number}", "gates")
                self.set.activations[pair.activation] = f"gates.{pair.place}.{number}".replace(".", "/")
        self.note("scale between gate and up", [pair for pair in found if not pair.proven])

    def _norm(self, pair: Pair, name: str) -> None:
        link = pair.sources[0]
        norm = link.part
        assert isinstance(norm, Norm)
        key = self.set.add(name, Scale(pair.classes, dtype=self.dtype))
        fields = {"site": key, "how": "divide", "stage": "norm", "index": link.index}
        self.set.edit(norm.module, Edit(f"{norm.name}.{norm.gain}", -1, offset=norm.offset, **fields))  # type: ignore[arg-type]
        if norm.bias is not None:
            self.set.edit(norm.module, Edit(f"{norm.name}.{norm.bias}", -1, **fields))  # type: ignore[arg-type]
        for reader in pair.readers:
            self.edit(reader, site=key, how="multiply", stage="norm", index=reader.index)

    def _heads(self, pair: Pair, name: str) -> None:
        assert pair.heads is not None
        count, size = pair.heads.shape
        owners = [torch.arange(count).repeat_interleave(len(places) // count) for places in pair.reader_heads]
        readers = list(zip(pair.readers, pair.reader_heads, owners, strict=True))
        if any(len(places) % count for places in pair.reader_heads):
            self.note("rotation of the heads", [Pair("vo", pair.place).refuse("its readers use the heads unevenly")])
            return
        starts = []
        for head in range(count):
            cov = None
            if self.sites.start in ("womi", "klt"):
                cov = init.covariance(_columns(link, places[owner == head]) for link, places, owner in readers)
            starts.append(init.start(self.sites.start, size, cov, self.generator))
        key = self.set.add(name, Rotation(torch.stack(starts), dtype=self.dtype))
        for link in pair.sources:
            self.outputs(link, site=key, how="turn", stage="heads", index=pair.heads, owner=torch.arange(count))
        for link, places, owner in readers:
            self.edit(link, site=key, how="turn", stage="heads", index=places, owner=owner)

    # -- online ------------------------------------------------------------------------------------------------------
    def online(self) -> None:
        if self.sites.online == "none":
            return
        for site in _writers(self.plan, self.pairs, everything=self.sites.online == "all"):
            size = site.in_features
            order = size if hadamard.is_order(size) else hadamard.best_block(size)
            if order is None or site.bypassed:
                why = "it is not called" if site.bypassed else "no Hadamard order divides its inputs"
                self.note("online transform", [Pair("online", site.name).refuse(why)])
                continue
            self.set.online[site.name] = Hadamard(size, None if order == size else order)
            axis = 0 if site.kind == "transposed" else 1
            self.set.edit(site.module, Edit(f"{site.name}.weight", axis, "", "mix", "online", order=order))


def head_groups(pairs: PairReport) -> dict[str, int]:
    """Width of a head, for every linear that reads the values of heads lying one behind the other."""
    found = {}
    for pair in pairs.proven("vo"):
        for link, places in zip(pair.readers, pair.reader_heads, strict=False):
            if torch.equal(places.flatten(), torch.arange(len(link.index))):
                found[link.name] = places.shape[1]
    return found


def _columns(link: Link, places: torch.Tensor) -> torch.Tensor:
    """Inputs ``places`` ``[m, d]`` of a matrix as rows ``[outputs * m, d]``."""
    part = link.part
    weight = part.weight.detach().movedim(part.input_axis, -1)  # type: ignore[union-attr]
    return weight[..., places.to(weight.device)].reshape(-1, places.shape[-1])


def _writers(plan: Plan, pairs: PairReport, *, everything: bool) -> list[Site]:
    """Linears whose outputs are added to a stream: all of them, or those that attention does not feed."""
    streams = [pair for pair in pairs if pair.kind == "rotation"]
    names = {link.name for pair in streams for link in pair.sources if isinstance(link.part, Matrix)}
    behind = {link.name for pair in pairs if pair.kind == "vo" for link in pair.readers}
    names |= {link.name for pair in pairs.proven("updown") for link in pair.readers}
    names |= behind if everything else set()
    inside = [site for block in plan.blocks for site in block.sites if site.kind in ("linear", "transposed")]
    return [site for site in inside if site.name in names and (everything or site.name not in behind)]


def _untied(pair: Pair) -> Pair:
    """One scale a key channel. Members of a class are matched by their rank, as heads lie one behind the other."""
    query, key = pair.sources[0], pair.partners[0]
    sizes = torch.bincount(key.index[key.index >= 0], minlength=pair.classes)
    size = int(sizes.max())
    counts = torch.bincount(query.index[query.index >= 0], minlength=pair.classes)
    if bool((sizes != size).any()) or bool((counts % size).any()):
        raise QuantizationError(f"{pair.place}: queries and keys cannot be matched one by one: use queries='tied'")

    def split(index: torch.Tensor) -> torch.Tensor:
        found = torch.full_like(index, -1)
        for group in range(pair.classes):
            members = torch.nonzero(index == group).flatten()
            found[members] = group * size + torch.arange(len(members)) % size
        return found

    free = Pair("qk", pair.place, classes=pair.classes * size, through=pair.through)
    free.sources, free.partners = [Link(query.part, split(query.index))], [Link(key.part, split(key.index))]
    return free
