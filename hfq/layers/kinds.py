"""Which packed layer stands for which float module, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hfq import kernels
from hfq.errors import QuantizationError
from hfq.formats import ActivationSpec, QuantSpec
from hfq.layers.conv import QConv2d, geometry_of
from hfq.layers.embedding import QEmbedding
from hfq.layers.experts import QExperts, unpack_experts
from hfq.layers.linear import PackedMatrix, QConv1D, QLinear
from hfq.layers.online import OnlinePart
from hfq.layers.packed import PackedModule

__all__ = ["empty", "kind_of", "matrix_of", "to_float"]


def kind_of(module: nn.Module) -> str:
    """ "linear", "conv1d", "conv2d" or "embedding": which packed layer replaces ``module``.

    Raises:
        QuantizationError: none does, with the reason.
    """
    name = type(module).__name__
    if isinstance(module, PackedModule):
        raise QuantizationError(f"{name} is packed already")
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise QuantizationError(f"{name} is part of nn.MultiheadAttention, which reads its weight directly")
    if isinstance(module, nn.Linear):
        if type(module).forward is not nn.Linear.forward:
            raise QuantizationError(f"{name} computes more than nn.Linear does: a packed layer would lose that")
        return "linear"
    if isinstance(module, nn.Embedding):
        if type(module).forward is not nn.Embedding.forward or module.max_norm is not None:
            raise QuantizationError(f"{name} computes more than a look-up: a packed table would lose that")
        return "embedding"
    if isinstance(module, nn.Conv2d):
        own = type(module)
        if own.forward is not nn.Conv2d.forward or own._conv_forward is not nn.Conv2d._conv_forward:
            raise QuantizationError(f"{name} computes more than nn.Conv2d does: a packed layer would lose that")
        geometry_of(module)
        return "conv2d"
    if name == "Conv1D" and hasattr(module, "nf") and isinstance(getattr(module, "weight", None), torch.Tensor):
        return "conv1d"
    raise QuantizationError(f"no packed layer replaces {name}")


def matrix_of(module: nn.Module, kind: str) -> torch.Tensor:
    """The float weight as ``[out, in]``; of a convolution ``[out, in / groups * kh * kw]``."""
    weight: torch.Tensor = module.weight.detach()  # type: ignore[operator, union-attr]
    return weight.t() if kind == "conv1d" else weight.flatten(1) if kind == "conv2d" else weight


def empty(
    module: nn.Module, kind: str, spec: QuantSpec, online: OnlinePart | None, bias: bool, device: Any,
    activation: ActivationSpec | None = None, **parts: Any,
) -> PackedModule:
    """The packed layer of a float module, its tensors empty except for a bias that is there.

    ``parts`` are what a :class:`hfq.layers.conv.QConv2d` has besides (``coarse``, ``cut``), or a linear (``leading``).
    """
    weight = module.weight  # type: ignore[union-attr]
    rows, columns = matrix_of(module, kind).shape
    if kind == "embedding":
        new: PackedModule = QEmbedding(
            rows, columns, spec, padding_idx=module.padding_idx, compute_dtype=weight.dtype, device=device  # type: ignore[arg-type]
        )
    elif kind == "conv2d":
        given = getattr(module, "bias", None)
        new = QConv2d(
            module, spec, bias=(given if given is not None else True) if bias else None, compute_dtype=weight.dtype,  # type: ignore[arg-type]
            online=online, activation=activation, device=device, **parts,
        )
    else:
        present = getattr(module, "bias", None)
        layer = QLinear if kind == "linear" else QConv1D
        new = layer(
            columns, rows, spec, bias=(present if present is not None else True) if bias else None,
            compute_dtype=weight.dtype, online=online, device=device, activation=activation,  # type: ignore[arg-type]
        )
        new.float_class = type(module) if kind == "conv1d" else None
        new.leading = parts.get("leading")
    return new.train(module.training)


def to_float(module: PackedModule, dtype: torch.dtype | None) -> nn.Module:
    """The float module that a packed layer stands for, online transforms folded back into the weight."""
    if isinstance(module, QExperts):
        return unpack_experts(module, dtype)
    weight = module.dequantize(dtype=dtype)
    new: nn.Module
    if isinstance(module, QEmbedding):
        new = nn.Embedding(module.num_embeddings, module.embedding_dim, module.padding_idx, device="meta")
    elif isinstance(module, QConv1D):
        with torch.device("meta"):
            new = module.float_class(module.nf, module.nx)  # type: ignore[misc]
    elif isinstance(module, QConv2d):
        new = nn.Conv2d(
            module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding,
            module.dilation, module.groups, module.bias is not None, module.padding_mode, device="meta",
        )
    else:
        assert isinstance(module, PackedMatrix)
        new = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    new.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    bias = module._parameters.get("bias")
    if bias is not None and module.online is not None:  # a part that shifts the input left its counterpart in the bias
        columns = next(iter(module.slots.values())).columns
        offset = module.online(torch.zeros(columns, device=bias.device))
        if bool(offset.any()):
            matrix = kernels.dequantize(module.operand(next(iter(module.slots))), torch.float32)
            bias = bias.detach().float() + matrix @ offset
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
    return new
