"""Convolutions of two parts, and static integer inputs, site by site through a model without repeated blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hfq.calibration.observers import AbsMax, Kl, Mse, Observer
from hfq.errors import ConfigError
from hfq.formats import ActivationSpec
from hfq.formats.activation import SMALLEST_RANGE, Parameters
from hfq.layers import swap
from hfq.reconstruction.direct import site_matrix, unpackable
from hfq.report import Report
from hfq.rounding.split import gain, nearest_symmetric, split

__all__ = ["METRICS", "observer_of", "pack_site", "parameters_of", "taps_of"]

METRICS = ("kl_improved", "kl", "minmax", "mse")


def observer_of(metric: str, bits: int, *, positive: bool = False, stride: int = 4) -> Observer:
    """What finds the threshold of a symmetric grid of ``bits`` by ``metric``."""
    if metric not in METRICS:
        raise ConfigError(f"metric={metric!r}: one of {METRICS}")
    if metric == "minmax":
        return AbsMax()
    if metric == "mse":
        return Mse(bits, symmetric=True)
    return Kl(bits, True, masked=metric == "kl_improved", positive=positive, stride=stride)


def parameters_of(observer: Observer, spec: ActivationSpec) -> Parameters:
    """Scale ``[1]`` of a symmetric static format: the observer's threshold over the largest code."""
    reach = observer.range()[1].reshape(1).float().clamp(min=SMALLEST_RANGE)
    return reach / spec.max_code, None


def taps_of(module: nn.Module, declared: int | None, whole: bool) -> tuple[int, int] | None:
    """The taps of the coarse part of a convolution; ``None`` if it is not to be split.

    Args:
        declared: side of the centre that a smaller branch was merged into; 3 x 3 kernels have one of 1.
        whole: the coarse part is the whole kernel.
    """
    if not isinstance(module, nn.Conv2d):
        return None
    kernel = (module.kernel_size[0], module.kernel_size[1])
    if kernel == (1, 1) or (declared is None and kernel != (3, 3)):
        return None
    return kernel if whole else (declared or 1, declared or 1)


def pack_site(
    model: nn.Module, site: Any, bits: int, report: Report, *, taps: tuple[int, int] | None = None,
    least_gain: float = 0.0, per_channel: bool = True, activation: ActivationSpec | None = None,
    params: Parameters | None = None, bias_bits: int = 32, extra: Mapping[str, Any] | None = None,
) -> None:
    """Replace a site by its packed layer: of two parts with ``taps``, where that gains enough, else of one.

    Args:
        least_gain: how many times finer the fine part's grid must be, in the median over the channels.
        per_channel: steps of the coarse part.
        bias_bits: 16 rounds the bias to a symmetric grid of 16 bits; 32 leaves it as it is.
    """
    asked = {"bits": bits, "group_size": -1, "symmetric": True}
    if why := unpackable(site):
        report.refuse(site.name, why, kind=site.kind, asked=asked, numel=site.numel)
        return
    more, reason = dict(extra or {}), ""
    whole = taps is not None and taps == tuple(site.module.kernel_size)
    if taps is not None:
        found = float("inf") if whole else gain(site.weight, taps, bits=bits)
        more["split_gain"] = found if found < float("inf") else None
        if found < least_gain:
            reason = f"not split: the fine part's grid is {found:.3g} times finer, {least_gain:g} were asked for"
            taps = None
    if bias_bits == 16 and getattr(site.module, "bias", None) is not None:
        _round_bias(site.module)
    options: dict[str, Any] = {
        "asked": asked, "activation": activation, "activation_params": params, "reason": reason, "extra": more,
    }
    if taps is None:
        codes = nearest_symmetric(site_matrix(site), bits)
        swap.swap(model, site.name, codes, report, **options)
        return
    parts = split(site.weight, taps, bits=bits, per_channel=per_channel)
    more["parts"] = {"fine": list(site.module.kernel_size), "coarse": list(taps)}
    swap.swap(model, site.name, parts.fine, report, coarse=(taps, parts.coarse), **options)


@torch.no_grad()
def _round_bias(module: nn.Module) -> None:
    bias: torch.Tensor = module.bias  # type: ignore[assignment]
    step = bias.abs().max().double() / (1 << 15)
    if step > 0:
        rounded = (bias.double() / step + 0.5).floor().clamp(-(1 << 15), (1 << 15) - 1) * step
        bias.copy_(rounded.to(bias.dtype))


