"""Pictures beside cards and tables: accuracy against bits, bits of each layer, histograms, curves of trainings (extra
``plots``)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hfq.errors import ConfigError
from hfq.report import Report

__all__ = ["FOLDER", "accuracy_against_bits", "bits_per_layer", "collect", "curves", "histograms", "strips", "write"]

FOLDER = "plots"


def write(folder: str | os.PathLike[str], model: Any, pixels: Tensor, rows: Sequence[Mapping[str, Any]] = ()
          ) -> list[Path]:
    """All pictures of a packed image model into ``folder/plots``; the card shows what lies there.

    Args:
        model: with ``hfq_report``.
        pixels: a few prepared images ``[N, C, H, W]``, for the histograms.
        rows: measured rows; those with bits and an accuracy are drawn.
    """
    _need()
    target = Path(folder) / FOLDER
    target.mkdir(parents=True, exist_ok=True)
    made = [histograms(collect(model, pixels), target / "histograms.png")]
    report = getattr(model, "hfq_report", None)
    if report is not None and any(row.bits for row in report.packed):
        made.append(bits_per_layer(report, target / "bits.png"))
    if any(_point(row) for row in rows):
        made.append(accuracy_against_bits(rows, target / "accuracy.png"))
    return made


def accuracy_against_bits(rows: Sequence[Mapping[str, Any]], path: Path, title: str = "") -> Path:
    """Top-1 over stored bits a weight: rows called "model: method, width" make one line a model and method.

    Raises:
        ConfigError: no row has both, or matplotlib is missing.
    """
    points = [row for row in rows if _point(row)]
    if not points:
        raise ConfigError("no row has both bits per weight and an accuracy: nothing to plot")
    figure, axes = _figure()
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in points:
        lines.setdefault(row["name"].rpartition(", ")[0] or row["name"], []).append(
            (row["bits_per_weight"], 100 * row["accuracy"]))  # fmt: skip
    for label, found in lines.items():
        axes.plot(*zip(*sorted(found), strict=True), marker="o", label=label)
    for row in rows:
        if row.get("accuracy") is not None and row.get("bits_per_weight") is None:
            axes.axhline(100 * row["accuracy"], color="black", linestyle=":", linewidth=1)
    axes.set(xlabel="stored bits per weight", ylabel="top-1 (%)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)
    return path


def bits_per_layer(report: Report, path: Path) -> Path:
    """A bar a packed layer, in the order of the report."""
    rows = [row for row in report.packed if row.bits]
    if not rows:
        raise ConfigError("the report has no packed layer: nothing to plot")
    figure, axes = _figure(height=max(3.0, 0.16 * len(rows) + 1))
    axes.barh(range(len(rows)), [row.bits or 0 for row in rows])
    axes.set_yticks(range(len(rows)), [row.module for row in rows], fontsize=6)
    axes.invert_yaxis()
    axes.set(xlabel="stored bits per weight, metadata included")
    axes.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=150)
    return path


def histograms(layers: Mapping[str, tuple[Tensor, Tensor]], path: Path) -> Path:
    """One line of two histograms a layer: its weights and its inputs (counts on a logarithmic axis).

    Args:
        layers: name to ``(weights, inputs)``, of any shape.
    """
    if not layers:
        raise ConfigError("the model has no linear layer or convolution that ran: nothing to plot")
    _need()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.7 * len(layers)), layout="constrained")
    grid = figure.subplots(len(layers), 2, squeeze=False)
    for line, (name, parts) in zip(grid, layers.items(), strict=True):
        for axes, values, what in zip(line, parts, ("weights", "inputs"), strict=True):
            axes.hist(values.detach().float().flatten().cpu().numpy(), bins=101, log=True)
            axes.set_title(f"{name}: {what}", fontsize=7)
            axes.tick_params(labelsize=6)
    figure.savefig(path, dpi=150)
    return path


def curves(lines: Mapping[str, Mapping[str, Sequence[float]]], path: Path, title: str = "", average: int = 10) -> Path:
    """What is measured at every step of several trainings: a panel a quantity, a line a training.

    Args:
        lines: quantity to name to one number a step, above zero.
        average: steps whose geometric mean is drawn, so that single mini-batches do not hide the course.
    """
    if not lines:
        raise ConfigError("there are no curves: nothing to plot")
    _need()
    import numpy
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(lines), 4.0), layout="constrained")
    for axes, (quantity, found) in zip(figure.subplots(1, len(lines), squeeze=False)[0], lines.items(), strict=True):
        for name, values in found.items():
            width = min(average, len(values))
            smooth = numpy.exp(numpy.convolve(numpy.log(values), numpy.ones(width) / width, "valid"))
            axes.plot(numpy.arange(len(smooth)) + width // 2, smooth, label=name, linewidth=1.2)
        axes.set(xlabel="step", ylabel=quantity, yscale="log", title=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)
    return path


def strips(rows: Mapping[str, Any], path: Path, scale: int = 2) -> Path:
    """Rows of pictures under each other, each with its name: what several models draw from the same seeds.

    Args:
        rows: name to an image (PIL or array ``[H, W]``), pictures side by side.
        scale: points of the file to a pixel.
    """
    if not rows:
        raise ConfigError("there are no pictures: nothing to show")
    _need()
    import numpy
    from matplotlib.figure import Figure

    images = {name: numpy.asarray(image) for name, image in rows.items()}
    height, width = next(iter(images.values())).shape[:2]
    size = (scale * width / 100 + 2.2, len(images) * scale * height / 100)
    figure = Figure(figsize=size, facecolor="white")
    for i, (name, image) in enumerate(images.items()):
        top = 1 - (i + 1) / len(images)
        axes = figure.add_axes((2.2 / size[0], top, 1 - 2.2 / size[0], 0.97 / len(images)))
        axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        figure.text(0.01, top + 0.5 / len(images), name, fontsize=8, va="center")
    figure.savefig(path, dpi=100)
    return path


@torch.no_grad()
def collect(model: nn.Module, pixels: Tensor, count: int = 6) -> dict[str, tuple[Tensor, Tensor]]:
    """Weights and inputs of ``count`` layers spread over the model's depth, on at most 8 images.

    Packed layers where the model has them, else linear layers and convolutions; weights as they are multiplied.
    """
    from hfq.layers import swap

    names = list(swap.packed_modules(model)) or [
        name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    chosen = [names[i * (len(names) - 1) // max(1, count - 1)] for i in range(count)] if len(names) > count else names
    found: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for name in dict.fromkeys(chosen):

        def keep(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            if args and isinstance(args[0], Tensor):
                found[name] = (module.weight.detach(), args[0].detach())  # type: ignore[union-attr, operator]

        handles.append(model.get_submodule(name).register_forward_pre_hook(keep))
    try:
        model(pixel_values=pixels[:8])
    finally:
        for handle in handles:
            handle.remove()
    return found


def _point(row: Mapping[str, Any]) -> bool:
    return row.get("bits_per_weight") is not None and row.get("accuracy") is not None


def _figure(height: float = 4.5) -> tuple[Any, Any]:
    _need()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, height), layout="constrained")
    return figure, figure.add_subplot()


def _need() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib: pip install 'hfq[plots]'")
