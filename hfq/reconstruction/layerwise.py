"""One layer at a time, by gradient descent on its own output: weight, bias, and the ranges of weight and input.

There is no gate and no penalty: the weight itself moves, and is rounded at every step. What is learned of a layer
depends on what it reads and on what it should give, and on nothing else of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from hfq.calibration import ranks
from hfq.calibration.capture import device_of
from hfq.calibration.operands import Operands
from hfq.errors import QuantizationError
from hfq.formats import ActivationSpec, Codes, QuantSpec, activation
from hfq.formats.activation import Parameters
from hfq.layers import swap
from hfq.layers.packed import PackedModule
from hfq.reconstruction import loop, losses
from hfq.reconstruction.block import frozen
from hfq.reconstruction.samples import Calls, Samples
from hfq.reconstruction.static import input_grid
from hfq.report import Report
from hfq.rounding.learned_step import LearnedRange, RangedWeight

__all__ = ["Course", "Layer", "fit", "fit_products", "mean_range", "pack"]


@dataclass(frozen=True)
class Course:
    """How a layer learns.

    Attributes:
        steps, batch_size: of the loop.
        lr_weight, lr_bias, lr_range, lr_input: rates of weight, bias, and ranges of weight and input; constant.
        relative: rates count in units of what they move: spread of the weights, spread of the outputs, mean range of
            the weight's rows, range of the input.
        holdout: share of the samples that picks the best iterate.
    """

    steps: int = 1000
    batch_size: int = 50
    lr_weight: float = 1e-3
    lr_bias: float = 1e-3
    lr_range: float = 1e-3
    lr_input: float = 1e-3
    relative: bool = True
    holdout: float = 0.1


@dataclass
class Layer:
    """What was learned of a layer.

    Attributes:
        codes: of the weight.
        bias: float32 ``[out]``, ``None`` for a layer without one.
        grid, params: of the input; ``None`` for floats.
        before, after: mean squared error of the output (behind the ReLU, if there is one) on all samples.
        mean, variance: of each output channel of the float layer, ``[out]``.
        rows: vectors that the layer reads in all samples.
    """

    codes: Codes
    bias: torch.Tensor | None
    grid: ActivationSpec | None
    params: Parameters | None
    before: float
    after: float
    mean: torch.Tensor
    variance: torch.Tensor
    rows: int

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything but the formats, to be kept in a file."""
        numbers = torch.tensor([self.before, self.after, float(self.rows)], dtype=torch.float64)
        found = {"codes": self.codes.codes, "scale": self.codes.scale, "zero_point": self.codes.zero_point,
                 "bias": self.bias, "mean": self.mean, "variance": self.variance, "numbers": numbers}  # fmt: skip
        if self.params is not None:
            found |= {"input_scale": self.params[0], "input_zero_point": self.params[1]}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @classmethod
    def of(cls, kept: Mapping[str, torch.Tensor], spec: QuantSpec, grid: ActivationSpec | None) -> Layer:
        """What :meth:`tensors` gave."""
        codes = Codes(kept["codes"], kept["scale"], kept.get("zero_point"), spec)
        params = None if grid is None else (kept["input_scale"], kept.get("input_zero_point"))
        before, after, rows = kept["numbers"].tolist()
        return cls(codes, kept.get("bias"), grid, params, before, after, kept["mean"], kept["variance"], int(rows))


def mean_range(inputs: Sequence[torch.Tensor], grid: ActivationSpec, extreme: bool = False) -> Parameters:
    """The grid between the smallest and the largest number of a sample, both averaged over all samples.

    Args:
        extreme: the smallest and largest of all instead of the mean.
    """
    lows, highs = [], []
    for x in inputs:
        flat = x.float().flatten(1)
        lows.append(flat.amin(1))
        highs.append(flat.amax(1))
    ends = torch.stack([torch.cat(lows), torch.cat(highs)]) if lows else torch.empty(2, 0)
    low, high = torch.cat([part.cpu() for part in ranks.gather(ends)], 1)
    if not low.numel():
        raise QuantizationError("no calibration sample was seen: no range can be found")
    found = (low.min(), high.max()) if extreme else (low.mean(), high.mean())
    return activation.range_parameters(found[0].reshape(1), found[1].reshape(1), grid)


def fit(
    site: Any, spec: QuantSpec, bits: int, inputs: Sequence[torch.Tensor], targets: Sequence[torch.Tensor],
    course: Course, *, relu: bool = False, extreme: bool = False, generator: torch.Generator | None = None,
) -> Layer:
    """Learn one linear or convolution.

    Args:
        spec: grid of the weight.
        bits: of the input; 16 leaves it as it is.
        inputs, targets: what the layer reads and should give, a tensor a call, samples along axis 0.
        relu: what counts is the output behind a ReLU.
        extreme: of :func:`mean_range`.

    The start is the grid of each row's minimum and maximum, and :func:`mean_range`. If learning does not lower the
    error over all samples, the start is kept.
    """
    module, device = site.module, device_of(site.module)
    weight = site.weight.detach()
    ranged = RangedWeight(weight.t() if site.kind == "transposed" else weight, spec).to(device)
    grid = None if bits == 16 else input_grid(bits)
    entry = None if grid is None else LearnedRange(grid, mean_range(inputs, grid, extreme)).to(device)
    own = getattr(module, "bias", None)
    bias = None if own is None else nn.Parameter(own.detach().float().clone())
    mean, variance, rows = _statistics(site, inputs, targets)

    def forward(weights: dict[str, torch.Tensor], args: tuple[Any, ...], _: Any) -> torch.Tensor:
        x = args[0] if entry is None else activation.fake(args[0], entry.spec, entry())
        w = weights[site.name].to(weight.dtype)
        given = {"weight": w.t() if site.kind == "transposed" else w}
        return functional_call(module, given if bias is None else {**given, "bias": bias.to(weight.dtype)}, (x,))

    def loss(pred: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return losses.mse(pred.relu(), target.relu()) if relu else losses.mse(pred, target)

    trained = {"bias": bias, **({} if entry is None else dict(entry.named_parameters()))}
    trained = {name: p for name, p in trained.items() if p is not None}
    parameters = [*ranged.parameters(), *trained.values()]
    samples = Samples(Calls(inputs), targets, device=device)
    start, before = [p.detach().clone() for p in parameters], _mean(forward, ranged, site.name, loss, samples)
    with frozen(module):
        loop.optimise(
            forward, {site.name: ranged}, samples, steps=course.steps, batch_size=min(course.batch_size, samples.total),
            lr=_rates(course, site.name, ranged, entry, float(variance.mean()) ** 0.5, list(trained)), loss=loss,
            generator=generator, parameters=trained.values(), constant=lambda name: True, where=site.name,
            relative=1.0 if course.relative else None,  # gradients far above what the optimiser takes for zero
            holdout=course.holdout if round(course.holdout * samples.total) < samples.total else 0.0,
        )  # fmt: skip
    after = _mean(forward, ranged, site.name, loss, samples)
    if not after <= before:
        with torch.no_grad():
            for p, old in zip(parameters, start, strict=True):
                p.copy_(old)
        after = before
    found = None if bias is None else bias.detach().clone()
    return Layer(ranged.codes(), found, grid, None if entry is None else entry.params(), before, after, mean, variance,
                 rows)


def _rates(
    course: Course, name: str, ranged: RangedWeight, entry: LearnedRange | None, spread: float, more: list[str]
) -> Callable[[str, nn.Parameter], float]:
    weight, reach = ranged.matrix.detach(), ranged.reach.detach()
    units = {"weight": float(weight.std()), "bias": spread, "range": float(reach.mean()),
             "input": 1.0 if entry is None else float(entry.reach.detach())}  # fmt: skip
    kinds = {f"{name}.matrix": "weight", f"{name}.reach": "range", f"{name}.low": "range"}
    kinds |= {f"parameters.{i}": "bias" if key == "bias" else "input" for i, key in enumerate(more)}

    def rate(parameter: str, _: nn.Parameter) -> float:
        kind = kinds[parameter]
        return getattr(course, f"lr_{kind}") * (max(units[kind], 1e-12) if course.relative else 1.0)

    return rate


def _statistics(
    site: Any, inputs: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Mean and variance of each output channel, and the vectors read, over all processes."""
    total, square, counts = 0.0, 0.0, torch.zeros(2, dtype=torch.float64)
    for x, y in zip(inputs, targets, strict=True):
        rows = (y.movedim(1, -1) if site.kind == "conv" else y).reshape(-1, site.out_features).double()
        total, square = total + rows.sum(0), square + rows.square().sum(0)
        counts += torch.tensor([rows.shape[0], x.numel() // site.in_features], dtype=torch.float64)
    sums = torch.cat([torch.as_tensor(total).reshape(-1).cpu(), torch.as_tensor(square).reshape(-1).cpu(), counts])
    if len(sums) == 4:  # this process has no call
        sums = torch.zeros(2 * site.out_features + 2, dtype=torch.float64)
    sums = ranks.sum_(sums)
    count = max(float(sums[-2]), 1.0)
    mean, second = (sums[:-2] / count).chunk(2)
    return mean.float(), (second - mean.square()).clamp(min=0).float(), int(sums[-1])


@torch.no_grad()
def _mean(forward: Any, ranged: RangedWeight, name: str, loss: losses.Loss, samples: Samples) -> float:
    total, weights = torch.zeros(1, dtype=torch.float64), {name: ranged()}
    own = samples.own(range(samples.total))
    for start in range(0, len(own), 64):
        for part in samples.parts(own[start : start + 64], 0):
            total += float(loss(forward(weights, *part.call), part.target, None)) * part.rows
    return float(ranks.sum_(total)) / max(samples.total, 1)


@torch.enable_grad()
def fit_products(
    sample: Operands, bits: int, *, steps: int = 50, lr: float = 1e-3, relative: bool = True, extreme: bool = False
) -> dict[str, tuple[ActivationSpec, Parameters]]:
    """Learn the ranges of both factors of an attention's products, by the error of the products; nothing has weights.

    Returns:
        side → grid and range. A product that learning makes no better keeps where it started.
    """
    spec, found = input_grid(bits), dict[str, tuple[ActivationSpec, Parameters]]()
    for sides, (left, right) in sample.products.items():
        wanted = left @ right
        grids = [LearnedRange(spec, mean_range([x], spec, extreme)) for x in (left, right)]

        def error(factors: Sequence[torch.Tensor], wanted: torch.Tensor = wanted) -> torch.Tensor:
            return (factors[0] @ factors[1] - wanted).square().mean()

        def coded(grids: Sequence[LearnedRange] = grids, pair: Any = (left, right)) -> list[torch.Tensor]:
            return [activation.fake(x, spec, grid()) for x, grid in zip(pair, grids, strict=True)]

        start = [grid.params() for grid in grids]
        before = float(error(coded()).detach())
        adam = torch.optim.Adam([{"params": list(grid.parameters()),
                                  "lr": lr * (float(grid.reach.detach()) if relative else 1.0)} for grid in grids])
        for _ in range(steps):
            adam.zero_grad()
            error(coded()).backward()
            adam.step()
        better = float(error(coded()).detach()) <= before
        params = [grid.params() for grid in grids] if better else start
        found |= {side: (spec, one) for side, one in zip(sides, params, strict=True)}
    return found


def pack(
    model: nn.Module, site: Any, layer: Layer, report: Report | None = None, extra: Mapping[str, Any] | None = None
) -> PackedModule:
    """Put the packed form of a layer in its place; the float module and its bias stay as they are."""
    module, own = site.module, site.module._parameters.get("bias")
    if layer.bias is not None:
        module._parameters["bias"] = nn.Parameter(layer.bias.to(own.device, own.dtype), requires_grad=False)
    told = {"layer_error_before": float(f"{layer.before:.6g}"), "layer_error": float(f"{layer.after:.6g}")}
    try:
        return swap.swap(model, site.name, layer.codes, report, activation=layer.grid, activation_params=layer.params,
                         tokens=layer.rows, extra={**told, **(extra or {})})  # fmt: skip
    finally:
        module._parameters["bias"] = own
