"""Scratch memory that is used again: fresh large temporaries cost more in page faults than the work done in them."""

from __future__ import annotations

import math
import threading

import torch

__all__ = ["LIMIT", "nbytes", "scratch"]

# A thread keeps at most this much per buffer; a larger request is served and not kept.
LIMIT = 16 << 20

_local = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised CPU tensor ``shape`` whose memory the next call with the same name and dtype takes again."""
    buffers: dict[tuple[str, torch.dtype], torch.Tensor] = _local.__dict__.setdefault("buffers", {})
    numel = math.prod(shape)
    kept = buffers.get((name, dtype))
    if kept is None or kept.numel() < numel:
        # Never an inference tensor: the buffer outlives the block that made it.
        with torch.inference_mode(False):
            kept = torch.empty(numel, dtype=dtype)
        if kept.nbytes <= LIMIT:
            buffers[name, dtype] = kept
    return kept[:numel].view(shape)


def nbytes() -> int:
    """Bytes that this thread keeps."""
    return sum(t.nbytes for t in _local.__dict__.get("buffers", {}).values())
