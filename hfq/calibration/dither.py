"""A fixed vector added to the inputs of a product before they are coded: range of the codes, mean and size of the
vector, by the error of the product's output.

``Q(x + N) - N`` in place of ``Q(x)``: numbers that pile up between two codes are spread over both. The vector
``N = mean + size * u`` has one number a channel, the same for every token; ``u`` is drawn once. Every search has "none"
among its candidates, so that it never ends worse than where it started.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hfq.errors import ConfigError
from hfq.formats import ActivationSpec, activation, grids, twin
from hfq.formats.activation import Parameters
from hfq.formats.twin import TwinSpec

__all__ = ["Found", "Product", "draw", "saturated", "search_noise", "search_scale", "search_twin"]

Spec = ActivationSpec | TwinSpec
_CHUNK = 1 << 22  # elements in flight


@dataclass(frozen=True)
class Found:
    """The vector ``[K]`` in float16's numbers, and mean squared errors of the output without and with it.

    ``mean`` and ``size`` in units of the step; ``clipped_before`` and ``clipped`` are shares of codes at the ends.
    """

    noise: torch.Tensor
    mean: float
    size: float
    before: float
    after: float
    clipped_before: float
    clipped: float


class Product:
    """What the readers of one tensor make of an error in it: ``||e W^T||^2`` a row, over all readers.

    Args:
        rows: inputs ``[N, K]``.
        weights: of the readers as they are multiplied, dequantized, ``[out, K]`` each.
        objective: "output" weighs errors with ``W^T W``; "input" counts those of the input itself.
    """

    def __init__(self, rows: torch.Tensor, weights: Sequence[torch.Tensor], objective: str = "output") -> None:
        if objective not in ("output", "input"):
            raise ConfigError(f"objective={objective!r}: 'output' or 'input'")
        self.rows = rows.float().cpu()
        width, weights = rows.shape[1], [w.detach().float().cpu() for w in weights]
        gram = sum((w.t() @ w for w in weights), torch.zeros(width, width))
        # ||e W^T|| = ||e R^T|| with as many rows of R as there are inputs at most: cheaper where outputs are many.
        self.root = None if objective == "input" else _root(gram) if sum(w.shape[0] for w in weights) > width else (
            torch.cat(weights))  # fmt: skip

    def error(self, quantize: Callable[[torch.Tensor], torch.Tensor]) -> float:
        """Mean over rows of the squared error that ``quantize`` leaves in the output."""
        total = 0.0
        for part in self.rows.split(max(1, _CHUNK // self.rows.shape[1])):
            e = quantize(part) - part
            e = e if self.root is None else e @ self.root.t()
            total += float(e.square().sum(dtype=torch.float64))
        return total / self.rows.shape[0]


def _root(gram: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(gram.double())
    return (values.clamp(min=0).sqrt()[:, None] * vectors.t()).float()


def _scan(count: int, error: Callable[[int], float], coarse: int) -> int:
    """The number ``0 .. count-1`` with the least error: every one, or every ``coarse``-th and those around the best."""
    step = 1 if coarse <= 0 or count <= 2 * coarse else max(1, count // coarse)
    known: dict[int, float] = {}

    def best(numbers: Sequence[int]) -> int:
        for i in numbers:
            if i not in known:
                known[i] = error(i)
        return min(known, key=lambda i: (known[i], i))

    at = best(sorted({*range(0, count, step), count - 1}))
    while step > 1:
        step = max(1, step // 4)
        at = best([i for i in range(at - 4 * step, at + 4 * step + 1, step) if 0 <= i < count])
    return at


def search_scale(product: Product, spec: ActivationSpec, *, steps: int = 1000, coarse: int = 50) -> Parameters:
    """The symmetric range of the least output error, ``absmax * i / steps`` for ``i = 1 .. steps``.

    Args:
        coarse: candidates of a first pass, refined around the best; 0 tries all.
    """
    top = float(product.rows.abs().max().clamp(min=activation.SMALLEST_RANGE))

    def params(i: int) -> Parameters:  # from the largest on: ties keep the wider range
        return torch.tensor([top * (steps - i) / steps / spec.max_code]), None

    at = _scan(steps, lambda i: product.error(lambda x: activation.fake(x, spec, params(i))), coarse)
    return params(at)


def search_twin(
    product: Product, spec: TwinSpec, *, steps: int = 100, coarse: int = 20, shifts: Sequence[int] = range(9)
) -> tuple[TwinSpec, Parameters]:
    """Shift and step of two grids of the least output error; the coarse one ends at ``max * i / steps``."""
    top = float(product.rows.max().clamp(min=activation.SMALLEST_RANGE))
    best = (float("inf"), spec, torch.ones(1))
    for shift in shifts:
        tried = replace(spec, shift=shift)

        def scale(i: int, tried: TwinSpec = tried) -> torch.Tensor:
            return twin.scale_of(torch.tensor([top * (steps - i) / steps]), tried)

        def error(i: int, tried: TwinSpec = tried, scale: Any = scale) -> float:
            return product.error(lambda x: twin.fake(x, scale(i), tried))

        at = _scan(steps, error, coarse)
        found = error(at)
        best = min(best, (found, tried, scale(at)), key=lambda entry: entry[0])
    return best[1], (best[2], None)


def draw(count: int, generator: torch.Generator, distribution: str = "uniform") -> torch.Tensor:
    """``u`` ``[count]``: "uniform" in (-1, 1), or "repo" as the public script has it, ``2 * normal - 1``."""
    if distribution == "uniform":
        return torch.rand(count, generator=generator) * 2 - 1
    if distribution == "repo":
        return torch.randn(count, generator=generator) * 2 - 1
    raise ConfigError(f"noise_dist={distribution!r}: 'uniform' or 'repo'")


def saturated(x: torch.Tensor, spec: Spec, params: Parameters) -> float:
    """Share of the elements whose code is at an end of the grid."""
    if isinstance(spec, TwinSpec):
        codes = twin.encode(x, params[0], spec) & spec.top
        return float((codes == spec.top).double().mean())
    codes = activation.quantize(x, spec, params).codes
    return float(((codes == spec.max_code) | (codes == spec.min_code)).double().mean())


def search_noise(
    product: Product, spec: Spec, params: Parameters, u: torch.Tensor, *, noise_steps: int = 1000,
    mean_steps: int = 200, search_mean: bool = True, coarse: int = 50,
) -> Found:
    """Mean, then size, of the vector with the least output error.

    ``mean = step * i / mean_steps`` for ``i`` from ``-mean_steps`` to ``mean_steps``, ``size = step * i / noise_steps``
    from 0 to below two steps. A vector that more than doubles the share of codes at the ends is not taken.

    Args:
        spec, params: the grid, found before.
        u: ``[K]``, drawn once.
    """
    step = float(params[0])
    clipped_before = saturated(product.rows, spec, params)
    before = product.error(lambda x: grids.fake(x, spec, params))

    def vector(mean: float, size: float) -> torch.Tensor:
        return (mean + size * u.float()).half().float()

    def error(noise: torch.Tensor) -> float:
        if not bool(noise.any()):
            return before
        found = product.error(lambda x: grids.fake(x + noise, spec, params) - noise)
        return found if found < before and saturated(product.rows + noise, spec, params) <= 2 * clipped_before else (
            float("inf"))  # fmt: skip

    mean = 0.0
    if search_mean and mean_steps:
        order = [0, *(sign * i for i in range(1, mean_steps + 1) for sign in (1, -1))]
        means = sorted(order)
        at = _scan(len(means), lambda i: error(vector(step * means[i] / mean_steps, 0.0)), coarse)
        if error(vector(step * means[at] / mean_steps, 0.0)) < before:
            mean = step * means[at] / mean_steps
    sizes = max(1, 2 * noise_steps)
    at = _scan(sizes, lambda i: error(vector(mean, step * i / noise_steps)), coarse)
    size = step * at / noise_steps
    noise = vector(mean, size)
    after = error(noise)
    if not after <= before:
        noise, mean, size, after = torch.zeros_like(noise), 0.0, 0.0, before
    return Found(noise, mean / step, size / step, before, after, clipped_before,
                 saturated(product.rows + noise, spec, params))
