"""Layers whose width follows the denoising schedule: packed weights of several widths, one of which computes.

Which one, the timestep of the call says that reaches the model around them. Intervals are bounded by timesteps, not
counted in steps of a loop: another number of steps, or another scheduler, finds its place in the same intervals.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hfq.errors import CheckpointError, QuantizationError
from hfq.layers import times
from hfq.layers.kinds import kind_of
from hfq.layers.manifest import present

__all__ = ["Switched", "child_name", "collapse", "describe", "empty_switched", "install", "interval"]


def interval(timestep: float, edges: Sequence[float]) -> int:
    """Which interval a timestep is in, from noise to image: the number of edges (falling) that it is not above."""
    return sum(timestep <= edge for edge in edges)


def child_name(bits: int) -> str:
    """Name of the layer of a width."""
    return f"bits{bits}"


class Switched(times.Follower, nn.Module):
    """In the place of one layer: children "bits4", "bits8", ...; ``schedule[i]`` computes in interval ``i``.

    Args:
        choices: a layer for each width of the schedule.
        schedule: widths, from noise to image.
        edges: falling timesteps between the intervals, one fewer than there are intervals.
    """

    def __init__(self, choices: Mapping[int, nn.Module], schedule: Sequence[int], edges: Sequence[float]) -> None:
        super().__init__()
        if set(choices) != set(schedule) or len(edges) != len(schedule) - 1 or not schedule:
            raise QuantizationError(f"layers of {sorted(choices)} bits for a schedule of {list(schedule)} bits with "
                                    f"{len(edges)} edges")
        if any(not a > b for a, b in zip(edges, edges[1:], strict=False)):
            raise QuantizationError(f"edges={list(edges)}: falling timesteps are needed")
        self.schedule, self.edges = tuple(schedule), tuple(float(edge) for edge in edges)
        self.now: int | None = None
        for bits in sorted(choices):
            self.add_module(child_name(bits), choices[bits])

    @property
    def active(self) -> nn.Module:
        """The layer that computes now.

        Raises:
            QuantizationError: no timestep was seen yet.
        """
        if self.now is None:
            raise QuantizationError("the width of this layer follows the timestep, and none was seen: call the model "
                                    "that it is part of, with timestep=...")
        return self._modules[child_name(self.schedule[self.now])]  # type: ignore[return-value]

    def follow(self, timestep: float) -> None:
        """Compute with the width of the interval that ``timestep`` is in."""
        self.now = interval(timestep, self.edges)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.active(x)

    @property
    def widest(self) -> nn.Module:
        return self._modules[child_name(max(self.schedule))]  # type: ignore[return-value]

    # What libraries read of a linear layer; the same for every width.

    weight = property(lambda self: (self.widest if self.now is None else self.active).weight)
    bias = property(lambda self: self.widest.bias)
    in_features = property(lambda self: self.widest.in_features)
    out_features = property(lambda self: self.widest.out_features)

    def describe(self) -> dict[str, Any]:
        return {"schedule": list(self.schedule), "edges": list(self.edges)}

    def extra_repr(self) -> str:
        return f"schedule {list(self.schedule)}, edges {list(self.edges)}"


def install(model: nn.Module, name: str, schedule: Sequence[int], edges: Sequence[float]) -> Switched:
    """Put copies of the float layer ``name`` in its place, one for each width of the schedule, to be packed one by one.

    Raises:
        QuantizationError: no packed layer could take the place of such a module.
    """
    module = model.get_submodule(name)
    kind_of(module)
    part = Switched({bits: copy.deepcopy(module) for bits in set(schedule)}, schedule, edges).train(module.training)
    model.set_submodule(name, part)
    times.listen(model)
    return part


def collapse(model: nn.Module) -> list[str]:
    """Leave of every such layer its widest form alone; their names."""
    found = [name for name, module in model.named_modules() if isinstance(module, Switched)]
    for name in found:
        model.set_submodule(name, model.get_submodule(name).widest)  # type: ignore[arg-type]
    return found


def describe(model: nn.Module) -> list[dict[str, Any]]:
    """Manifest entries of all such layers."""
    return [{"module": name, **module.describe()} for name, module in model.named_modules()
            if isinstance(module, Switched)]


def empty_switched(model: nn.Module, entry: Mapping[str, Any], place: str) -> tuple[list[int], list[float]] | None:
    """Checked schedule and edges of a manifest entry; ``None`` if the layer is there already.

    Raises:
        CheckpointError: the entry makes no sense.
    """
    where, schedule, edges = f"the schedule of {place!r}", entry.get("schedule"), entry.get("edges")
    if set(entry) != {"module", "schedule", "edges"} or not isinstance(schedule, list) or not isinstance(edges, list):
        raise CheckpointError(f"{where} in the manifest is damaged: {dict(entry)}")
    whole = all(type(bits) is int and 1 <= bits <= 8 for bits in schedule)
    falling = all(type(edge) in (int, float) for edge in edges)
    falling = falling and all(a > b for a, b in zip(edges, edges[1:], strict=False))
    if not whole or not falling or not schedule or len(edges) != len(schedule) - 1:
        raise CheckpointError(f"{where} in the manifest is damaged: {dict(entry)}")
    module = model.get_submodule(place)
    if present(module if isinstance(module, Switched) else None, entry, where):
        return None
    try:
        kind_of(module)
    except QuantizationError as error:
        raise CheckpointError(f"{where}: {error}") from error
    return schedule, edges
