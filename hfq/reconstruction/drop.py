"""Reconstruction of a unit whose quantization is dropped element by element: gates of weights and steps of inputs learn
together, while inputs are taken from either stream and every rounding of an input is left out at random."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hfq.calibration import ranks
from hfq.calibration.capture import device_of
from hfq.calibration.step import Step
from hfq.layers.fake import Drop
from hfq.reconstruction import block, layer, losses
from hfq.reconstruction.samples import Calls, Samples
from hfq.reconstruction.units import Unit, simulated
from hfq.rounding.lowrank import Hardening

__all__ = ["Course", "Fitted", "fit", "fit_site"]


@dataclass(frozen=True)
class Course:
    """How a unit learns.

    Attributes:
        steps, batch_size: of the loop.
        lr: of the gates; constant.
        lr_step: of the steps of inputs; falls to 0 on a cosine.
        drop: probability with which a rounding is left out, and with which an input comes from the float stream.
        penalty: weight of the penalty that drives gates to 0 and 1, a sum over weights.
        sharp: its exponent, first and last.
        warmup: share of the steps without it.
        relative: what the loss is in the first step; ``None`` leaves it as it is.
    """

    steps: int = 20_000
    batch_size: int = 32
    lr: float = 1e-3
    lr_step: float = 4e-5
    drop: float = 0.5
    penalty: float = 0.01
    sharp: tuple[float, float] = (20.0, 2.0)
    warmup: float = 0.2
    relative: float | None = 2.0

    def options(self, unit: Unit, generator: torch.Generator | None) -> dict[str, Any]:
        """What the loop is told."""
        return {
            "steps": self.steps, "batch_size": self.batch_size, "mix": self.drop, "relative": self.relative,
            "lr": lambda name, _: self.lr_step if name.startswith("parameters.") else self.lr,
            "constant": lambda name: not name.startswith("parameters."),
            "parameters": [step.scale for step in unit.steps], "keep": "last", "generator": generator,
            "penalty": Hardening(self.steps, self.penalty, self.sharp, self.warmup).over(unit.roundings.values()),
        }  # fmt: skip


@dataclass(frozen=True)
class Fitted:
    """Loss of the unit rounded to nearest and at the end, on the calibration data as it is met in use, and the curve
    of training. If learning did not help, ``learned`` is false and the unit is rounded to nearest."""

    nearest: float
    after: float
    learned: bool
    curve: list[float]

    def told(self) -> dict[str, Any]:
        """What the report rows say."""
        return {"unit_error_nearest": float(f"{self.nearest:.6g}"), "unit_error": float(f"{self.after:.6g}"),
                "rounding": "learned" if self.learned else "nearest: what was learned was no better"}


def fit(
    step: Step, unit: Unit, loss: losses.Loss, course: Course, *, targets: Sequence[torch.Tensor] | None = None,
    float_inputs: Sequence[Any] | None = None, generator: torch.Generator | None = None, seed: int = 0,
) -> Fitted:
    """Train what ``unit`` holds so that the block gives ``targets`` from the quantized stream.

    Args:
        targets, float_inputs: outputs and calls of the float block; default those of ``step``.
        generator: draws the samples; ``seed`` the roundings that are left out.
    """
    sites = {site.name: site for site in step.block.sites}
    device = device_of(step.block.module)
    wanted = step.outputs if targets is None else targets
    forward = block.forward_with(step.block, list(unit.roundings))
    samples = Samples(step.inputs, wanted, mask=step.mask, device=device, whole=True, distributed=False)

    def train() -> list[float]:
        return block.fit(step, unit.roundings, loss=loss, targets=wanted, float_inputs=float_inputs,
                         **course.options(unit, generator))

    with simulated(step.model, unit, sites, Drop(course.drop, seed)):
        return _kept(unit, train, lambda weights: _mean(forward, weights, loss, samples))


def fit_site(
    model: Any, site: Any, unit: Unit, inputs: Sequence[torch.Tensor], targets: Sequence[torch.Tensor],
    float_inputs: Sequence[torch.Tensor], loss: losses.Loss, course: Course, *,
    generator: torch.Generator | None = None, seed: int = 0,
) -> Fitted:
    """The same for one site outside the blocks, on what it reads: in the quantized model, and in the float one."""
    rounding = unit.roundings[site.name]
    samples = Samples(Calls(inputs), targets, device=device_of(site.module), whole=True, distributed=False)
    forward = layer.forward_with(site)

    def train() -> list[float]:
        return layer.fit(site, rounding, inputs, targets, float_inputs=float_inputs, loss=loss,
                         **course.options(unit, generator))

    with simulated(model, unit, {site.name: site}, Drop(course.drop, seed)):
        return _kept(unit, train, lambda weights: _mean(forward, weights, loss, samples))


def _kept(unit: Unit, train: Callable[[], list[float]], measure: Callable[[dict[str, torch.Tensor]], float]) -> Fitted:
    """Train, harden, and go back to nearest rounding where that is better."""
    def hardened() -> float:
        with torch.no_grad():
            for rounding in unit.roundings.values():
                rounding.hard = True
            value = measure({name: rounding() for name, rounding in unit.roundings.items()})
            for rounding in unit.roundings.values():
                rounding.hard = False
        return value

    parameters = [p for rounding in unit.roundings.values() for p in rounding.parameters()]
    parameters += [step.scale for step in unit.steps]
    start = [p.detach().clone() for p in parameters]
    nearest = hardened()
    curve = train()
    after = hardened()
    learned = after <= nearest
    if not learned:
        with torch.no_grad():
            for p, old in zip(parameters, start, strict=True):
                p.copy_(old)
    return Fitted(nearest, after if learned else nearest, learned, curve)


@torch.no_grad()
def _mean(forward: Any, weights: dict[str, torch.Tensor], loss: losses.Loss, samples: Samples) -> float:
    """The loss over the calls of all processes."""
    total = torch.zeros(2, dtype=torch.float64)
    for i in range(samples.total):
        part = samples.parts([i], 0)[0]
        rows = part.target.shape[0]
        total += torch.tensor([float(loss(forward(weights, *part.call), part.target, part.mask)) * rows, rows],
                              dtype=torch.float64)  # fmt: skip
    value, count = ranks.sum_(total).tolist()
    return value / max(count, 1)
