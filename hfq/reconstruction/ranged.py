"""Layers with stored ranges of their inputs, of any width, from one calibration: ends of the inputs are all it takes.

Weights are rounded from minimum to maximum, so that every width of weight and input follows from what is kept here, and
a plan of widths can be exchanged for another one. The model can compute as if it was packed, before it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from hfq.calibration import leading as first_tokens
from hfq.calibration.running import Ends, RunningEnds, observe_model
from hfq.errors import CheckpointError, QuantizationError
from hfq.formats import ActivationSpec, Codes, QuantSpec, activation, affine
from hfq.formats.activation import Parameters
from hfq.layers.conv import SecondHalf
from hfq.layers.leading import LeadingToken, lead
from hfq.reconstruction.direct import site_matrix
from hfq.reconstruction.static import input_grid, input_options

__all__ = ["RangedLayers", "calibrate", "load"]


class RangedLayers:
    """What is known of sites (linear, transposed, conv), and what follows from it.

    Args:
        sites: by name.
        spec_for: grid of a site's weights, but for its width; one range a row.
        ends: smallest and largest element of the inputs, of each half where they are in two.
        elements: of the inputs of one picture.
        cuts: input channels of the first half.
        tokens: first tokens that are always the same, by site.
    """

    def __init__(
        self, sites: Sequence[Any], spec_for: Callable[[str], QuantSpec], ends: Mapping[str, Ends],
        elements: Mapping[str, int], cuts: Mapping[str, int], tokens: Mapping[str, torch.Tensor],
    ) -> None:
        self.sites = {site.name: site for site in sites}
        self.spec_for, self.ends, self.elements = spec_for, dict(ends), dict(elements)
        self.cuts = {name: at for name, at in cuts.items() if name in self.sites}
        self.tokens = {name: token for name, token in tokens.items() if name in self.sites}

    # -- what is stored

    def params(self, name: str, bits: int) -> list[Parameters]:
        """Scale and zero point of the inputs at a width, of each half."""
        grid = input_grid(bits)
        return [activation.range_parameters(low.reshape(1).float(), high.reshape(1).float(), grid)
                for low, high in self.ends[name]]  # fmt: skip

    def codes(self, name: str, bits: int) -> list[Codes]:
        """The weight at a width, of each half."""
        site, spec = self.sites[name], self.spec_for(name).with_bits(bits)
        at, weight = self.cuts.get(name), site.module.weight.detach().float()
        if at is None:
            return [affine.quantize(site_matrix(site).float(), spec)]
        return [affine.quantize(half.flatten(1), spec) for half in (weight[:, :at], weight[:, at:])]

    def leading(self, name: str) -> LeadingToken | None:
        """The first token and what the float layer makes of it, in the dtype of the layer."""
        token = self.tokens.get(name)
        if token is None:
            return None
        site = self.sites[name]
        weight, bias = site_matrix(site), getattr(site.module, "bias", None)
        given = token.to(weight.device, weight.dtype)
        return LeadingToken(given, nn.functional.linear(given[None], weight, bias)[0])

    def pack(self, whole: Any, name: str, bits: int, inputs: int, extra: Mapping[str, Any] | None = None) -> None:
        """Replace a site (by ``whole.swap``) by its packed layer; ``inputs`` of 16 bits are floats."""
        site, codes, part = self.sites[name], self.codes(name, bits), self.leading(name)
        params: list[Any] = [None] * len(codes) if inputs == 16 else self.params(name, inputs)
        options = input_options(None if inputs == 16 else input_grid(inputs), params[0], extra=dict(extra or {}))
        if len(codes) > 1:
            options["second"] = SecondHalf(self.cuts[name], codes[1], params[1])
            options["extra"]["cut"] = self.cuts[name]
        if part is not None:
            options["extra"]["first_token"] = "exact"
        layer = whole.swap(site, codes[0], **options)
        if part is not None:
            lead(layer, part, None if whole.report is None else whole.report.rows[name])

    # -- as if it was packed

    @contextmanager
    def simulated(self, weights: Mapping[str, int] | None = None, inputs: Mapping[str, int] | None = None
                  ) -> Iterator[None]:
        """Inside, the named sites compute with weights and inputs of these widths (16 for floats), in floats.

        Raises:
            QuantizationError: a weight is not in memory.
        """
        weights = {name: bits for name, bits in (weights or {}).items() if bits != 16}
        inputs = {name: bits for name, bits in (inputs or {}).items() if bits != 16}
        kept: dict[str, torch.Tensor] = {}
        handles: list[Any] = []
        try:
            for name in {**weights, **inputs}:  # outputs of first tokens come from float weights
                part = self.leading(name)
                if part is not None:
                    handles.append(self.sites[name].module.register_forward_hook(_exact(part)))
            for name, bits in weights.items():
                module = self.sites[name].module
                if module.weight.is_meta:
                    raise QuantizationError(f"{name} is offloaded: this method runs the model with other weights, so "
                                            "that it has to be in memory")
                kept[name] = module.weight.data
                module.weight.data = self._rounded(name, bits)
            for name, bits in inputs.items():
                hook = _coded(self.params(name, bits), bits, self.cuts.get(name), name in self.tokens)
                handles.append(self.sites[name].module.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for name, weight in kept.items():
                self.sites[name].module.weight.data = weight

    def _rounded(self, name: str, bits: int) -> torch.Tensor:
        site, weight = self.sites[name], self.sites[name].module.weight
        halves = [affine.dequantize(codes) for codes in self.codes(name, bits)]
        if len(halves) > 1:
            halves = [half.reshape(half.shape[0], -1, *weight.shape[2:]) for half in halves]
        whole = torch.cat(halves, 1)
        return (whole.t() if site.kind == "transposed" else whole.reshape(weight.shape)).to(weight.dtype)

    # -- disk

    def save(self, path: Path, fingerprint: Mapping[str, Any]) -> None:
        """Write everything that took calibration data."""
        tensors = {f"ends/{name}": torch.tensor(ends, dtype=torch.float64) for name, ends in self.ends.items()}
        tensors |= {f"token/{name}": token.clone() for name, token in self.tokens.items()}
        about = {"fingerprint": dict(fingerprint), "elements": self.elements, "cuts": self.cuts}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.part")
        save_file(tensors, temporary, metadata={"hfq": json.dumps(about, default=str)})
        temporary.replace(path)


def calibrate(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], sites: Sequence[Any], spec_for: Callable[[str], QuantSpec],
    *, cuts: Mapping[str, int], first_token: bool = True, keep: float = 0.95, weight_bits: int = 8,
) -> RangedLayers:
    """Ends of the inputs of all sites in passes of the model with weights of ``weight_bits``, zero in every range.

    Args:
        batches: calls; each counts ``1 - keep`` in the running means.
        cuts: input channels of the first half, of sites whose input is in two.
        first_token: keep tokens that are always the same out of the ranges, and exact.
        weight_bits: 16 for float weights.
    """
    tokens = first_tokens.find(model, batches, sites) if first_token else {}
    ends = RunningEnds(cuts, keep=keep, zero=True, without_first=list(tokens))
    layers = RangedLayers(sites, spec_for, {}, {}, cuts, tokens)
    with layers.simulated({site.name: weight_bits for site in sites}):
        layers.ends = observe_model(model, batches, sites, ends)
    layers.elements = ends.elements
    return layers


def load(
    path: Path, sites: Sequence[Any], spec_for: Callable[[str], QuantSpec], fingerprint: Mapping[str, Any]
) -> RangedLayers:
    """What :meth:`RangedLayers.save` wrote.

    Raises:
        CheckpointError: the file is damaged, or of another run.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["hfq"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        known, elements, cuts = about["fingerprint"], about["elements"], about["cuts"]
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; remove it to calibrate again") from error
    wanted = json.loads(json.dumps(dict(fingerprint), default=str))
    other = sorted(key for key, value in wanted.items() if known.get(key) != value)
    if other:
        raise CheckpointError(f"{path} holds ranges of another run ({', '.join(other)} differ): choose another "
                              "work_dir, or remove it")
    of = {kind: {key.partition("/")[2]: t for key, t in tensors.items() if key.startswith(f"{kind}/")}
          for kind in ("ends", "token")}  # fmt: skip
    ends = {name: [(row[0], row[1]) for row in t] for name, t in of["ends"].items()}
    missing = [site.name for site in sites if site.name not in ends]
    if missing:
        raise CheckpointError(f"{path} has no range for {missing[:5]}: it is of another model")
    return RangedLayers(sites, spec_for, ends, elements, cuts, of["token"])


def _exact(part: LeadingToken) -> Any:
    def hook(_: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        first = part.output.to(output.device, output.dtype).expand(output.shape[0], 1, -1)
        return torch.cat([first, output[:, 1:]], 1)

    return hook


def _coded(params: Sequence[Parameters], bits: int, at: int | None, leads: bool) -> Any:
    spec: ActivationSpec = input_grid(bits)

    def fake(x: torch.Tensor) -> torch.Tensor:
        if at is not None:
            parts = [activation.fake(half, spec, _on(x, one))
                     for half, one in zip((x[:, :at], x[:, at:]), params, strict=True)]  # fmt: skip
            return torch.cat(parts, 1)
        if leads:
            return torch.cat([x[:, :1], activation.fake(x[:, 1:], spec, _on(x, params[0]))], 1)
        return activation.fake(x, spec, _on(x, params[0]))

    def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (fake(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: fake(kwargs[name])}

    return hook


def _on(x: torch.Tensor, params: Parameters) -> Parameters:
    return params[0].to(x.device), None if params[1] is None else params[1].to(x.device)
