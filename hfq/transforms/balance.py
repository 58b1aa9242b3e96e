"""Static and moving imbalance of channels, taken out in front of a product: a scale that is fixed, then a rotation.

What of a channel's size is the same in all calls goes into the weight by a scale; what comes and goes from call to call
is spread over all channels by a Hadamard transform with random signs. Both run online, and the weight, which holds
their counterparts, is rounded once, after both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hfq.errors import QuantizationError
from hfq.kernels import hadamard
from hfq.layers.parts import ChannelScale, Hadamard, OnlinePart
from hfq.transforms.scale import smoothing

__all__ = ["LEAST_INPUT", "balance_scale", "balanced"]

# Channels that were never larger count as that large: a dead one would get a scale without bounds.
LEAST_INPUT = 1e-3


def balance_scale(act_max: torch.Tensor, weight_max: torch.Tensor, alpha: float = 0.5) -> torch.Tensor:
    """``weight_max ** alpha / act_max ** (1 - alpha)``: what inputs are multiplied with and weights divided by.

    Args:
        act_max: largest magnitude of each channel ``[K]``; at least 1e-3 is taken.
        weight_max: of each column, over all weights that read the channels.
        alpha: exponent of the weight: 1 leaves the sizes of channels in the inputs.

    Returns:
        float32 ``[K]``, finite and positive.
    """
    return (1 / smoothing(act_max.detach().float().clamp(min=LEAST_INPUT), weight_max, 1 - alpha)).float()


def balanced(
    weights: Sequence[torch.Tensor], act_max: torch.Tensor, *, alpha: float = 0.5, scale: bool = True,
    rotate: bool = True, generator: torch.Generator | None = None,
) -> list[list[OnlinePart]]:
    """The online parts of the layers that read one tensor, first the scale, then the rotation.

    Args:
        weights: of all readers, ``[out, K]`` each: they share scale and rotation, so that their input is transformed
            and quantized once.
        act_max: largest magnitude of each channel ``[K]``.
        alpha: see :func:`balance_scale`.
        scale, rotate: which of the two.
        generator: of the signs, which are stored. Without a Hadamard matrix of order ``K`` runs of the largest order
            that divides it are rotated.

    Returns:
        Parts for each reader, equal and with tensors of their own.

    Raises:
        QuantizationError: the readers have inputs of different widths, or no Hadamard matrix fits them.
    """
    size = act_max.shape[0]
    if any(w.shape[1] != size for w in weights):
        raise QuantizationError(f"readers of {size} channels with weights {[tuple(w.shape) for w in weights]}")
    vector = signs = block = None
    if scale:
        most = torch.stack([w.detach().abs().amax(0).float().cpu() for w in weights]).amax(0)
        vector = balance_scale(act_max.cpu(), most, alpha)
    if rotate:
        block = None if hadamard.is_order(size) else hadamard.best_block(size)
        if block is None and not hadamard.is_order(size):
            raise QuantizationError(f"no Hadamard matrix has an order that divides {size} channels: rotate=False")
        signs = hadamard.random_signs(size, generator)

    def parts() -> list[Any]:
        found: list[Any] = [] if vector is None else [ChannelScale(vector)]
        return found if signs is None else [*found, Hadamard(size, block, signs=signs)]

    return [parts() for _ in weights]
