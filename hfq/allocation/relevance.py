"""How much of a prediction each layer of a float model carries: layer-wise relevance propagation, image by image.

Relevance starts as one at the logit of the predicted class and is handed back through every operation by the rules of
:mod:`hfq.allocation.rules`. What arrives at the output of a layer is its contribution; a layer's share of all of them,
averaged over images, is its score. Products of attentions are layers too (``<module>.scores``, ``<module>.values``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hfq.allocation.propagation import Pass
from hfq.calibration import capture, ranks
from hfq.errors import ConfigError, DataError, QuantizationError

__all__ = ["SCORES", "Relevance", "Shares", "first", "propagate", "shares"]

SCORES = ("abs", "signed", "grad")


@dataclass
class Relevance:
    """What one batch gave.

    Attributes:
        amounts: layer → float64 ``[images]``, the relevance at its output as the score counts it.
        macs: layer → multiplications for one image.
        sums: ``(watched module, "input" or "output")`` → float64 ``[images]``, the relevance there, with its sign.
    """

    amounts: dict[str, torch.Tensor] = field(default_factory=dict)
    macs: dict[str, float] = field(default_factory=dict)
    sums: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Shares:
    """``shares`` of all layers add up to one; ``macs`` for one image; ``images`` that were seen."""

    shares: dict[str, float]
    macs: dict[str, float]
    images: int


def propagate(
    model: nn.Module, batch: Mapping[str, Any], *, targets: torch.Tensor | None = None, score: str = "abs",
    dtype: torch.dtype = torch.float32, watch: Sequence[str] = (),
) -> Relevance:
    """Relevance of one batch.

    Args:
        model: a classifier of floats; of a language model the last token's logits are taken.
        batch: arguments of ``model``.
        targets: int64 ``[images]``, the class of each image; the predicted one if missing.
        score: "abs" counts magnitudes, "signed" the magnitude of the sum over a layer's output, "grad" what is above
            zero of relevance times the gradient of the logit.
        dtype: float32 or float64, in which the model computes meanwhile.
        watch: modules whose inputs' and outputs' relevance is summed.

    Raises:
        QuantizationError: an operation has no rule, or parameters are not in memory.
        DataError: relevance that is not finite, or an output without logits.
    """
    if score not in SCORES or dtype not in (torch.float32, torch.float64):
        raise ConfigError(f"score={score!r}, dtype={dtype}: one of {SCORES}, float32 or float64")
    images = _count(batch)
    if not images:
        raise DataError("the batch holds no image: relevance has nothing to start from")
    inputs = capture.arguments(model, {
        k: v.detach().to(dtype).requires_grad_() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in batch.items()})  # fmt: skip
    found = Relevance()
    outputs: dict[str, list[torch.Tensor]] = {}
    with capture.quiet(model), _computing(model, dtype):
        if score == "grad":
            gradients = _gradients(model, inputs, images, targets)

            def amount(name: str, number: int, r: torch.Tensor) -> torch.Tensor:
                return (r.double() * gradients[name][number]).clamp(min=0).reshape(images, -1).sum(1)
        else:
            def amount(name: str, number: int, r: torch.Tensor) -> torch.Tensor:
                flat = r.double().reshape(images, -1)
                return flat.abs().sum(1) if score == "abs" else flat.sum(1).abs()

        def point(name: str, out: torch.Tensor, macs: float) -> None:
            number = len(outputs.setdefault(name, []))
            outputs[name].append(out)
            found.macs[name] = found.macs.get(name, 0.0) + float(macs)
            found.amounts.setdefault(name, torch.zeros(images, dtype=torch.float64))
            _on_relevance(out, lambda r: found.amounts[name].add_(amount(name, number, r).cpu()))

        def seen(name: str, side: str, tensor: torch.Tensor) -> None:
            found.sums[name, side] = torch.zeros(images, dtype=torch.float64)
            _on_relevance(tensor, lambda r: found.sums[name, side].add_(
                r.double().reshape(images, -1).sum(1).cpu()))

        _run(Pass(model, images, point, watch=(watch, seen)), inputs, targets)
    bad = [name for name, value in found.amounts.items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise DataError(f"the relevance of {bad[-1]} is not finite: check the images and the model's weights")
    return found


def shares(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], *, images: int | None = None, score: str = "abs",
    targets: Callable[[int], torch.Tensor | None] | None = None, dtype: torch.dtype = torch.float32,
    progress: Callable[..., Any] | None = None,
) -> Shares:
    """The share of each layer in the relevance of all layers, averaged over images.

    Args:
        images: how many at most, from the first on; ``None`` for all. With several processes, each takes its part.
        targets: number of a batch to the classes of its images.

    Raises:
        DataError: there is no image, or an image without any relevance.
    """
    totals: dict[str, float] = {}
    macs: dict[str, float] = {}
    cut, seen = first(batches, images), 0
    for i in ranks.share(len(cut)):
        wanted = None if targets is None else targets(i)
        found = propagate(model, cut[i], score=score, dtype=dtype,
                          targets=None if wanted is None else wanted[: _count(cut[i])])  # fmt: skip
        whole = torch.stack(list(found.amounts.values())).sum(0)
        if not bool((whole > 0).all()):
            raise DataError("an image has no relevance at any layer: its logits do not depend on it")
        for name, value in found.amounts.items():
            totals[name] = totals.get(name, 0.0) + float((value / whole).sum())
        macs |= found.macs
        seen += int(whole.numel())
    gathered = ranks.gather((totals, macs, seen))
    names = list(dict.fromkeys(name for part, _, _ in gathered for name in part))
    count = sum(part for _, _, part in gathered)
    if not count:
        raise DataError("no calibration images: relevance needs some")
    mean = {name: sum(part.get(name, 0.0) for part, _, _ in gathered) / count for name in names}
    whole_mean = sum(mean.values())
    known = {name: value for _, part, _ in gathered for name, value in part.items()}
    return Shares({name: value / whole_mean for name, value in mean.items()}, known, count)


def _count(batch: Mapping[str, Any]) -> int:
    return next((v.shape[0] for v in batch.values() if isinstance(v, torch.Tensor) and v.ndim), 0)


def first(batches: Sequence[Mapping[str, Any]], images: int | None) -> list[Mapping[str, Any]]:
    """The batches that hold the first ``images`` images, the last one cut."""
    found: list[Mapping[str, Any]] = []
    left = images
    for i in range(len(batches)):
        if left is not None and left <= 0:
            break
        batch, count = batches[i], _count(batches[i])
        if left is not None and count > left:
            batch = {k: v[:left] if isinstance(v, torch.Tensor) and v.ndim and v.shape[0] == count else v
                     for k, v in batch.items()}  # fmt: skip
        left = None if left is None else left - count
        found.append(batch)
    return found


def _on_relevance(tensor: torch.Tensor, function: Callable[[torch.Tensor], Any]) -> None:
    def hook(r: torch.Tensor) -> None:
        function(r.detach())

    tensor.register_hook(hook)


def _run(under: Pass, inputs: capture.Tree, targets: torch.Tensor | None) -> None:
    """One pass forward, and one back from the seeds."""
    args, kwargs = inputs
    with torch.enable_grad():
        with under.hooked(), under:
            output = under.model(*args, **kwargs)
        tensors, seeds = _seeds(output, targets, under.images)
        torch.autograd.backward(tensors, seeds)


def _seeds(output: Any, targets: torch.Tensor | None, images: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Where relevance starts: one at the logit of the class; with two heads, a half at each."""
    logits = getattr(output, "logits", None)
    if logits is None:
        logits = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(logits, torch.Tensor) or logits.ndim not in (2, 3) or logits.shape[0] != images:
        raise DataError("the model gives no logits [images, classes]: relevance starts at a class")
    heads = [getattr(output, name, None) for name in ("cls_logits", "distillation_logits")]
    heads = heads if all(isinstance(head, torch.Tensor) for head in heads) else [logits]
    last = logits if logits.ndim == 2 else logits[:, -1]
    chosen = last.argmax(-1) if targets is None else targets.to(last.device)
    if chosen.shape != (images,) or not bool(((chosen >= 0) & (chosen < last.shape[-1])).all()):
        raise DataError(f"targets {tuple(chosen.shape)}: one class below {last.shape[-1]} an image is needed")
    seeds = []
    for head in heads:
        seed = torch.zeros_like(head)
        (seed if seed.ndim == 2 else seed[:, -1]).scatter_(1, chosen[:, None], 1.0 / len(heads))
        seeds.append(seed)
    return heads, seeds


def _gradients(
    model: nn.Module, inputs: capture.Tree, images: int, targets: torch.Tensor | None
) -> dict[str, list[torch.Tensor]]:
    """Gradients of the logits of the classes at every output of a layer, in the order of the calls."""
    found: dict[str, list[torch.Tensor]] = {}

    def point(name: str, out: torch.Tensor, macs: float) -> None:
        kept = found.setdefault(name, [])
        number = len(kept)
        kept.append(torch.zeros((), dtype=torch.float64))
        _on_relevance(out, lambda g: kept.__setitem__(number, g.double()))

    _run(Pass(model, images, point, gradients=True), inputs, targets)
    return found


@contextmanager
def _computing(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, all floats of ``model`` are of ``dtype`` and parameters take no gradients; restored afterwards."""
    kept = []
    try:
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_meta:
                raise QuantizationError(f"{name} is not in memory: relevance runs the whole model at once")
            kept.append((tensor, tensor.data, tensor.requires_grad))
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(False)
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)
        yield
    finally:
        for tensor, data, needs in kept:
            tensor.data = data
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(needs)
