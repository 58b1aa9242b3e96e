"""Tiny untrained vision transformers, and a norm with its reader, for tests of methods."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from hfq.graph.absorb import Matrix, Norm
from hfq.graph.links import Link, Pair


def untrained(kind: str = "vit", *, seed: int = 0, window: int = 2, blocks: int = 2, **more: Any) -> Any:
    """A ViT of ``blocks`` blocks or a Swin of two stages, for images ``[N, 3, 32, 32]`` and five classes."""
    torch.manual_seed(seed)
    if kind == "vit":
        return transformers.ViTForImageClassification(transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=blocks, num_attention_heads=4, intermediate_size=64, image_size=32,
            patch_size=8, num_labels=5, **more)).eval()  # fmt: skip
    return transformers.SwinForImageClassification(transformers.SwinConfig(
        embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=window, image_size=32, patch_size=4, mlp_ratio=2.0,
        num_labels=5, **more)).eval()  # fmt: skip


def uneven(kind: str = "vit", *, seed: int = 0, window: int = 2, **more: Any) -> Any:
    """The same with norms whose gains and biases differ by orders of magnitude between channels."""
    model = untrained(kind, seed=seed, window=window, **more)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.LayerNorm) and not name.endswith("layernorm"):
                gain = torch.exp(1.2 * torch.randn(module.weight.shape))
                module.weight.mul_(gain)
                module.bias.add_(gain * torch.randn(gain.shape))
    return model


def toy(width: int = 24, out: int = 7, *, spread: float = 1.5) -> tuple[nn.LayerNorm, nn.Linear, Pair, torch.Tensor]:
    """A norm and its reader in float64, with very different channels, and rows that the norm is given."""
    torch.manual_seed(0)
    norm, linear = nn.LayerNorm(width).double(), nn.Linear(width, out).double()
    with torch.no_grad():
        norm.weight.copy_(torch.exp(spread * torch.randn(width)))
        norm.bias.copy_(3 * torch.randn(width))
    whole = torch.arange(width)
    pair = Pair("norm", "toy", [Link(Norm("norm", norm, bias="bias", centred=True), whole)],
                [Link(Matrix("linear", linear), whole)], classes=width, proven=True)  # fmt: skip
    return norm, linear, pair, 2 * torch.randn(400, width, dtype=torch.float64)
