"""Training of a denoiser in stages, each with layers of its own: their weights move, all others stay.

The float model is the teacher; the student computes on the same inputs with rounded weights and activations. A stage
compares what both predict, and the outputs of its layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hfq.report import Report
from hfq.training.denoise import Denoising
from hfq.training.loop import ProgressBar, fit
from hfq.training.progress import Saved
from hfq.training.substitutes import Substitutes
from hfq.training.turns import Turns

__all__ = ["Stage", "tune"]


@dataclass(frozen=True)
class Stage:
    """A part of the training.

    Attributes:
        name: of its curve.
        weights, scales: what is trained.
        lr, lr_scales: of both; they stay.
        compared: layers whose outputs are compared beside the prediction.
        steps: updates for every timestep.
    """

    name: str
    weights: Sequence[nn.Parameter]
    scales: Sequence[nn.Parameter]
    lr: float
    lr_scales: float
    compared: Sequence[str]
    steps: int

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Of the optimiser."""
        every = [{"params": list(self.weights), "lr": self.lr}, {"params": list(self.scales), "lr": self.lr_scales}]
        return [group for group in every if group["params"]]


def tune(
    student: Substitutes, stages: Sequence[Stage], calls: Sequence[Mapping[str, Any]], report: Report, *,
    batch_size: int = 8, seed: int = 0, saved: Mapping[str, Saved] | None = None,
    progress: ProgressBar | None = None, looked: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Train stage after stage; steps take the timesteps in turn, and one optimiser of the Adam kind serves a stage.

    Args:
        calls: of the denoiser, each at one timestep.
        batch_size: rows of a step.
        saved: where the state of a stage is kept, by its name.
        looked: calls on which the error of the prediction is measured before, between and after; default none.

    The report gets the curve of each stage, and of that error ("prediction").
    """
    error: list[float] = []

    def look() -> None:
        if looked is not None:
            error.append(float(f"{Denoising(student, reduction='mean').mean(looked, batch_size):.6g}"))

    own = [p for stage in stages for p in (*stage.weights, *stage.scales)]
    rows = Turns(calls, batch_size, seed)
    with _frozen([*student.model.parameters(), *own]):
        look()
        for stage in stages:
            trained = [p for group in stage.groups for p in group["params"]]
            if not trained or not stage.steps:
                continue
            for p in trained:
                p.requires_grad_(True)
            objective = Denoising(student, reduction="mean", layers=stage.compared)
            curve = fit(
                objective, torch.optim.Adam(stage.groups), rows, steps=stage.steps * len(rows),
                micro_batch=batch_size, schedule="constant", saved=(saved or {}).get(stage.name), progress=progress,
                where=f"tuning {stage.name}",
            )  # fmt: skip
            for p in trained:
                p.requires_grad_(False)
                p.grad = None
            report.curves[stage.name] = [float(f"{value:.6g}") for value in curve]
            look()
    if error:
        report.curves["prediction"] = error


@contextmanager
def _frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, no gradient reaches what is not asked for."""
    before = [p.requires_grad for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(False)
        yield
    finally:
        for p, needed in zip(parameters, before, strict=True):
            p.requires_grad_(needed)
