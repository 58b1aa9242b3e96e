"""Which packed layer stands for which float module, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hfq.errors import QuantizationError
from hfq.formats import ActivationSpec, QuantSpec
from hfq.layers.embedding import QEmbedding
from hfq.layers.experts import QExperts, unpack_experts
from hfq.layers.linear import PackedMatrix, QConv1D, QLinear
from hfq.layers.online import OnlinePart
from hfq.layers.packed import PackedModule

__all__ = ["empty", "kind_of", "matrix_of", "to_float"]


def kind_of(module: nn.Module) -> str:
    """ "linear", "conv1d" or "embedding": which packed layer replaces ``module``.

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
    if name == "Conv1D" and hasattr(module, "nf") and isinstance(getattr(module, "weight", None), torch.Tensor):
        return "conv1d"
    raise QuantizationError(f"no packed layer replaces {name}")


def matrix_of(module: nn.Module, kind: str) -> torch.Tensor:
    """The float weight as ``[out, in]``."""
    weight: torch.Tensor = module.weight.detach()  # type: ignore[operator, union-attr]
    return weight.t() if kind == "conv1d" else weight


def empty(
    module: nn.Module, kind: str, spec: QuantSpec, online: OnlinePart | None, bias: bool, device: Any,
    activation: ActivationSpec | None = None,
) -> PackedModule:
    """The packed layer of a float module, its tensors empty except for a bias that is there."""
    weight = module.weight  # type: ignore[union-attr]
    rows, columns = matrix_of(module, kind).shape
    if kind == "embedding":
        new: PackedModule = QEmbedding(
            rows, columns, spec, padding_idx=module.padding_idx, compute_dtype=weight.dtype, device=device  # type: ignore[arg-type]
        )
    else:
        present = getattr(module, "bias", None)
        layer = QLinear if kind == "linear" else QConv1D
        new = layer(
            columns, rows, spec, bias=(present if present is not None else True) if bias else None,
            compute_dtype=weight.dtype, online=online, device=device, activation=activation,  # type: ignore[arg-type]
        )
        new.float_class = type(module) if kind == "conv1d" else None
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
    else:
        assert isinstance(module, PackedMatrix)
        new = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    new.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    bias = module._parameters.get("bias")
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
    return new
