"""Layers of a denoiser that learn in low bits: updates of weights that are rounded, inputs with a grid per level."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from hfq.calibration import ranges, static, trajectories
from hfq.errors import QuantizationError
from hfq.formats import ActivationSpec, QuantSpec
from hfq.formats.activation import Parameters
from hfq.layers import levels as timed
from hfq.layers import substitute, swap
from hfq.layers.fake import fake_inputs
from hfq.layers.times import NoiseLevels
from hfq.report import Report
from hfq.rounding import nearest
from hfq.rounding.level_steps import LearnedLevels
from hfq.rounding.updated import UpdatedWeight
from hfq.training.rates import by_scale
from hfq.training.substitutes import Substitutes

__all__ = ["Layers", "Start", "starts"]

_ELEMENTS = 1 << 18  # of an input that a range is searched on; those of all levels together
_LEAST = 1 << 13  # of one level


@dataclass(frozen=True)
class Start:
    """Where the grid of an input starts: ``params`` ``[1]`` or ``[levels]``, found on ``tokens`` rows."""

    spec: ActivationSpec
    params: Parameters
    tokens: int


def starts(
    model: nn.Module, calls: Sequence[Mapping[str, Any]], sites: Sequence[Any],
    spec_for: Callable[[str], ActivationSpec | None], *, levels: NoiseLevels | None = None, rows: int = 32,
    observer: str = "mse", seed: int = 0,
) -> dict[str, Start]:
    """Ranges of the inputs of ``sites`` in the float model, of those that ``spec_for`` has a grid for.

    Args:
        levels: a range for each of them, on the calls that are nearest to it; default one for all.
        rows: of calls drawn at random that a range is searched on.
        observer: of :func:`hfq.calibration.ranges.fit`, with the exponent 2.4 and shrunken ranges down to a fifth.

    Raises:
        QuantizationError: a site was never reached.
    """
    asked = [site for site in sites if spec_for(site.name) is not None]
    parts: list[Sequence[Mapping[str, Any]]] = [calls]
    if levels is not None:
        near = [levels.nearest(t) for t in trajectories.timesteps_of(calls)]
        parts = [_Some(calls, [i for i, level in enumerate(near) if level == one]) for one in range(len(levels))]
    found: dict[str, list[Parameters]] = {site.name: [] for site in asked}
    tokens = dict.fromkeys(found, 0)
    for part in parts:
        chosen = trajectories.drawn(part, rows, seed)
        limit = max(_LEAST, _ELEMENTS // len(parts))
        seen = static.observe_outside(model, chosen, asked, limit=limit, seed=seed)
        for name in found:
            if name not in seen:
                raise QuantizationError(f"{name}: the data does not reach it: leave it out with modules_to_not_convert")
            spec: ActivationSpec = spec_for(name)  # type: ignore[assignment]
            found[name].append(ranges.fit(seen[name], spec, observer, max_shrink=0.8, norm=2.4))
            tokens[name] += seen[name].shape[0]
    return {name: Start(spec_for(name), _joined(params), tokens[name]) for name, params in found.items()}  # type: ignore[arg-type]


def _joined(params: Sequence[Parameters]) -> Parameters:
    scale, zero = torch.cat([one for one, _ in params]), [one for _, one in params]
    return scale, None if zero[0] is None else torch.cat(zero)  # type: ignore[arg-type]


class _Some(Sequence[Mapping[str, Any]]):
    """Some of the calls, read when they are used."""

    def __init__(self, calls: Sequence[Mapping[str, Any]], places: Sequence[int]) -> None:
        self.calls, self.places = calls, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        return self.calls[self.places[index]]


class Layers:
    """The quantized layers of a student.

    Args:
        model: in floats; what it computes outside of ``student.running()`` stays.
        sites: linears and convolutions.
        spec_for: grid of a weight, by name; it starts between minimum and maximum.
        starts: of the inputs; others stay floats.
        levels: learned inputs have a grid for each.
        learned: names of the layers that learn. The others have one grid for all levels, and stay where they start.
        rank: of the updates, cut to that of a layer's weight; ``None`` for full rank. A convolution in groups learns
            its scales alone.
        codes: updates start from the rounded weight (:class:`hfq.rounding.updated.UpdatedWeight`).
        seed: of the updates.

    Attributes:
        weights, inputs: what learns (and what does not), by name.
        student: for an objective.
    """

    def __init__(
        self, model: nn.Module, sites: Sequence[Any], spec_for: Callable[[str], QuantSpec],
        starts: Mapping[str, Start], levels: NoiseLevels, *, learned: Sequence[str], rank: int | None,
        codes: bool = False, seed: int = 0,
    ) -> None:
        self.model, self.sites, self.starts, self.levels = model, list(sites), dict(starts), levels
        self.learned = frozenset(learned)
        generator, self.weights = torch.Generator().manual_seed(seed), {}
        for site in self.sites:
            self.weights[site.name] = self._weight(site, spec_for(site.name), rank, codes, generator)
        specs = {name: one.spec for name, one in self.starts.items() if name in self.learned}
        self.inputs = LearnedLevels(specs, {name: self.starts[name].params for name in specs}, levels)
        made = {f"{site.name}.weight": partial(self._made, site) for site in self.sites}
        self.student = Substitutes(model, made, inputs=self._running)

    def _weight(
        self, site: Any, spec: QuantSpec, rank: int | None, codes: bool, generator: torch.Generator
    ) -> UpdatedWeight:
        matrix, whole = substitute.matrix(site.module), getattr(site.module, "groups", 1) == 1
        r = 0 if site.name not in self.learned or not (whole or rank is None) else rank
        r = None if r is None else min(r, *matrix.shape)
        one = UpdatedWeight(matrix, spec, nearest.grid_of(matrix, spec), r, codes=codes, generator=generator)
        return one.requires_grad_(site.name in self.learned)

    def _made(self, site: Any) -> torch.Tensor:
        return substitute.as_weight(site.module, self.weights[site.name]())

    def _running(self) -> AbstractContextManager[Any]:
        modules = {self.model.get_submodule(name): name for name in self.starts}
        params: dict[nn.Module, Any] = {
            module: self.inputs.of(name) if name in self.learned else self.starts[name].params
            for module, name in modules.items()
        }
        return fake_inputs({module: self.starts[name].spec for module, name in modules.items()}, params=params)

    def groups(self, factor: float, scale_lr: float, table_lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Of an optimiser: updates with rates after the scales of their layers, scales, and grids of the inputs."""
        learned = {name: one for name, one in self.weights.items() if name in self.learned}
        found = by_scale(((name, list(one.update), one.scale) for name, one in learned.items() if len(one.update)),
                         factor, weight_decay)  # fmt: skip
        found.append({"params": [one.scale for one in learned.values()], "lr": scale_lr, "weight_decay": 0.0})
        tables = [p for p in self.inputs.parameters() if p.numel()]
        return [*found, {"params": tables, "lr": table_lr, "weight_decay": 0.0}]

    def pack(self, report: Report) -> None:
        """Put packed layers into the model, which has to have the noise levels (:func:`hfq.layers.times.install`)."""
        for site in self.sites:
            name, weight, start = site.name, self.weights[site.name], self.starts.get(site.name)
            follows = start is not None and name in self.learned
            params = None if start is None else self.inputs.params(name) if follows else start.params
            first = None if params is None else tuple(None if t is None else t[:1] for t in params)
            rank = {} if not len(weight.update) else {"rank": min(min(one.shape) for one in weight.update)}
            options = {} if start is None else {"activation": start.spec, "activation_params": first,
                                                "tokens": start.tokens}  # fmt: skip
            layer = swap.swap(self.model, name, weight.codes(), report, extra=rank, **options)  # type: ignore[arg-type]
            if follows:
                timed.follow(layer, self.levels, {"weight": params}, report.rows[name])  # type: ignore[dict-item]
