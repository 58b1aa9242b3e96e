"""From the parts of a float decoder to its integer modules: ranges of keys and values, scales, codes, assembly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hfq.calibration import ranks
from hfq.calibration.capture import device_of
from hfq.errors import QuantizationError
from hfq.formats import QuantSpec
from hfq.formats.dyadic import fit_shared
from hfq.graph import twin
from hfq.graph.absorb import Norm
from hfq.graph.decoder import Decoder, DecoderBlock
from hfq.layers.attached import ScaledSiLU
from hfq.layers.integer import MANTISSA_BITS, IntegerEmbedding, IntegerHead, IntegerMatrix, IntegerNorm
from hfq.layers.integer_block import BlockShape, Grids, IntegerBlock, Numbers, place
from hfq.layers.integer_build import assemble, install
from hfq.layers.integer_decoder import Rotary
from hfq.report import Report, Row

__all__ = ["AttentionRanges", "Packer", "attention_ranges"]

_FLOOR = 1e-5  # of the largest range: a channel that is never used


@dataclass
class AttentionRanges:
    """Largest magnitudes after norms and rotary embedding: query ``[H, D]``, key ``[G, D]``, value ``[G]``."""

    query: Tensor
    key: Tensor
    value: Tensor

    def keep(self, steps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """These ranges and sizes of codes by site, to be kept beside a finished block."""
        return {**{f"range:{name}": tensor for name, tensor in vars(self).items()},
                **{f"step:{name}": tensor for name, tensor in steps.items()}}

    @classmethod
    def kept(cls, tensors: Mapping[str, Tensor]) -> tuple[AttentionRanges, dict[str, Tensor]]:
        """What :meth:`keep` gave."""
        parts: dict[str, dict[str, Tensor]] = {"range": {}, "step": {}}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(":")
            parts[kind][name] = tensor
        return cls(**parts["range"]), parts["step"]


@torch.no_grad()
def attention_ranges(decoder: Decoder, block: DecoderBlock, step: Any) -> AttentionRanges:
    """Measure a block on the inputs of a walk's step, padded rows left out; over all processes."""
    found: dict[str, Tensor] = {}
    device = device_of(step.block.module)
    for i in range(len(step.inputs)):
        hidden, mask = step.hidden(i).to(device), step.mask(i)
        made = twin.attention_inputs(decoder, block, hidden.float())
        for name, tensor in zip(("query", "key", "value"), made, strict=True):
            size = tensor.abs()
            if mask is not None:
                size = size * mask.to(device, torch.bool)[:, None, :, None]
            most = size.amax((0, 2))
            found[name] = most if name not in found else torch.maximum(found[name], most)
    if not found:
        raise QuantizationError(f"{block.name}: no calibration data reached it")
    query, key, value = (ranks.max_(found[name].double().cpu()) for name in ("query", "key", "value"))
    if not all(bool(torch.isfinite(t).all()) for t in (query, key, value)):
        raise QuantizationError(f"{block.name}: its queries, keys or values are not finite on the calibration data")
    return AttentionRanges(query, key, value.amax(-1))


@dataclass
class Packer:
    """Makes the integer modules of a decoder, block after block, and puts them in its place.

    Args:
        decoder: proven.
        numbers: widths.
        spec_for: grid of a matrix by qualified name; its bits are taken, the codes are symmetric with a scale a row.
        steps_for: sizes of a code for a weight ``[N, K]`` and its grid, float ``[N]``.
        alpha: share of the keys' spread over channels that their static steps take (1: every channel its own range).
        report: gets a row for every matrix.
    """

    decoder: Decoder
    numbers: Numbers
    spec_for: Callable[[str], QuantSpec | None]
    steps_for: Callable[[Tensor, QuantSpec], Tensor]
    alpha: float = 1.0
    report: Report | None = None
    blocks: dict[str, IntegerBlock] = field(default_factory=dict)

    @torch.no_grad()
    def block(
        self, block: DecoderBlock, ranges: AttentionRanges, steps: Mapping[str, Tensor] | None = None,
        tokens: int | None = None,
    ) -> IntegerBlock:
        """The integer form of a block as its float weights are now.

        Args:
            ranges: of its attention.
            steps: sizes of a code by qualified name where they were learned.
            tokens: rows of calibration data, for the report.
        """
        roles = self._roles(block)
        shape = BlockShape(block.heads, block.groups, block.size, block.activation,
                           bool(self.decoder.rotary is not None and self.decoder.rotary.interleaved))
        made = IntegerBlock(roles, shape, self.numbers, len(self.blocks))
        made.add_module("hfq_grids", self._grids(block, ranges))
        for role, path in roles.items():
            part = getattr(block, role)
            if isinstance(part, Norm):
                place(made, path, self._norm(part))
                continue
            units = None
            if role == "value":
                units = self._value_units(made.hfq_grids).repeat_interleave(block.size)
            place(made, path, self._matrix(part, IntegerMatrix, (steps or {}).get(part), units, tokens))
        made.check_sizes(block.name)
        self.blocks[block.name.rpartition(".")[2]] = made
        return made

    @torch.no_grad()
    def follow(self, step: Any, block: DecoderBlock) -> None:
        """Give the float weights of a block the values of their codes, so that the blocks after see its error."""
        made = self.blocks[block.name.rpartition(".")[2]]
        for role in made.roles:
            part = made.part(role)
            if isinstance(part, IntegerMatrix):
                value = part.dequantize()
                if role == "value":
                    value *= self._value_units(made.hfq_grids).repeat_interleave(block.size)[:, None]
                weight = self.decoder.model.get_submodule(getattr(block, role)).weight
                weight.copy_(value)  # type: ignore[operator, union-attr]

    def _roles(self, block: DecoderBlock) -> dict[str, str]:
        names = {"norm1": block.norm1.name, "query": block.query, "key": block.key, "value": block.value,
                 "query_norm": block.query_norm and block.query_norm.name,
                 "key_norm": block.key_norm and block.key_norm.name, "out": block.out, "norm2": block.norm2.name,
                 "gate": block.gate, "up": block.up, "down": block.down}
        return {role: name.removeprefix(f"{block.name}.") for role, name in names.items() if name}

    def _norm(self, norm: Norm) -> IntegerNorm:
        bias = norm.get_bias()
        return IntegerNorm.from_float(norm.get_gain().cpu(), None if bias is None else bias.cpu(), norm.centred)

    def _matrix(
        self, name: str, kind: type[IntegerMatrix], steps: Tensor | None = None, units: Tensor | None = None,
        tokens: int | None = None,
    ) -> Any:
        module = self.decoder.model.get_submodule(name)
        weight: Tensor = module.weight.detach()  # type: ignore[assignment, operator, union-attr]
        if not torch.isfinite(weight).all():
            raise QuantizationError(f"{name}: the weight has NaN or infinite elements")
        spec = self.spec_for(name)
        assert spec is not None, name
        steps = self.steps_for(weight.float(), spec) if steps is None else steps
        bias = getattr(module, "bias", None)
        made = kind.from_float(weight, steps.reshape(-1), spec.bits, bias, units)
        made.label = name
        if self.report is not None:
            self._row(name, made, weight, units, spec, tokens)
        return made

    def _row(
        self, name: str, made: IntegerMatrix, weight: Tensor, units: Tensor | None, spec: QuantSpec, tokens: int | None
    ) -> None:
        wrong = total = 0.0
        scale: Tensor
        codes, scale = made.codes(), made.mantissa.detach().double() * 2.0**-made.shift
        scale = scale if units is None else scale * units.double()
        for start in range(0, weight.shape[0], 4096):
            part = slice(start, start + 4096)
            w = weight[part].double().cpu()
            wrong += float((w - codes[part].double() * scale[part, None]).square().sum())
            total += float(w.square().sum())
        stored = sum(p.nbytes for key, p in made.named_parameters() if key != "bias")
        self.report.add(Row(  # type: ignore[union-attr]
            name, kind=made.kind, asked={"bits": spec.bits, "activation_bits": self.numbers.activation_bits},
            bits=8 * stored / weight.numel(), numel=weight.numel(), error=(wrong / total) ** 0.5 if total else 0.0,
            tokens=tokens, kernel="integer",
        ))  # fmt: skip

    def again(self, block: DecoderBlock, module: nn.Module, kept: Mapping[str, Tensor]) -> IntegerBlock:
        """The integer form of a block that an interrupted run had finished: ``module`` as it left it, and what
        :meth:`AttentionRanges.keep` gave. Weights that follow their codes give the same codes; the report has the
        rows already."""
        scaled = [name for name, part in module.named_modules() if isinstance(part, ScaledSiLU)]
        block.scale = f"{block.name}.{scaled[0]}" if scaled else None
        report, self.report = self.report, None
        try:
            return self.block(block, *AttentionRanges.kept(kept))
        finally:
            self.report = report

    # -- static scales of attention ----------------------------------------------------------------------------------
    def _grids(self, block: DecoderBlock, ranges: AttentionRanges) -> Grids:
        top = (1 << (self.numbers.kv_bits - 1)) - 1
        key = ranges.key.clamp_min(float(ranges.key.max()) * _FLOOR + 1e-30)
        share = block.heads // block.groups
        query = ranges.query.view(block.groups, share, block.size).amax(1)
        query = query.clamp_min(float(query.max()) * _FLOOR + 1e-30)
        spread = key**self.alpha / query ** (1 - self.alpha)
        steps = spread * (key / spread).amax(-1, keepdim=True) / top
        inverse, inverse_shift = fit_shared((1 / steps).flatten(), MANTISSA_BITS)
        used = 2.0**inverse_shift / inverse.double()
        step, step_shift = fit_shared(used * block.scaling, MANTISSA_BITS)
        value = ranges.value.clamp_min(float(ranges.value.max()) * _FLOOR + 1e-30) / top
        unit, unit_shift = fit_shared(value, MANTISSA_BITS, up=True)
        gated = None
        if block.scale is not None:
            part: Any = self.decoder.model.get_submodule(block.scale)
            gated = fit_shared(1 / part.scale.double().cpu(), MANTISSA_BITS)
        shifts = (step_shift, inverse_shift, unit_shift, 0 if gated is None else gated[1])
        grids = Grids(step.numel(), block.groups, 0 if gated is None else gated[0].numel(), shifts)
        for name, values in zip(Grids.names, (step, inverse, unit, gated and gated[0]), strict=True):
            if values is not None:
                grids.put(name, values.to(torch.int16))
        return grids

    @staticmethod
    def _value_units(grids: Any) -> Tensor:
        return grids.value_step.double() * 2.0 ** -grids.shifts[2]

    # -- the whole ---------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def finish(self, tokens: int | None = None) -> None:
        """Quantize what lies outside the blocks, and put the integer decoder and head into the model.

        Raises:
            QuantizationError: a block is missing.
        """
        decoder = self.decoder
        if len(self.blocks) != len(decoder.blocks):
            raise QuantizationError(f"{len(self.blocks)} of {len(decoder.blocks)} blocks were made")

        def below(name: str) -> str:
            return name.removeprefix(f"{decoder.body}.")

        names = {"embed": below(decoder.embed), "norm": below(decoder.norm.name), "stack": below(decoder.stack)}
        outer: dict[str, Any] = {"embed": self._matrix(decoder.embed, IntegerEmbedding),
                                 "norm": self._norm(decoder.norm)}
        if decoder.positions is not None:
            names["positions"] = below(decoder.positions)
            outer["positions"] = self._matrix(decoder.positions, IntegerEmbedding)
        model = decoder.model
        dtype = model.get_submodule(decoder.head).weight.dtype  # type: ignore[union-attr]
        head = self._matrix(decoder.head, IntegerHead, tokens=tokens)
        head.put("output", torch.empty(0, dtype=dtype))  # type: ignore[arg-type]
        rotary = None if decoder.rotary is None else Rotary.from_float(decoder.rotary.cos, decoder.rotary.sin)
        made = assemble(names, self.numbers, outer, self.blocks, rotary, decoder.limit, decoder.offset)
        install(model, decoder.body, decoder.head, made, head)
