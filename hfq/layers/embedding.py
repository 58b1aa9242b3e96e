"""A packed table in the place of ``nn.Embedding``."""

from __future__ import annotations

from typing import Any

import torch

from hfq import kernels
from hfq.formats import QuantSpec
from hfq.layers.one_weight import OneWeight
from hfq.layers.slot import Slot

__all__ = ["QEmbedding"]


class QEmbedding(OneWeight):
    """Rows of a packed ``[num_embeddings, embedding_dim]``; only the rows asked for are unpacked.

    Args:
        num_embeddings, embedding_dim: as of ``nn.Embedding``.
        spec: grid of the codes, groups along ``embedding_dim``.
        padding_idx: kept for those who read it; it has no effect on the result.
        compute_dtype: dtype of the rows.
    """

    _kind = "embedding"
    _has_runtime = False

    def __init__(
        self, num_embeddings: int, embedding_dim: int, spec: QuantSpec, *, padding_idx: int | None = None,
        compute_dtype: torch.dtype = torch.float32, device: Any = None,
    ) -> None:
        slots = {"weight": Slot(spec, num_embeddings, embedding_dim)}
        super().__init__(slots, compute_dtype=compute_dtype, device=device)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Integer ids ``[...]`` to ``[..., embedding_dim]``."""
        return kernels.embedding(ids, self.packed()[0], self.compute_dtype)
