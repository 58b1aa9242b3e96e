"""Measure image classifiers: accuracy, agreement with the float model, size; for the command line and the examples."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from hfq.errors import DataError
from hfq.evaluation.classification import classify
from hfq.evaluation.memory import disk_bytes
from hfq.integrations import environment, measure
from hfq.integrations.inputs_vision import Images, labels_for, open_images

__all__ = ["PROTOCOL", "calibration", "is_image_model", "load", "load_processor", "prepared", "row"]

PROTOCOL = "Top-1 of {count} images prepared by the model's own image processor, float32."
load = measure.load_model


def is_image_model(name: str | os.PathLike[str]) -> bool:
    """Whether the config of a folder, Hub id or demo name is that of an image classifier."""
    from transformers import AutoConfig

    if str(name) == measure.DEMO:
        return False
    try:
        architectures = AutoConfig.from_pretrained(measure.resolve(name)).architectures or []
    except (OSError, ValueError):
        return False  # loading the model says what is wrong
    return any(architecture.endswith("ForImageClassification") for architecture in architectures)


def load_processor(name: str | os.PathLike[str]) -> Any:
    """Image processor of a folder or Hub id.

    Raises:
        DataError: it has none.
    """
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(measure.resolve(name))
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"{name} has no image processor: {str(error).strip().splitlines()[0]}") from error


def prepared(images: Images, model: Any, processor: Any) -> tuple[Tensor, Tensor]:
    """``(pixel_values [N, C, H, W], labels [N])`` as ``model`` wants them.

    Raises:
        DataError: sizes, channels or classes that the model does not have.
    """
    from hfq.calibration.images import check_size

    pixels = images.pixels(processor)
    check_size(tuple(pixels.shape), model, "the images")
    return pixels, labels_for(images, model)


def calibration(source: str, processor: Any, count: int, seed: int = 0) -> Tensor:
    """``pixel_values`` of ``count`` training images of ``source``.

    Raises:
        DataError: fewer than two images, or all of one class.
    """
    images = open_images(source, "train", count, seed)
    if len(images) < 2 or len(set(images.labels)) < 2:
        what = "one image" if len(images) < 2 else f"images of one class ({images.names[images.labels[0]]})"
        raise DataError(f"{source}: calibration on {what} measures ranges that others do not keep: give more")
    return images.pixels(processor)


def row(name: str, model: Any, pixels: Tensor, labels: Tensor | None, *, reference: Any = None,
        folder: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Quality and size of one model.

    Args:
        reference: the float model, or its logits.
        folder: where the model is saved, for its bytes on disk.

    Returns:
        Keys of :data:`hfq.integrations.results.COLUMNS`.
    """
    found = classify(model, pixels, labels, reference=reference, progress=environment.progress)
    entry: dict[str, Any] = {"name": name, "accuracy": found.top1, "agreement": found.agreement, "kl": found.kl}
    if folder is not None and os.path.isdir(folder):
        entry["disk_bytes"] = disk_bytes(folder)
    report = getattr(model, "hfq_report", None)
    if report is not None:
        entry |= {
            "bits_per_weight": report.bits_per_weight(), "quantize_seconds": report.totals.get("seconds"),
            "peak_memory_bytes": report.totals.get("peak_memory_bytes"),
            "kernel": measure.kernels_used(model, len(pixels)),
        }
    return {key: value for key, value in entry.items() if value is not None}


def compared(names: Sequence[str], data: str, count: int | None) -> tuple[list[dict[str, Any]], Images]:
    """One row a model on the same images; agreement and KL are to the first."""
    images = open_images(data, "test", count)
    rows: list[dict[str, Any]] = []
    reference: Tensor | None = None
    for name in names:
        model = load(name)
        pixels, labels = prepared(images, model, load_processor(name))
        label = Path(name).name or name
        label = name if any(label == entry["name"] for entry in rows) else label
        rows.append(row(label, model, pixels, labels, reference=reference, folder=measure.resolve(name)))
        if reference is None and len(names) > 1:
            from hfq.evaluation.classification import image_logits

            reference = image_logits(model, pixels)
    return rows, images
