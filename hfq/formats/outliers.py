"""Outliers of a token beside its codes: a fixed number of slots, each a float16 difference and a channel.

Tokens are ``[batch, heads, tokens, head_dim]``; a channel counts over all heads. A slot that is not needed adds zero.
"""

from __future__ import annotations

import torch

__all__ = ["add", "beyond", "differences", "fill", "flat"]

_LARGEST = 65504.0


def flat(x: torch.Tensor) -> torch.Tensor:
    """Tokens as rows of all their channels, ``[batch, tokens, heads * head_dim]``."""
    return x.transpose(1, 2).flatten(2)


def beyond(scaled: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Channels of the ``count`` largest and ``count`` smallest of each token, and which of them leave ``[-1, 1]``."""
    rows = flat(scaled)
    (high, above), (low, below) = rows.topk(count, dim=-1), rows.topk(count, dim=-1, largest=False)
    return torch.cat([above, below], -1), torch.cat([high > 1, low < -1], -1)


def fill(codes: torch.Tensor, index: torch.Tensor, code: int) -> torch.Tensor:
    """``codes`` with ``code`` at the channels ``index`` ``[batch, tokens, slots]``."""
    rows = flat(codes).scatter(-1, index, code)
    return rows.unflatten(-1, (codes.shape[1], codes.shape[3])).transpose(1, 2).contiguous()


def differences(
    x: torch.Tensor, dense: torch.Tensor, index: torch.Tensor, outside: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The slots: what ``dense`` lacks at the channels ``index`` (float16), and these channels.

    Args:
        outside: which slots are needed; ``None`` for all.
    """
    value = flat(x - dense).gather(-1, index)
    value = value.clamp(-_LARGEST, _LARGEST).add(value, alpha=0)  # an infinity becomes NaN, not a large number
    if outside is not None:
        value, index = torch.where(outside, value, 0.0), torch.where(outside, index, 0)
    channels = x.shape[1] * x.shape[3]
    return value.half(), index.to(torch.int16 if channels < 1 << 15 else torch.int32)


def add(x: torch.Tensor, values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Add ``values`` at channels ``index`` (``[batch, tokens, slots]``) to ``x`` in place; returns ``x``."""
    batch, _, tokens, width = x.shape
    at = index.long()
    at = (at // width * tokens + torch.arange(tokens, device=x.device)[None, :, None]) * width + at % width
    x.view(batch, -1).scatter_add_(1, at.view(batch, -1), values.to(x.dtype).reshape(batch, -1))
    return x
