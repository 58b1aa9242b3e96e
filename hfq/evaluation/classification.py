"""What an image classifier answers: how often it is right, and how close it stays to the float model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfq.errors import DataError

__all__ = ["Classification", "classify", "image_logits"]

Model = nn.Module | Callable[[Tensor], Any]


@dataclass(frozen=True)
class Classification:
    """Means over all images.

    Attributes:
        images: how many there were.
        top1: share whose most likely class is the label; ``None`` without labels.
        agreement: share whose most likely class is the reference's; ``None`` without a reference, as the next.
        kl: KL(reference || model) of the class distributions, in nats.
        max_abs: largest absolute difference of two logits.
    """

    images: int
    top1: float | None = None
    agreement: float | None = None
    kl: float | None = None
    max_abs: float | None = None


def classify(
    model: Model, pixels: Tensor, labels: Tensor | None = None, *, reference: Model | Tensor | None = None,
    batch_size: int = 32, progress: Callable[[int, str], Any] | None = None,
) -> Classification:
    """Measure ``model`` on images.

    Args:
        model: a module or a function of ``pixels``; gives logits ``[B, K]`` or an object with ``.logits``.
        pixels: float ``[N, C, H, W]``, prepared as the model wants them.
        labels: int64 ``[N]``.
        reference: the float model, or its logits ``[N, K]`` (computed once for many models).
        batch_size: images a forward.

    Raises:
        DataError: no image, pixels of another form or not finite, labels that do not fit, logits that are not finite,
            or a reference with another number of classes.
    """
    logits = image_logits(model, pixels, batch_size=batch_size, progress=progress)
    if not torch.isfinite(logits).all():
        raise DataError("the model's logits are not finite: a layer overflowed, or its weights are damaged")
    found: dict[str, float] = {}
    if labels is not None:
        _check_labels(labels, logits)
        found["top1"] = float((logits.argmax(-1) == labels.cpu()).double().mean())
    if reference is not None:
        wanted = reference if isinstance(reference, Tensor) else image_logits(reference, pixels, batch_size=batch_size)
        wanted = wanted.float().cpu()
        if wanted.shape != logits.shape:
            raise DataError(f"logits of shapes {tuple(wanted.shape)} and {tuple(logits.shape)} cannot be compared")
        log_p, log_q = wanted.double().log_softmax(-1), logits.double().log_softmax(-1)
        found["agreement"] = float((wanted.argmax(-1) == logits.argmax(-1)).double().mean())
        found["kl"] = max(0.0, float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))
        found["max_abs"] = float((wanted - logits).abs().max())
    return Classification(len(logits), **found)


@torch.no_grad()
def image_logits(
    model: Model, pixels: Tensor, *, batch_size: int = 32, progress: Callable[[int, str], Any] | None = None
) -> Tensor:
    """Logits float32 ``[N, K]`` on the CPU, in evaluation mode.

    Raises:
        DataError: no image, or pixels that are not finite floats ``[N, C, H, W]``.
    """
    _check_pixels(pixels)
    module = model if isinstance(model, nn.Module) else None
    training = module is not None and module.training
    if module is not None:
        module.eval()
    bar = None if progress is None else progress(math.ceil(len(pixels) / batch_size), "images")
    found = []
    try:
        for part in pixels.split(batch_size):
            result = model(part if module is None else part.to(*_place(module)))
            found.append((result if isinstance(result, Tensor) else result.logits).float().cpu())
            if bar is not None:
                bar.update()
    finally:
        if module is not None:
            module.train(training)
        if bar is not None:
            bar.close()
    if any(part.ndim != 2 for part in found):
        raise DataError(f"logits of shape {tuple(found[0].shape)}: one row of classes an image is needed")
    return torch.cat(found)


def _check_pixels(pixels: Tensor) -> None:
    if pixels.ndim != 4 or not len(pixels):
        raise DataError(f"images of shape {tuple(pixels.shape)}: [images, channels, height, width] is needed")
    if not pixels.is_floating_point():
        raise DataError(f"images of {pixels.dtype}: the model's image processor makes floats of them first")
    if not torch.isfinite(pixels).all():
        raise DataError("images have NaN or infinite elements")


def _check_labels(labels: Tensor, logits: Tensor) -> None:
    count, classes = logits.shape
    if labels.shape != (count,) or labels.dtype.is_floating_point:
        raise DataError(f"labels of shape {tuple(labels.shape)} and {labels.dtype} for {count} images: one whole "
                        "number an image is needed")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(f"labels from {low} to {high} for {classes} classes: 0 to {classes - 1} are allowed")


def _place(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where images go and in which precision: as the weight of the first layer that has data."""
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            if not parameter.is_meta and parameter.is_floating_point() and parameter.dtype.itemsize > 1:
                return parameter.device, getattr(part, "compute_dtype", parameter.dtype)  # scales say nothing of it
    return torch.device("cpu"), torch.float32
