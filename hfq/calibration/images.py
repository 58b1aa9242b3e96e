"""Images as calibration data: recognised, prepared by the model's processor, and checked against the model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from hfq.errors import DataError

__all__ = ["check", "check_size", "column", "is_image", "prepared"]

# No image processor gives numbers as large as this.
UNSCALED = 100.0
_LABELS = ("label", "labels", "fine_label")


def is_image(item: Any) -> bool:
    """Whether ``item`` is a picture as PIL has them (not imported here)."""
    return hasattr(item, "getbands") and hasattr(item, "convert")


def column(row: Any) -> str | int | None:
    """Where the picture of a row is: a column of a mapping, a place of a tuple, -1 if the row is one; else ``None``."""
    if is_image(row):
        return -1
    if isinstance(row, Mapping):
        return next((key for key, value in row.items() if is_image(value)), None)
    if isinstance(row, (tuple, list)):
        return next((place for place, value in enumerate(row) if is_image(value)), None)
    return None


def prepared(rows: Iterable[Any], where: str | int, processor: Callable[..., Any] | None) -> Iterator[dict[str, Any]]:
    """Rows of ``pixel_values`` ``[C, H, W]`` made by ``processor``.

    Raises:
        DataError: no processor, a row without a picture, or rows whose labels are all the same.
    """
    if processor is None or not callable(processor):
        raise DataError("pictures need the model's image processor: pass processor=... to the config, or tensors of "
                        "pixel_values")
    labels: list[Any] = []
    count = 0
    for count, row in enumerate(rows, 1):
        place = column(row)
        if place is None:
            raise DataError(f"calibration sample {count - 1} has no picture, the first one had it at {where!r}")
        picture = row if place == -1 else row[place]
        labels.append(_label(row, place))
        made = processor(images=picture.convert("RGB"), return_tensors="pt")
        if "pixel_values" not in made:
            raise DataError(f"{type(processor).__name__} made no pixel_values of a picture: is it an image processor?")
        yield {"pixel_values": made["pixel_values"][0]}
    if count > 1 and labels[0] is not None and all(label == labels[0] for label in labels):
        raise DataError(f"all {count} calibration images are of one class ({labels[0]!r}): ranges measured on one "
                        "class do not hold for the others; shuffle the data, or take images of several")


def _label(row: Any, place: str | int) -> Any:
    if isinstance(row, Mapping):
        return next((row[key] for key in _LABELS if isinstance(row.get(key), (int, str))), None)
    if place == 0 and isinstance(row, (tuple, list)) and len(row) == 2 and isinstance(row[1], (int, str)):
        return row[1]
    return None


def check(batches: Iterable[Mapping[str, Any]], model: Any) -> None:
    """Check images against the model that will read them.

    Raises:
        DataError: one image alone, or images whose size, channels or dtype the model does not take.
    """
    count, largest = 0, 0.0
    for batch in batches:
        pixels = batch.get("pixel_values")
        if not isinstance(pixels, torch.Tensor) or pixels.ndim != 4:
            return
        count += len(pixels)
        check_size(tuple(pixels.shape), model, "the calibration images")
        if not pixels.is_floating_point():
            raise DataError(f"the calibration images are of {pixels.dtype}: the model's image processor makes floats "
                            "of pictures, scaled as the model was trained")
        largest = max(largest, float(pixels.abs().max()))
    if largest > UNSCALED:
        warnings.warn(f"the calibration images hold numbers up to {largest:.0f}: image processors scale pictures to a "
                      "few units; ranges measured on these hold for no other", stacklevel=2)
    if count == 1:
        raise DataError("one calibration image: ranges measured on one image do not hold for others; give at least two")


def check_size(shape: tuple[int, ...], model: Any, what: str) -> None:
    """Raises :class:`DataError` unless images ``[N, C, H, W]`` have the channels and size of the model's config."""
    config = getattr(model, "config", None)
    channels, size = getattr(config, "num_channels", None), getattr(config, "image_size", None)
    if isinstance(channels, int) and shape[1] != channels:
        raise DataError(f"{what} have shape {list(shape)}: the model reads {channels} channels, [N, {channels}, H, W]")
    if hasattr(config, "window_size"):
        return  # windows are padded: other sizes run
    if isinstance(size, int):
        size = (size, size)
    if isinstance(size, (tuple, list)) and len(size) == 2 and tuple(shape[2:]) != tuple(size):
        raise DataError(f"{what} are {shape[2]} x {shape[3]} pixels and the model reads {size[0]} x {size[1]}: resize "
                        "them with its image processor")
