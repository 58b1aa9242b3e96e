"""The same function on other numbers: an exact random rescaling of a Llama-like model's channels.

Weights that came out of a low-bit file lie on a grid that a quantizer could just find again. Multiplying channels by
random factors and dividing the weights that read them leaves the function as it was and takes the grid away. One draw
is one sample: on the demo model round-to-nearest at 4 bits spreads from 18.5 to 19.6 over six seeds, so methods are
compared on the same seed, and a small difference on several. This is
written out for one family of models, independent of the pair discovery, so that it can serve as a check.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hfq.errors import QuantizationError

__all__ = ["rescale", "spread_convolutions", "spread_norms", "widen_channels"]


@torch.no_grad()
def rescale(model: nn.Module, sigma: float = 0.1, seed: int = 0) -> nn.Module:
    """Rescale channels in place by ``exp(sigma * N(0, 1))``: norms to q, k, v, gate and up; v to o; up to down.

    Args:
        model: a Llama-like causal language model (RMSNorm with a plain gain, no biases in v and up).
        sigma: standard deviation of the logarithm of the factors.
        seed: of the factors; block by block, in a fixed order.

    Raises:
        QuantizationError: the blocks are not of that family.
    """
    generator = torch.Generator().manual_seed(seed)

    def factors(count: int) -> Tensor:
        return torch.exp(sigma * torch.randn(count, generator=generator, dtype=torch.float64))

    for block in _blocks(model):
        attention, mlp = block.self_attn, block.mlp
        _norm_to(block.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj],
                 factors(block.input_layernorm.weight.numel()))
        _norm_to(block.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj],
                 factors(block.post_attention_layernorm.weight.numel()))
        heads = attention.o_proj.in_features // attention.head_dim
        groups = attention.v_proj.out_features // attention.head_dim
        value = factors(attention.v_proj.out_features)
        per_head = value.view(groups, 1, -1).expand(groups, heads // groups, -1).reshape(-1)
        _rows(attention.v_proj, value)
        _columns(attention.o_proj, 1 / per_head)
        hidden = factors(mlp.up_proj.out_features)
        _rows(mlp.up_proj, hidden)
        _columns(mlp.down_proj, 1 / hidden)
    return model


@torch.no_grad()
def widen_channels(model: nn.Module, channels: Sequence[int], factor: float = 30.0) -> nn.Module:
    """Give every norm of every block a gain ``factor`` times larger in ``channels``, the weights after it smaller.

    The function is unchanged; the activations that the quantized layers read get outlier channels, as the ones of
    large language models have.
    """
    for block in _blocks(model):
        attention, mlp = block.self_attn, block.mlp
        scale = torch.ones(block.input_layernorm.weight.numel(), dtype=torch.float64)
        scale[list(channels)] = factor
        _norm_to(block.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj], scale)
        _norm_to(block.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj], scale)
    return model


@torch.no_grad()
def spread_norms(model: nn.Module, spread: float = 1.5, seed: int = 0, largest: int = 32) -> nn.Module:
    """Give the channels behind the norms of vision transformer blocks the unequal ranges that large models have.

    Gain and bias of a channel are multiplied by ``2 ** floor(|N(0, spread)|)`` (at most ``largest``) and the weights
    that read it are divided by it. Powers of two round nothing: the function is the same to the last bit where sums
    keep their order. Half of the channels stay as they are, about one in twenty grows eightfold or more.

    Args:
        model: a model with blocks that have ``layernorm_before`` (read by query, key and value) and ``layernorm_after``
            (read by the first linear of the MLP), as ViT, DeiT and Swin have.

    Raises:
        QuantizationError: there is no such block.
    """
    generator = torch.Generator().manual_seed(seed)
    found = [m for m in model.modules() if hasattr(m, "layernorm_before") and hasattr(m, "layernorm_after")]
    if not found:
        raise QuantizationError(f"{type(model).__name__} has no block with layernorm_before and layernorm_after")
    for block in found:
        linears = {name.rpartition(".")[2] if "intermediate" not in name else "fc1": part
                   for name, part in block.named_modules() if isinstance(part, nn.Linear)}  # fmt: skip
        attention = [part for name, part in linears.items() if name in ("q_proj", "k_proj", "v_proj", "query", "key",
                                                                        "value")]  # fmt: skip
        readers = {"layernorm_before": attention, "layernorm_after": [linears["fc1"]] if "fc1" in linears else []}
        for name, parts in readers.items():
            norm = getattr(block, name)
            if len(parts) not in (1, 3) or any(part.in_features != norm.weight.numel() for part in parts):
                raise QuantizationError(f"{type(block).__name__}: the readers of {name} are not where ViT has them")
            scale = _powers(norm.weight.numel(), spread, largest, generator)
            _norm_to(norm, parts, scale)
            norm.bias.copy_((norm.bias.double() * scale).to(norm.bias.dtype))
    return model


@torch.no_grad()
def spread_convolutions(model: nn.Module, spread: float = 1.5, seed: int = 0, largest: int = 32) -> nn.Module:
    """:func:`spread_norms` for the inner channels of residual blocks: through batch normalisation and ReLU, exactly.

    Args:
        model: a model with blocks whose ``layer`` is a sequence of parts with ``convolution``, ``normalization`` and
            ``activation``, as ResNets of transformers have.

    Raises:
        QuantizationError: there is no such block, or something other than a ReLU stands between.
    """
    generator = torch.Generator().manual_seed(seed)
    chains = [list(m.layer) for m in model.modules() if isinstance(getattr(m, "layer", None), nn.Sequential)]
    chains = [parts for parts in chains if all(hasattr(part, "convolution") for part in parts)]
    if not chains:
        raise QuantizationError(f"{type(model).__name__} has no block with a sequence of convolutions in `layer`")
    for parts in chains:
        for part, reader in zip(parts, parts[1:], strict=False):
            if not isinstance(part.activation, nn.ReLU) or reader.convolution.groups != 1:
                raise QuantizationError(f"{type(part).__name__}: a ReLU and a convolution without groups are needed")
            scale = _powers(part.normalization.num_features, spread, largest, generator)
            for tensor in (part.normalization.weight, part.normalization.bias):
                tensor.copy_((tensor.double() * scale).to(tensor.dtype))
            weight = reader.convolution.weight
            weight.copy_((weight.double() / scale[:, None, None]).to(weight.dtype))
    return model


def _powers(count: int, spread: float, largest: int, generator: torch.Generator) -> Tensor:
    exponent = (spread * torch.randn(count, generator=generator)).abs().floor()
    return torch.exp2(exponent.double()).clamp(max=largest)


def _blocks(model: nn.Module) -> list[nn.Module]:
    blocks = list(getattr(getattr(model, "model", model), "layers", []))
    wanted = ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", "mlp.gate_proj",
              "input_layernorm", "post_attention_layernorm")
    names = {name for block in blocks for name, _ in block.named_modules()}
    missing = [name for name in wanted if name not in names]
    if not blocks or missing:
        raise QuantizationError(f"{type(model).__name__} is not Llama-like: its blocks lack {', '.join(missing)}")
    for name in ("self_attn.v_proj", "mlp.up_proj"):
        if blocks[0].get_submodule(name).bias is not None:
            raise QuantizationError(f"{name} has a bias, which this exact rescaling does not handle")
    return blocks


def _norm_to(norm: nn.Module, readers: list[nn.Module], scale: Tensor) -> None:
    norm.weight.copy_((norm.weight.double() * scale).to(norm.weight.dtype))
    for reader in readers:
        _columns(reader, 1 / scale)


def _rows(linear: nn.Module, scale: Tensor) -> None:
    linear.weight.copy_((linear.weight.double() * scale[:, None]).to(linear.weight.dtype))


def _columns(linear: nn.Module, scale: Tensor) -> None:
    linear.weight.copy_((linear.weight.double() * scale).to(linear.weight.dtype))
