"""A packed table in the place of ``nn.Embedding``."""

from __future__ import annotations

from typing import Any

import torch

from hfq import kernels
from hfq.formats import QuantSpec
from hfq.layers.packed import PackedModule
from hfq.layers.slot import Slot

__all__ = ["QEmbedding"]


class QEmbedding(PackedModule):
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

    @property
    def spec(self) -> QuantSpec:
        return self.slots["weight"].spec

    @property
    def weight(self) -> torch.Tensor:
        """The float table, ``compute_dtype``; dequantized when it is used."""
        return self.weight_view("weight")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and isinstance(value, torch.Tensor):
            self.assign_weight("weight", value)
        else:
            super().__setattr__(name, value)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Integer ids ``[...]`` to ``[..., embedding_dim]``."""
        return kernels.embedding(ids, self.packed()[0], self.compute_dtype)

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self._kind, "in_features": self.embedding_dim, "out_features": self.num_embeddings, "bias": False,
            "spec": self.spec.to_dict(), "online": None,
        }
