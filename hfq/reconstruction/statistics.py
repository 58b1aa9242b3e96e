"""What enters the modules of a block: largest magnitude and middle of every channel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hfq.calibration import ranks
from hfq.calibration.capture import device_of, to_device
from hfq.calibration.observers import AbsMax
from hfq.calibration.step import input_rows

__all__ = ["InputStatistics", "input_statistics"]

_OLD = 0.99  # share of the running middle that a new sample leaves


@dataclass
class InputStatistics:
    """Of one module's input: ``largest`` magnitude and ``middle`` (running mean of ``(max + min) / 2``), ``[K]``."""

    largest: torch.Tensor
    middle: torch.Tensor


@torch.no_grad()
def input_statistics(step: Any, modules: Mapping[str, nn.Module]) -> dict[str, InputStatistics]:
    """Statistics of the first input of ``modules`` while the block runs on the float stream, padded rows left out.

    The first sample starts the running middle, every later one moves it by a hundredth; samples count in their order,
    over all processes. Modules that the data never reaches are missing.
    """
    cache = step.inputs if step.float_inputs is None else step.float_inputs
    largest = {name: AbsMax(axis=-1) for name in modules}
    middles: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    for i in range(len(cache)):
        mask = step.mask(i)
        handles = [
            module.register_forward_pre_hook(_hook(largest[name], middles[name], step.hidden(i), mask))
            for name, module in modules.items()
        ]
        try:
            args, kwargs = to_device(cache[i], device_of(step.block.module))
            step.block.module(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
    found = {}
    for name, observer in largest.items():
        samples = [row for part in ranks.gather([m.cpu() for m in middles[name]]) for row in part]
        observer.reduce()
        if samples:
            middle = samples[0]
            for one in samples[1:]:
                middle = _OLD * middle + (1 - _OLD) * one
            found[name] = InputStatistics(observer.range()[1], middle)
    return found


def _hook(
    largest: AbsMax, middles: list[torch.Tensor], hidden: torch.Tensor, mask: torch.Tensor | None
) -> Callable[..., None]:
    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach().float()
        rows = None if mask is None else input_rows(x, hidden, mask.to(x.device))
        if rows is not None:
            largest.update(x.reshape(-1, x.shape[-1])[rows])
        else:
            largest.update(x)
        samples = x if x.dim() >= 3 else x[None]
        for number, sample in enumerate(samples):
            sample = sample.reshape(-1, x.shape[-1])
            if rows is not None and x.dim() >= 3 and mask is not None:
                sample = sample[mask[number].to(x.device).repeat_interleave(len(sample) // mask.shape[1])]
            if len(sample):
                middles.append((sample.amax(0) + sample.amin(0)) / 2)

    return look
