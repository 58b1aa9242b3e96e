"""Reconstruct one layer by itself: from recorded inputs and outputs, or from the second moment of its inputs alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from hfq.calibration.capture import device_of
from hfq.errors import QuantizationError
from hfq.reconstruction import loop
from hfq.reconstruction.block import frozen
from hfq.reconstruction.samples import Calls, Samples

__all__ = ["fit", "fit_second_moment", "forward_with"]


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


def fit_second_moment(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    quantizer: nn.Module,
    *,
    steps: int,
    lr: float,
    patience: int | None = None,
) -> list[float]:
    """Train a quantizer on ``tr((W - Q) H (W - Q)^T) / tr(W H W^T)``: the layer's squared error on all of its
    calibration inputs at the cost of one ``[rows, K] x [K, K]`` product a step.

    Args:
        weight: ``[rows, K]``. hessian: ``[K, K]``. quantizer: gives ``[rows, K]``.
        patience: stop after this many steps without a new least loss; the best parameters are kept in any case.

    Returns:
        The relative loss of every step.
    """
    w, h = weight.detach().float(), hessian.float().to(weight.device)
    size = float(((w @ h) * w).sum())
    if not size > 0:
        return []
    trained = [p for p in quantizer.parameters() if p.requires_grad]
    adam = torch.optim.Adam(trained, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    curve: list[float] = []
    least, kept, age = math.inf, [p.detach().clone() for p in trained], 0
    for _ in range(steps + 1):  # the last round only looks at the end point
        adam.zero_grad(set_to_none=True)
        difference = quantizer().float() - w
        fixed = difference.detach()
        product = fixed @ h
        value = float((product * fixed).sum()) / size
        if not math.isfinite(value):
            raise QuantizationError(f"the loss is {value} in step {len(curve)}: use a smaller learning rate")
        curve.append(value)
        age += 1
        if value < least:
            least, age = value, 0
            kept = [p.detach().clone() for p in trained]
        if patience is not None and age >= patience:
            break
        difference.backward(product * (2 / size))
        adam.step()
        schedule.step()
    with torch.no_grad():
        for p, best in zip(trained, kept, strict=True):
            p.copy_(best)
            p.grad = None
    return curve
