"""Distillation of a denoiser into its own quantized form, on the trajectories of the float model.

The inputs of a step do not depend on the student: they are calls of the float model that were recorded from noise to
picture, in the order in which they were made. No data but noise (and prompts) is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from hfq.calibration import ranks
from hfq.calibration.rows import batch_rows
from hfq.errors import ConfigError, DataError, QuantizationError
from hfq.layers import times
from hfq.training.loop import rows_of
from hfq.training.student import logits_of

__all__ = ["Denoising", "Trajectories", "combined"]


class _Student(Protocol):
    """What trains: :class:`hfq.training.substitutes.Substitutes`, or anything that does these."""

    model: nn.Module

    def __call__(self, batch: Mapping[str, Any]) -> torch.Tensor: ...
    def teacher(self, batch: Mapping[str, Any]) -> torch.Tensor: ...
    def running(self) -> Any: ...


class Trajectories:
    """Rows of :func:`hfq.training.loop.fit`: a step takes whole calls, each of them once before it takes one again.

    Args:
        calls: batches of forward keywords of a denoiser, each at one timestep.
        guided: both halves of guidance are in every call; parts of it have both halves of their samples.
        together: calls a step.
        seed: of an order at random, another one in every round; ``None`` keeps the order of the data.
    """

    def __init__(
        self, calls: Sequence[Mapping[str, Any]], guided: bool = False, *, together: int = 1, seed: int | None = None
    ) -> None:
        if not len(calls):
            raise DataError("training needs data: no calls were given")
        self.calls, self.guided, self.together, self.seed = calls, guided, together, seed
        self._order: tuple[int, list[int]] = (-1, [])

    def parts(self, step: int, micro_batch: int) -> Iterator[dict[str, Any]]:
        """This process' share of the samples of a step, ``micro_batch`` of them in a pass."""
        for number in range(step * self.together, (step + 1) * self.together):
            yield from self._passes(self.calls[self._place(number)], micro_batch)

    def _place(self, number: int) -> int:
        round_, place = divmod(number, len(self.calls))
        if self.seed is None:
            return place
        if self._order[0] != round_:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + round_)
            self._order = round_, torch.randperm(len(self.calls), generator=generator).tolist()
        return self._order[1][place]

    def _passes(self, call: Mapping[str, Any], micro_batch: int) -> Iterator[dict[str, Any]]:
        rows = batch_rows(call)
        if self.guided and rows % 2:
            raise DataError(f"a call of {rows} rows has no two halves of guidance: record the calls with guidance")
        count = rows // 2 if self.guided else rows
        mine = list(range(count))[ranks.rank() :: ranks.count()]
        for first in range(0, len(mine), micro_batch):
            own = mine[first : first + micro_batch]
            yield rows_of(call, own + [count + row for row in own] if self.guided else own)


def combined(prediction: torch.Tensor, guidance: float, condition_first: bool = False) -> torch.Tensor:
    """``e_u + guidance (e_c - e_u)`` of a prediction ``[2 B, ...]`` for both halves.

    Args:
        condition_first: the half with the condition is the first one (pipelines of class-conditional transformers).
    """
    one, other = prediction.chunk(2)
    plain, asked = (other, one) if condition_first else (one, other)
    return plain + guidance * (asked - plain)


class Denoising:
    """An objective of :func:`hfq.training.loop.fit`: squared distance of the student's prediction to the teacher's.

    Args:
        student: also gives the teacher, which is the model as it is. Every pass runs at the timestep of its batch
            (:func:`hfq.layers.times.at`).
        guidance: compare what guidance of this scale makes of both halves; ``None`` compares all rows.
        condition_first: as of :func:`combined`.
        reduction: "sum" over all elements of a step, or their "mean".
        weight: factor of the loss at a timestep.
        layers: modules whose outputs are compared too, each like the prediction (without guidance).
        whole: factor of the loss of the prediction; 0 compares the layers alone.
    """

    def __init__(
        self, student: _Student, *, guidance: float | None = None, condition_first: bool = False,
        reduction: str = "sum", weight: Callable[[float], float] | None = None, layers: Sequence[str] = (),
        whole: float = 1.0,
    ) -> None:
        if reduction not in ("sum", "mean"):
            raise ConfigError(f"reduction={reduction!r}: 'sum' or 'mean'")
        self.student, self.guidance, self.condition_first = student, guidance, condition_first
        self.reduction, self.weight, self.layers, self.whole = reduction, weight, tuple(layers), whole

    def start(self) -> None:
        """Nothing is prepared: weights are made in the pass."""

    def finish(self) -> None:
        """Gradients are where they belong."""

    def add(self, batch: Mapping[str, Any]) -> tuple[float, int]:
        """Forward and backward of the loss of a part of a step."""
        loss, samples = self._loss(batch, self.reduction)
        loss.backward()
        return float(loss.detach()), 0 if self.reduction == "sum" else samples

    @torch.no_grad()
    def mean(self, calls: Sequence[Mapping[str, Any]], micro_batch: int = 1 << 20) -> float:
        """The mean of the squared distance (with all factors) over ``calls``, in all processes."""
        data, sums = Trajectories(calls, self.guidance is not None), torch.zeros(2, dtype=torch.float64)
        for part in (part for step in range(len(calls)) for part in data.parts(step, micro_batch)):
            loss, samples = self._loss(part, "mean")
            sums += torch.tensor([float(loss), samples], dtype=torch.float64)
        total, count = ranks.sum_(sums).tolist()
        return total / max(count, 1)

    def _loss(self, batch: Mapping[str, Any], reduction: str) -> tuple[torch.Tensor, int]:
        """The loss summed over samples, and their number."""
        timestep = times.read(self.student.model, (), batch)
        with times.at(timestep):
            with self._watched() as wanted:
                target = self.student.teacher(batch)
            with self.student.running(), self._watched() as found:
                prediction = self.student(batch)
        samples = self._compared(prediction).shape[0]
        pairs = [(self._compared(prediction), self._compared(target), self.whole)] if self.whole else []
        pairs += [(self._output(found, name), self._output(wanted, name), 1.0) for name in self.layers]
        total = sum(_distance(one, other, samples, reduction) * factor for one, other, factor in pairs)
        return total * (1.0 if self.weight is None else self.weight(timestep)), samples  # type: ignore[return-value]

    def _compared(self, prediction: torch.Tensor) -> torch.Tensor:
        return prediction if self.guidance is None else combined(prediction, self.guidance, self.condition_first)

    @contextmanager
    def _watched(self) -> Iterator[dict[str, torch.Tensor]]:
        """The outputs of the layers that are compared; those of the last pass inside."""
        kept: dict[str, torch.Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                kept[name] = logits_of(output)

            return hook

        with ExitStack() as stack:
            for name in self.layers:
                module = self.student.model.get_submodule(name)
                stack.callback(module.register_forward_hook(keep(name)).remove)
            yield kept

    @staticmethod
    def _output(kept: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        if name not in kept:
            raise QuantizationError(f"{name}: the data does not reach it, and its output cannot be compared")
        return kept[name]


def _distance(found: torch.Tensor, wanted: torch.Tensor, samples: int, reduction: str) -> torch.Tensor:
    """Summed squares; of a mean, the mean over a sample's elements times the number of samples."""
    error = (found.float() - wanted.detach().float()).square()
    return error.sum() if reduction == "sum" else error.mean() * samples
