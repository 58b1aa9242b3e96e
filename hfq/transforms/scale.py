"""Channel scales that leave a model's function as it is: outputs of one matrix (or norm) divided, inputs of the next
ones multiplied, in float64, only where the graph has proven the pair.

Convention of everything here: a vector ``s`` *smooths* what flows between the two sides. For every kind of pair:

- "norm", "vo", "updown", "direct": the source's outputs / s, the readers' input columns * s.
- "qk": query / s, key * s; one value for all channels that rotary embeddings or shared heads tie together.
- "gate": up / s, gate * s, and the activation between becomes ``x * sigmoid(x / s)``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import nn

from hfq.errors import QuantizationError
from hfq.graph import links
from hfq.graph.absorb import Matrix
from hfq.graph.links import Link, Pair
from hfq.graph.pairs import PairReport
from hfq.graph.read import Plan
from hfq.layers.attached import ScaledSiLU, install_scaled
from hfq.report import Report
from hfq.transforms.fold import check_plan

__all__ = ["FLOOR", "apply_scale", "classes_of", "column_maxima", "smooth", "smoothing"]

FLOOR = 1e-5

Reduction = Literal["max", "mean", "first"]
Placement = Callable[[nn.Module], AbstractContextManager[Any]]
_REDUCE = {"max": "amax", "mean": "mean"}


def smoothing(act_max: torch.Tensor, weight_max: torch.Tensor, alpha: float = 0.5) -> torch.Tensor:
    """``act_max ** alpha / weight_max ** (1 - alpha)``, elementwise, everything at least 1e-5.

    Args:
        act_max: largest magnitude of each input channel ``[K]``.
        weight_max: largest magnitude of each weight column ``[K]``.
        alpha: how much of the difficulty moves into the weights, 0 to 1.

    Returns:
        float64 ``[K]``, finite and positive.

    Raises:
        QuantizationError: shapes differ, or a maximum is not finite.
    """
    if act_max.shape != weight_max.shape:
        raise QuantizationError(f"maxima of {tuple(act_max.shape)} inputs and {tuple(weight_max.shape)} columns")
    act, weight = (t.detach().double().abs().clamp(min=FLOOR) for t in (act_max, weight_max))
    scale = (act**alpha / weight.to(act.device) ** (1 - alpha)).clamp(min=FLOOR)
    if not torch.isfinite(scale).all():
        raise QuantizationError("a channel's largest magnitude is not finite: no smoothing scale exists")
    return scale


def column_maxima(link: Link) -> torch.Tensor:
    """Largest magnitude of every input column of a reader, float64 ``[K]``."""
    part = link.part
    if not isinstance(part, Matrix):
        raise QuantizationError(f"{link.name} is a norm: it has no input columns")
    axes = [axis for axis in range(part.weight.dim()) if axis != part.input_axis]
    return part.weight.detach().double().abs().amax(axes)


def classes_of(link: Link, values: torch.Tensor, classes: int, reduce: Reduction = "max") -> torch.Tensor:
    """One number a class of a pair from one number a channel of ``link``, in the dtype of ``values``.

    Several channels share a class where key-value heads serve several query heads. "first" takes the first channel.
    Classes that ``link`` does not reach get one.
    """
    index = link.index.to(values.device)
    used = torch.nonzero(index >= 0).flatten()
    out = torch.ones(classes, dtype=values.dtype, device=values.device)
    if reduce == "first":
        back = used.flip(0)  # the first one is written last
        for position in back.tolist():
            out[index[position]] = values[position]
        return out
    return out.scatter_reduce(0, index[used], values[used], _REDUCE[reduce], include_self=False)


@torch.no_grad()
def apply_scale(pair: Pair, vector: torch.Tensor, *, model: nn.Module | None = None) -> None:
    """Divide what flows through ``pair`` by ``vector`` ``[classes]``, in place, in float64.

    Args:
        pair: proven.
        vector: finite and not zero; positive where the pair needs it.
        model: needed for pairs of kind "gate", whose activation is replaced.

    Raises:
        QuantizationError: the pair was not proven (with its reason), or the vector does not fit.
    """
    if not pair.proven:
        raise QuantizationError(f"{pair}: it cannot be scaled")
    if pair.kind == "rotation":
        raise QuantizationError(f"{pair.place}: a rotation of the stream takes no scales")
    if tuple(vector.shape) != (pair.classes,):
        raise QuantizationError(f"{pair.place}: {tuple(vector.shape)} scales for a pair of {pair.classes}")
    scale = vector.detach().double()
    if not torch.isfinite(scale).all() or bool((scale == 0).any()) or (pair.positive and bool((scale < 0).any())):
        kind = "finite and positive" if pair.positive else "finite and not zero"
        raise QuantizationError(f"{pair.members[0]}: scales have to be {kind}")
    if pair.kind == "gate":
        if model is None:
            raise QuantizationError(f"{pair.members[0]}: pass model=..., its activation has to be replaced")
        old = model.get_submodule(pair.activation)
        before = old.scale.double() if isinstance(old, ScaledSiLU) else torch.ones_like(scale)
        device = pair.partners[0].part.module._parameters[pair.partners[0].tensor].device  # type: ignore[union-attr]
        total = (before.to(scale.device) * scale).float().to(device)
        install_scaled(model, pair.activation, ScaledSiLU(pair.classes, total))
    links.apply_scale(pair, 1 / scale)


def smooth(
    model: nn.Module,
    plan: Plan,
    pairs: PairReport,
    maxima: Mapping[str, torch.Tensor],
    *,
    alpha: float = 0.5,
    kinds: Collection[str] = ("norm", "vo", "updown", "direct"),
    reduce: Reduction = "max",
    placement: Placement | None = None,
    report: Report | None = None,
) -> list[Pair]:
    """Smooth every proven pair whose inputs were measured, in place.

    Args:
        maxima: largest magnitude of the input channels ``[K]`` by name of the linear that reads them.
        alpha: exponent of :func:`smoothing`; the weight's side is the largest column over all readers.
        kinds: of the pairs.
        reduce: how channels that share a scale are joined.
        placement: makes a block's weights available while they change.
        report: gets a note for every pair of these kinds that is not scaled, with the reason.

    Returns:
        The pairs that were scaled.
    """
    check_plan(model, plan)
    done = []
    for pair in pairs:
        if pair.kind not in kinds:
            continue
        reason = "" if pair.proven else pair.reason
        measured = [link for link in pair.readers if link.name in maxima]
        if not reason and not measured:
            reason = "no input of its readers was measured"
        if reason:
            if report is not None:
                report.note(f"{pair.members[0] if pair.members else pair.place} ({pair.kind}) is not scaled: {reason}")
            continue
        with placement(plan.block(pair.place).module) if placement else nullcontext():
            columns = [classes_of(link, column_maxima(link), pair.classes, reduce) for link in pair.readers]
            inputs = [classes_of(link, maxima[link.name].double(), pair.classes, reduce).cpu() for link in measured]
            most = torch.stack([c.cpu() for c in columns]).amax(0)
            apply_scale(pair, smoothing(torch.stack(inputs).amax(0), most, alpha), model=model)
        done.append(pair)
    return done
