"""Keys and values of calibration tokens, and how much the loss of a language model depends on each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hfq.calibration import capture
from hfq.errors import DataError, QuantizationError
from hfq.layers import attention, rotary
from hfq.layers.kv_install import Place

__all__ = ["Tokens", "collect"]


@dataclass
class Tokens:
    """What one attention module computed on the calibration data; rows are tokens, columns channels of all heads.

    Attributes:
        key, value: float32 ``[tokens, heads * width]``; keys without their positions where the place is rotary.
        key_weight, value_weight: squared gradients of the loss, same shapes; ``None`` if they were not asked for.
        seen: tokens of the data, of which the rows are an even selection.
    """

    key: torch.Tensor
    value: torch.Tensor
    key_weight: torch.Tensor | None
    value_weight: torch.Tensor | None
    seen: int


def collect(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], places: Sequence[Place], *, gradients: bool = True,
    most: int = 8192, drop: int = 0, progress: Callable[[int, str], Any] | None = None,
) -> dict[str, Tokens]:
    """Run the model on every row of the data, with the loss of predicting each token from those before it.

    Args:
        batches: with ``input_ids`` and, where rows are padded, ``attention_mask``.
        places: the attention modules.
        gradients: also the squared gradients of the (summed) loss.
        most: tokens that are kept; an even selection of each row if there are more.
        drop: first tokens of each row that are left out.

    Raises:
        DataError: the data holds no token ids, or no tokens are left.
        QuantizationError: a gradient is not finite.
    """
    if any("input_ids" not in batch for batch in batches):
        raise DataError("keys and values are collected with a language model's loss: the data must hold input_ids")
    rows = sum(batch["input_ids"].shape[0] for batch in batches)
    if not rows:
        raise DataError("no calibration data")
    each = max(1, most // rows)
    names = {model.get_submodule(place.name): place for place in places}
    parts: dict[str, list[tuple[torch.Tensor, ...]]] = {place.name: [] for place in places}
    bar = None if progress is None else progress(rows, "keys and values")
    seen = 0
    with capture.quiet(model):
        for batch in batches:
            for i in range(batch["input_ids"].shape[0]):
                row = {name: value[i:i + 1] for name, value in batch.items() if isinstance(value, torch.Tensor)}
                for name, found in _one_row(model, row, names, gradients, each, drop).items():
                    parts[name].append(found)
                seen += row["input_ids"].shape[1]
                if bar is not None:
                    bar.update()
    if bar is not None:
        bar.close()
    return {name: _joined(name, found, seen) for name, found in parts.items()}


def _joined(name: str, found: list[tuple[torch.Tensor, ...]], seen: int) -> Tokens:
    if not found or not sum(part[0].shape[0] for part in found):
        raise DataError(f"{name}: no calibration token is left for its keys and values")
    key, value, *weights = (torch.cat(parts) for parts in zip(*found, strict=True))
    if not all(bool(torch.isfinite(t).all()) for t in (key, value, *weights)):
        raise QuantizationError(f"{name}: its keys, its values or their gradients are not finite on the data")
    return Tokens(key, value, *(weights if weights else (None, None)), seen=seen)


def _one_row(
    model: nn.Module, row: dict[str, torch.Tensor], names: Mapping[nn.Module, Place], gradients: bool, each: int,
    drop: int,
) -> dict[str, tuple[torch.Tensor, ...]]:
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    pairs: dict[str, Any] = {}

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        pairs[names[module].name] = rotary.pair_of(args, kwargs)

    def observer(module: nn.Module, query: Any, key: torch.Tensor, value: torch.Tensor, mask: Any) -> Any:
        if module not in names:
            return None
        if gradients:  # frozen or packed weights before it: gradients still have to reach the keys
            key, value = (t if t.requires_grad else t.detach().requires_grad_() for t in (key, value))
        seen[names[module].name] = key, value
        return query, key, value

    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in names]
    try:
        with attention.observing(model, observer), torch.set_grad_enabled(gradients):
            arguments = capture.to_device(row, capture.device_of(model))
            logits = model(**arguments, use_cache=False).logits
            kept = _kept(row, each, drop)
            slopes = _slopes(logits, arguments, list(seen.values())) if gradients else None
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for i, (name, tensors) in enumerate(seen.items()):
        place = next(place for place in names.values() if place.name == name)
        angles = None if place.rotary is None else place.rotary.angles_of(pairs[name])
        new = [t.detach().float() for t in tensors] + ([] if slopes is None else [g.float() for g in slopes[i]])
        if angles is not None:
            new[0] = place.rotary.undo(new[0], angles)  # type: ignore[union-attr]
            if slopes is not None:
                new[2] = place.rotary.adjoint(new[2], angles)  # type: ignore[union-attr]
        new[2:] = [g.square() for g in new[2:]]
        found[name] = tuple(t[0].transpose(0, 1).flatten(1)[kept.to(t.device)].cpu() for t in new)
    return found


def _slopes(
    logits: torch.Tensor, row: dict[str, torch.Tensor], pairs: list[tuple[torch.Tensor, torch.Tensor]]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Gradients of the summed next-token loss to keys and values."""
    targets = row["input_ids"][:, 1:].to(logits.device)
    losses = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="none")
    if "attention_mask" in row:
        losses = losses * row["attention_mask"][:, 1:].flatten().to(losses)
    flat = torch.autograd.grad(losses.sum(), [t for pair in pairs for t in pair])
    return list(zip(flat[0::2], flat[1::2], strict=True))


def _kept(row: dict[str, torch.Tensor], each: int, drop: int) -> torch.Tensor:
    """Places of the tokens of a row that are kept: not padding, not among the first ``drop``, evenly chosen."""
    mask = row.get("attention_mask")
    places = torch.arange(row["input_ids"].shape[1]) if mask is None else mask[0].nonzero()[:, 0].cpu()
    places = places[drop:]
    if len(places) > each:
        places = places[torch.linspace(0, len(places) - 1, each).round().long()]
    return places
