"""Reconstruct one layer by itself: from recorded inputs and outputs, or from the second moment of its inputs alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from hfq.calibration.capture import device_of
from hfq.reconstruction import loop
from hfq.reconstruction.block import frozen
from hfq.reconstruction.samples import Calls, Samples

__all__ = ["fit", "forward_with"]


def fit(
    site: Any,
    quantizer: nn.Module,
    inputs: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor] | None = None,
    *,
    mask: Callable[[int], torch.Tensor | None] | None = None,
    float_inputs: Sequence[torch.Tensor] | None = None,
    mix: float = 0.0,
    **options: Any,
) -> list[float]:
    """Train the quantizer of one linear or convolution on its own output.

    Args:
        site: with ``name``, ``kind`` and ``module``.
        inputs: what the layer reads in the quantized stream, ``[B, ...]`` each.
        targets: what it should give, ``[B, ...]`` each; default: the float layer on the same inputs.
        mask: gives the padding mask of call ``i``.
        float_inputs, mix: with this probability an element of the input is taken from those.
        options: as for :func:`hfq.reconstruction.loop.optimise`.
    """
    module = site.module
    if targets is None:
        with torch.no_grad():
            targets = [module(x) for x in inputs]

    others = None if float_inputs is None else Calls(float_inputs)
    samples = Samples(Calls(inputs), targets, float_inputs=others, mix=mix, mask=mask, device=device_of(module))
    with frozen(module):
        return loop.optimise(forward_with(site), {site.name: quantizer}, samples, where=site.name, **options)


def forward_with(site: Any) -> loop.Forward:
    """A function that runs the module of ``site`` with another weight under the site's name."""
    module = site.module

    def forward(weights: dict[str, torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        weight = weights[site.name].to(module.weight.dtype)
        return functional_call(module, {"weight": weight.t() if site.kind == "transposed" else weight}, args, kwargs)

    return forward
