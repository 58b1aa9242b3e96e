"""Distillation of a model into its own quantized form: the student's logits follow those of the float model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hfq.calibration.step import mask_for
from hfq.training.loop import mean_loss
from hfq.training.student import Student

__all__ = ["Distillation"]

Divergence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Distillation:
    """An objective of :func:`hfq.training.loop.fit`: mean over the tokens of a divergence of logits.

    Args:
        student: also gives the teacher, which is the model as it is.
        divergence: ``divergence(student logits, teacher logits)``, one number a token.
    """

    def __init__(self, student: Student, divergence: Divergence) -> None:
        self.student, self.divergence = student, divergence

    def start(self) -> None:
        self.student.start()

    def finish(self) -> None:
        self.student.finish()

    def add(self, batch: Mapping[str, Any]) -> tuple[float, int]:
        """Forward and backward of one part; its summed loss and its number of tokens."""
        wanted = self.student.teacher(batch)
        with self.student.running():
            loss, count = self._loss(batch, wanted)
            loss.backward()
        return float(loss.detach()), count

    @torch.no_grad()
    def mean(self, batches: Sequence[Mapping[str, Any]], rows: int | None = None, micro_batch: int = 1) -> float:
        """The loss over the first ``rows`` rows (default all) with the transforms as they are now."""
        self.student.start()
        try:
            return mean_loss(self._evaluate, batches, rows, micro_batch)
        finally:
            self.student.drop()

    def _evaluate(self, batch: Mapping[str, Any]) -> tuple[float, int]:
        wanted = self.student.teacher(batch)
        with self.student.running():
            loss, count = self._loss(batch, wanted)
        return float(loss), count

    def _loss(self, batch: Mapping[str, Any], wanted: torch.Tensor) -> tuple[torch.Tensor, int]:
        found = self.student(batch)
        mask = mask_for(batch, (found.shape[0], found.shape[1])) if found.dim() == 3 else None
        if mask is not None:
            mask = mask.to(found.device)
            found, wanted = found[mask], wanted[mask]
        per_token = self.divergence(found, wanted)
        return per_token.sum(), per_token.numel()
