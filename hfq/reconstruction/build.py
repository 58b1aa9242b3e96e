"""Which maps a block gets, where they start, and the proof in float64 that all of them together leave it as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.func import functional_call

from hfq.calibration.capture import device_of
from hfq.graph.absorb import Matrix, Norm
from hfq.graph.links import Link, Pair
from hfq.graph.proof import TOLERANCE, double_copy, double_precision, relative_error, to_double
from hfq.layers import attention
from hfq.reconstruction.block import separable
from hfq.reconstruction.maps import (
    BlockMap,
    MatrixMap,
    PairMap,
    ScaleMap,
    head_places,
    key_heads,
    rotary_places,
    untied,
)
from hfq.reconstruction.options import Options
from hfq.reconstruction.samples import Samples
from hfq.reconstruction.statistics import InputStatistics, input_statistics
from hfq.transforms.affine import LEAST, Diagonal, MaskedMatrix, RotaryBlocks
from hfq.transforms.scale import classes_of, column_maxima, smoothing

if TYPE_CHECKING:
    from hfq.reconstruction.block_transform import BlockTransform

__all__ = ["maps", "prove"]

_OPTION = {"norm": "norm", "vo": "value", "qk": "query", "updown": "product", "direct": "product", "gate": "gate"}
# Where the entries of a matrix start at most: with the truncation from below, scales alone stay well conditioned.
_MOST = LEAST * 1e5


def maps(
    step: Any, pairs: Sequence[Pair], options: Options, reasons: dict[str, str],
    spec_for: Callable[[str], Any],
) -> list[PairMap]:
    """One map for every proven pair of the block that the options ask for; what is left out goes to ``reasons``."""
    builder = _Builder(step, pairs, options, reasons, spec_for)
    return [made for pair in builder.wanted if (made := builder.map_of(pair)) is not None]


class _Builder:
    def __init__(
        self, step: Any, pairs: Sequence[Pair], options: Options, reasons: dict[str, str],
        spec_for: Callable[[str], Any],
    ) -> None:
        self.options, self.reasons, self.pairs = options, reasons, [p for p in pairs if p.place == step.block.name]
        self.packed = {site.name for site in step.block.sites if spec_for(site.name) is not None
                       and site.kind in ("linear", "transposed")}
        self.wanted: list[Pair] = []
        for pair in self.pairs:
            if getattr(options, _OPTION.get(pair.kind, ""), "off") == "off":
                continue
            if pair.proven:
                self.wanted.append(pair)
            else:
                reasons[_label(pair)] = pair.reason
        self.statistics: dict[str, InputStatistics] = {}
        if options.alpha is not None or options.shift:
            order = {site.name: number for number, site in enumerate(step.block.sites)}
            self.order = order
            leads = {lead.name: lead.part.module for pair in self.wanted if (lead := self.lead(pair)) is not None}
            self.statistics = input_statistics(step, leads)

    def lead(self, pair: Pair) -> Link | None:
        """The reader whose weight and input decide where a map starts: the query, or up, or the first one."""
        called = [link for link in pair.readers if isinstance(link.part, Matrix) and link.tensor == "weight"]
        roles = [link.name for other in self.pairs if other.kind in ("qk", "updown") for link in other.sources]
        chosen = [link for link in called if link.name in roles]
        return min(chosen or called, key=lambda link: self.order.get(link.name, len(self.order)), default=None)

    def start(self, pair: Pair) -> torch.Tensor:
        """Starting scales ``[classes]``."""
        lead, options = self.lead(pair), self.options
        device = device_of(next(link for link in (*pair.readers, *pair.sources)).part.module)
        if options.alpha is None or lead is None or lead.name not in self.statistics or pair.kind in ("qk", "gate"):
            return torch.ones(pair.classes, device=device)
        largest = self.statistics[lead.name].largest.double().to(device)
        act = classes_of(lead, largest, pair.classes, options.heads)
        weight = classes_of(lead, column_maxima(lead), pair.classes, options.heads)
        return smoothing(act, weight, options.alpha).clamp(LEAST, _MOST).float()

    def shift(self, pair: Pair) -> torch.Tensor | None:
        """Starting shift ``[classes]``, or ``None`` where there cannot be one."""
        if not self.options.shift or pair.kind not in ("norm", "vo"):
            return None
        takers = [link for link in (*pair.readers, *pair.sources) if isinstance(link.part, Matrix)]
        for link in takers:
            part = link.part
            assert isinstance(part, Matrix)
            fresh = link.tensor == "weight" and isinstance(part.module, nn.Linear) and link.name in self.packed
            if part.bias_tensor is None and not fresh:
                self.reasons[f"shift of {_label(pair)}"] = f"{link.name} stays float and has no bias to take it"
                return None
        lead = self.lead(pair)
        norms = [p for p in self.pairs if p.kind == "norm"]
        biased = bool(norms) and all(getattr(p.sources[0].part, "bias", None) is not None for p in norms)
        if lead is None or not biased or self.options.start_shift == "zero" or lead.name not in self.statistics:
            return torch.zeros(pair.classes, device=device_of(takers[0].part.module))
        middle = self.statistics[lead.name].middle.to(device_of(lead.part.module))
        return classes_of(lead, middle, pair.classes, "mean")

    def map_of(self, pair: Pair) -> PairMap | None:
        place = getattr(self.options, _OPTION[pair.kind])
        if pair.kind == "qk":
            return self._query(pair, place)
        start, shift = self.start(pair), self.shift(pair)
        if place == "vector":
            return ScaleMap(pair, Diagonal(start), shift)
        if pair.kind == "norm":
            whole = torch.arange(pair.classes)
            odd = [link.name for link in pair.readers if not torch.equal(link.index.cpu(), whole)]
            if odd or not isinstance(pair.sources[0].part, Norm):
                self.reasons[_label(pair)] = f"{odd} read other channels than all in order: scales instead of a matrix"
                return ScaleMap(pair, Diagonal(start), shift)
            return MatrixMap(pair, MaskedMatrix(start[None], self.options.factor), shift)
        if not pair.rotates or pair.heads is None:
            self.reasons[_label(pair)] = "its heads cannot be mixed: scales instead of a matrix"
            return ScaleMap(pair, Diagonal(start), shift)
        index = pair.sources[0].index[pair.heads].to(start.device)
        return BlockMap(pair, MaskedMatrix(start[index], self.options.factor), head_places(pair), shift)

    def _query(self, pair: Pair, place: str) -> PairMap | None:
        options, rotated = self.options, _rotated(pair)
        device = device_of(pair.sources[0].part.module)
        if place == "vector" and (options.rotary == "safe" or not rotated):
            return ScaleMap(pair, Diagonal(torch.ones(pair.classes, device=device)))
        if place == "matrix" and options.rotary == "safe" and rotated:
            found = rotary_places(pair)
            if isinstance(found, str):
                self.reasons[_label(pair)] = found
                return None
            places, count = found
            return BlockMap(pair, RotaryBlocks(torch.ones(count, device=device), options.factor), places)
        size = next((p.heads.shape[1] for p in self.pairs if p.kind == "vo" and p.heads is not None), None)
        if size is None:
            self.reasons[_label(pair)] = "the size of a head is not known"
            return None
        if place == "vector":
            free = untied(pair, size)
            if isinstance(free, str):
                self.reasons[_label(pair)] = free
                return None
            made: PairMap = ScaleMap(free, Diagonal(torch.ones(free.classes, device=device)))
        else:
            heads = key_heads(pair, size)
            if isinstance(heads, str):
                self.reasons[_label(pair)] = heads
                return None
            banks = len(heads[id(pair.partners[0])][0])
            made = BlockMap(pair, MaskedMatrix(torch.ones(banks, size, device=device), options.factor), heads)
        made.exact = not rotated
        return made


def _rotated(pair: Pair) -> bool:
    """Whether channels of one key share a class: a rotary embedding mixes them."""
    index = pair.partners[0].index
    used = index[index >= 0]
    return len(torch.unique(used)) < len(used)


def _label(pair: Pair) -> str:
    return f"{pair.kind} {pair.members[0] if pair.members else pair.place}"


# -- proof -----------------------------------------------------------------------------------------------------------
def prove(transform: BlockTransform, step: Any, generator: torch.Generator) -> None:
    """Random maps on all pairs must leave the float64 block as it is; what does not is taken out, with its reason."""
    exact = [one for one in transform.maps if one.exact]
    for one in transform.maps:
        if not one.exact:
            transform.reasons[_label(one.pair)] = "free under rotary embeddings: not equivalent to the model"
    if not exact or not len(step.inputs):
        return
    trial = _Trial(transform, step, generator)
    if trial.error(exact) <= TOLERANCE:
        return
    for one in exact:
        if trial.error([one]) <= TOLERANCE:
            continue
        label, shifted = _label(one.pair), one.shift is not None
        transform.drop_shift(one)
        error = trial.error([one])
        if shifted and error <= TOLERANCE:
            transform.reasons[f"shift of {label}"] = "a random shift changes the block's output"
            continue
        transform.reasons[label] = f"a random map changes the block's output by {error:.1e}"
        transform.drop(one)


class _Trial:
    """A float64 copy of the block with the arguments of one sample."""

    def __init__(self, transform: BlockTransform, step: Any, generator: torch.Generator) -> None:
        self.transform, self.generator = transform, generator
        module = step.block.module
        whole = not separable(step, device_of(module))
        samples = Samples(step.inputs, [step.hidden(0)], whole=whole, device=device_of(module), distributed=False)
        self.args, self.kwargs = to_double(samples.parts([0], 0)[0].call)
        self.module = double_copy(module)
        with attention.without(self.module), double_precision():
            self.expected = self.module(*to_double(self.args), **to_double(self.kwargs))

    def error(self, chosen: Sequence[PairMap]) -> float:
        """Largest relative change of the output with random values in ``chosen`` and identities elsewhere."""
        transform = self.transform
        with transform.set_aside(), torch.no_grad():
            for one in transform.maps:
                _randomise(one, self.generator if one in chosen else None)
            values: Mapping[str, torch.Tensor] = transform(torch.float64, quantized=False)
        known = {name for name, _ in self.module.named_parameters()}
        values = {name: value for name, value in values.items() if name in known}
        with attention.without(self.module), double_precision():
            found = functional_call(self.module, dict(values), to_double(self.args), to_double(self.kwargs))
        return relative_error(found, self.expected)


def _randomise(one: PairMap, generator: torch.Generator | None) -> None:
    """Random values far from the identity; without a generator the identity itself."""
    def draw(like: torch.Tensor, spread: float) -> torch.Tensor:
        if generator is None:
            return torch.zeros_like(like)
        return (spread * torch.randn(like.shape, generator=generator)).to(like)

    learned = one.map
    if isinstance(learned, Diagonal):
        learned.scale.copy_(draw(learned.scale, 0.4).exp())
    elif isinstance(learned, RotaryBlocks):
        learned.a.copy_(draw(learned.a, 0.4).exp())
        learned.b.copy_(draw(learned.b, 0.5 / max(learned.factor, 1e-9)))
        learned.open(1, 2)
    elif isinstance(learned, MaskedMatrix):
        diagonal = draw(learned.raw[..., 0], 0.4).exp()
        off = draw(learned.raw, 0.5 / learned.size**0.5 / learned.factor) if learned.factor else 0.0
        learned.open(1, 2)
        learned.raw.copy_(torch.diag_embed(diagonal))
        learned.raw.add_(off * (1 - torch.eye(learned.size, device=learned.raw.device)))
    if one.shift is not None:
        one.shift.copy_(draw(one.shift, 0.5))
