"""Another activation between two linears, which are fitted to what they gave before: a range without a long tail.

``second(relu(first(x)))`` learns ``second(gelu(first(x)))``, also when what enters ``second`` is clamped to
``[0, top]`` as a grid will clamp it. The clamp is a means of training: afterwards nothing is left of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hfq.calibration import ranks, static
from hfq.calibration.cache import Stored, TensorList
from hfq.calibration.step import Step
from hfq.graph.perceptrons import Perceptron
from hfq.layers.attached import install_rectifier
from hfq.reconstruction import loop, losses
from hfq.reconstruction.samples import Calls, Samples

__all__ = ["Rebuilt", "rebuild", "upper_share"]

_SCALE = 10.0  # the loss is divided by it, as published


@dataclass(frozen=True)
class Rebuilt:
    """What became of a perceptron: losses behind the bare new activation and at the end, the clamp, and the largest
    number that enters the second linear with the old activation and at the end."""

    before: float
    after: float
    top: float
    largest_before: float
    largest: float


def upper_share(values: torch.Tensor, share: float) -> float:
    """The number of rank ``ceil(share * count)`` among those above zero; 0 if there is none."""
    positive = values[values > 0].flatten().sort().values
    return float(positive[max(math.ceil(share * positive.numel()) - 1, 0)]) if positive.numel() else 0.0


def rebuild(
    step: Step, names: Perceptron, weight: torch.Tensor, *, share: float, clamped: float, steps: int, lr: float,
    batch_size: int = 32, generator: torch.Generator | None = None,
) -> Rebuilt:
    """Replace the activation by a ReLU and fit both linears, on the float stream of the block, in place.

    Args:
        step: with a float stream; its block has the old activation.
        weight: second derivatives at the output, ``[1, ...]``.
        share: which part of the positive numbers behind the old activation is not clamped.
        clamped: weight of the loss with the clamp.

    If fitting does not lower the loss, the linears stay as they were.
    """
    model = step.model
    first, second = model.get_submodule(names.first), model.get_submodule(names.second)
    inputs, targets = _record(step, first, second)
    site = next(s for s in (*step.block.sites, *step.block.kept) if s.name == names.second)
    rows = static.observe_inputs(step, [site], inputs=step.float_inputs)[site.name]
    top = upper_share(rows, share)
    install_rectifier(model, names.activation)
    distance = losses.weighted(weight.to(next(first.parameters()).device), over_tokens=True)

    def forward(_: Any, args: tuple[Any, ...], __: Any) -> torch.Tensor:
        inner = torch.relu(first(args[0]))
        found = [second(inner)] + ([second(inner.clamp(max=top))] if top > 0 else [])
        return torch.stack(found, 1)

    def loss(pred: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        direct, *limited = pred.unbind(1)
        extra = sum((clamped * distance(one, target, mask) for one in limited), pred.new_zeros(()))
        return (distance(direct, target, mask) + extra) / _SCALE

    device = next(first.parameters()).device
    samples = Samples(Calls(inputs), targets, mask=step.mask, device=device)
    trained = [p for module in (first, second) for p in module.parameters()]
    start = [p.detach().clone() for p in trained]
    before = _mean(forward, loss, samples)
    with _trainable(trained):
        loop.optimise(forward, {}, samples, steps=steps, lr=lr, batch_size=batch_size, loss=loss, generator=generator,
                      parameters=trained, keep="last", where=names.second)
    after = _mean(forward, loss, samples)
    if not after < before:
        with torch.no_grad():
            for p, old in zip(trained, start, strict=True):
                p.copy_(old)
        after = before
    largest = static.observe_inputs(step, [site], inputs=step.float_inputs)[site.name]
    for kept in (inputs, targets):
        for stored in kept._stored:
            step.inputs.store.drop(stored)
    return Rebuilt(before, after, top, float(rows.max()), float(largest.max()))


def _record(step: Step, first: nn.Module, second: nn.Module) -> tuple[TensorList, TensorList]:
    """What enters the first linear and what the second gives, call by call, in the float stream."""
    store, read, given = step.inputs.store, list[Stored](), list[Stored]()

    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        read.append(store.put(args[0]))

    def after(_: nn.Module, __: Any, output: torch.Tensor) -> None:
        given.append(store.put(output))

    handles = [first.register_forward_pre_hook(before), second.register_forward_hook(after)]
    try:
        for i in range(len(step)):
            step.call(i, step.float_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return TensorList(store, read), TensorList(store, given)


@torch.no_grad()
def _mean(forward: Any, loss: losses.Loss, samples: Samples) -> float:
    """The loss over all samples of all processes."""
    total = torch.zeros((), dtype=torch.float64)
    for position in range(0, len(samples.own(range(samples.total))), 32):
        own = samples.own(range(samples.total))[position : position + 32]
        for part in samples.parts(own, 0):
            total += float(loss(forward({}, *part.call), part.target, part.mask)) * part.rows
    return float(ranks.sum_(total.reshape(1))) / max(samples.total, 1)


class _trainable:
    """Gradients for ``parameters``; what was asked of them before is restored."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.before = [(p, p.requires_grad) for p in parameters]

    def __enter__(self) -> None:
        for p, _ in self.before:
            p.requires_grad_(True)

    def __exit__(self, *_: Any) -> None:
        for p, wanted in self.before:
            p.requires_grad_(wanted)
            p.grad = None
