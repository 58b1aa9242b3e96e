"""Observing the inputs of single modules in whole forward passes: models without repeated blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hfq.calibration import ranks
from hfq.calibration.cache import Store, Stored, TensorList, leaves
from hfq.calibration.capture import Stop, forward, quiet, row_of
from hfq.calibration.observers import Observer
from hfq.errors import QuantizationError

__all__ = ["order", "outputs", "record", "watch"]


@torch.no_grad()
def watch(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], sites: Sequence[Any], make: Callable[[Any], Observer], *,
    stop: bool = False,
) -> dict[str, Observer]:
    """Every input of every site, as ``model`` computes it now, shown to an observer of its own.

    Args:
        make: gives the observer of a site.
        stop: the sites are one, or read nothing of each other: end each pass when all have been seen.

    Returns:
        site name to observer, merged over all processes.

    Raises:
        QuantizationError: a site was not reached by any batch.
    """
    observers = {site.name: make(site) for site in sites}
    seen: set[str] = set()
    open_: set[str] = set()

    def hook(site: Any) -> Callable[..., None]:
        def before(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            observers[site.name].update(args[0] if args else next(iter(kwargs.values())))
            seen.add(site.name)
            open_.discard(site.name)
            if stop and not open_:
                raise Stop

        return before

    handles = [site.module.register_forward_pre_hook(hook(site), with_kwargs=True) for site in sites]
    try:
        with quiet(model):
            for i in ranks.share(len(batches)):
                open_ = set(observers)
                forward(model, batches[i])
    finally:
        for handle in handles:
            handle.remove()
    reached = {name for names in ranks.gather(sorted(seen)) for name in names}
    missed = [name for name in observers if name not in reached]
    if missed:
        raise QuantizationError(f"the calibration data never reaches {', '.join(missed[:5])}: leave these modules out "
                                "with modules_to_not_convert, or use other data")
    for name in sorted(observers):
        observers[name].reduce()
    return observers


@torch.no_grad()
def record(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], site: Any, store: Store, *, results: bool = True
) -> tuple[TensorList, TensorList]:
    """What a site reads, and what it gives, in whole passes of ``model`` as it is now: a tensor a call.

    Args:
        site: with ``name`` and ``module``.
        store: where they are kept.
        results: also keep the outputs.

    Raises:
        QuantizationError: no batch of any process reaches the site.
    """
    inputs: list[Stored] = []
    outputs: list[Stored] = []

    def after(_: nn.Module, args: tuple, kwargs: dict[str, Any], output: torch.Tensor) -> None:
        inputs.append(store.put(args[0] if args else next(iter(kwargs.values()))))
        if results:
            outputs.append(store.put(output))
        raise Stop

    handle = site.module.register_forward_hook(after, with_kwargs=True)
    try:
        with quiet(model):
            for i in ranks.share(len(batches)):
                forward(model, batches[i])
    finally:
        handle.remove()
    if not any(ranks.gather(len(inputs))):
        raise QuantizationError(f"the calibration data never reaches {site.name}: leave it out with "
                                "modules_to_not_convert, or use other data")
    return TensorList(store, inputs), TensorList(store, outputs)


def order(model: nn.Module, batch: Mapping[str, Any], sites: Sequence[Any]) -> list[Any]:
    """``sites`` in the order in which a forward pass reaches them first; those that it does not reach come last."""
    found: dict[str, None] = {}
    handles = []
    for site in sites:
        def before(_: nn.Module, __: Any, name: str = site.name) -> None:
            found.setdefault(name)

        handles.append(site.module.register_forward_pre_hook(before))
    try:
        with quiet(model):
            forward(model, row_of(batch))
    finally:
        for handle in handles:
            handle.remove()
    place = {name: i for i, name in enumerate(found)}
    return sorted(sites, key=lambda site: place.get(site.name, len(place)))


@torch.no_grad()
def outputs(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """All floating results of one forward pass, flat, float32."""
    found: list[torch.Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        tree = dict(output) if isinstance(output, Mapping) else output
        found.extend(t.float().reshape(-1).cpu() for _, t in leaves(tree) if t.is_floating_point())

    handle = model.register_forward_hook(keep)
    try:
        with quiet(model):
            forward(model, batch)
    finally:
        handle.remove()
    return torch.cat(found)
