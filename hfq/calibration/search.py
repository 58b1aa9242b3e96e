"""Grids of weights and of their inputs, searched together: least error of themselves, then of what they multiply to.

The candidates of a grid are pairs: steps between that of the middle 80 percent of the numbers and that of all of them,
and zero points around the middle of the codes, besides the one that the whole range asks for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hfq.formats import ActivationSpec, QuantSpec, activation, affine
from hfq.formats.activation import Parameters

__all__ = ["Search", "candidates", "fit_input", "fit_weight"]

FLOOR = 1e-4  # least step of inputs
_CHUNK = 1 << 22  # elements in flight


def candidates(x: torch.Tensor, bits: int, count: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps and zero points ``[candidates, rows]`` for the rows of ``x`` ``[rows, N]``.

    ``count // min(16, 2**bits)`` steps on a line from ``(Q.90 - Q.10) / (2**bits - 1)`` to
    ``(max - min) / (2**bits - 1)``, each with ``min(16, 2**bits)`` whole zero points centred on the middle of the codes
    and with that of the whole range.
    """
    x, top = x.detach().float(), (1 << bits) - 1
    low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
    inner = torch.quantile(x[:, :: -(-x.shape[1] // 65_536)], torch.tensor([0.1, 0.9], device=x.device), dim=1)
    number = min(16, top + 1)
    shares = torch.linspace(0, 1, max(count // number, 2), device=x.device)[:, None]
    small, large = (inner[1] - inner[0]) / top, (high - low) / top
    steps = small + (large - small) * shares
    first = (top + 1) // 2 - number // 2
    zeros = torch.arange(first, first + number, device=x.device, dtype=torch.float32)
    whole = (-low / large.clamp(min=1e-12)).round().clamp(0, top)
    zeros = torch.cat([zeros[:, None].expand(-1, x.shape[0]), whole[None]])
    return (t.flatten(0, 1) for t in torch.broadcast_tensors(steps[:, None], zeros[None]))  # type: ignore[return-value]


class Search:
    """The grids of the weights that read one input, and that of the input.

    Args:
        rows: of the input, ``[N, K]``.
        weights: ``[out, K]`` each.
        specs: their grids: one scale a row, integer zero points.
        grid: of the input; static. ``None`` where it stays as it is.
        count: candidates of a grid.
        zero: the input's zero point where it is known (0 behind a ReLU).
    """

    def __init__(
        self, rows: torch.Tensor, weights: Sequence[torch.Tensor], specs: Sequence[QuantSpec],
        grid: ActivationSpec | None, *, count: int = 128, zero: int | None = None,
    ) -> None:
        self.rows, self.specs, self.grid, self.count, self.zero = rows.float(), list(specs), grid, count, zero
        self.weights = [w.detach().float().to(rows.device) for w in weights]
        self.grids = [fit_weight(w, spec, count) for w, spec in zip(self.weights, specs, strict=True)]
        self.params = None if grid is None else fit_input(self.rows, grid, count, zero=zero)

    def run(self, rounds: int = 3) -> None:
        """``rounds`` times: weights, then inputs, for the least error of the product."""
        for _ in range(rounds if self.grid is not None else min(rounds, 1)):
            self._weights()
            if self.grid is not None:
                self._input()

    def _coded(self) -> torch.Tensor:
        return self.rows if self.grid is None else activation.fake(self.rows, self.grid, self.params)

    def _weights(self) -> None:
        """Row by row: ``||X^ w^ - X w||^2`` from second moments of the inputs."""
        coded = self._coded().double()
        gram, cross = coded.t() @ coded, coded.t() @ self.rows.double()
        for i, (weight, spec) in enumerate(zip(self.weights, self.specs, strict=True)):
            pull = weight.double() @ cross.t()

            def error(rounded: torch.Tensor, pull: torch.Tensor = pull) -> torch.Tensor:
                q = rounded.double()
                return ((q @ gram - 2 * pull) * q).sum(1)

            self.grids[i] = fit_weight(weight, spec, self.count, error, self.grids[i])

    def _input(self) -> None:
        """``||X^ W^ - X W||^2`` over all readers, without its constant part."""
        assert self.grid is not None
        each = zip(self.weights, self.grids, self.specs, strict=True)
        rounded = torch.cat([affine.fake(w, s, None if z is None else z.float(), spec) for w, (s, z), spec in each])
        own = rounded.t() @ rounded
        pull = self.rows @ (torch.cat(self.weights).t() @ rounded)

        def error(coded: torch.Tensor, part: slice) -> float:
            return float(((coded @ own - 2 * pull[part]) * coded).sum(dtype=torch.float64))

        assert self.params is not None
        self.params = fit_input(self.rows, self.grid, self.count, zero=self.zero, error=error, start=self.params)


def fit_weight(
    weight: torch.Tensor, spec: QuantSpec, count: int = 128, error: object = None,
    start: tuple[torch.Tensor, torch.Tensor | None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``(scale, zero point)`` of each row of ``weight`` ``[rows, K]`` with the least error, as they are stored.

    Args:
        error: gives ``[rows]`` for a rounded weight; default its squared distance.
        start: what counts as a candidate besides; default the grid of the whole range.
    """
    measure = error or (lambda rounded: (rounded - weight).square().sum(1, dtype=torch.float64))
    scale, zero = affine.fit(weight, spec) if start is None else start

    def loss(s: torch.Tensor, z: torch.Tensor | None) -> torch.Tensor:
        return measure(affine.fake(weight, s, None if z is None else z.float(), spec))  # type: ignore[operator]

    least = loss(scale, zero)
    for step, at in zip(*candidates(weight, spec.bits, count), strict=True):
        s = step.clamp(min=affine.smallest_scale(spec)).to(spec.torch_scale_dtype)[:, None]
        z = None if zero is None else at.to(torch.uint8)[:, None]
        value = loss(s, z)
        better = (value < least)[:, None]
        least = torch.minimum(value, least)
        scale = torch.where(better, s, scale)
        zero = None if zero is None else torch.where(better, z, zero)  # type: ignore[arg-type]
    return scale, zero


def fit_input(
    rows: torch.Tensor, grid: ActivationSpec, count: int = 128, *, zero: int | None = None, error: object = None,
    start: Parameters | None = None,
) -> Parameters:
    """``(scale [1], zero point [1])`` for ``rows`` ``[N, K]`` with the least error.

    Args:
        zero: the zero point, if it is known.
        error: ``error(coded rows, which)`` for a part of the rows; default their squared distance.
        start: what counts as a candidate besides.
    """
    measure = error or (lambda coded, part: float((coded - rows[part]).square().sum(dtype=torch.float64)))
    chunk = max(1, _CHUNK // rows.shape[1])
    parts = [slice(i, min(i + chunk, rows.shape[0])) for i in range(0, rows.shape[0], chunk)]

    def loss(params: Parameters) -> float:
        return sum(measure(activation.fake(rows[part], grid, params), part) for part in parts)  # type: ignore[operator]

    steps, zeros = candidates(rows.reshape(1, -1), grid.bits, count)
    found = [] if start is None else [start]
    for step, at in zip(steps[:, 0], zeros[:, 0], strict=True):
        place = at if zero is None else torch.full_like(at, float(zero))
        found.append((step.clamp(min=FLOOR).reshape(1), None if grid.symmetric else place.reshape(1)))
    found = [one for i, one in enumerate(found) if not any(_same(one, other) for other in found[:i])]
    losses = [loss(params) for params in found]
    return found[losses.index(min(losses))]


def _same(a: Parameters, b: Parameters) -> bool:
    return all((x is None and y is None) or (x is not None and y is not None and bool(x == y))
               for x, y in zip(a, b, strict=True))  # fmt: skip
