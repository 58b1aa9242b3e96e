"""A layer's product with another weight in the place of its own: what training computes with before anything is packed.

The weight is the matrix that a quantizer sees, ``[rows, columns]``: of a packed layer with an online transform, the
transformed one.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from hfq import kernels
from hfq.errors import QuantizationError
from hfq.formats import Codes, QuantSpec, grids
from hfq.layers.conv import QConv2d
from hfq.layers.kinds import empty, kind_of, matrix_of
from hfq.layers.linear import PackedMatrix
from hfq.layers.one_weight import OneWeight

__all__ = ["as_weight", "check", "digest", "matrix", "pack", "product", "seen", "spec_of"]


def check(layer: nn.Module) -> None:
    """Raise QuantizationError, with the reason, unless the functions of this module know ``layer``."""
    if isinstance(layer, (PackedMatrix, QConv2d)):
        if len(layer.slots) > 1:
            raise QuantizationError("its weight is made of two parts")
    elif isinstance(layer, OneWeight) or kind_of(layer) == "embedding":
        raise QuantizationError("rows of a table are looked up, there is no product")
    groups = getattr(layer, "groups", 1)
    if groups != 1:
        raise QuantizationError(f"a convolution in {groups} groups has no low-rank weight")


def spec_of(layer: nn.Module) -> QuantSpec | None:
    """The grid of a packed layer, ``None`` of a float one."""
    return layer.spec if isinstance(layer, OneWeight) else None


def matrix(layer: nn.Module) -> torch.Tensor:
    """The weight as a float32 matrix ``[rows, columns]``; of a float layer a view where that is possible."""
    if isinstance(layer, OneWeight):
        return kernels.dequantize(layer.operand("weight"), torch.float32)
    return matrix_of(layer, kind_of(layer)).float()


def as_weight(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """A matrix ``[rows, columns]`` in the layout and dtype of a float layer's weight."""
    own: torch.Tensor = layer.weight  # type: ignore[assignment]
    return (weight.t() if kind_of(layer) == "conv1d" else weight.reshape(own.shape)).to(own.dtype)


def seen(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The input as the product of a packed layer sees it: after its online parts, on its grid. Differentiable."""
    if not isinstance(layer, OneWeight):
        return x
    x = layer._arriving(x)
    if layer.online is not None:
        x = layer.online(x)
    if layer.activation is not None:
        params, factor = layer.input_of("weight")
        x = grids.fake(x, layer.activation, params, factor)  # type: ignore[arg-type]
    return x


def product(layer: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What ``layer`` gives for ``x`` with the matrix ``weight``; gradients reach both."""
    if not isinstance(layer, OneWeight):
        return functional_call(layer, {"weight": as_weight(layer, weight)}, (x,))
    x = seen(layer, x)
    weight = weight.to(x.dtype)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)  # type: ignore[union-attr]
    if isinstance(layer, QConv2d):
        top, bottom, left, right = layer._pads
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, (left, right, top, bottom), mode=mode)
        return F.conv2d(x, weight.reshape(layer.slots["weight"].weight_shape), bias, layer.stride, 0, layer.dilation)
    return F.linear(x, weight, bias)


def pack(layer: nn.Module, codes: Codes) -> OneWeight:
    """A packed layer with ``codes`` ``[rows, columns]`` in the place of a float layer."""
    weight: Any = layer.weight
    new = empty(layer, kind_of(layer), codes.spec, None, getattr(layer, "bias", None) is not None, "meta")
    new.set_codes("weight", codes, weight.device)
    new.prepare()
    assert isinstance(new, OneWeight)
    return new


def digest(layer: nn.Module) -> str:
    """SHA-256 of what a layer's weight is: codes, scales and zero points, or the weight rounded to bfloat16.

    Casts to bfloat16 do not change it, so the same checkpoint has one digest in both dtypes.
    """
    if isinstance(layer, OneWeight):
        one = layer.packed("weight")[0]
        tensors = [t for t in (one.qweight, one.scale, one.zero_point) if t is not None]
    else:
        tensors = [layer.weight.detach().to(torch.bfloat16)]  # type: ignore[union-attr, operator]
    total = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous()
        total.update(f"{flat.dtype}{tuple(flat.shape)}".encode() + flat.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
