"""A tiny Llama, batches for it, and a minimal recipe: round every weight to nearest, in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hfq.calibration import data

SIZES: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(**more: Any) -> Any:
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**{**SIZES, **more})).eval()

    return make


@pytest.fixture
def batches():
    def make(rows: int = 5, tokens: int = 12, batch_size: int = 2, padded: bool = False) -> data.Batches:
        ids = torch.randint(1, 100, (rows, tokens), generator=torch.Generator().manual_seed(1))
        if not padded:
            return data.normalise(ids, batch_size=batch_size, seqlen=None)
        return data.normalise(
            [{"input_ids": row[: tokens - i % 3]} for i, row in enumerate(ids)], batch_size=batch_size
        )

    return make


@pytest.fixture
def rounded():
    def change(step: Any, bits: int = 4) -> None:
        """Round to nearest in place (no packed layers), so that only the walk is under test."""
        for site in step.block.sites:
            for name in site.tensors:
                weight = getattr(site.module, name).data
                scale = weight.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
                weight.copy_((weight / scale).round() * scale)

    return change
