"""The noise level at which a denoiser is called: what its parts are told apart by.

A model with such parts has hooks that read the timestep of every call. Its parts ask for a level that was calibrated
(:class:`NoiseLevels`), or are told the timestep before the call (:class:`Follower`): either way schedulers
and numbers of steps may change.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hfq.errors import CheckpointError, QuantizationError
from hfq.layers.hooks import unhook

__all__ = [
    "RULES", "Follower", "NoiseLevels", "at", "chosen", "counted", "describe", "from_manifest", "install", "listen",
    "of", "position_of", "read", "remove",
]  # fmt: skip

RULES = ("nearest", "above")
# What denoisers call it.
_ARGUMENT = "timestep"
_ATTRIBUTE = "hfq_noise_levels"
# Timesteps of the models whose calls are running in this thread, the innermost last.
_RUNNING = threading.local()


class NoiseLevels:
    """Calibrated levels, in the order of the banks that belong to them.

    Args:
        levels: timesteps; one alone serves every call.
        rule: which level a call has: the "nearest" one, or the last one "above" it (on the way from noise to picture a
            level holds until the next one is reached; above all of them it is the highest).

    Raises:
        QuantizationError: none, or one that is no number; another rule.
    """

    def __init__(self, levels: Sequence[float], rule: str = "nearest") -> None:
        self.levels, self.rule = tuple(float(level) for level in levels), rule
        self.told = False  # whether somebody was told that the model is used on other sizes
        if rule not in RULES:
            raise QuantizationError(f"rule={rule!r} of noise levels: one of {RULES}")
        if not self.levels or not all(map(math.isfinite, self.levels)):
            raise QuantizationError(f"noise levels {self.levels}: one or more finite numbers are needed")

    @classmethod
    def even(cls, count: int, last: float = 1000.0) -> NoiseLevels:
        """``count`` levels in the middle of equal parts of ``[0, last]``: a timestep t belongs to part
        ``floor(t * count / last)`` from below."""
        return cls([(count - i - 0.5) * last / count for i in range(count)])

    def __len__(self) -> int:
        return len(self.levels)

    def index(self) -> int:
        """Number of the level of the running call.

        Raises:
            QuantizationError: no call of the whole model is running.
        """
        if len(self.levels) == 1:
            return 0
        running = getattr(_RUNNING, "values", None)
        if not running:
            raise QuantizationError("a part that was calibrated for single noise levels ran outside of its model: call "
                                    "the model, which is told the timestep")
        return self.of(running[-1])

    def of(self, timestep: float) -> int:
        """Number of the level that a call at ``timestep`` has."""
        if self.rule == "nearest":
            return self.nearest(timestep)
        above = [i for i, level in enumerate(self.levels) if level >= timestep]
        every = range(len(self.levels))
        return min(above, key=lambda i: self.levels[i]) if above else max(every, key=lambda i: self.levels[i])

    def nearest(self, timestep: float) -> int:
        """Number of the level nearest to a timestep; of two, the first."""
        return min(range(len(self.levels)), key=lambda i: abs(self.levels[i] - timestep))

    def __repr__(self) -> str:
        return f"NoiseLevels({len(self)} from {max(self.levels):g} to {min(self.levels):g})"


@torch._dynamo.disable  # the running call is known to Python alone
def chosen(
    params: tuple[torch.Tensor, torch.Tensor | None], levels: NoiseLevels
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of a scale and a zero point a level, ``[levels]`` each, those ``[1]`` of the running call."""
    index, (scale, zero) = levels.index(), params
    return scale[index : index + 1], None if zero is None else zero[index : index + 1]


def counted(given: Any, levels: NoiseLevels | None, where: str) -> NoiseLevels:
    """The levels that a part of a manifest follows, which says how many there are.

    Raises:
        CheckpointError: the manifest has others, or none.
    """
    if levels is None or type(given) is not int or given != len(levels):
        known = "none" if levels is None else len(levels)
        raise CheckpointError(f"{where}: ranges for {given!r} noise levels, and the manifest has {known}")
    return levels


def _value(timestep: Any) -> float:
    """The timestep of a call, as a number.

    Raises:
        QuantizationError: it is none, or samples of the call have different ones.
    """
    if isinstance(timestep, torch.Tensor):
        values = timestep.detach().reshape(-1)
        if values.numel() > 1 and bool((values != values[0]).any()):
            raise QuantizationError(f"samples of one call are at different timesteps {values.tolist()[:4]}...: parts "
                                    "that were calibrated for single noise levels take one a call")
        timestep = float(values[0]) if values.numel() else math.nan
    if not isinstance(timestep, (int, float)) or not math.isfinite(timestep):
        raise QuantizationError(f"timestep={timestep!r}: a finite number is needed")
    return float(timestep)


def position_of(model: nn.Module) -> int:
    """Position of the timestep among the arguments of ``model``.

    Raises:
        QuantizationError: it takes none: it is no denoiser.
    """
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    if _ARGUMENT not in names:
        raise QuantizationError(f"{type(model).__name__} takes no timestep ({', '.join(names)}): noise levels are "
                                "those of denoisers")
    return names.index(_ARGUMENT)


def read(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    """The timestep of a call of ``model``, by position or by name.

    Raises:
        QuantizationError: there is none, or samples of the call have different ones.
    """
    given = kwargs.get(_ARGUMENT)
    if given is None:
        position = position_of(model)
        given = args[position] if position < len(args) else None
    if given is None:
        raise QuantizationError(f"{type(model).__name__} was called without a timestep, which parts of it follow")
    return _value(given)


@contextmanager
def at(level: float) -> Iterator[None]:
    """Inside, parts run as in a call at this timestep."""
    _push(level)
    try:
        yield
    finally:
        _RUNNING.values.pop()


def _push(level: float) -> None:
    if not hasattr(_RUNNING, "values"):
        _RUNNING.values = []
    _RUNNING.values.append(level)


class Follower:
    """Base of modules that are told the timestep of every call of the model around them, before it."""

    def follow(self, timestep: float) -> None:
        raise NotImplementedError


# A compiled graph may depend on what parts make of the timestep, not on the timestep: that would be a graph a step.
@torch.compiler.disable
def _enter(module: nn.Module, args: Any, kwargs: Any) -> None:
    timestep = read(module, args, kwargs)
    for part in module.modules():
        if isinstance(part, Follower):
            part.follow(timestep)
    _push(timestep)


@torch.compiler.disable
def _leave(module: nn.Module, args: Any, output: Any) -> None:
    if getattr(_RUNNING, "values", None):
        _RUNNING.values.pop()


def listen(model: nn.Module) -> None:
    """Make every call of ``model`` tell its parts the timestep; once is enough."""
    if _enter not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_enter, with_kwargs=True)
        model.register_forward_hook(_leave, always_call=True)


def install(model: nn.Module, levels: NoiseLevels) -> NoiseLevels:
    """Give ``model`` its calibrated levels, and :func:`listen`.

    Raises:
        QuantizationError: the model takes no timestep, or has levels already.
    """
    position_of(model)
    if of(model) is not None:
        raise QuantizationError(f"{type(model).__name__} has noise levels already")
    model.__dict__[_ATTRIBUTE] = levels
    listen(model)
    return levels


def remove(model: nn.Module) -> None:
    """Undo :func:`install` and :func:`listen`."""
    model.__dict__.pop(_ATTRIBUTE, None)
    unhook(model, _enter, _leave)


def of(model: nn.Module) -> NoiseLevels | None:
    """The levels of a model, if it has any."""
    return model.__dict__.get(_ATTRIBUTE)


def describe(model: nn.Module) -> dict[str, Any]:
    """The manifest's part about the model's levels, JSON only; empty without any."""
    found = of(model)
    if found is None:
        return {}
    levels = list(found.levels)
    return {"noise_levels": levels if found.rule == "nearest" else {"levels": levels, "rule": found.rule}}


def from_manifest(model: nn.Module, given: Any) -> NoiseLevels:
    """The levels that a manifest has; not installed yet, unless ``model`` has them already.

    Raises:
        CheckpointError: they are damaged, or the model has others, or is no denoiser.
    """
    plain = isinstance(given, list)
    values, rule = (given, "nearest") if plain else (given["levels"], given["rule"]) if _has_rule(given) else (None, "")
    if not isinstance(values, list) or any(type(one) not in (int, float) for one in values):
        raise CheckpointError(f"the noise levels in the manifest are damaged: {given!r}")
    try:
        position_of(model)
        levels, present = NoiseLevels(values, rule), of(model)
    except QuantizationError as error:
        raise CheckpointError(f"the noise levels in the manifest cannot be used: {error}") from error
    if present is not None and (present.levels, present.rule) != (levels.levels, levels.rule):
        raise CheckpointError(f"{type(model).__name__} has noise levels already, and others than the manifest says")
    return levels if present is None else present


def _has_rule(given: Any) -> bool:
    return isinstance(given, Mapping) and set(given) == {"levels", "rule"}
