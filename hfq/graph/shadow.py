"""Channel numbers of a tensor, element by element: ``NONE`` does not depend on the source, ``ZERO`` is zero."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["NONE", "ZERO", "Classes", "collapse", "is_constant", "only"]

NONE = -1
ZERO = -2
_LARGE = torch.iinfo(torch.long).max


def is_constant(shadow: torch.Tensor, dims: Sequence[int]) -> bool:
    """Whether the channel is the same all along ``dims``; zeros belong to any channel."""
    if not dims or shadow.numel() == 0:
        return True
    low = torch.where(shadow == ZERO, _LARGE, shadow).amin(list(dims), keepdim=True)
    return bool(((shadow == low) | (shadow == ZERO)).all())


def only(shadow: torch.Tensor, dims: Sequence[int], keepdim: bool = False) -> torch.Tensor:
    """The channel along ``dims``, where it is constant (zeros only: ``ZERO``)."""
    return shadow.amax(list(dims), keepdim=keepdim) if dims else shadow


def collapse(shadow: torch.Tensor, keep: Sequence[int]) -> torch.Tensor | None:
    """The channels along the axes ``keep``, or ``None`` if they change along the others."""
    kept = {d % shadow.dim() for d in keep}
    dims = [d for d in range(shadow.dim()) if d not in kept]
    return only(shadow, dims) if is_constant(shadow, dims) else None


class Classes:
    """Channels that must share one scale (union-find)."""

    def __init__(self, size: int) -> None:
        self._parent = list(range(size))

    def find(self, channel: int) -> int:
        while self._parent[channel] != channel:
            self._parent[channel] = self._parent[self._parent[channel]]
            channel = self._parent[channel]
        return channel

    def union(self, a: int, b: int) -> None:
        low, high = sorted((self.find(a), self.find(b)))
        self._parent[high] = low

    def unite(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Unite the channels at equal positions of two tensors of channel numbers."""
        pairs = torch.unique(torch.stack((a.flatten(), b.flatten())), dim=1)
        for left, right in zip(*pairs.tolist(), strict=True):
            self.union(left, right)

    def labels(self, channels: torch.Tensor) -> torch.Tensor:
        """Consecutive class numbers, from 0, of ``channels``."""
        roots = torch.tensor([self.find(int(c)) for c in channels], dtype=torch.long)
        return torch.unique(roots, return_inverse=True)[1] if len(roots) else roots
