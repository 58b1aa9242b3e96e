"""Reconstruct a window of adjacent blocks: their quantized weights learn together to give the float blocks' output.

The window is run on the quantized stream. What it gives is compared with two targets: what the float blocks make of the
float stream (which corrects the errors made before), and what they make of the same quantized stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from hfq.calibration.cache import TensorList
from hfq.calibration.capture import device_of
from hfq.calibration.window import Window, outputs_of
from hfq.errors import QuantizationError
from hfq.formats import ActivationSpec
from hfq.layers import attention
from hfq.layers.fake import fake_inputs
from hfq.reconstruction import loop, losses
from hfq.reconstruction.block import frozen, independent, replacing
from hfq.reconstruction.samples import Samples, SideBySide

__all__ = ["distance", "fit", "forward_with", "plain_attention", "samples_of"]


def distance(kl: float = 1.0, same_input: bool = True) -> losses.Loss:
    """Mean squared error plus ``kl`` times the divergence of the softmaxed hidden states, in float32.

    The target holds both targets side by side in its last axis; without ``same_input`` only the first counts.
    """

    def one(pred: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        value = losses.mse(pred, target, mask)
        return value + kl * losses.divergence(pred, target, mask) if kl else value

    def both(pred: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        first, *second = target.chunk(target.shape[-1] // pred.shape[-1], -1)
        return sum((one(pred, t, mask) for t in second if same_input), one(pred, first, mask))

    return both


def fit(
    window: Window,
    *,
    steps: int | None = None,
    epochs: float = 3.0,
    lr: loop.LearningRate,
    batch_size: int = 1,
    kl: float = 1.0,
    same_input: bool = True,
    penalty: Callable[[int, int], float | None] | None = None,
    penalty_weight: float = 0.01,
    generator: torch.Generator | None = None,
    **options: Any,
) -> list[float]:
    """Train what ``window.learners`` hold of all blocks of the window.

    Args:
        steps: optimiser steps; ``None`` for ``epochs`` passes over the samples.
        lr, batch_size, generator: as :func:`hfq.reconstruction.loop.optimise` takes them; names of parameters begin
            with the site, factors of input ranges are called ``<site>.factor``.
        kl, same_input: of :func:`distance`.
        penalty: the exponent of the roundings' penalty at a step of so many, ``None`` for no penalty; the last
            parameters are kept then, otherwise the best.
        penalty_weight: weight of the penalty, which is a mean over all weights of the window.

    Returns:
        The loss curve. The blocks are not changed.
    """
    learners = {step.block.name: window.learners[step.block.name] for step in window.steps}
    roundings = {name: rounding for learner in learners.values() for name, rounding in learner.weights.items()}
    factors = {f"{name}.factor": p for learner in learners.values() for name, p in learner.factors.items()}
    device = device_of(window.steps[0].block.module)
    if not roundings and not factors:
        return []
    for factor in factors.values():
        factor.data = factor.data.to(device)
    if not any(getattr(rounding, "weights", 0) for rounding in roundings.values()):
        penalty = None  # nothing has a gate
    forward = forward_with(window, list(roundings))
    reference = _stored(window, same_input)
    names = list(factors)

    def rate(name: str, parameter: nn.Parameter) -> float:
        number = name.removeprefix("parameters.")
        return lr(names[int(number)] if number != name else name, parameter) if callable(lr) else lr

    try:
        samples = samples_of(window, reference, forward, device)
        total = math.ceil(epochs * samples.total / batch_size) if steps is None else steps
        close = None if penalty is None else lambda step: penalty(step, total)
        with ExitStack() as stack:
            for step in window.steps:
                stack.enter_context(frozen(step.block.module))
            stack.enter_context(_fake_inputs(window))
            return loop.optimise(
                forward, roundings, samples, steps=total, lr=rate, batch_size=batch_size,
                loss=distance(kl, same_input), generator=generator, parameters=factors.values(),
                optimizer=_adamw, penalty=_penalty(roundings, close, penalty_weight),
                keep="best" if penalty is None else "last", where=window.name, **options,
            )  # fmt: skip
    finally:
        for stored in reference._stored if reference is not None else ():
            window.steps[0].inputs.store.drop(stored)


def _adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    # No decay: it would pull steps and factors to zero.
    return torch.optim.AdamW(groups, weight_decay=0.0)


def _penalty(
    roundings: Mapping[str, Any], exponent: Callable[[int], float | None] | None, weight: float
) -> Callable[[int], torch.Tensor | None] | None:
    gated = [rounding for rounding in roundings.values() if getattr(rounding, "weights", 0)]
    if exponent is None or not gated or not weight:
        return None
    total = sum(rounding.weights for rounding in gated)

    def value(step: int) -> torch.Tensor | None:
        beta = exponent(step)
        return None if beta is None else torch.stack([r.penalty(beta) for r in gated]).sum() * (weight / total)

    return value


def forward_with(window: Window, names: Sequence[str]) -> loop.Forward:
    """A function that runs the window's blocks, one after the other, with other weights under ``names``."""
    own = [[n for n in names if n.startswith(f"{step.block.name}.")] for step in window.steps]
    missed = set(names) - {n for some in own for n in some}
    if missed:
        raise QuantizationError(f"{sorted(missed)} belong to no block of {window.name}")
    replaced = [replacing(step.block, some) for step, some in zip(window.steps, own, strict=True)]

    def forward(weights: dict[str, torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        def run(number: int, step: Any, inner: tuple[Any, ...], more: dict[str, Any]) -> Any:
            return functional_call(step.block.module, replaced[number](weights), inner, more)

        return window.through(args, run)

    return forward


def samples_of(
    window: Window, reference: Sequence[torch.Tensor] | None, forward: loop.Forward, device: torch.device
) -> Samples:
    """The window's calls with both targets side by side (or only the first)."""
    targets = window.targets if reference is None else SideBySide(window.targets, reference)
    with plain_attention(window):
        apart = independent(forward, window.inputs, window.targets, device)
    return Samples(window.inputs, targets, mask=window.mask, device=device, whole=not apart)


def _stored(window: Window, same_input: bool) -> TensorList | None:
    """What the float blocks make of the quantized stream, kept for all steps."""
    if not same_input:
        return None
    store = window.steps[0].inputs.store
    with plain_attention(window):
        return TensorList(store, [store.put(output) for output in outputs_of(window)])


@contextmanager
def plain_attention(window: Window) -> Iterator[None]:
    """Inside, the attention modules of the window's blocks compute with float queries, keys and values."""
    taken = []
    for step in window.steps:
        for module in step.block.module.modules():
            part = module._modules.pop(attention.CHILD, None)
            if part is not None:
                taken.append((module, part))
    try:
        yield
    finally:
        for module, part in taken:
            module._modules[attention.CHILD] = part


@contextmanager
def _fake_inputs(window: Window) -> Iterator[None]:
    specs: dict[nn.Module, ActivationSpec] = {}
    factors: dict[nn.Module, torch.Tensor] = {}
    for step in window.steps:
        learner = window.learners[step.block.name]
        modules = {site.name: site.module for site in step.block.sites}
        specs |= {modules[name]: spec for name, spec in learner.inputs.items()}
        factors |= {modules[name]: factor for name, factor in learner.factors.items()}
    with fake_inputs(specs, factors):
        yield
