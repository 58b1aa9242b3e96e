"""Reconstruct one block: its quantized weights learn to give the float block's output from the quantized stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from hfq.calibration.cache import leaves
from hfq.calibration.capture import device_of, first_tensor
from hfq.errors import QuantizationError
from hfq.reconstruction import loop
from hfq.reconstruction.samples import Samples

__all__ = ["fit", "forward_with", "frozen", "independent", "output_error", "replacing"]


def fit(
    step: Any,
    quantizers: Mapping[str, nn.Module],
    *,
    steps: int,
    lr: loop.LearningRate,
    batch_size: int = 8,
    loss: Any = "mse",
    generator: torch.Generator | None = None,
    mix: float = 0.0,
    targets: Sequence[torch.Tensor] | None = None,
    float_inputs: Sequence[Any] | None = None,
    **options: Any,
) -> list[float]:
    """Train ``quantizers`` so that the block maps the quantized stream to the float stream's outputs.

    Args:
        step: a :class:`hfq.calibration.step.Step` whose block has not been changed; ``step.outputs`` are the targets.
        quantizers: site name (or qualified name of a parameter) → module whose output replaces that weight. Sites
            give ``[out, in]``, banks of experts ``[E, out, in]``; the transposed layout is made here.
        mix: probability with which an element of the input is taken from the float stream.
        targets, float_inputs: outputs and calls of another float block; default those of ``step``.
        options: the rest goes to :func:`hfq.reconstruction.loop.optimise`.

    Returns:
        The loss curve. The quantizers hold the best parameters; the block itself is not changed.
    """
    block = step.block
    float_inputs = step.float_inputs if float_inputs is None else float_inputs
    if mix and float_inputs is None:
        raise QuantizationError(f"{block.name}: mixing inputs needs the float stream in the walk")
    device = device_of(block.module)
    forward = forward_with(block, list(quantizers))
    samples = Samples(
        step.inputs,
        step.outputs if targets is None else targets,
        float_inputs=float_inputs,
        mix=mix,
        mask=step.mask,
        device=device,
        whole=not separable(step, device),
    )
    with frozen(block.module):
        return loop.optimise(
            forward,
            quantizers,
            samples,
            steps=steps,
            lr=lr,
            batch_size=batch_size,
            loss=loss,
            generator=generator,
            where=block.name,
            **options,
        )


def forward_with(block: Any, names: list[str]) -> loop.Forward:
    """A function that runs ``block`` with other weights under ``names`` (sites or parameters of the block)."""
    replaced = replacing(block, names)

    def forward(weights: dict[str, torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        output = functional_call(block.module, replaced(weights), args, kwargs)
        path = first_tensor(output)
        return next(tensor for where, tensor in leaves(output) if where == path)

    return forward


def replacing(block: Any, names: list[str]) -> Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """A function from weights under ``names`` to parameters of the block's module, in their layout and dtype."""
    sites = {site.name: site for site in block.sites}
    own = dict(block.module.named_parameters())
    prefix = f"{block.name}."
    turned = {
        f"{site.name}.{name}"
        for site in block.sites
        if site.kind == "experts" and site.in_by_out
        for name in site.tensors
    }
    paths: dict[str, tuple[str, bool]] = {}
    for name in names:
        site = sites.get(name)
        path = (name if site is None else f"{name}.weight").removeprefix(prefix)
        if path not in own:
            raise QuantizationError(f"{block.name} has no parameter {path!r} to learn; it has {sorted(own)}")
        paths[name] = (path, site.kind == "transposed" if site is not None else name in turned)

    def replaced(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # The block computes in its own dtype; what is learned stays in float32.
        found = ((weights[name], *paths[name]) for name in weights if name in paths)
        return {path: (weight.mT if flip else weight).to(own[path].dtype) for weight, path, flip in found}

    return replaced


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No gradients for the module's own parameters; what was asked of them before is restored."""
    wanted = [p for p in module.parameters() if p.requires_grad]
    try:
        for p in wanted:
            p.requires_grad_(False)
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)


def separable(step: Any, device: torch.device) -> bool:
    """Whether a sample alone gives the output that it gives among the others of its call."""
    return independent(forward_with(step.block, []), step.inputs, step.outputs, device)


@torch.no_grad()
def independent(
    forward: loop.Forward, inputs: Sequence[Any], outputs: Sequence[torch.Tensor], device: torch.device
) -> bool:
    """:func:`separable` for any function of calls."""
    if len(inputs) == 0:
        return True
    widest = max(range(len(inputs)), key=lambda i: outputs[i].shape[0])
    if outputs[widest].shape[0] == 1:
        return True
    call, target = [inputs[widest]], [outputs[widest]]
    together, alone = (
        Samples(call, target, whole=whole, device=device, distributed=False).parts([0], 0)[0] for whole in (True, False)
    )
    try:
        whole, single = forward({}, *together.call), forward({}, *alone.call)
    except (RuntimeError, IndexError, ValueError):
        return False  # shapes inside the block are tied to the number of samples
    if whole.shape[1:] != single.shape[1:] or single.shape[0] != 1:
        return False
    return bool((whole[:1] - single).norm() <= 1e-2 * whole[:1].norm())


@torch.no_grad()
def output_error(step: Any, weights: Mapping[str, torch.Tensor], limit: int | None = None) -> float:
    """Relative error ``||Y - f(X~)|| / ||Y||`` of the block's output with other weights; padded rows excluded.

    ``limit`` bounds the calls that are looked at.
    """
    forward = forward_with(step.block, list(weights))
    device = device_of(step.block.module)
    count = len(step.inputs) if limit is None else min(limit, len(step.inputs))
    samples = Samples(step.inputs, step.outputs, mask=step.mask, device=device, whole=True, distributed=False)
    lost = size = 0.0
    for i in range(count):
        part = samples.parts([i], 0)[0]
        difference = forward(dict(weights), *part.call).float() - part.target.float()
        target = part.target.float()
        if part.mask is not None:
            wide = part.mask.reshape(*part.mask.shape, *(1,) * (target.ndim - 2))
            difference, target = difference * wide, target * wide
        lost += float(difference.double().square().sum())
        size += float(target.double().square().sum())
    return (lost / size) ** 0.5 if size else 0.0
