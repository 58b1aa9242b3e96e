"""The loop: mini-batches of rows, an optimiser with a schedule, gradients summed over processes, a file to go on from.

What is trained is an :class:`Objective`. Rows of a step do not depend on the steps before, so a run that was stopped
goes on to the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from hfq.calibration import ranks
from hfq.calibration.cache import rebuild
from hfq.calibration.rows import batch_rows
from hfq.errors import ConfigError, DataError, QuantizationError
from hfq.training.progress import Saved

__all__ = ["SCHEDULES", "Gradients", "Objective", "Rows", "fit", "gathered", "mean_loss", "rows_of"]

SCHEDULES = ("cosine", "linear", "constant")
ProgressBar = Callable[[int, str], Any]


class Rows(Protocol):
    """Which rows a step takes."""

    def parts(self, step: int, micro_batch: int) -> Iterator[dict[str, Any]]:
        """This process' share of the rows of a step, in passes of ``micro_batch`` rows at most."""


class Objective(Protocol):
    """What a step trains: ``start``, then ``add`` for each part of the mini-batch, then ``finish``."""

    def start(self) -> None:
        """Prepare a step."""

    def add(self, batch: Mapping[str, Any]) -> tuple[float, int]:
        """Forward and backward of the loss summed over tokens; that sum, and the number of tokens (0: the loss of a
        step is the sum)."""

    def finish(self) -> None:
        """Leave the gradients at the parameters."""


@dataclass
class Gradients:
    """What happens to the gradients of a step before the optimiser takes it.

    Attributes:
        clip: largest norm of all of them together; longer ones are scaled down.
        watched: parameters whose norm is kept; default all.
        norms: one a step, before clipping; filled in.
    """

    clip: float | None = None
    watched: Sequence[torch.Tensor] | None = None
    norms: list[float] = field(default_factory=list)

    def take(self, parameters: Sequence[torch.Tensor]) -> None:
        watched = parameters if self.watched is None else self.watched
        self.norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in watched if p.grad is not None])))
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self.clip)


def fit(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Mapping[str, Any]] | Rows,
    *,
    steps: int,
    batch_size: int = 8,
    micro_batch: int = 1,
    schedule: str = "cosine",
    seed: int = 0,
    saved: Saved | None = None,
    progress: ProgressBar | None = None,
    before: Callable[[int], None] | None = None,
    after: Callable[[], None] | None = None,
    warmup: float = 0.0,
    gradients: Gradients | None = None,
    where: str = "training",
) -> list[float]:
    """Train; the gradient of a step is that of the mean loss over all tokens of its rows, in all processes.

    Args:
        objective: what is trained.
        optimizer: of its parameters; the learning rates of its groups are where the schedule starts.
        batches: forward keywords, rows along axis 0 (the same in every process); or what chooses the rows of a step.
        steps: steps in all, those of an earlier run included.
        batch_size: rows a step, over all processes; every row is used before one is used again. Of batches only.
        micro_batch: rows in one forward pass at most (rows of one batch).
        schedule: "cosine" or "linear" to 0, or "constant".
        seed: of the order of the rows.
        saved: where the state is kept; a run that finds one there goes on from it.
        progress: makes a progress bar.
        before: called with the number of every step, before it.
        after: called after every step.
        warmup: share of the steps over which the learning rates rise from 0 to what the schedule says.
        gradients: how they are clipped, and where their norms are kept.
        where: named in errors and on the progress bar.

    Returns:
        The mean loss of every step.

    Raises:
        ConfigError, DataError: options or data make no training. QuantizationError: the loss is not finite.
    """
    rows = batches if hasattr(batches, "parts") else _Rows(batches, batch_size, seed)  # type: ignore[arg-type]
    if steps < 0 or micro_batch < 1 or schedule not in SCHEDULES:
        raise ConfigError(f"steps={steps}, micro_batch={micro_batch}, schedule={schedule!r}: at least 0 and 1, one of "
                          f"{SCHEDULES}")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not parameters or not steps:
        return []
    rates = [group["lr"] for group in optimizer.param_groups]
    curve = saved.load(optimizer) if saved is not None else []
    bar = progress(steps, where) if progress is not None else None
    for _ in curve if bar is not None else ():
        bar.update()  # type: ignore[union-attr]
    for step in range(len(curve), steps):
        factor = _factor(schedule, step, steps) * min(1.0, (step + 1) / max(1.0, warmup * steps))
        _set_rates(optimizer, [rate * factor for rate in rates])
        if before is not None:
            before(step)
        optimizer.zero_grad(set_to_none=True)
        objective.start()
        total, count = 0.0, 0
        for part in rows.parts(step, micro_batch):  # type: ignore[union-attr]
            loss, tokens = objective.add(part)
            total, count = total + loss, count + tokens
        objective.finish()
        value = _reduce(parameters, total, count)
        if not math.isfinite(value):
            raise QuantizationError(f"{where}: the loss is {value} in step {step}: use smaller learning rates, or no "
                                    "mixed precision")
        if gradients is not None:
            gradients.take(parameters)
        optimizer.step()
        if after is not None:
            after()
        curve.append(value)
        if saved is not None:
            saved.offer(optimizer, curve, last=step + 1 == steps)
        if bar is not None:
            bar.update()
    if bar is not None:
        bar.close()
    _set_rates(optimizer, rates)
    return curve


def mean_loss(evaluate: Callable[[Mapping[str, Any]], tuple[float, int]], batches: Sequence[Mapping[str, Any]],
              rows: int | None = None, micro_batch: int = 1) -> float:
    """Mean over the tokens of the first ``rows`` rows (default all), in all processes.

    ``evaluate(batch)`` gives the summed loss and the number of tokens.
    """
    found = [(i, row) for i, batch in enumerate(batches) for row in range(batch_rows(dict(batch)))][:rows]
    mine = found[ranks.rank() :: ranks.count()]
    sums = torch.zeros(2, dtype=torch.float64)
    for part in gathered(batches, mine, micro_batch):
        sums += torch.tensor(evaluate(part), dtype=torch.float64)
    total, count = ranks.sum_(sums).tolist()
    return total / max(count, 1)


def rows_of(batch: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Some rows of a batch; what has no axis for rows is shared."""
    size, index = batch_rows(dict(batch)), torch.tensor(list(rows))
    return rebuild(dict(batch), lambda _, t: t[index.to(t.device)] if t.ndim and t.shape[0] == size else t)


def _set_rates(optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _factor(schedule: str, step: int, steps: int) -> float:
    share = step / steps
    return {"cosine": 0.5 * (1 + math.cos(math.pi * share)), "linear": 1 - share, "constant": 1.0}[schedule]


def _reduce(parameters: list[torch.Tensor], total: float, count: int) -> float:
    """Divide the gradients by the number of tokens in all processes, after summing both; the mean loss.

    A parameter that no process has a gradient of stays without one: an optimiser leaves it as it is.
    """
    device = parameters[0].device
    head = torch.tensor([total, float(count)], dtype=torch.float64)
    if ranks.count() > 1:
        reached = torch.tensor([float(p.grad is not None) for p in parameters], dtype=torch.float64)
        head = ranks.sum_(torch.cat([head, reached]).to(device)).cpu()
        parameters = [p for p, seen in zip(parameters, head[2:].tolist(), strict=True) if seen]
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        flat = ranks.sum_(torch.cat([p.grad.flatten().to(device) for p in parameters]))  # type: ignore[union-attr]
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad.copy_(part.view_as(p))  # type: ignore[union-attr]
    tokens = max(float(head[1]), 1.0)
    for p in parameters:
        if p.grad is not None:
            p.grad.div_(tokens)
    return float(head[0]) / tokens


class _Rows:
    """Which rows a step takes: all of them in a random order, then again in another."""

    def __init__(self, batches: Sequence[Mapping[str, Any]], batch_size: int, seed: int) -> None:
        self.batches, self.seed = batches, seed
        self.places = [(i, row) for i, batch in enumerate(batches) for row in range(batch_rows(dict(batch)))]
        if not self.places:
            raise DataError("training needs data: no batches were given")
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}: at least 1 is needed")
        self.size = batch_size
        self._orders: dict[int, list[int]] = {}

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._orders = {epoch: torch.randperm(len(self.places), generator=generator).tolist()}
        return self._orders[epoch]

    def parts(self, step: int, micro_batch: int) -> Iterator[dict[str, Any]]:
        """This process' share of the rows of a step, in passes."""
        numbers = range(step * self.size, (step + 1) * self.size)
        chosen = [self.places[self._order(n // len(self.places))[n % len(self.places)]] for n in numbers]
        yield from gathered(self.batches, chosen[ranks.rank() :: ranks.count()], micro_batch)


def gathered(
    batches: Sequence[Mapping[str, Any]], places: Sequence[tuple[int, int]], micro_batch: int
) -> Iterator[dict[str, Any]]:
    """Rows at ``places`` (batch, row), ``micro_batch`` of one batch at once."""
    by_batch: dict[int, list[int]] = {}
    for i, row in places:
        by_batch.setdefault(i, []).append(row)
    for i in sorted(by_batch):
        found = sorted(by_batch[i])
        for start in range(0, len(found), micro_batch):
            yield rows_of(batches[i], found[start : start + micro_batch])
