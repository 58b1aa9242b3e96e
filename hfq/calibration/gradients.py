"""Inputs of sites beside the gradients at their outputs, row by row: what a weighted search of steps looks at.

The loss is the cross entropy with a class drawn from the model's own prediction. Its squared gradients have the mean of
the diagonal of the second derivative of the divergence from that prediction, whose own gradient is zero there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hfq.calibration import capture, ranks
from hfq.calibration.static import RowSample
from hfq.errors import DataError, QuantizationError

__all__ = ["Rows", "collect", "divergence", "first", "logits_of", "predictions"]


@dataclass(frozen=True)
class Rows:
    """Of one site: inputs ``[N, K]``, gradients of the loss at its output ``[N, O]``, and input elements an image."""

    inputs: torch.Tensor
    gradients: torch.Tensor
    elements: float


def logits_of(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """``[rows, classes]``; the tokens of language models are rows.

    Raises:
        DataError: the model gives none.
    """
    args, kwargs = capture.arguments(model, batch)
    output = model(*args, **kwargs)
    logits = getattr(output, "logits", output)
    logits = logits[0] if isinstance(logits, (tuple, list)) else logits
    if not isinstance(logits, torch.Tensor) or logits.ndim not in (2, 3):
        raise DataError("the model gives no logits: there is no prediction to compare with")
    return logits if logits.ndim == 2 else logits.flatten(0, 1)


@torch.no_grad()
def predictions(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> list[torch.Tensor]:
    """Log-probabilities float32 ``[rows, classes]`` of each batch, on the CPU."""
    with capture.quiet(model):
        return [logits_of(model, batch).float().log_softmax(-1).cpu() for batch in batches]


def first(model: nn.Module, batches: Sequence[Mapping[str, Any]], most: int = 1 << 25) -> list[torch.Tensor]:
    """:func:`predictions` of the first batches, until they hold ``most`` numbers; none for a model without logits."""
    found: list[torch.Tensor] = []
    for batch in batches:
        try:
            found += predictions(model, [batch])
        except DataError:  # a model without a head
            return []
        if sum(one.numel() for one in found) >= most:
            break
    return found


@torch.no_grad()
def divergence(model: nn.Module, batches: Sequence[Mapping[str, Any]], wanted: Sequence[torch.Tensor]) -> float:
    """Mean divergence of the model's predictions from ``wanted`` (of :func:`predictions`)."""
    total, count = 0.0, 0
    with capture.quiet(model):
        for batch, target in zip(batches, wanted, strict=True):
            own = logits_of(model, batch).float().log_softmax(-1).cpu()
            total += float(nn.functional.kl_div(own, target, reduction="sum", log_target=True))
            count += target.shape[0]
    return total / max(count, 1)


def collect(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], sites: Sequence[Any], *, rows: int = 512, seed: int = 0
) -> dict[str, Rows]:
    """:class:`Rows` of each site in the float model, at most ``rows`` of them; one pass forward and back a batch.

    Args:
        sites: linears of the graph, floats still.

    Raises:
        QuantizationError: the data never reaches a site.
    """
    if not sites:
        return {}
    samples: dict[str, RowSample] = {}
    elements: dict[str, int] = {}
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    images, handles = 0, []
    needs = [p for p in model.parameters() if p.requires_grad]

    def hook(name: str) -> Any:
        def after(_: nn.Module, args: Any, kwargs: Any, out: torch.Tensor) -> torch.Tensor:
            x = args[0] if args else next(iter(kwargs.values()))
            out = out if out.requires_grad else out.detach().requires_grad_()  # the first ones of the model
            out.retain_grad()
            seen.setdefault(name, []).append((x.detach(), out))
            return out.clone()  # what follows may change it in place

        return after

    try:
        for parameter in needs:
            parameter.requires_grad_(False)
        handles = [site.module.register_forward_hook(hook(site.name), with_kwargs=True) for site in sites]
        with capture.quiet(model):
            for i in ranks.share(len(batches)):
                seen.clear()
                with torch.enable_grad():
                    logits = logits_of(model, batches[i]).float()
                    drawn = torch.Generator().manual_seed(seed + 7919 * i)
                    labels = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=drawn)[:, 0]
                    nn.functional.cross_entropy(logits, labels.to(logits.device), reduction="sum").backward()
                images += next(v.shape[0] for v in batches[i].values() if isinstance(v, torch.Tensor))
                for name, calls in seen.items():
                    for x, out in calls:
                        gradient = torch.zeros_like(out) if out.grad is None else out.grad
                        both = torch.cat([x.flatten(0, -2).float(), gradient.flatten(0, -2).float()], 1)
                        samples.setdefault(name, RowSample(rows * both.shape[1], seed)).update(both)
                        elements[name] = elements.get(name, 0) + x.numel()
    finally:
        for handle in handles:
            handle.remove()
        for parameter in needs:
            parameter.requires_grad_(True)
    missed = [site.name for site in sites if site.name not in samples]
    if missed:
        raise QuantizationError(f"the calibration data never reaches {', '.join(missed[:5])}: leave it out with "
                                "modules_to_not_convert")
    found = {}
    for site in sites:
        both = samples[site.name].rows()
        found[site.name] = Rows(both[:, : site.in_features].clone(), both[:, site.in_features :].clone(),
                                elements[site.name] / max(images, 1))
    return found
