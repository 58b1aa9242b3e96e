"""Whose weights an adapter belongs to, and what a model is after adapters were merged into it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from hfq.layers import swap

__all__ = ["combined", "record"]


def combined(digests: Mapping[str, str]) -> str:
    """One SHA-256 for the digests of several layers; their order does not matter."""
    total = hashlib.sha256()
    for name, one in sorted(digests.items()):
        total.update(f"{name}={one};".encode())
    return total.hexdigest()


def record(model: nn.Module, tuned: Any) -> None:
    """Write into the model's config what its packed layers are now, so that it saves and loads as a packed checkpoint.

    A model that was float until now becomes one of round to nearest, which is how its layers were packed in the end.
    Modules that belong to no library have no config.
    """
    if not swap.packed_modules(model):
        return
    from hfq import api
    from hfq.integrations.registration import install_environment
    from hfq.methods.rtn import RTNConfig

    quantizer = getattr(model, "hf_quantizer", None)
    config = getattr(quantizer, "quantization_config", None)
    if getattr(config, "manifest", None) is not None:
        config.manifest = swap.describe(model)
        return
    install_environment()
    attach = api.environment().attach
    if attach is not None:
        config = RTNConfig(bits=tuned.bits, group_size=tuned.group_size, symmetric=tuned.symmetric)
        config.manifest = swap.describe(model)
        attach(model, config)
