"""What is left of a batch normalisation that was folded into the convolution before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hfq.errors import CheckpointError, QuantizationError
from hfq.layers import manifest as record

__all__ = ["Folded", "describe", "empty_folded", "fold", "install", "restore"]


class Folded(nn.Module):
    """The identity, in the place of a batch normalisation; :func:`restore` puts a neutral one back.

    Args:
        conv: name of the convolution that took the normalisation in.
        features, eps: of the normalisation.
        bias: the convolution had a bias of its own before.
    """

    def __init__(self, conv: str, features: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.conv, self.num_features, self.eps, self.had_bias = conv, features, eps, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def describe(self) -> dict[str, Any]:
        return {"conv": self.conv, "features": self.num_features, "eps": self.eps, "bias": self.had_bias}

    def extra_repr(self) -> str:
        return f"{self.num_features} features, in {self.conv}"


def fold(model: nn.Module, norm: str, conv: str) -> None:
    """Multiply the normalisation ``norm`` into the weight and bias of ``conv`` before it, in float64, in place.

    Raises:
        QuantizationError: the normalisation is in training mode, has no statistics, or does not fit.
    """
    module, target = model.get_submodule(norm), model.get_submodule(conv)
    assert isinstance(module, nn.modules.batchnorm._BatchNorm) and isinstance(target, nn.Conv2d)
    if module.training:
        raise QuantizationError(f"{norm} is in training mode, it normalises with each batch: call model.eval() first")
    if module.running_mean is None or module.running_var is None:
        raise QuantizationError(f"{norm} keeps no statistics (track_running_stats=False): it cannot be folded")
    if module.num_features != target.out_channels:
        raise QuantizationError(f"{norm} has {module.num_features} features, {conv} {target.out_channels} outputs")
    with torch.no_grad():
        gain = torch.rsqrt(module.running_var.double() + module.eps)
        gain = gain if module.weight is None else gain * module.weight.double()
        before = torch.zeros_like(gain) if target.bias is None else target.bias.double()
        bias = (before - module.running_mean.double()) * gain
        bias = bias if module.bias is None else bias + module.bias.double()
        dtype, had_bias = target.weight.dtype, target.bias is not None
        weight = target.weight.double() * gain.view(-1, 1, 1, 1)
        if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
            raise QuantizationError(f"{norm} folded into {conv} gives values that are not finite: its statistics are "
                                    "damaged, or a channel has no variance")
        target.weight.copy_(weight.to(dtype))
        target.bias = nn.Parameter(bias.to(dtype), requires_grad=target.weight.requires_grad)
    install(model, norm, Folded(conv, module.num_features, module.eps, had_bias))


def install(model: nn.Module, name: str, part: Folded) -> None:
    """Put ``part`` in the place of the normalisation, and give its convolution a bias."""
    conv = model.get_submodule(part.conv)
    if isinstance(conv, nn.Conv2d) and conv.bias is None:
        weight = conv.weight
        conv.bias = nn.Parameter(torch.empty(conv.out_channels, dtype=weight.dtype, device=weight.device), False)
    model.set_submodule(name, part.train(model.training))


def describe(model: nn.Module) -> list[dict[str, Any]]:
    """The manifest entries, JSON only."""
    return [{"module": name, **part.describe()} for name, part in model.named_modules() if isinstance(part, Folded)]


def empty_folded(model: nn.Module, entry: Mapping[str, Any], name: str, conv: str | None) -> Folded | None:
    """The part that a manifest entry describes; ``None`` if it is there already.

    Raises:
        CheckpointError: the entry is damaged, or the model has no such normalisation.
    """
    record.fields(name, entry, {"module", "conv", "features", "eps", "bias"})
    module = model.get_submodule(name)
    # The convolution may have another prefix to its name in this model.
    if record.present(module if isinstance(module, Folded) else None, {**entry, "conv": conv}, f"the folded {name}"):
        return None
    if conv is None or not isinstance(module, nn.modules.batchnorm._BatchNorm):
        raise CheckpointError(f"{name} was folded in the checkpoint; in the model it is {type(module).__name__}")
    record.size(name, entry, "features", module.num_features)
    eps, bias = entry["eps"], entry["bias"]
    if type(eps) not in (int, float) or not 0 <= eps < 1 or not isinstance(bias, bool):
        raise CheckpointError(f"{name}: eps={eps!r}, bias={bias!r} in the manifest")
    target = model.get_submodule(conv)
    if getattr(target, "out_channels", None) != module.num_features:
        raise CheckpointError(f"{name} was folded into {conv}, which has not its {module.num_features} channels")
    return Folded(conv, module.num_features, float(eps), bias)


def restore(model: nn.Module) -> None:
    """Neutral normalisations in the place of folded ones, of float convolutions: the float model's own structure.

    A bias that came from the normalisation goes back to it.
    """
    for name, part in [(n, m) for n, m in model.named_modules() if isinstance(m, Folded)]:
        conv = model.get_submodule(part.conv)
        if not isinstance(conv, nn.Conv2d):
            continue
        like = {"dtype": conv.weight.dtype, "device": conv.weight.device}
        norm = nn.BatchNorm2d(part.num_features, part.eps, **like)
        norm.running_var.fill_(1 - part.eps)  # type: ignore[union-attr]
        if not part.had_bias and conv.bias is not None:
            with torch.no_grad():
                norm.bias.copy_(conv.bias)
            conv.bias = None
        model.set_submodule(name, norm.requires_grad_(False).train(part.training))
