"""The weights of a model whose rounding was learned, and some of them that are tuned behind it, with their biases."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hfq.errors import QuantizationError
from hfq.formats import Codes, affine
from hfq.rounding.frozen import FrozenRounding

__all__ = ["TunedWeights"]


class TunedWeights:
    """What a model computes with in the place of its float weights, which stay as they are.

    Args:
        sites: layers of the model (a name, a kind and a module each).
        codes: what was learned for each, one set for the whole weight or one for each half of its input channels.
        tuned: names of those that move; none with halves.
        start: of :class:`hfq.rounding.frozen.FrozenRounding`.
    """

    def __init__(
        self, sites: Sequence[Any], codes: Mapping[str, Sequence[Codes]], tuned: Collection[str], start: str = "weight"
    ) -> None:
        self._sites = {site.name: site for site in sites if site.name in codes}
        self._codes = {name: tuple(codes[name]) for name in self._sites}
        self.latents: dict[str, FrozenRounding] = {}
        self.biases: dict[str, nn.Parameter] = {}
        for name in (name for name in self._sites if name in tuned):
            site, several = self._sites[name], self._codes[name]
            if len(several) != 1:
                raise QuantizationError(f"{name}: a weight in two halves is not tuned: leave it out, or keep it whole")
            self.latents[name] = FrozenRounding(_turned(site, site.weight.detach()), several[0], start)
            if getattr(site.module, "bias", None) is not None:
                self.biases[name] = nn.Parameter(site.module.bias.detach().float().clone())
        self._fixed = {name: self._decoded(name) for name in self._sites if name not in tuned}

    def parameters(self, names: Collection[str]) -> list[nn.Parameter]:
        """What is trained of some of the tuned layers: weights, then biases."""
        return [*(one.latent for name, one in self.latents.items() if name in names),
                *(bias for name, bias in self.biases.items() if name in names)]  # fmt: skip

    def made(self) -> dict[str, Callable[[], torch.Tensor]]:
        """What :class:`hfq.training.substitutes.Substitutes` replaces, by the parameter's name."""
        found: dict[str, Callable[[], torch.Tensor]] = {}
        for name in self._sites:
            found[f"{name}.weight"] = self._maker(name)
            if name in self.biases:
                found[f"{name}.bias"] = lambda bias=self.biases[name]: bias
        return found

    def codes(self, name: str) -> tuple[Codes, ...]:
        """What is stored of a layer."""
        return (self.latents[name].codes(),) if name in self.latents else self._codes[name]

    @torch.no_grad()
    def store_biases(self) -> None:
        """Write the tuned biases into the float layers, for the packed layers that take their place."""
        for name, bias in self.biases.items():
            self._sites[name].module.bias.copy_(bias)

    def _maker(self, name: str) -> Callable[[], torch.Tensor]:
        if name in self._fixed:
            return lambda: self._fixed[name]
        site, latent = self._sites[name], self.latents[name]
        return lambda: _turned(site, latent())

    def _decoded(self, name: str) -> torch.Tensor:
        """The hard weight in the layout of the module."""
        site, shape = self._sites[name], self._sites[name].weight.shape
        if site.kind == "transposed":
            return affine.dequantize(self._codes[name][0]).t().contiguous()
        halves = [affine.dequantize(codes).reshape(shape[0], -1, *shape[2:]) for codes in self._codes[name]]
        return torch.cat(halves, 1).reshape(shape).to(site.weight.device)


def _turned(site: Any, weight: torch.Tensor) -> torch.Tensor:
    return weight.t().contiguous() if site.kind == "transposed" else weight
