"""Attention functions of transformers that ask the module for its quantized part, and otherwise do what they did."""

from __future__ import annotations

from typing import Any

from torch import nn

from hfq.layers import attention, routing

__all__ = ["register"]


def _sdpa(module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return attention.attend(sdpa_attention_forward, module, query, key, value, attention_mask, **kwargs)


def _eager(module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
    inner = routing.eager_function(module)
    return attention.attend(inner, module, query, key, value, attention_mask, **kwargs)


def register() -> None:
    """Enter the functions, and the form of the masks that each of them takes. Idempotent."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask

    AttentionInterface.register(routing.DEFAULT_ROUTE, _sdpa)
    AttentionMaskInterface.register(routing.DEFAULT_ROUTE, sdpa_mask)
    AttentionInterface.register(routing.ROUTES["eager"], _eager)
    AttentionMaskInterface.register(routing.ROUTES["eager"], eager_mask)
    from hfq.integrations import kv_cache

    routing.routable(routing.DEFAULT_ROUTE, *routing.ROUTES.values(), adopt=kv_cache.adopt)
