"""What is learned about one block of a window: made when the block enters, packed when it leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from hfq.calibration.outliers import Rule, truncate
from hfq.calibration.step import Step
from hfq.formats import ActivationSpec, QuantSpec
from hfq.layers import attention
from hfq.reconstruction.direct import expert_matrices
from hfq.rounding.lowrank import Bank, GatedRounding

__all__ = ["BlockLearner", "head_widths", "learner_of", "pack", "quantize_attention", "truncation"]

_LEARNED = ("linear", "transposed", "experts")


class BlockLearner(nn.Module):
    """What is learned about one block.

    Args:
        weights: roundings by site name (or qualified name of a parameter); each gives the fake-quantized weight.
        inputs: grids of the inputs of modules, by site name. A grid with a factor gets a learned one, initially 1.

    Attributes:
        weights: the roundings by name, in order.
        factors: parameters of one element by site name.
    """

    def __init__(self, weights: Mapping[str, nn.Module], inputs: Mapping[str, ActivationSpec] | None = None) -> None:
        super().__init__()
        self._names, self.inputs = list(weights), dict(inputs or {})
        self._roundings = nn.ModuleList(weights.values())
        self._factored = [name for name, spec in self.inputs.items() if spec.factor]
        self._factors = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in self._factored)

    @property
    def weights(self) -> dict[str, Any]:
        return dict(zip(self._names, self._roundings, strict=True))

    @property
    def factors(self) -> dict[str, nn.Parameter]:
        return dict(zip(self._factored, self._factors, strict=True))

    @torch.no_grad()
    def factor(self, name: str) -> torch.Tensor | None:
        """The learned factor of a site, ready to be stored; ``None`` where the grid has none."""
        found = self.factors.get(name)
        return None if found is None else found.detach().clone()


def _matrices(site: Any) -> dict[str, torch.Tensor]:
    """The matrices of a site as ``[out, in]`` (banks of experts ``[E, out, in]``) by the name of what learns them."""
    if site.kind == "experts":
        return {f"{site.name}.{name}": expert_matrices(site, name) for name in site.tensors}
    weight = site.weight.detach()
    return {site.name: weight.t() if site.kind == "transposed" else weight}


@torch.no_grad()
def truncation(step: Step, rule: Rule) -> dict[str, torch.Tensor]:
    """What cutting outliers off does to each weight, as a ratio: it is found before channels are scaled, and applied
    to the scaled weight."""
    found = {}
    for site in (site for site in step.block.sites if site.kind in _LEARNED):
        for name, weight in _matrices(site).items():
            cut = truncate(weight.reshape(-1, weight.shape[-1]), rule)[0].reshape(weight.shape)
            found[name] = torch.where(weight == 0, 1.0, cut / weight)
    return found


def learner_of(
    step: Step, spec_for: Callable[[str], QuantSpec], options_for: Callable[[str], Mapping[str, Any]], *,
    inputs_for: Callable[[str], ActivationSpec | None] = lambda name: None,
    ratios: Mapping[str, torch.Tensor] | None = None,
) -> BlockLearner:  # fmt: skip
    """Roundings for every site of a block; sites that no packed layer takes become refused rows.

    Args:
        spec_for, options_for: grid of a site, and options of its :class:`hfq.rounding.lowrank.GatedRounding`.
        inputs_for: grid of the input of a site.
        ratios: factors of the weights' elements, by name (of :func:`truncation`).
    """
    weights: dict[str, nn.Module] = {}
    inputs: dict[str, ActivationSpec] = {}
    for site in step.block.sites:
        spec = spec_for(site.name)
        if site.kind not in _LEARNED:
            assert step.report is not None
            reason = f"no packed layer for sites of kind {site.kind!r}"
            step.report.refuse(site.name, reason, kind=site.kind, asked=spec.to_dict(), numel=site.numel)
            continue
        for name, weight in _matrices(site).items():
            weight = weight if ratios is None or name not in ratios else weight * ratios[name]
            each = weight if weight.ndim == 3 else [weight]
            made = [GatedRounding(one, spec, **options_for(site.name)) for one in each]
            weights[name] = Bank(made) if weight.ndim == 3 else made[0]
        grid = inputs_for(site.name)
        if grid is not None:
            inputs[site.name] = grid
    return BlockLearner(weights, inputs)


def pack(step: Step, learner: Any, asked: Callable[[str], Mapping[str, Any]] | None = None) -> None:
    """Harden what was learned and replace every site of the block by its packed layer."""
    for site in step.block.sites:
        names = [f"{site.name}.{name}" for name in site.tensors] if site.kind == "experts" else [site.name]
        rounding = [learner.weights[name] for name in names if name in learner.weights]
        if not rounding:
            continue
        for one in rounding:
            one.harden()
        extra = rounding[0].statistics()
        options: dict[str, Any] = {"extra": extra, **({} if asked is None else {"asked": asked(site.name)})}
        factor = learner.factor(site.name)
        if site.name in learner.inputs:
            options["activation"] = learner.inputs[site.name]
        if factor is not None:
            extra["range_factor"] = round(float(factor), 6)
        if site.kind == "experts":
            if factor is not None:  # learned for what enters the bank; what flows inside keeps its own range
                inside = {name: torch.ones_like(factor) for name in site.tensors}
                options["activation_factors"] = inside | {site.tensors[0]: factor}
            codes = {name: one.codes() for name, one in zip(site.tensors, rounding, strict=True)}
            step.swap_experts(site, codes, **options)
        else:
            if factor is not None:
                options["activation_factor"] = factor
            step.swap(site, rounding[0].codes(), **options)


def head_widths(model: nn.Module, call: Callable[[], Any]) -> dict[str, int]:
    """Width of a head by name of each attention module that goes through transformers' attention interface."""
    names, found = {module: name for name, module in model.named_modules()}, dict[str, int]()

    def observe(module: nn.Module, query: torch.Tensor, *_: Any) -> None:
        if module in names:
            found.setdefault(names[module], query.shape[-1])

    with attention.observing(model, observe):
        call()
    return found


def quantize_attention(step: Step, widths: Mapping[str, int], spec: ActivationSpec) -> None:
    """Queries, keys and values of the block's attention modules on ``spec``, from now on."""
    for name in [name for name in widths if name.startswith(f"{step.block.name}.")]:
        part = attention.AttentionQuant(widths[name], query=spec, key=spec, value=spec)
        attention.install(step.model, name, part)
