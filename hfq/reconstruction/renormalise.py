"""Means and variances of the channels of packed layers, brought back to what they were in the float model.

Behind a layer a normalisation is put that starts as the identity for the statistics that the float layer had. Run in
training mode it follows those of the quantized one; what it then is goes into the layer's scales and bias. Codes and
zero points stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hfq.calibration.capture import forward, quiet
from hfq.errors import QuantizationError
from hfq.formats import PER_TENSOR
from hfq.layers.conv import QConv2d
from hfq.layers.packed import PackedModule

__all__ = ["Statistics", "absorb", "insert", "of_norms", "remove", "renormalise", "tune"]


@dataclass(frozen=True)
class Statistics:
    """Of the channels of a layer's output, ``[out]``: mean and variance, and what is added to the variance."""

    mean: torch.Tensor
    variance: torch.Tensor
    eps: float = 1e-5


def of_norms(model: nn.Module) -> dict[str, Statistics]:
    """What every batch normalisation gives, by name: its bias and its squared gain."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            size = module.num_features
            gain = torch.ones(size) if module.weight is None else module.weight.detach().float().cpu()
            bias = torch.zeros(size) if module.bias is None else module.bias.detach().float().cpu()
            found[name] = Statistics(bias.clone(), gain.square(), module.eps)
    return found


class _Norm(nn.Module):
    """A batch normalisation over the channels of a layer that starts as the identity."""

    def __init__(self, start: Statistics, axis: int, momentum: float | None) -> None:
        super().__init__()
        self.axis = axis
        self.norm = nn.BatchNorm1d(len(start.mean), start.eps, momentum).requires_grad_(False).eval()
        self.norm.running_mean.copy_(start.mean)  # type: ignore[union-attr]
        self.norm.running_var.copy_(start.variance)  # type: ignore[union-attr]
        with torch.no_grad():
            self.norm.weight.copy_((start.variance + start.eps).sqrt())
            self.norm.bias.copy_(start.mean)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.movedim(self.axis, -1)
        out = self.norm(rows.reshape(-1, rows.shape[-1]).float())
        return out.reshape(rows.shape).movedim(-1, self.axis).to(x.dtype)

    def map(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``(factor, offset)`` float64 of what it does in evaluation."""
        n: Any = self.norm
        factor = n.weight.double() * torch.rsqrt(n.running_var.double() + n.eps)
        return factor, n.bias.double() - n.running_mean.double() * factor


class Inserted:
    """The normalisations behind layers, by name; :func:`remove` takes them out."""

    def __init__(self, norms: Mapping[str, _Norm], handles: Sequence[Any]) -> None:
        self.norms, self.handles = dict(norms), list(handles)


def renormalise(
    model: nn.Module, targets: Mapping[str, Statistics], batches: Sequence[Mapping[str, Any]], *, passes: int = 1,
    momentum: float | None = 0.1, loss: Callable[[], float] | None = None,
) -> tuple[float, float] | None:
    """Insert, tune and absorb; if ``loss`` of the model rises by that, its layers stay as they were.

    Args:
        targets: statistics of the outputs of packed layers, in the float model.

    Returns:
        ``loss`` before and after tuning; ``None`` without it.
    """
    inserted = insert(model, targets, momentum=momentum)
    before = None if loss is None else loss()
    tune(model, inserted, batches, passes)
    if loss is None or before is None:
        absorb(model, inserted)
        return None
    after = loss()
    if after <= before:
        absorb(model, inserted)
    else:
        remove(inserted)
    return before, after


def insert(model: nn.Module, targets: Mapping[str, Statistics], *, momentum: float | None = 0.1) -> Inserted:
    """Put a normalisation behind each packed layer of ``targets``: at first it changes nothing.

    Args:
        momentum: of the running statistics; ``None`` takes their mean over all batches.

    Raises:
        QuantizationError: a layer is not packed, has no bias, or one scale for all its rows.
    """
    norms, handles = {}, []
    for name, start in targets.items():
        layer = model.get_submodule(name)
        if not isinstance(layer, PackedModule) or layer._parameters.get("bias") is None:
            raise QuantizationError(f"{name}: a packed layer with a bias is needed to take a normalisation in")
        slot = layer.slots["weight"]
        if slot.spec.group_size == PER_TENSOR or len(layer.slots) > 1:
            raise QuantizationError(f"{name}: one scale serves all its rows: they cannot be scaled one by one")
        norms[name] = _Norm(start, 1 if isinstance(layer, QConv2d) else -1, momentum).to(layer.device)
        handles.append(layer.register_forward_hook(lambda _, __, out, norm=norms[name]: norm(out)))
    return Inserted(norms, handles)


def tune(model: nn.Module, inserted: Inserted, batches: Sequence[Mapping[str, Any]], passes: int = 1) -> None:
    """Let the normalisations follow the statistics of the batches."""
    with quiet(model):
        for norm in inserted.norms.values():
            norm.norm.train()
        for batch in [batch for _ in range(passes) for batch in batches]:
            forward(model, batch)
    for norm in inserted.norms.values():
        norm.norm.eval()


@torch.no_grad()
def absorb(model: nn.Module, inserted: Inserted) -> None:
    """Multiply what the normalisations do into scales and biases, and take them out."""
    for name, norm in inserted.norms.items():
        layer: Any = model.get_submodule(name)
        factor, offset = norm.map()
        scale = layer.scale_of("weight")
        new = (scale.double() * factor[:, None].to(scale.device)).to(scale.dtype)
        bias = (layer.bias.double() * factor.to(layer.bias.device) + offset.to(layer.bias.device)).to(layer.bias.dtype)
        if not (torch.isfinite(new).all() and (new > 0).all() and torch.isfinite(bias).all()):
            raise QuantizationError(f"{name}: a channel of its output has no variance left, or its scale leaves the "
                                    f"range of {scale.dtype}")
        scale.copy_(new)
        layer.bias.copy_(bias)
    remove(inserted)


def remove(inserted: Inserted) -> None:
    """Take the normalisations out."""
    for handle in inserted.handles:
        handle.remove()
    inserted.handles.clear()
