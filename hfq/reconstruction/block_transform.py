"""All learned maps of one block together with the rounding of its weights: parameters in, weights of the block out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hfq.errors import QuantizationError
from hfq.formats import Codes, QuantSpec
from hfq.graph.absorb import Matrix, Norm
from hfq.graph.links import Link, Pair
from hfq.layers import attached
from hfq.layers.attached import OutputAffine, ScaledSiLU
from hfq.reconstruction import build
from hfq.reconstruction.maps import MatrixMap, PairMap, State
from hfq.reconstruction.options import Options
from hfq.rounding.clipping import ClippedRounding

__all__ = ["BlockTransform", "Member", "Options"]

@dataclass(eq=False)
class Member:
    """One weight of the block that is transformed or quantized.

    Attributes:
        matrix: the weight in the model.
        path, bias_path: names below the block.
        weight, bias: the float values as ``[..., out, in]`` in float32 (views of the model's where possible).
        reads, writes: maps with the link and the side ("write" or "mirror").
        quantizer: key of its rounding, ``None`` where the weight stays float.
    """

    matrix: Matrix
    path: str
    bias_path: str | None
    weight: torch.Tensor
    bias: torch.Tensor | None
    reads: list[tuple[PairMap, Link]] = field(default_factory=list)
    writes: list[tuple[PairMap, Link, str]] = field(default_factory=list)
    quantizer: str | None = None

    def laid_out(self, weight: torch.Tensor) -> torch.Tensor:
        """``[..., out, in]`` in the layout of the parameter."""
        return weight.movedim((-2, -1), (self.matrix.output_axis, self.matrix.input_axis))


class BlockTransform(nn.Module):
    """The learned transforms of one block. Calling it gives ``{name below the block: tensor}`` for all its weights.

    Args:
        step: of the walk; its block has not been changed. The statistics of the start come from its inputs.
        pairs: of the block, proven or refused (kinds "norm", "vo", "qk", "updown", "direct", "gate").
        spec_for: grid of a site by name, ``None`` where it stays float.
        options: what is learned.
        generator: of the random values with which the whole is proven in float64.

    Parts that run online (an affine map at a norm's output, a scaled activation) and biases that will be needed are put
    into the block at once, as identities: its function stays. ``reasons`` says what was asked for and left out.

    Raises:
        QuantizationError: the block has weights that are not in memory.
    """

    def __init__(
        self, step: Any, pairs: Sequence[Pair], spec_for: Callable[[str], QuantSpec | None], options: Options,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.block, self.options = step.block, options
        self.reasons: dict[str, str] = {}
        self.members: dict[str, Member] = {}
        self.quantizers = nn.ModuleDict()
        self._sites: list[str] = []
        self._last: dict[nn.Module, State] = {}
        self._biases: list[str] = []
        self._replaced: dict[str, nn.Module] = {}
        found = build.maps(step, pairs, options, self.reasons, spec_for)
        self.maps: nn.ModuleList = nn.ModuleList(found)
        self._collect(spec_for)
        self._install()
        build.prove(self, step, generator or torch.Generator().manual_seed(0))
        self._start = {name: p.detach().clone() for name, p in self.named_parameters()}

    # -- what there is -----------------------------------------------------------------------------------------------
    def _collect(self, spec_for: Callable[[str], QuantSpec | None]) -> None:
        for site in self.block.sites:
            spec = spec_for(site.name)
            if site.kind in ("linear", "transposed") and not site.bypassed:
                axes = (1, 0) if site.kind == "linear" else (0, 1)
                bias = "bias" if site.module._parameters.get("bias") is not None else None
                member = self._member(Matrix(site.name, site.module, "weight", *axes, bias))
                if spec is not None:
                    member.quantizer = f"q{len(self.quantizers)}"
                    self._sites.append(site.name)
                    self.quantizers[member.quantizer] = ClippedRounding(
                        member.weight, spec, self.options.clip_start, learn=self.options.clip)
        for one in self.maps:
            for link in one.pair.readers:
                self._member(link.part).reads.append((one, link))
            for links, side in ((one.pair.sources, "write"), (one.pair.partners, "mirror")):
                for link in links:
                    if isinstance(link.part, Matrix):
                        self._member(link.part).writes.append((one, link, side))

    def _member(self, matrix: Matrix) -> Member:
        key = f"{matrix.name}.{matrix.tensor}"
        if key not in self.members:
            weight = matrix.weight.detach().movedim((matrix.output_axis, matrix.input_axis), (-2, -1)).float()
            bias = None if matrix.bias_tensor is None else matrix.bias_tensor.detach().float()
            below = matrix.name.removeprefix(f"{self.block.name}.")
            bias_path = None if bias is None else f"{below}.{matrix.bias}"
            self.members[key] = Member(matrix, f"{below}.{matrix.tensor}", bias_path, weight, bias)
        return self.members[key]

    def _install(self) -> None:
        """Identities for what the maps will need: biases, affine parts, scaled activations."""
        for one in self.maps:
            if one.shift is not None:
                for link in (*one.pair.readers, *one.pair.sources):
                    if isinstance(link.part, Matrix):
                        self._add_bias(self.members[f"{link.name}.{link.tensor}"])
            source = one.pair.sources[0].part
            if isinstance(source, Norm):
                shift = one.shift is not None and source.bias is None
                if shift or isinstance(one, MatrixMap):
                    device, width = source.module._parameters[source.gain].device, one.pair.classes
                    eye = torch.eye(width, dtype=torch.float32, device=device) if isinstance(one, MatrixMap) else False
                    zeros = torch.zeros(width, device=device) if shift else False
                    attached.attach_affine(source.module, OutputAffine(width, matrix=eye, shift=zeros))
            if one.pair.kind == "gate":
                device = self.members[f"{one.pair.sources[0].name}.weight"].weight.device
                part = ScaledSiLU(one.pair.classes, torch.ones(one.pair.classes, device=device))
                self._replaced[one.pair.activation] = self.block.module.get_submodule(self._below(one.pair.activation))
                attached.install_scaled(self.block.module, self._below(one.pair.activation), part)

    def _add_bias(self, member: Member) -> None:
        if member.bias is not None:
            return
        weight = member.matrix.weight
        zeros = torch.zeros(weight.shape[member.matrix.output_axis], dtype=weight.dtype, device=weight.device)
        member.matrix.module.bias = nn.Parameter(zeros, requires_grad=False)
        member.matrix.bias = "bias"
        self._biases.append(member.matrix.name)
        member.bias, member.bias_path = zeros.float(), f"{member.path.rpartition('.')[0]}.bias"

    def _below(self, name: str) -> str:
        return name.removeprefix(f"{self.block.name}.")

    def drop(self, one: PairMap) -> None:
        """Take a map out again, with the parts that it had installed."""
        self.drop_shift(one)
        self.maps = nn.ModuleList([other for other in self.maps if other is not one])
        for member in self.members.values():
            member.reads = [found for found in member.reads if found[0] is not one]
            member.writes = [found for found in member.writes if found[0] is not one]
        source = one.pair.sources[0].part
        if isinstance(source, Norm):
            attached.detach_affine(source.module)
        if one.pair.kind == "gate":
            self.block.module.set_submodule(self._below(one.pair.activation), self._replaced[one.pair.activation])

    def drop_shift(self, one: PairMap) -> None:
        """Leave the shift of a map out; biases that were added for it stay, as zeros."""
        one.shift = None
        source = one.pair.sources[0].part
        part = source.module._modules.get(attached.CHILD) if isinstance(source, Norm) else None
        if isinstance(part, OutputAffine) and part.shift is not None:
            attached.detach_affine(source.module)
            if part.matrix is not None:
                attached.attach_affine(source.module, OutputAffine(part.size, matrix=part.matrix))

    # -- weights -----------------------------------------------------------------------------------------------------
    def forward(self, dtype: torch.dtype = torch.float32, *, quantized: bool = True) -> dict[str, torch.Tensor]:
        """Every tensor of the block that the maps or the rounding change.

        Args:
            dtype: to compute in; float64 gives the transformed float weights, not rounded.
            quantized: round the weights of the sites.
        """
        states, found = self.states(dtype), {}
        self._last = states
        for member in self.members.values():
            weight, bias = self._transformed(member, states, dtype)
            if quantized and member.quantizer is not None:
                weight = self.quantizers[member.quantizer](weight)
            found[member.path] = member.laid_out(weight)
            if member.bias_path is not None and bias is not None:
                found[member.bias_path] = bias
        for one in self.maps:
            found.update(self._online(one, states[one], dtype))
        return found

    def states(self, dtype: torch.dtype, *, stored: bool = False) -> dict[nn.Module, State]:
        """Every map at this moment; ``stored``: with online matrices as they are stored."""
        return {one: one.state(dtype, self.options.stored) if stored and isinstance(one, MatrixMap)
                else one.state(dtype) for one in self.maps}

    def _transformed(
        self, member: Member, states: Mapping[nn.Module, State], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight, bias = member.weight.to(dtype), None if member.bias is None else member.bias.to(dtype)
        for one, link in member.reads:
            weight, bias = one.read(link, weight, bias, states[one])
        for one, link, side in member.writes:
            weight, bias = getattr(one, side)(link, weight, bias, states[one])
        return weight, bias

    def _online(self, one: PairMap, state: State, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        source = one.pair.sources[0].part
        if one.pair.kind == "gate":
            return {f"{self._below(one.pair.activation)}.scale": state.forward}
        if not isinstance(source, Norm):
            return {}
        gain, bias = source.get_gain().to(dtype), source.get_bias()
        values = one.norm(gain, None if bias is None else bias.to(dtype), state)
        name = self._below(source.name)
        paths = {"gain": f"{name}.{source.gain}", "bias": f"{name}.{source.bias}",
                 "matrix": f"{name}.{attached.CHILD}.matrix", "shift": f"{name}.{attached.CHILD}.shift"}
        values["gain"] = values["gain"] - source.offset
        return {paths[key]: value for key, value in values.items()}

    def codes(self) -> dict[str, Codes]:
        """Codes of every quantized site, of the weight as :meth:`freeze` leaves it (or would)."""
        states = self.states(torch.float64, stored=True)
        found = {}
        with torch.no_grad():
            for name in self._sites:
                member = self.members[f"{name}.weight"]
                weight, _ = self._transformed(member, states, torch.float64)
                found[name] = self.quantizers[member.quantizer].codes(weight.float())  # type: ignore[index,operator]
        return found

    @torch.no_grad()
    def freeze(self) -> dict[str, Codes]:
        """Write the transforms into the block, in float64, and give the codes of its sites.

        Weights are written as transformed floats: the caller packs the codes. Afterwards the maps are spent.
        """
        codes, own = self.codes(), dict(self.block.module.named_parameters())
        states, values = self.states(torch.float64, stored=True), {}
        for member in self.members.values():
            weight, bias = self._transformed(member, states, torch.float64)
            values[member.path] = member.laid_out(weight)
            if member.bias_path is not None and bias is not None:
                values[member.bias_path] = bias
        for one in self.maps:
            values.update(self._online(one, states[one], torch.float64))
        for name, value in values.items():
            if not torch.isfinite(value).all():
                raise QuantizationError(f"{self.block.name}.{name}: the transformed tensor is not finite")
            own[name].copy_(value)
        for module in self.block.module.modules():
            part = module._modules.get(attached.CHILD)
            if isinstance(part, OutputAffine) and part.matrix is not None:
                part.matrix = nn.Parameter(part.matrix.detach().to(self.options.stored), requires_grad=False)
        return codes

    def added(self) -> dict[str, list[nn.Parameter]]:
        """Parameters that the block did not have before, by the name of what holds them."""
        parts = {f"{self.block.name}.{name}": list(module.parameters(recurse=False))
                 for name, module in self.block.module.named_modules() if isinstance(module, attached.AttachedPart)}
        modules = dict(self.block.module.named_modules())
        biases = {f"{name}.bias": [modules[self._below(name)].bias] for name in self._biases}
        return {**parts, **biases}

    # -- training ----------------------------------------------------------------------------------------------------
    def open(self, epoch: int, epochs: int) -> None:
        """Open the masks as far as ``epoch`` says."""
        for one in self.maps:
            one.map.open(epoch, epochs)

    def truncate_(self) -> None:
        """Keep every entry away from zero, in place."""
        for one in self.maps:
            one.map.truncate_()

    @torch.no_grad()
    def restart(self, factor: float) -> None:
        """Everything as at the start, with another damping of the entries off the diagonals."""
        for name, parameter in self.named_parameters():
            parameter.copy_(self._start[name])
        for one in self.maps:
            if hasattr(one.map, "factor"):
                one.map.factor = factor
        self.open(0, 2)

    def condition(self) -> float:
        """Largest condition number of the matrices (scales alone are always invertible)."""
        numbers = [one.map.condition() for one in self.maps if hasattr(one.map, "factor")]
        return max(numbers, default=1.0)

    @torch.no_grad()
    def bound(self) -> float:
        """A bound on the condition numbers of the last call: ``|A| |A^-1|`` in the Frobenius norm."""
        sizes = [(state.forward.detach().square().sum((-2, -1)) * state.back.detach().square().sum((-2, -1))).max()
                 for one, state in self._last.items() if hasattr(one.map, "factor")]
        return float(torch.stack(sizes).max().sqrt()) if sizes else 1.0

    def groups(self, transforms: float, clipping: float) -> list[dict[str, Any]]:
        """Parameter groups: maps and shifts, and the learned ranges."""
        sets = ((list(self.maps.parameters()), transforms), (list(self.quantizers.parameters()), clipping))
        return [{"params": parameters, "lr": lr} for parameters, lr in sets if parameters]

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Inside, the parameters may be changed at will; afterwards they are as before."""
        saved = {name: t.detach().clone() for name, t in self.state_dict().items()}
        try:
            yield
        finally:
            self.load_state_dict(saved)
