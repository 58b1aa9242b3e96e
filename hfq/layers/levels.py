"""Stored ranges that follow the noise level, of a whole model: how many there are, and fewer of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from hfq.errors import QuantizationError
from hfq.formats.activation import Parameters
from hfq.layers import times
from hfq.layers.banks import InputBanks
from hfq.layers.inputs import input_shapes
from hfq.layers.one_weight import OneWeight
from hfq.layers.packed import PackedModule
from hfq.layers.products import AttentionProducts
from hfq.layers.times import NoiseLevels
from hfq.report import Row

__all__ = ["follow", "following", "thin"]


def follow(
    layer: PackedModule, levels: NoiseLevels, params: Mapping[str, Parameters], row: Row | None = None, *,
    factors: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Give a packed layer a range of its input for each noise level, in the place of the one that it has.

    Args:
        params: scale and zero point ``[levels]`` of each slot ("weight", and "second" of an input in two halves).
        row: of the report; its bits count them.
        factors: of a dynamic input in the place of ``params``: of the lower and the upper end, ``[levels, 2]`` of each
            slot.

    Raises:
        QuantizationError: the layer has no stored range, or they are no ranges.
    """
    if not isinstance(layer, OneWeight):
        raise QuantizationError(f"{layer.label}: {type(layer).__name__} has one range for all noise levels")
    before = _stored_bits(layer)
    layer.follow(levels)
    for key in {**params, **(factors or {})}:
        layer.set_input(key, params.get(key), (factors or {}).get(key))
    if row is not None and row.bits is not None and row.numel:
        row.bits += (_stored_bits(layer) - before) / row.numel
        row.extra["levels"] = len(levels)


def _stored_bits(layer: OneWeight) -> int:
    names = [name for slot in layer.slots.values() for name in input_shapes(layer.activation, slot.prefix)]
    return sum(8 * layer._parameters[name].nbytes for name in names)  # type: ignore[union-attr]


def following(model: nn.Module) -> Iterator[tuple[OneWeight | AttentionProducts, list[str]]]:
    """The parts whose ranges follow the noise level, and the names of the parameters ``[levels]`` that hold them."""
    for module in model.modules():
        if isinstance(module, OneWeight) and module.levels is not None:
            yield module, [name for slot in module.slots.values()
                           for name in input_shapes(module.activation, slot.prefix)]  # fmt: skip
        elif isinstance(module, AttentionProducts) and module.levels is not None:
            yield module, list(module._parameters)


@torch.no_grad()
def thin(model: nn.Module, timesteps: Sequence[float]) -> NoiseLevels:
    """Keep of all ranges those that calls at ``timesteps`` (a shorter loop's) have, which are the levels then.

    A model finds its level by itself: this saves what it will not use. The levels that a model has give the
    model that it was.

    Raises:
        QuantizationError: no range follows the noise level, or inputs in groups do.
    """
    old, parts = times.of(model), list(following(model))
    if old is None or not parts:
        raise QuantizationError(f"{type(model).__name__} has no ranges that follow the noise level")
    if any(isinstance(module, InputBanks) for module in model.modules()):
        raise QuantizationError(f"{type(model).__name__} has groups that follow the noise level: thin none")
    index, new = [old.of(float(t)) for t in timesteps], NoiseLevels(timesteps, old.rule)
    for part, names in parts:
        for name in names:
            values: torch.Tensor = part._parameters[name]  # type: ignore[assignment]
            part._parameters[name] = nn.Parameter(values.detach()[index].clone(), requires_grad=False)
        part.levels = new
    times.remove(model)
    return times.install(model, new)
