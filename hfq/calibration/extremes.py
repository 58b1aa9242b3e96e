"""The smallest and the largest number of every row and every column of inputs, noise level by noise level.

Measured in whole passes of the model as it is: of what enters its packed layers, and of the queries, keys and values of
its attentions. Several calls are joined by the least of their minima and the largest of their maxima.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hfq import kernels
from hfq.calibration import ranks, trajectories
from hfq.calibration.capture import forward, quiet
from hfq.calibration.clusters import Ends
from hfq.calibration.static import probabilities
from hfq.errors import DataError
from hfq.kernels.geometry import Geometry
from hfq.kernels.grouped import unfolded
from hfq.layers import processors, routing, times
from hfq.layers.conv import QConv2d

__all__ = ["Attention", "Extremes", "Observed", "levels_of", "observe"]


@dataclass
class Extremes:
    """Ends of one input at one noise level.

    Attributes:
        tensor: of all of it, ``[1]`` each.
        rows, columns: of every row and column; ``None`` for vectors. ``ragged``: calls had different numbers of rows.
        seen: how many vectors (of a convolution, positions of its input).
    """

    tensor: Ends | None = None
    rows: Ends | None = None
    columns: Ends | None = None
    ragged: bool = False
    seen: int = 0

    def update(self, x: torch.Tensor) -> None:
        """Add ``x`` ``[..., rows, columns]`` or ``[B, columns]``.

        Raises:
            DataError: it is not finite.
        """
        x = x.detach().float()
        self.seen += x[..., 0].numel()
        if not bool(torch.isfinite(x).all()):
            raise DataError("an observed activation has NaN or infinite elements")
        if x.dim() < 3:
            return self._join(tensor=_ends(x.reshape(1, -1), 1))
        flat = x.reshape(-1, *x.shape[-2:])
        return self._join(rows=_ends(flat.transpose(0, 1).flatten(1), 1), columns=_ends(flat.flatten(0, 1), 0))

    def unfold(self, x: torch.Tensor, geometry: Geometry) -> None:
        """Add the unfolded form of ``x`` ``[B, C, H, W]``: rows are output positions, columns (channel, tap) pairs."""
        parts: dict[int, Ends] = {}
        self.seen += x[:, 0].numel()
        for _, at, part in unfolded(x.detach().float(), geometry):
            if not bool(torch.isfinite(part).all()):
                raise DataError("an observed activation has NaN or infinite elements")
            self._join(columns=_ends(part.flatten(0, 1), 0))
            own = _ends(part.transpose(0, 1).flatten(1), 1)
            parts[at.start] = _joined(parts.get(at.start), own)
        ordered = [parts[start] for start in sorted(parts)]
        self._join(rows=tuple(torch.cat([one[side] for one in ordered]) for side in (0, 1)))  # type: ignore[arg-type]

    def _join(self, **ends: Ends) -> None:
        for name, new in ends.items():
            old = getattr(self, name)
            if name == "rows" and (self.ragged or (old is not None and len(old[0]) != len(new[0]))):
                self.ragged, self.rows = True, None
            else:
                setattr(self, name, _joined(old, new))

    def merge(self, other: Extremes) -> None:
        """Add what another process has seen."""
        self.ragged, self.seen = self.ragged or other.ragged, self.seen + other.seen
        for name in ("tensor", "rows", "columns"):
            if (found := getattr(other, name)) is not None:
                self._join(**{name: found})
        self.rows = None if self.ragged else self.rows

    @property
    def whole(self) -> Ends:
        """Ends of everything."""
        ends = self.tensor if self.tensor is not None else self.columns
        assert ends is not None
        return ends[0].amin().reshape(1), ends[1].amax().reshape(1)


def _ends(x: torch.Tensor, axis: int) -> Ends:
    found = x.aminmax(dim=axis)
    return found.min.cpu(), found.max.cpu()


def _joined(old: Ends | None, new: Ends) -> Ends:
    return new if old is None else (torch.minimum(old[0], new[0]), torch.maximum(old[1], new[1]))


@dataclass
class Attention:
    """One attention.

    Attributes:
        head_dim: width of a head.
        cross: it attended to a sequence of its own that it was given.
        first: sum, and number of calls, of the mean probability of the first key.
        operands: "query", "key", "value", and "rest", the keys after the first, by level.
    """

    head_dim: int = 0
    cross: bool = False
    first: tuple[float, int] = (0.0, 0)
    operands: dict[str, dict[int, Extremes]] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Mean probability of the first key."""
        return self.first[0] / max(self.first[1], 1)


@dataclass
class Observed:
    """Inputs of layers by name and level, and attentions by name."""

    inputs: dict[str, dict[int, Extremes]] = field(default_factory=dict)
    attentions: dict[str, Attention] = field(default_factory=dict)


@torch.no_grad()
def observe(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], layers: Sequence[str], level_of: Callable[[float], int], *,
    attention: bool = True,
) -> Observed:
    """Ends of the inputs of the packed layers ``layers``, and of the operands of attentions.

    Args:
        level_of: number of the noise level of a timestep.
        attention: look at attentions at all.

    Raises:
        DataError: a batch has no timestep, or makes activations that are not finite.
    """
    found, now = Observed(), [0]
    modules = {model.get_submodule(name): name for name in layers}

    def read(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        name, x = modules[module], args[0] if args else next(iter(kwargs.values()))
        one = found.inputs.setdefault(name, {}).setdefault(now[0], Extremes())
        if isinstance(module, QConv2d):
            one.unfold(module.padded(x if x.dim() == 4 else x[None]), module.place)
        else:
            one.update(x)

    handles = [module.register_forward_pre_hook(read, with_kwargs=True) for module in modules]
    exact = kernels.use(wna16="reference") if not torch.cuda.is_available() else kernels.use()
    try:
        with quiet(model), exact, _attentions(model, found, now, attention):
            found_at = trajectories.timesteps_of(batches)
            for i in ranks.share(len(batches)):
                now[0] = level_of(found_at[i])
                forward(model, batches[i])
    finally:
        for handle in handles:
            handle.remove()
    return _everywhere(found)


def levels_of(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], *, each: bool = True, rule: str = "nearest"
) -> times.NoiseLevels:
    """The noise levels of the calibration data, from noise to image; one for all of them unless ``each``.

    Args:
        rule: which of them a call has, see :class:`hfq.layers.times.NoiseLevels`.

    Raises:
        DataError: a batch has none, or its rows have different ones.
        QuantizationError: the model is no denoiser.
    """
    times.position_of(model)
    levels = sorted(set(trajectories.timesteps_of(batches)), reverse=True)
    return times.NoiseLevels(levels if each else levels[:1], rule)


@contextmanager
def _attentions(model: nn.Module, found: Observed, now: list[int], wanted: bool) -> Iterator[None]:
    """Inside, queries, keys and values of all attentions are measured."""
    if not wanted:
        yield
        return
    names = {module: name for name, module in model.named_modules()}
    crossing: set[nn.Module] = set()

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        other = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
        (crossing.add if isinstance(other, torch.Tensor) else crossing.discard)(module)

    def seen(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any) -> None:
        one = found.attentions.setdefault(names[module], Attention(query.shape[-1]))
        one.cross = one.cross or module in crossing
        for side, x in (("query", query), ("key", key), ("value", value), ("rest", key[:, :, 1:])):
            if x.shape[2]:
                one.operands.setdefault(side, {}).setdefault(now[0], Extremes()).update(x)
        share = float(probabilities(module, query, key, mask)[..., 0].mean())
        one.first = (one.first[0] + share, one.first[1] + 1)

    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in model.modules()
               if processors.has_processor(module)]  # fmt: skip
    try:
        with routing.observing(model, seen):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _everywhere(found: Observed) -> Observed:
    """What all processes have seen."""
    total = Observed()
    for part in ranks.gather(found):
        for name, own in part.inputs.items():
            _merge(total.inputs.setdefault(name, {}), own)
        for name, one in part.attentions.items():
            have = total.attentions.setdefault(name, Attention(one.head_dim))
            have.cross = have.cross or one.cross
            have.first = (have.first[0] + one.first[0], have.first[1] + one.first[1])
            for side, own in one.operands.items():
                _merge(have.operands.setdefault(side, {}), own)
    return total


def _merge(into: dict[int, Extremes], own: Mapping[int, Extremes]) -> None:
    for level, one in own.items():
        into.setdefault(level, Extremes()).merge(one)
