"""A decoder computed again from its parts alone: the proof that they are all there is, and where they are measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hfq.errors import QuantizationError
from hfq.graph.absorb import Norm
from hfq.graph.decoder import Decoder, DecoderBlock
from hfq.graph.proof import relative_error

__all__ = ["attention_inputs", "block_output", "logits", "prove"]

Watch = Callable[[str, Tensor], None]


def prove(decoder: Decoder, ids: Tensor, expected: Tensor) -> float:
    """Compare the twin's logits with the model's; also decides how a rotary table pairs channels.

    Args:
        decoder: ``rotary.interleaved`` is corrected, ``error`` filled in.
        ids: ``[B, T]``.
        expected: the model's logits.

    Raises:
        QuantizationError: they differ by more than the model's own rounding.
    """
    eps = torch.finfo(expected.dtype).eps
    limit = max(2e-4, 20 * eps)
    errors = []
    for interleaved in (False, True) if decoder.rotary is not None else (False,):
        if decoder.rotary is not None:
            decoder.rotary.interleaved = interleaved
        decoder.error = relative_error(logits(decoder, ids).to(expected.dtype), expected)
        errors.append(decoder.error)
        if decoder.error <= limit:
            return decoder.error
    raise QuantizationError(
        "no integer-only decoder can be made of this model: what it computes is not what its norms, attention and MLP "
        f"make of the embedding (the logits differ by {min(errors):.1e})"
    )


@torch.no_grad()
def logits(decoder: Decoder, ids: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Logits ``[B, T, V]`` of ids ``[B, T]`` without padding."""
    x = embed(decoder, ids, dtype)
    for block in decoder.blocks:
        x = block_output(decoder, block, x)
    x = _norm(decoder.norm, x)
    return _linear(decoder, decoder.head, x)


def embed(decoder: Decoder, ids: Tensor, dtype: torch.dtype) -> Tensor:
    x = _module(decoder, decoder.embed).weight[ids].to(dtype)
    if decoder.positions is not None:
        rows = torch.arange(ids.shape[1], device=ids.device) + decoder.offset
        x = x + _module(decoder, decoder.positions).weight[rows].to(dtype)
    return x


def attention_inputs(decoder: Decoder, block: DecoderBlock, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query ``[B, H, T, D]`` (rotated, unscaled), key and value ``[B, G, T, D]`` from what enters the block."""
    y = _norm(block.norm1, x)
    made = []
    parts = ((block.query, block.heads, block.query_norm), (block.key, block.groups, block.key_norm),
             (block.value, block.groups, None))
    for position, (name, heads, norm) in enumerate(parts):
        z = _linear(decoder, name, y).unflatten(-1, (heads, block.size))
        z = z if norm is None else _norm(norm, z)
        z = z.transpose(1, 2)
        made.append(z if position == 2 else _turn(decoder, z))
    return made[0], made[1], made[2]


def block_output(decoder: Decoder, block: DecoderBlock, x: Tensor, watch: Watch | None = None) -> Tensor:
    """The stream after the block; ``watch(name, tensor)`` sees what :func:`attention_inputs` gives."""
    query, key, value = attention_inputs(decoder, block, x)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if watch is not None:
            watch(name, tensor)
    share = block.heads // block.groups
    key, value = (t.repeat_interleave(share, 1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * block.scaling
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
    mixed = scores.masked_fill(causal, float("-inf")).softmax(-1) @ value
    x = x + _linear(decoder, block.out, mixed.transpose(1, 2).flatten(2))
    y = _norm(block.norm2, x)
    hidden = _linear(decoder, block.up, y)
    if block.gate is None:
        hidden = hidden.relu()
    else:
        gate = _linear(decoder, block.gate, y)
        scale = 1.0 if block.scale is None else _module(decoder, block.scale).scale.to(gate.dtype)
        hidden = hidden * (gate.relu() if block.activation == "relu" else gate * torch.sigmoid(gate / scale))
    return x + _linear(decoder, block.down, hidden)


def _module(decoder: Decoder, name: str) -> Any:
    return decoder.model.get_submodule(name)


def _linear(decoder: Decoder, name: str, x: Tensor) -> Tensor:
    module = _module(decoder, name)
    bias = None if module.bias is None else module.bias.to(x.dtype)
    return nn.functional.linear(x, module.weight.to(x.dtype), bias)


def _norm(norm: Norm, x: Tensor) -> Tensor:
    eps = next((float(getattr(norm.module, key)) for key in ("eps", "variance_epsilon") if hasattr(norm.module, key)),
               1e-6)
    if norm.centred:
        x = x - x.mean(-1, keepdim=True)
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm.get_gain().to(x)
    bias = norm.get_bias()
    return y if bias is None else y + bias.to(x)


def _turn(decoder: Decoder, x: Tensor) -> Tensor:
    table = decoder.rotary
    if table is None:
        return x
    length, count = x.shape[-2], table.cos.shape[-1]
    cos, sin = table.cos[:length].to(x), table.sin[:length].to(x)
    part = x[..., : 2 * count]
    if table.interleaved:
        first, second = part[..., 0::2], part[..., 1::2]
    else:
        first, second = part[..., :count], part[..., count:]
    a, b = first * cos - second * sin, second * cos + first * sin
    turned = torch.stack((a, b), -1).flatten(-2) if table.interleaved else torch.cat((a, b), -1)
    return torch.cat((turned, x[..., 2 * count :]), -1)
