"""Learned transforms become part of a model for good: merged in float64, with what runs online installed.

A rotated residual stream is either folded into what lies outside the blocks (embeddings, final norm, head; tied ones
get weights of their own) or turned by hooks at its two ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import nn

from hfq.errors import QuantizationError
from hfq.graph.absorb import Matrix, Norm, rotate_inputs, rotate_outputs
from hfq.graph.ends import Ends
from hfq.graph.links import apply_fold
from hfq.graph.proof import relative_error
from hfq.graph.read import Plan
from hfq.layers.attached import ScaledSiLU, install_scaled
from hfq.layers.online import Hadamard, install_rotation
from hfq.report import Report, Row
from hfq.transforms.rotate import TOLERANCE, online_input, outputs_of
from hfq.transforms.sites import Stream, TransformSet

__all__ = ["settle"]

Placement = Callable[[nn.Module], AbstractContextManager[Any]]
Untie = Callable[[nn.Module, str], None]


def settle(
    model: nn.Module,
    plan: Plan,
    transforms: TransformSet,
    *,
    call: Callable[[], Any] | None = None,
    ends: Mapping[str, Ends] | None = None,
    untie: Untie | None = None,
    placement: Placement | None = None,
    report: Report | None = None,
) -> dict[str, Hadamard]:
    """Write the transforms into the weights, in place.

    Args:
        model, plan: as the transforms were built from; the set cannot be used again afterwards.
        transforms: of :func:`hfq.transforms.learned.build`, with the values to keep.
        call: runs one forward pass; the model's output is compared before and after. ``None``: not compared (transforms
            that change the function).
        ends: by place of a stream, what lies outside its blocks, to fold its rotation into; streams without an entry,
            or whose entry has a reason, are turned by hooks.
        untie: ``untie(model, name)`` gives the module a weight of its own where it is tied to another.
        placement: makes weights available while they change (offloaded models).
        report: gets notes.

    Returns:
        The online transforms by site name, for the packed layers.

    Raises:
        QuantizationError: the model computes something else afterwards.
    """
    place = placement or (lambda _: nullcontext())
    before = outputs_of(model, call) if call is not None else None
    for block in plan.blocks:
        with place(block.module):
            transforms.apply_(block.name)
    online = {}
    for name in transforms.online:
        site = plan.site(name)
        with place(site.module):
            online[name] = online_input(site, signs=False)
    for name, key in transforms.activations.items():
        scale = transforms.transforms[key]().detach()
        part = ScaledSiLU(scale.numel(), scale)
        install_scaled(model, name, part)
        _count(report, name, "activation with a scale", part)
    for stream in transforms.streams:
        _stream(model, transforms, stream, (ends or {}).get(stream.pair.place), before, call, untie, place, report)
    if before is not None and call is not None:
        error = _error(model, before, call)
        if not error <= _tolerance(before):
            raise QuantizationError(f"the transforms change the model's output by {error:.1e}: load the model again "
                                    "and switch off rotations or scales one by one")
    return online


def _count(report: Report | None, name: str, what: str, part: nn.Module) -> None:
    """A row for a float part: its bits belong to the packed weights beside it."""
    if report is not None:
        numel = sum(p.numel() for p in part.parameters())
        bits = 8 * sum(p.nbytes for p in part.parameters()) / numel
        report.add(Row(name, kind="part", status="attached", reason=what, bits=bits, numel=numel))


def _stream(
    model: nn.Module, transforms: TransformSet, stream: Stream, ends: Ends | None, before: list[torch.Tensor] | None,
    call: Callable[[], Any] | None, untie: Untie | None, place: Placement, report: Report | None,
) -> None:
    with torch.no_grad():
        rotation = transforms.rotation(stream, torch.float64)
    reason = "" if ends is None else ends.reason
    if ends is not None and not reason:
        reason = _separate(model, ends, untie)
        if not reason:
            saved = _fold(model, ends, rotation, place)
            # With several streams the others may not be turned yet: only a single one can be looked at by itself.
            if before is None or call is None or len(transforms.streams) > 1:
                return
            error = _error(model, before, call)
            if error <= _tolerance(before):
                return
            _restore(model, saved, place)
            reason = f"rotating {', '.join(ends.modules)} changes the model's output by {error:.1e}"
    if reason and report is not None:
        report.note(f"the rotation of {stream.pair.place} is not folded into embedding and head: {reason}")
    made = install_rotation(model, stream.first, stream.last, "dense", {"matrix": rotation.float()})
    for name, part in zip((stream.first, stream.last), made, strict=True):
        _count(report, f"{name}.hfq_rotation_{part.side}", "rotation of the residual stream", part)


def _separate(model: nn.Module, ends: Ends, untie: Untie | None) -> str:
    """Weights of their own for all that will change; a reason if that cannot be."""
    for name in ends.modules:
        if _shared(model, name) and untie is not None:
            untie(model, name)
    tied = [name for name in ends.modules if _shared(model, name)]
    if tied:
        return f"the weight of {tied[0]} belongs to another module too"
    return ""


def _shared(model: nn.Module, name: str) -> bool:
    own = {id(p) for p in model.get_submodule(name).parameters()}
    others = (p for other, p in model.named_parameters(remove_duplicate=False) if not other.startswith(f"{name}."))
    return any(id(p) in own for p in others)


def _fold(model: nn.Module, ends: Ends, rotation: torch.Tensor, place: Placement) -> dict[str, torch.Tensor]:
    """Rotate the ends; the parameters as they were, by name."""
    parts: list[Matrix] = [link.part for link in ends.readers]  # type: ignore[misc]
    saved: dict[str, torch.Tensor] = {}
    names = ends.modules
    with _placed(model, names, place):
        for name in names:
            found = model.get_submodule(name).named_parameters(recurse=False)
            saved |= {f"{name}.{key}": p.detach().clone() for key, p in found}
        fresh = {name: model.get_submodule(name) for name in names}  # untying may have replaced parameters, not modules
        if ends.fold is not None:
            apply_fold(ends.fold, fresh.__getitem__)
            norm = ends.fold.sources[0].part
            bias = norm.get_bias() if isinstance(norm, Norm) else None
            if isinstance(norm, Norm) and bias is not None:
                norm.set_bias(bias @ rotation.to(bias.device))
        for matrix in parts:
            rotate_inputs(matrix, rotation)
        for matrix in ends.writers:
            rotate_outputs(matrix, rotation)
    return saved


def _placed(model: nn.Module, names: Iterable[str], place: Placement) -> ExitStack:
    """All of several modules in memory at once."""
    stack = ExitStack()
    for name in names:
        stack.enter_context(place(model.get_submodule(name)))
    return stack


@torch.no_grad()
def _restore(model: nn.Module, saved: Mapping[str, torch.Tensor], place: Placement) -> None:
    names = list(dict.fromkeys(key.rpartition(".")[0] for key in saved))
    with _placed(model, names, place):
        for key, value in saved.items():
            name, _, leaf = key.rpartition(".")
            model.get_submodule(name)._parameters[leaf].copy_(value)  # type: ignore[union-attr]


def _tolerance(before: list[torch.Tensor]) -> float:
    return max(TOLERANCE.get(t.dtype, 1e-4) for t in before)


def _error(model: nn.Module, before: list[torch.Tensor], call: Callable[[], Any]) -> float:
    return relative_error(outputs_of(model, call), before)

