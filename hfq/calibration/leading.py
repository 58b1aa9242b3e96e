"""Layers whose inputs begin with a token that is the same in every call: found by what enters them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hfq.calibration import static
from hfq.calibration.capture import forward, quiet

__all__ = ["find"]

SAME = 1e-5  # relative to the token's length
OTHER = 1e-3
CALLS = 4


@dataclass
class _Seen:
    reference: torch.Tensor  # [T, D] of the first row of the first call
    first: float = 0.0
    rest: float = 0.0
    fits: bool = True


@torch.no_grad()
def find(model: nn.Module, batches: Sequence[Mapping[str, Any]], sites: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Site name → its constant first token, float32 ``[D]``.

    The first token must be the same, up to 1e-5 of its length, in all rows of some calls spread over the data, and the
    other tokens must not be: data of one prompt cannot tell, and nothing is found.
    """
    seen: dict[str, _Seen] = {}

    def hook(site: Any, x: torch.Tensor) -> None:
        if x.ndim != 3 or x.shape[1] < 2:
            seen[site.name] = _Seen(torch.empty(0), fits=False)
            return
        rows = x.float().cpu()
        now = seen.setdefault(site.name, _Seen(rows[0].clone()))
        if not now.fits or rows.shape[1:] != now.reference.shape:
            now.fits = False
            return
        length = float(now.reference[0].norm().clamp(min=1e-30))
        distance = (rows - now.reference).norm(dim=-1)
        now.first = max(now.first, float(distance[:, 0].max()) / length)
        now.rest = max(now.rest, float(distance[:, 1:].max()) / length)

    linears = [site for site in sites if site.kind in ("linear", "transposed")]
    with quiet(model), static.watching(linears, hook):
        for i in range(0, len(batches), max(1, len(batches) // CALLS)):
            forward(model, batches[i])
    return {name: now.reference[0] for name, now in seen.items()
            if now.fits and now.first <= SAME and now.rest > OTHER}  # fmt: skip
