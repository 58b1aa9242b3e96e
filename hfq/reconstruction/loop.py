"""The optimisation loop: quantizers make weights, a call turns weights and inputs into outputs, gradients flow back.

The weights are computed once a step. Each part of the mini-batch runs forward and backward by itself and leaves its
gradient at the weights; one backward pass through the quantizers follows. Memory is that of one part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from hfq.calibration import ranks
from hfq.errors import ConfigError, QuantizationError
from hfq.reconstruction import losses
from hfq.reconstruction.samples import Samples

__all__ = ["optimise", "thinned"]

Forward = Callable[[dict[str, torch.Tensor], tuple[Any, ...], dict[str, Any]], torch.Tensor]
LearningRate = float | Callable[[str, nn.Parameter], float]


@torch.enable_grad()  # whatever mode the caller is in
def optimise(
    forward: Forward,
    quantizers: Mapping[str, nn.Module],
    samples: Samples,
    *,
    steps: int,
    lr: LearningRate,
    batch_size: int = 8,
    loss: str | losses.Loss = "mse",
    generator: torch.Generator | None = None,
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] = torch.optim.Adam,
    autocast: torch.dtype | None = None,
    holdout: float = 0.0,
    checks: int = 10,
    patience: int | None = None,
    micro_batch: int | None = None,
    parameters: Iterable[nn.Parameter] = (),
    penalty: Callable[[int], torch.Tensor | None] | None = None,
    keep: Literal["best", "last"] = "best",
    constant: Callable[[str], bool] = lambda name: False,
    relative: float | None = None,
    where: str = "",
) -> list[float]:
    """Train the quantizers on ``samples`` and leave them with the best parameters seen (or the last ones).

    Args:
        forward: ``forward(weights, args, kwargs)`` gives the output for ``weights``, named as the quantizers.
        quantizers: modules without arguments whose output is a tensor.
        steps: optimiser steps; the learning rate falls to 0 on a cosine.
        lr: learning rate, or a function of (name of the parameter, parameter).
        batch_size: samples of a step, over all processes; drawn without repetition until all were seen.
        loss: name or function, see :mod:`hfq.reconstruction.losses`.
        generator: CPU generator of the draws; has to be in the same state in all processes.
        optimizer: made from parameter groups.
        autocast: ``torch.bfloat16`` runs the forward pass in mixed precision.
        holdout: share of the samples that is not trained on but decides which parameters are best. 0: the mean
            training loss since the check before decides.
        checks: how often the best parameters are looked for.
        patience: stop after this many checks without improvement.
        micro_batch: samples in one forward pass at most.
        parameters: trained as well; what they act on has to be part of ``forward``.
        penalty: ``penalty(step)`` is added to the loss of a step (``None`` adds nothing); not part of the curve.
        keep: "last" where a penalty changes over the steps, so that losses of different steps say nothing.
        constant: whether the learning rate of a parameter, by name, stays as it is.
        relative: the loss is divided by its value in the first step and multiplied with this number (so that a penalty
            weighs the same for all); the curve too.
        where: named in errors.

    Returns:
        The mean loss of every step.

    Raises:
        ConfigError: options out of range. QuantizationError: the loss is not finite.
    """
    _check(steps, batch_size, holdout, autocast, samples)
    run = _Run(forward, quantizers, samples, losses.get(loss), autocast, micro_batch)
    trained = run.trainable(parameters)
    groups = [{"params": [p], "lr": lr(name, p) if callable(lr) else lr} for name, p in trained.items()]
    if not groups or steps == 0:
        return []
    adam = optimizer(groups)
    schedule = _schedule(adam, steps, [constant(name) for name in trained])
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    order = torch.randperm(samples.total, generator=generator).tolist()
    held = order[: round(holdout * samples.total)]
    draw = _Draw(order[len(held) :], batch_size, generator)
    best = _Best(trained, run.evaluate(held, batch_size) if held else math.inf)
    curve: list[float] = []
    interval, since = max(1, steps // max(checks, 1)), 0
    for step in range(steps):
        adam.zero_grad(set_to_none=True)
        value = run.gradients(draw.next(), draw.seed(), list(trained.values()))
        if relative is not None and step == 0 and value > 0:
            value = run.rescale(relative / value, trained.values()) * value
        if penalty is not None and (extra := penalty(step)) is not None and extra.requires_grad:
            extra.backward()
        _check_loss(value, step, where)
        adam.step()
        schedule.step()
        curve.append(value)
        since += 1
        if (step + 1) % interval == 0 or step + 1 == steps:
            best.offer(run.evaluate(held, batch_size) if held else sum(curve[-since:]) / since)
            since = 0
            if patience is not None and best.age >= patience:
                break
    if keep == "best":
        best.restore()
    return curve


def thinned(curve: list[float], points: int = 100) -> list[float]:
    """A loss curve short enough for a report: means over equal stretches."""
    width = -(-len(curve) // points) if curve else 1
    parts = (curve[i : i + width] for i in range(0, len(curve), width))
    return [float(f"{sum(part) / len(part):.6g}") for part in parts]


class _Run:
    def __init__(
        self,
        forward: Forward,
        quantizers: Mapping[str, nn.Module],
        samples: Samples,
        loss: losses.Loss,
        autocast: torch.dtype | None,
        micro_batch: int | None,
    ) -> None:
        self.forward, self.quantizers, self.samples, self.loss = forward, dict(quantizers), samples, loss
        self.autocast, self.micro_batch, self.scale = autocast, micro_batch, 1.0

    def rescale(self, scale: float, trained: Iterable[nn.Parameter]) -> float:
        """From now on, and in the gradients that there are, the loss is multiplied with ``scale``."""
        self.scale = scale
        for p in trained:
            if p.grad is not None:
                p.grad.mul_(scale)
        return scale

    def trainable(self, more: Iterable[nn.Parameter]) -> dict[str, nn.Parameter]:
        found, seen = {}, set()
        named = [(f"{name}.{key}", p) for name, q in self.quantizers.items() for key, p in q.named_parameters()]
        for name, p in [*named, *((f"parameters.{i}", p) for i, p in enumerate(more))]:
            if p.requires_grad and id(p) not in seen:
                seen.add(id(p))
                found[name] = p
        return found

    def _loss(self, weights: dict[str, torch.Tensor], part: Any) -> torch.Tensor:
        kind = self.samples.device.type
        with torch.autocast(kind, dtype=self.autocast, enabled=self.autocast is not None):
            pred = self.forward(weights, *part.call)
        return self.loss(pred, part.target, part.mask)

    def gradients(self, numbers: list[int], seed: int, trained: list[nn.Parameter]) -> float:
        """Leave the gradient of the mean loss of these samples at ``trained``; returns the loss. Summed over ranks."""
        made = {name: quantizer() for name, quantizer in self.quantizers.items()}
        leaf = {name: weight.detach().requires_grad_(weight.requires_grad) for name, weight in made.items()}
        total = 0.0
        for part in self.samples.parts(self.samples.own(numbers), seed, self.micro_batch):
            value = self._loss(leaf, part) * (self.scale * part.rows / len(numbers))
            value.backward()
            total += float(value.detach())
        due = [(made[name], weight.grad) for name, weight in leaf.items() if weight.grad is not None]
        if due:
            torch.autograd.backward([weight for weight, _ in due], [grad for _, grad in due])
        if ranks.count() == 1:
            return total
        for p in trained:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        flat = torch.cat([torch.tensor([total], device=trained[0].device), *(p.grad.flatten() for p in trained)])
        ranks.sum_(flat)
        for p, part_of in zip(trained, flat[1:].split([p.numel() for p in trained]), strict=True):
            p.grad.copy_(part_of.view_as(p))
        return float(flat[0])

    @torch.no_grad()
    def evaluate(self, numbers: list[int], batch_size: int) -> float:
        """Mean loss of these samples without gradients, over all processes."""
        weights = {name: quantizer() for name, quantizer in self.quantizers.items()}
        mixed, self.samples.mix = self.samples.mix, 0.0
        total = 0.0
        own = self.samples.own(numbers)
        for start in range(0, len(own), batch_size):
            for part in self.samples.parts(own[start : start + batch_size], 0, self.micro_batch):
                total += float(self._loss(weights, part)) * part.rows / len(numbers)
        self.samples.mix = mixed
        return float(ranks.sum_(torch.tensor([total], dtype=torch.float64)))


class _Draw:
    """Mini-batches without repetition until all samples were seen, then again in a new order."""

    def __init__(self, numbers: list[int], batch_size: int, generator: torch.Generator) -> None:
        self.numbers, self.size, self.generator = numbers, min(batch_size, len(numbers)), generator
        self.left: list[int] = []

    def next(self) -> list[int]:
        if len(self.left) < self.size:
            self.left = [self.numbers[i] for i in torch.randperm(len(self.numbers), generator=self.generator)]
        batch, self.left = self.left[: self.size], self.left[self.size :]
        return batch

    def seed(self) -> int:
        return int(torch.randint(1 << 40, (), generator=self.generator))


class _Best:
    """The parameters with the least loss so far, and how many offers ago that was."""

    def __init__(self, parameters: dict[str, nn.Parameter], value: float) -> None:
        self.parameters, self.value, self.age = list(parameters.values()), value, 0
        self.kept: list[torch.Tensor] = [p.detach().clone() for p in self.parameters]

    def offer(self, value: float) -> None:
        self.age += 1
        if value < self.value:
            self.value, self.age = value, 0
            for kept, p in zip(self.kept, self.parameters, strict=True):
                kept.copy_(p.detach())

    @torch.no_grad()
    def restore(self) -> None:
        for kept, p in zip(self.kept, self.parameters, strict=True):
            p.copy_(kept)
            p.grad = None


def _schedule(
    optimizer: torch.optim.Optimizer, steps: int, constant: list[bool]
) -> torch.optim.lr_scheduler.LRScheduler:
    """Rates that fall to 0 on a cosine, or stay, group by group."""

    def cosine(step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * min(step / steps, 1)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, [(lambda _: 1.0) if stays else cosine for stays in constant])


def _check_loss(value: float, step: int, where: str) -> None:
    if not math.isfinite(value):
        raise QuantizationError(
            f"{where or 'reconstruction'}: the loss is {value} in step {step}: use a smaller learning rate, or a "
            "wider dtype (autocast=None)"
        )


def _check(steps: int, batch_size: int, holdout: float, autocast: torch.dtype | None, samples: Samples) -> None:
    if steps < 0 or batch_size < 1:
        raise ConfigError(f"steps={steps}, batch_size={batch_size}: at least 0 and 1")
    if not 0 <= holdout < 1 or (samples.total and round(holdout * samples.total) >= samples.total):
        raise ConfigError(f"holdout={holdout}: a share in [0, 1) that leaves a sample to train on")
    if autocast not in (None, torch.bfloat16):
        raise ConfigError(
            f"autocast={autocast}: None or torch.bfloat16 (float16 needs loss scaling and gains nothing here)"
        )
    if samples.total == 0:
        raise ConfigError("there are no samples to reconstruct from")
