"""What a width costs: stored bits with all metadata, or nominal bits. Costs add up over names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hfq.errors import ConfigError
from hfq.formats import QuantSpec
from hfq.formats.bitpack import packed_bytes

__all__ = [
    "Costs",
    "Scores",
    "average",
    "averages",
    "checked",
    "join",
    "resources",
    "site_bits",
    "stored_bits",
    "table",
    "total",
]

Costs = Mapping[str, Mapping[int, float]]
Scores = Mapping[str, Mapping[int, float]]

_SCALE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


def stored_bits(rows: int, in_features: int, spec: QuantSpec) -> int:
    """Bits on disk of a ``[rows, in_features]`` matrix: packed codes, scales and zero points."""
    codes = rows * packed_bytes(in_features, spec.bits)
    shape = spec.parameter_shape(rows, in_features)
    scale = _SCALE_BYTES[spec.scale_dtype]
    zero = 0 if spec.symmetric else scale if spec.zero_point == "float" else 1
    return 8 * (codes + shape[0] * shape[1] * (scale + zero))


def site_bits(site: Any, spec: QuantSpec) -> float:
    """Bits on disk of all weight tensors of a site of the graph (linear, transposed, embedding, experts, conv)."""
    total = 0
    for name in site.tensors:
        shape = tuple(getattr(site.module, name).shape)
        if site.kind == "experts":
            rows, columns = (shape[2], shape[1]) if site.in_by_out else (shape[1], math.prod(shape[2:]))
            total += shape[0] * stored_bits(rows, columns, spec)
        elif site.kind == "transposed":
            total += stored_bits(shape[1], shape[0], spec)
        else:
            total += stored_bits(shape[0], math.prod(shape[1:]), spec)
    return float(total)


def table(shapes: Mapping[str, tuple[int, int]], spec: QuantSpec, widths: Iterable[int]) -> dict[str, dict[int, float]]:
    """Stored bits of every matrix (name → ``(rows, in_features)``) at every width, otherwise as ``spec``."""
    widths = list(widths)
    return {
        name: {bits: float(stored_bits(*shape, spec.with_bits(bits))) for bits in widths}
        for name, shape in shapes.items()
    }


def join(costs: Costs, members: Mapping[str, Sequence[str]]) -> dict[str, dict[int, float]]:
    """Costs (or additive scores) of units that share a width: unit → its members, for example block → sites."""
    joined = {}
    for unit, names in members.items():
        widths = set.intersection(*(set(costs[name]) for name in names)) if names else set()
        joined[unit] = {bits: sum(costs[name][bits] for name in names) for bits in sorted(widths)}
    return joined


def total(costs: Costs, chosen: Mapping[str, int]) -> float:
    """Cost of an allocation."""
    return sum(costs[name][bits] for name, bits in chosen.items())


def average(sizes: Mapping[str, int], chosen: Mapping[str, int]) -> float:
    """Mean nominal bits a weight; ``sizes`` counts the weights of each name."""
    return sum(sizes[name] * bits for name, bits in chosen.items()) / sum(sizes[name] for name in chosen)


def averages(sites: Iterable[Any], spec_for: Callable[[str], QuantSpec]) -> dict[str, float]:
    """Mean bits a weight of some sites: ``"nominal"`` of the codes alone, ``"stored"`` with scales and zero points."""
    specs = [(site, spec_for(site.name)) for site in sites]
    size = sum(site.numel for site, _ in specs)
    return {
        "nominal": sum(site.numel * spec.bits for site, spec in specs) / size,
        "stored": sum(site_bits(site, spec) for site, spec in specs) / size,
    }


def resources(
    costs: Costs | Mapping[str, Costs], budget: float | Mapping[str, float]
) -> dict[str, tuple[Costs, float]]:
    """Costs and budget of each resource: several if ``budget`` is a mapping (``costs`` then has a table for each of
    its names), else the one, called "".

    Raises:
        ConfigError: the two name different resources, or there is none.
    """
    if not isinstance(budget, Mapping):
        return {"": (costs, float(budget))}  # type: ignore[dict-item]
    if not budget or set(budget) != set(costs):
        raise ConfigError(f"budgets for {sorted(budget)} and costs for {sorted(costs)}: the same resources are needed")
    return {name: (costs[name], float(limit)) for name, limit in budget.items()}  # type: ignore[misc]


def checked(scores: Scores, costs: Costs, budget: float, what: str = "") -> None:
    """Refuse tables that do not belong together, and budgets that even the cheapest allocation exceeds.

    Args:
        what: the resource, for the message.

    Raises:
        ConfigError: with the names, or with the least budget that works.
    """
    of = f" of {what}" if what else ""
    if set(scores) != set(costs):
        raise ConfigError(f"scores and costs{of} name different things: {sorted(set(scores) ^ set(costs))[:5]}")
    for name, row in scores.items():
        if not row or set(row) != set(costs[name]):
            raise ConfigError(f"{name}: scores for {sorted(row)} and costs{of} for {sorted(costs[name])} bits")
        if any(value != value for value in (*row.values(), *costs[name].values())):
            raise ConfigError(f"{name}: a score or cost{of} is not a number")
    if budget != budget:
        raise ConfigError(f"the budget{of} is not a number")
    least = sum(min(row.values()) for row in costs.values())
    if not fits(least, budget):
        raise ConfigError(
            f"budget{of} {budget:.6g} is below the least possible cost {least:.6g}: raise it or allow smaller widths"
        )


def fits(cost: float, budget: float) -> bool:
    """Whether a cost is within the budget, up to the rounding of sums of floats."""
    return cost <= budget + 1e-9 * max(abs(budget), 1.0)
