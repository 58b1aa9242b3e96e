"""Units that learn in two phases: gates of the weights first, then steps of the inputs behind the hardened weights.

In the first phase a unit gives the float model's output from what enters it in the model whose weights before it are
rounded; in the second the float model's output from the float model's input. The first one writes the rounded weights
into the float layers (:func:`harden`) and keeps their codes; the second one packs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hfq.calibration import ranges, running, static
from hfq.calibration.capture import device_of
from hfq.calibration.step import Step
from hfq.formats import ActivationSpec, Codes, QuantSpec, activation
from hfq.formats.activation import Parameters
from hfq.layers import products
from hfq.layers.conv import SecondHalf
from hfq.layers.fake import fake_halves
from hfq.layers.products import SIDES, AttentionProducts
from hfq.reconstruction import block, loop, losses, units
from hfq.reconstruction.direct import site_matrix, unpackable
from hfq.reconstruction.samples import Samples
from hfq.reconstruction.static import input_grid, input_options
from hfq.reconstruction.units import Unit
from hfq.rounding import nearest
from hfq.rounding.halves import HalvedRounding
from hfq.rounding.learned_step import LearnedStep
from hfq.rounding.lowrank import GatedRounding, Hardening

__all__ = [
    "Course", "Inputs", "Ranges", "Rounded", "fit_inputs", "fit_weights", "harden", "held", "measure", "pack",
    "roundings",
]  # fmt: skip

Rounding = GatedRounding | HalvedRounding
_PLAIN = ("linear", "transposed", "conv")


@dataclass(frozen=True)
class Course:
    """How a unit learns.

    Attributes:
        steps, lr: of the gates; the rate stays.
        input_steps, input_lr: of the steps of inputs; the rate falls to 0 on a cosine.
        batch_size: rows of both.
        penalty: weight of the penalty that drives gates to 0 and 1, a sum over weights.
        sharp: its exponent, first and last, on a line.
        warmup: share of the steps without it.
        over_axis: losses are sums over axis 1 (channels of pictures, tokens of sequences), not means.
        input_power: exponent of the loss of the steps of inputs.
    """

    steps: int = 20_000
    lr: float = 1e-3
    input_steps: int = 5_000
    input_lr: float = 4e-4
    batch_size: int = 32
    penalty: float = 0.01
    sharp: tuple[float, float] = (20.0, 2.0)
    warmup: float = 0.2
    over_axis: bool = True
    input_power: float = 2.4


@dataclass(frozen=True)
class Ranges:
    """How grids are found.

    Attributes:
        spec_for: of a site's weight.
        bits_for: width of its inputs; 16 for floats.
        weight, inputs: "mse" (the shrunken range with the least error) or "max".
        symmetric: no zero points of inputs.
        running: ranges of inputs between running means of their ends.
        softmax_bits: of probabilities; 16 for floats.
        norm: exponent of that error.
        cuts: input channels of the first half, of sites whose input is in two halves.
        seed: of samples.
    """

    spec_for: Callable[[str], QuantSpec]
    bits_for: Callable[[str], int]
    weight: str = "mse"
    inputs: str = "mse"
    symmetric: bool = False
    running: bool = False
    softmax_bits: int = 8
    norm: float = 2.4
    cuts: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0

    def weight_grid(self, matrix: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor | None]:
        return nearest.grid_of(matrix, spec, clip="mse" if self.weight == "mse" else "none", norm=self.norm)

    def input_grid(self, x: torch.Tensor, spec: ActivationSpec, observer: str | None = None) -> Parameters:
        how = observer or ("mse" if self.inputs == "mse" else "minmax")
        return ranges.fit(x, spec, how, max_shrink=0.8, norm=self.norm)


@dataclass
class Rounded:
    """A weight whose gates are hard: codes of the whole or of both halves, and what its report row says (numbers)."""

    codes: tuple[Codes, ...]
    told: dict[str, float]


@dataclass
class Inputs:
    """What is learned of the inputs of a unit.

    Attributes:
        steps: of each site one, or one for each half.
        sides: of the operands of attentions.
    """

    steps: dict[str, tuple[LearnedStep, ...]] = field(default_factory=dict)
    sides: dict[str, dict[str, LearnedStep]] = field(default_factory=dict)

    @property
    def scales(self) -> list[nn.Parameter]:
        """Every step once."""
        every = [*(step for steps in self.steps.values() for step in steps),
                 *(step for sides in self.sides.values() for step in sides.values())]  # fmt: skip
        return list({id(step): step.scale for step in every}.values())


# -- weights


def roundings(step: Step, how: Ranges) -> dict[str, Rounding]:
    """Gates on fixed grids for the sites of a block; sites that have no packed layer become refused rows."""
    found: dict[str, Rounding] = {}
    for site in step.block.sites:
        spec = how.spec_for(site.name)
        if why := (unpackable(site) if site.kind in _PLAIN else f"no rounding is learned for {site.kind}"):
            assert step.report is not None
            step.report.refuse(site.name, why, kind=site.kind, asked=spec.to_dict(), numel=site.numel)
            continue
        weight, at = site.weight.detach(), how.cuts.get(site.name)
        options: dict[str, Any] = {"rank": None, "learn_scale": False}
        if at is None:
            weight = weight.t() if site.kind == "transposed" else weight
            found[site.name] = GatedRounding(weight, spec, grid=how.weight_grid(site_matrix(site), spec), **options)
        else:
            one, other = (how.weight_grid(half.flatten(1), spec) for half in (weight[:, :at], weight[:, at:]))
            found[site.name] = HalvedRounding(weight, spec, at, grids=(one, other), **options)
    return found


def fit_weights(
    step: Step, gates: Mapping[str, Rounding], targets: Sequence[torch.Tensor], course: Course,
    generator: torch.Generator | None = None,
) -> list[float]:
    """Train the gates so that the block gives ``targets`` from the quantized stream; returns the loss curve."""
    penalty = Hardening(course.steps, course.penalty, course.sharp, course.warmup).over(gates.values())
    return block.fit(step, gates, targets=targets, steps=course.steps, lr=course.lr, batch_size=course.batch_size,
                     loss="sum" if course.over_axis else "mse", generator=generator, keep="last",
                     penalty=penalty, constant=lambda name: True)  # fmt: skip


@torch.no_grad()
def harden(step: Step, gates: Mapping[str, Rounding]) -> None:
    """Write the hardened weights into the float layers, and their codes into the progress of the walk."""
    for site in step.block.sites:
        gate = gates.get(site.name)
        if gate is None:
            continue
        gate.harden()
        weight = gate()
        weight = weight.t() if site.kind == "transposed" else weight
        before = site.module.weight.float()
        told = {"error": float((before - weight).norm() / before.norm().clamp(min=1e-30)), **gate.statistics()}
        step.kept |= {f"{site.name}/told/{key}": torch.tensor(value) for key, value in told.items()}
        site.module.weight.copy_(weight)
        several = gate.codes() if isinstance(gate, HalvedRounding) else (gate.codes(),)
        for number, codes in enumerate(several):
            parts = {"codes": codes.codes, "scale": codes.scale, "zero_point": codes.zero_point}
            step.kept |= {f"{site.name}/{number}/{leaf}": t for leaf, t in parts.items() if t is not None}
    step.changed = True


def held(kept: Mapping[str, torch.Tensor], spec_for: Callable[[str], QuantSpec]) -> dict[str, Rounded]:
    """What :func:`harden` left in ``step.kept``, by site."""
    found: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    for key, tensor in kept.items():
        name, number, leaf = key.rsplit("/", 2)
        found.setdefault(name, {}).setdefault(number, {})[leaf] = tensor
    made = {}
    for name, parts in found.items():
        told = {key: float(value) for key, value in parts.pop("told").items()}
        codes = (Codes(part["codes"], part["scale"], part.get("zero_point"), spec_for(name))
                 for _, part in sorted(parts.items()))  # fmt: skip
        made[name] = Rounded(tuple(codes), told)
    return made


# -- inputs


def measure(step: Step, names: Sequence[str], how: Ranges, products_too: bool) -> Inputs:
    """Grids of the inputs of the sites ``names`` and of the operands of the block's attentions, as the quantized stream
    has them; the attentions compute with theirs from now on."""
    inputs = Inputs()
    sites = [site for site in step.block.sites if site.name in names and how.bits_for(site.name) != 16]
    if sites:
        rows = static.observe_inputs(step, sites, seed=how.seed)
        ends = running.observe(step, sites, how.cuts) if how.running else {}
        shared: dict[Any, tuple[LearnedStep, ...]] = {}
        for site in sites:
            spec, at = input_grid(how.bits_for(site.name), how.symmetric), how.cuts.get(site.name)
            key = (id(rows[site.name]), spec, at)
            if key not in shared:
                shared[key] = tuple(LearnedStep(spec, params)
                                    for params in _params(rows[site.name], spec, at, ends.get(site.name), how))
            inputs.steps[site.name] = shared[key]
    if products_too:
        for stage in static.stages(step):
            inside = [site for site in sites if site.name.startswith(f"{stage.attention}.")]
            if stage.attention and inside:
                _products(step, stage.attention, max(how.bits_for(site.name) for site in inside), how, inputs)
    return inputs


def _params(
    rows: torch.Tensor, spec: ActivationSpec, at: int | None, ends: running.Ends | None, how: Ranges
) -> list[Parameters]:
    if ends is not None:
        return [activation.range_parameters(low.reshape(1).float(), high.reshape(1).float(), spec)
                for low, high in ends]  # fmt: skip
    return [how.input_grid(part, spec) for part in ([rows] if at is None else [rows[:, :at], rows[:, at:]])]


def _products(step: Step, name: str, bits: int, how: Ranges, inputs: Inputs) -> None:
    if products.causal(step.model.get_submodule(name)):
        if step.report is not None:
            step.report.note(products.NOT_CAUSAL)
        return
    sample, spec = static.observe_attention(step, name, seed=how.seed), input_grid(bits, how.symmetric)
    # Zero is a point of the grid of probabilities, and its first one.
    soft = None if how.softmax_bits == 16 else input_grid(how.softmax_bits)
    specs = dict.fromkeys(("query", "key", "value"), spec) | {"probabilities": soft}
    part, steps = AttentionProducts(sample.query.shape[-1], **specs), {}
    part.label = name
    for side in SIDES:
        if specs[side] is not None:
            params = how.input_grid(getattr(sample, side), specs[side], "minmax" if side == "probabilities" else None)
            part.set_range(side, params)
            steps[side] = LearnedStep(specs[side], params)
    inputs.sides[name] = steps
    products.install(step.model, name, part, step.report)


@contextmanager
def simulated(step: Step, inputs: Inputs, how: Ranges) -> Iterator[None]:
    """Inside, the block's inputs and operands of attention are on their grids, as they are learned."""
    sites = {site.name: site for site in step.block.sites}
    whole = {name: steps[0] for name, steps in inputs.steps.items() if len(steps) == 1}
    halves = {sites[name].module: (how.cuts[name], steps[0].spec, steps)
              for name, steps in inputs.steps.items() if len(steps) > 1}  # fmt: skip
    with units.simulated(step.model, Unit(inputs=whole, sides=inputs.sides), sites), fake_halves(halves):
        yield


def fit_inputs(
    step: Step, inputs: Inputs, floats: Step, course: Course, how: Ranges, generator: torch.Generator | None = None
) -> list[float]:
    """Train the steps so that the block gives the outputs of ``floats``, the same block of the float model, from its
    inputs; returns the loss curve."""
    if not inputs.scales:
        return []
    device = device_of(step.block.module)
    forward = block.forward_with(step.block, [])
    whole = not block.independent(forward, floats.inputs, floats.outputs, device)
    samples = Samples(floats.inputs, floats.outputs, mask=floats.mask, device=device, whole=whole)
    loss = losses.powers(course.input_power, over_axis=course.over_axis)
    with block.frozen(step.block.module), simulated(step, inputs, how):
        return loop.optimise(forward, {}, samples, steps=course.input_steps, lr=course.input_lr,
                             batch_size=course.batch_size, loss=loss, generator=generator, keep="last",
                             parameters=inputs.scales, where=step.block.name)  # fmt: skip


def pack(step: Step, rounded: Mapping[str, Rounded], inputs: Inputs, how: Ranges) -> None:
    """Store the steps and replace the sites whose codes are there by packed layers."""
    units.store(step.model, inputs.sides)
    for site in step.block.sites:
        if site.name not in rounded:
            continue
        own, steps = rounded[site.name].codes, inputs.steps.get(site.name, ())
        told = dict(rounded[site.name].told)
        error = told.pop("error")
        params = [learned.params() for learned in steps] or [None, None]
        options = input_options(steps[0].spec if steps else None, params[0], extra=told)
        if len(own) > 1:
            options["second"] = SecondHalf(how.cuts[site.name], own[1], params[1])
            options["extra"] |= {"cut": how.cuts[site.name]}
        step.swap(site, own[0], asked=own[0].spec.to_dict(), **options)
        if step.report is not None:  # the float layer had the rounded weight already
            step.report.rows[site.name].error = error
