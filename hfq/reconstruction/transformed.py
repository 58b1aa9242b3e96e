"""Learn the transforms of one block: its transformed, rounded weights reproduce the float block's output.

Two streams: the targets are what the float block makes of the float stream (and, as a second loss, of the quantized
stream); what is trained sees the quantized stream. Every epoch runs over all samples and opens the masks a little more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from hfq.calibration import ranks
from hfq.calibration.cache import TensorList, leaves
from hfq.calibration.capture import device_of, first_tensor
from hfq.errors import ConfigError, QuantizationError
from hfq.formats import ActivationSpec
from hfq.layers.fake import fake_inputs
from hfq.reconstruction import losses
from hfq.reconstruction.block import frozen, separable
from hfq.reconstruction.block_transform import BlockTransform, Member, Options
from hfq.reconstruction.samples import Samples

__all__ = ["BlockTransform", "Fit", "Member", "Options", "fit_transformed", "targets_of_stream"]


@dataclass
class Fit:
    """How a block was learned.

    Attributes:
        initial: loss over all samples before any step, with everything quantized.
        final: the same with the parameters that were kept; never above ``initial``.
        curve: mean training loss of every epoch of the run that was kept.
        epoch: whose parameters were kept; -1 is the start.
        condition: largest condition number of the kept matrices.
        factor: damping of entries off the diagonals that the kept run had.
        retries: runs that were given up, with their reasons.
    """

    initial: float
    final: float
    curve: list[float]
    epoch: int
    condition: float
    factor: float
    retries: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON values for a report."""
        condition = float(f"{self.condition:.4g}") if math.isfinite(self.condition) else None
        return {"loss_before": self.initial, "loss_after": self.final, "best_epoch": self.epoch,
                "condition": condition, "damping": self.factor, "retries": self.retries}


class _Unstable(Exception):
    """A run that has to be given up: the loss is not finite, or a matrix is close to singular."""


def targets_of_stream(step: Any) -> TensorList:
    """What the block makes of the quantized stream, to be called before anything in it is changed."""
    kept = [step._store.put(step.call(i)) for i in range(len(step))]
    step._owned += kept
    return TensorList(step._store, kept)


def fit_transformed(
    step: Any,
    transform: BlockTransform,
    *,
    epochs: int,
    lr: float = 5e-3,
    clip_lr: float = 1e-2,
    batch_size: int = 1,
    loss: str | losses.Loss = "mse",
    second: Sequence[torch.Tensor] | None = None,
    shuffle: bool = False,
    generator: torch.Generator | None = None,
    activations: Mapping[nn.Module, ActivationSpec | None] | None = None,
    autocast: torch.dtype | None = None,
    parameters: Iterable[nn.Parameter] = (),
    most_condition: float = 1e6,
    retries: int = 3,
    checks: int = 10,
    watch: Callable[[BlockTransform], None] | None = None,
) -> Fit:
    """Train ``transform`` on the quantized stream of ``step`` and leave it with the parameters of the best epoch.

    Args:
        step: of a walk with both streams (or one: then the targets are the block's own outputs).
        transform: of the block of ``step``.
        epochs: passes over all samples; the masks open from the first to the last.
        lr, clip_lr: AdamW learning rates (no weight decay) of maps and shifts, and of learned ranges.
        batch_size: samples a step, over all processes.
        loss: of :mod:`hfq.reconstruction.losses`.
        second: other targets of the same samples (:func:`targets_of_stream`), whose loss is added.
        shuffle: draw the order of the samples anew every epoch; else it is that of the data.
        generator: of the order.
        activations: grids of the inputs of float modules, quantized while training.
        autocast: ``torch.bfloat16`` runs the block in mixed precision; maps, inverses and loss stay in float32.
        parameters: trained as well with ``lr``; they have to act through modules of the block.
        most_condition: a matrix with a larger condition number ends the run.
        retries: how often a run that was ended starts again, with a tenth of the damping each time, at last with none.
        checks: how often the loss over all samples is taken, at ends of epochs, to find the best parameters.
        watch: called after every optimiser step, for tests and diagnostics.

    Raises:
        ConfigError: options out of range. QuantizationError: no run came to its end.
    """
    if epochs < 0 or batch_size < 1 or autocast not in (None, torch.bfloat16):
        raise ConfigError(f"epochs={epochs}, batch_size={batch_size}, autocast={autocast}: at least 0, at least 1, and "
                          "None or torch.bfloat16")
    module = step.block.module
    samples = Samples(
        step.inputs, step.outputs if second is None else _Stacked(step.outputs, second), mask=step.mask,
        device=device_of(module), whole=not separable(step, device_of(module)),
    )
    if samples.total == 0:
        raise ConfigError("there are no samples to learn from")
    run = _Run(transform, samples, losses.get(loss), second is not None, autocast, list(parameters), watch)
    run.checks = min(max(checks, 1), max(epochs, 1))
    factor, given_up = transform.options.factor, []
    with ExitStack() as stack:
        stack.enter_context(frozen(module))
        stack.enter_context(fake_inputs(activations or {}))
        for attempt in range(retries + 1):
            used = 0.0 if attempt and attempt == retries else factor * 0.1**attempt
            if attempt:
                transform.restart(used)
            try:
                found = run.epochs(epochs, (lr, clip_lr), batch_size, shuffle, generator, most_condition)
            except _Unstable as reason:
                given_up.append(f"damping {used:.3g}: {reason}")
                continue
            return Fit(*found, factor=used, retries=given_up)
    raise QuantizationError(f"{step.block.name}: its transforms cannot be learned ({'; '.join(given_up)}): use a "
                            "smaller learning rate, or scales instead of matrices")


class _Stacked(Sequence):  # type: ignore[type-arg]
    """Two targets of every call, made when asked for: ``[B, 2, ...]``."""

    def __init__(self, first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> None:
        self.first, self.second = first, second

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, i: Any) -> Any:
        return torch.stack((self.first[i], self.second[i]), 1)


class _Run:
    def __init__(
        self, transform: BlockTransform, samples: Samples, loss: losses.Loss, double: bool,
        autocast: torch.dtype | None, more: list[nn.Parameter], watch: Callable[[BlockTransform], None] | None,
    ) -> None:
        self.transform, self.samples, self.loss, self.double = transform, samples, loss, double
        self.autocast, self.more, self.watch = autocast, more, watch
        self.module = transform.block.module
        self.own = dict(self.module.named_parameters())
        self.checks = 1

    def epochs(
        self, epochs: int, rates: tuple[float, float], batch_size: int, shuffle: bool,
        generator: torch.Generator | None, most: float,
    ) -> tuple[float, float, list[float], int, float]:
        transform, total = self.transform, self.samples.total
        transform.open(0, max(epochs, 2))
        transform.truncate_()
        initial = self.evaluate(batch_size)
        best, kept, curve = (initial, -1), self._snapshot(), []
        groups = transform.groups(*rates)
        if self.more:
            groups.append({"params": self.more, "lr": rates[0]})
        if not groups or epochs == 0:
            return initial, initial, [], -1, transform.condition()
        adam = torch.optim.AdamW(groups, weight_decay=0.0)
        for epoch in range(epochs):
            transform.open(epoch, epochs)
            order = torch.randperm(total, generator=generator).tolist() if shuffle else list(range(total))
            lost = 0.0
            for first in range(0, total, batch_size):
                numbers = order[first : first + batch_size]
                lost += self._step(adam, numbers, most) * len(numbers)
            curve.append(lost / total)
            if (epoch + 1) * self.checks // epochs > epoch * self.checks // epochs:
                value, condition = self.evaluate(batch_size), transform.condition()
                if not condition <= most:
                    raise _Unstable(f"the condition number reached {condition:.2g}")
                if value < best[0]:
                    best, kept = (value, epoch), self._snapshot()
        self._restore(kept)
        return initial, best[0], curve, best[1], transform.condition()

    def _step(self, adam: torch.optim.Optimizer, numbers: list[int], most: float) -> float:
        adam.zero_grad(set_to_none=True)
        try:
            made = self.transform()
        except QuantizationError as error:
            raise _Unstable(str(error)) from error
        self._check(made, most)
        leaf = {name: tensor.detach().requires_grad_(tensor.requires_grad) for name, tensor in made.items()}
        total = 0.0
        for part in self.samples.parts(self.samples.own(numbers), 0):
            value = self._loss(leaf, part) * (part.rows / len(numbers))
            value.backward()
            total += float(value.detach())
        due = [(made[name], tensor.grad) for name, tensor in leaf.items() if tensor.grad is not None]
        if due:
            torch.autograd.backward([tensor for tensor, _ in due], [grad for _, grad in due])
        total = self._reduce(adam, total)
        if not math.isfinite(total):
            raise _Unstable(f"the loss is {total}")
        adam.step()
        self.transform.truncate_()
        if self.watch is not None:
            self.watch(self.transform)
        return total

    def _check(self, made: Mapping[str, torch.Tensor], most: float) -> None:
        """A cheap bound on the condition numbers first; the numbers themselves only where it is not enough."""
        if not self.transform.bound() <= most:
            condition = self.transform.condition()
            if not condition <= most:
                raise _Unstable(f"the condition number reached {condition:.2g}")

    def _reduce(self, adam: torch.optim.Optimizer, total: float) -> float:
        """Sum gradients and loss over all processes."""
        if ranks.count() == 1:
            return total
        trained = [p for group in adam.param_groups for p in group["params"]]
        for p in trained:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        flat = torch.cat([torch.tensor([total], device=trained[0].device), *(p.grad.flatten() for p in trained)])
        ranks.sum_(flat)
        for p, part in zip(trained, flat[1:].split([p.numel() for p in trained]), strict=True):
            p.grad.copy_(part.view_as(p))
        return float(flat[0])

    def _loss(self, weights: Mapping[str, torch.Tensor], part: Any) -> torch.Tensor:
        # The block computes in its own dtype; what is learned stays in float32.
        values = {name: tensor.to(self.own[name].dtype) for name, tensor in weights.items()}
        with torch.autocast(self.samples.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            output = functional_call(self.module, values, *part.call)
        path = first_tensor(output)
        found = next(tensor for where, tensor in leaves(output) if where == path)
        if not self.double:
            return self.loss(found, part.target, part.mask)
        return self.loss(found, part.target[:, 0], part.mask) + self.loss(found, part.target[:, 1], part.mask)

    @torch.no_grad()
    def evaluate(self, batch_size: int) -> float:
        """Mean loss over all samples of all processes."""
        weights, total = self.transform(), 0.0
        own = self.samples.own(range(self.samples.total))
        for first in range(0, len(own), batch_size):
            for part in self.samples.parts(own[first : first + batch_size], 0):
                total += float(self._loss(weights, part)) * part.rows / self.samples.total
        return float(ranks.sum_(torch.tensor([total], dtype=torch.float64)))

    def _snapshot(self) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        state = {name: t.detach().clone() for name, t in self.transform.state_dict().items()}
        return state, [p.detach().clone() for p in self.more]

    @torch.no_grad()
    def _restore(self, kept: tuple[dict[str, torch.Tensor], list[torch.Tensor]]) -> None:
        self.transform.load_state_dict(kept[0])
        for p, before in zip(self.more, kept[1], strict=True):
            p.copy_(before)
        for p in (*self.transform.parameters(), *self.more):
            p.grad = None
