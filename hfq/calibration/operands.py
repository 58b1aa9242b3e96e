"""What attentions multiply, whole heads of single samples; and the ranges with which the products err least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hfq.calibration import ranks
from hfq.calibration.ranges import quantiles
from hfq.calibration.static import probabilities
from hfq.errors import QuantizationError
from hfq.formats import ActivationSpec, activation
from hfq.formats.activation import Parameters
from hfq.layers import routing

__all__ = ["Operands", "observe", "search"]

HEADS = 64  # of single samples, kept for a search


@dataclass
class Operands:
    """Of an attention, ``[heads of samples, tokens, width]`` each; ``probabilities`` are ``[.., tokens, tokens]``."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    probabilities: torch.Tensor

    @property
    def products(self) -> dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]]:
        """Both products by the names of their sides: ``(left, right)`` to be multiplied."""
        return {("query", "key"): (self.query, self.key.transpose(-1, -2)),
                ("probabilities", "value"): (self.probabilities, self.value)}  # fmt: skip


def observe(model: nn.Module, name: str, run: Callable[[], Any], *, limit: int = HEADS, seed: int = 0) -> Operands:
    """Operands of the attention ``name`` while ``run`` runs passes of ``model`` (or of a block of it).

    Every head of every sample is kept with the same probability, ``limit`` of them at most; the same ones for the same
    data and seed, over all processes.

    Raises:
        QuantizationError: the attention is not reached through the attention interface, or its calls differ in length.
    """
    target, random = model.get_submodule(name), torch.Generator().manual_seed(seed)
    kept: list[tuple[float, tuple[torch.Tensor, ...]]] = []

    def seen(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any) -> None:
        if module is not target:
            return
        with torch.no_grad():
            p = probabilities(module, query, key, mask)
        repeats = query.shape[1] // key.shape[1]
        numbers = torch.rand(query.shape[:2], generator=random, dtype=torch.float64)
        for flat in numbers.flatten().argsort()[:limit].tolist():
            sample, head = divmod(flat, query.shape[1])
            sides = query[sample, head], key[sample, head // repeats], value[sample, head // repeats], p[sample, head]
            kept.append((float(numbers[sample, head]), tuple(t.detach().float().cpu() for t in sides)))
        kept.sort(key=lambda one: one[0])
        del kept[limit:]

    with routing.observing(model, seen):
        run()
    chosen = sorted((one for part in ranks.gather(kept) for one in part), key=lambda one: one[0])[:limit]
    if not chosen:
        raise QuantizationError(f"{name}: the data does not reach this attention")
    if len({sides[3].shape for _, sides in chosen}) != 1:
        raise QuantizationError(f"{name}: its calls differ in length; use inputs of one size")
    return Operands(*(torch.stack([sides[i] for _, sides in chosen]) for i in range(4)))


@torch.no_grad()
def search(
    left: torch.Tensor, right: torch.Tensor, specs: tuple[ActivationSpec, ActivationSpec], *, steps: int = 129,
    rounds: int = 3,
) -> tuple[Parameters, Parameters]:
    """Ranges of both factors of a product ``left @ right`` for its least squared error.

    ``steps`` upper ends between the quantiles 0.99 and 0.99999 and as many lower ends between their mirrors; in turn
    the upper and the lower end of each factor are chosen, ``rounds`` times.
    """
    wanted = left @ right
    ends, tables = [], []
    for x in (left, right):
        flat = x.flatten()
        ordered = flat[:: -(-flat.numel() // (1 << 22))].sort().values
        upper = quantiles(ordered, torch.linspace(0.99, 0.99999, steps, dtype=torch.float64).tolist())
        lower = quantiles(ordered, torch.linspace(0.01, 0.00001, steps, dtype=torch.float64).tolist())
        tables.append((lower, upper))
        ends.append([lower[-1], upper[-1]])

    def params(side: int) -> Parameters:
        low, high = (end.reshape(1) for end in ends[side])
        return activation.range_parameters(torch.minimum(low, high), torch.maximum(low, high), specs[side])

    rounded = [activation.fake(x, specs[side], params(side)) for side, x in enumerate((left, right))]
    for _ in range(rounds):
        for side, x in enumerate((left, right)):
            for end in (1, 0):
                ends[side][end] = _least(side, end, x, rounded, wanted, ends, tables, specs, params)
            rounded[side] = activation.fake(x, specs[side], params(side))
    return params(0), params(1)


def _least(
    side: int, end: int, x: torch.Tensor, rounded: list[torch.Tensor], wanted: torch.Tensor, ends: Any, tables: Any,
    specs: Any, params: Callable[[int], Parameters],
) -> torch.Tensor:
    """The end of a factor's range, among its candidates, with the least error; the present one wins ties."""
    known: dict[tuple[float, ...], float] = {}
    best, kept = float("inf"), ends[side][end]
    for value in [ends[side][end], *tables[side][end]]:
        ends[side][end] = value
        found = params(side)
        key = tuple(float(t) for t in found if t is not None)
        if key not in known:
            other = activation.fake(x, specs[side], found)
            product = other @ rounded[1] if side == 0 else rounded[0] @ other
            known[key] = float((product - wanted).square().sum(dtype=torch.float64))
        if known[key] < best:
            best, kept = known[key], value
    return kept
