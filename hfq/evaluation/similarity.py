"""How near a quantized model's results are to the float model's: signal to noise of tensors, structure of pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from hfq.errors import DataError

__all__ = ["HIGHEST", "SIGNALS", "signal_to_noise", "structural_similarity"]

HIGHEST = 200.0  # dB, of equal tensors


def _whole(x: Tensor) -> Tensor:
    return x


def _halves(x: Tensor) -> Tensor:
    """What the condition changes: the difference of the halves of classifier-free guidance."""
    if x.shape[0] % 2:
        raise DataError(f"an output of {x.shape[0]} rows has no two halves of guidance: record the calls with "
                        "guidance, or score by the whole output")
    first, second = x.chunk(2)
    return first - second


def _frames(x: Tensor) -> Tensor:
    """What moves: differences of neighbouring frames of ``[B, C, F, H, W]``."""
    if x.ndim != 5 or x.shape[2] < 2:
        raise DataError(f"an output of shape {tuple(x.shape)} has no frames [B, C, F, H, W] to compare")
    return x[:, :, 1:] - x[:, :, :-1]


# What of an output is compared.
SIGNALS: dict[str, Callable[[Tensor], Tensor]] = {"output": _whole, "guidance": _halves, "frames": _frames}


def signal_to_noise(found: Sequence[Tensor], wanted: Sequence[Tensor], signal: str = "output") -> float:
    """``10 log10(sum wanted^2 / sum (found - wanted)^2)`` in dB over all tensors, at most 200.

    Args:
        signal: "output" for all of a tensor, "guidance" for the difference of its two halves along the batch (what the
            prompt changes), "frames" for differences along axis 2 (what moves in a video).

    Raises:
        DataError: the tensors do not fit each other or the signal, or there is no signal.
    """
    of = SIGNALS[signal]
    power = noise = 0.0
    for a, b in zip(found, wanted, strict=True):
        if a.shape != b.shape:
            raise DataError(f"tensors of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared")
        one, other = of(a.double()), of(b.double())
        power += float(other.square().sum())
        noise += float((one - other).square().sum())
    if not power > 0 or noise != noise:
        raise DataError(f"the {signal} of the float model is zero, or a result is not finite: nothing to compare with")
    return min(HIGHEST, 10 * float(torch.log10(torch.tensor(power / max(noise, 1e-300), dtype=torch.float64))))


def structural_similarity(pictures: Tensor, reference: Tensor, window: int = 511) -> Tensor:
    """Structural similarity (Wang et al. 2004) of pictures ``[N, C, H, W]`` in [0, 1]: float32 ``[N]``, 1 for equal.

    Args:
        window: side of the uniform window; for smaller pictures the largest odd one that fits.

    Raises:
        DataError: shapes that differ.
    """
    if pictures.shape != reference.shape or pictures.ndim != 4:
        raise DataError(f"pictures of shapes {tuple(pictures.shape)} and {tuple(reference.shape)} cannot be compared")
    most = min(window, *pictures.shape[2:])
    side = most if most % 2 else most - 1
    x, y = pictures.double(), reference.double()

    def mean(t: Tensor) -> Tensor:
        return F.avg_pool2d(t, side, 1)

    sample = side * side / max(side * side - 1, 1)  # of the unbiased variance
    mx, my = mean(x), mean(y)
    vx, vy = ((mean(t * t) - m * m) * sample for t, m in ((x, mx), (y, my)))
    vxy = (mean(x * y) - mx * my) * sample
    low, high = 0.01**2, 0.03**2  # constants for a range of one
    maps = (2 * mx * my + low) * (2 * vxy + high) / ((mx * mx + my * my + low) * (vx + vy + high))
    return maps.flatten(1).mean(1).float()
