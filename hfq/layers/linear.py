"""Packed matrices in the place of ``nn.Linear`` and of transformers' ``Conv1D``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hfq import kernels
from hfq.formats import QuantSpec
from hfq.formats.twin import TwinSpec
from hfq.kernels import grouped, twin
from hfq.layers.inputs import InputSpec, describe_input
from hfq.layers.leading import LeadingToken
from hfq.layers.one_weight import OneWeight
from hfq.layers.online import OnlinePart
from hfq.layers.slot import Slot

__all__ = ["PackedMatrix", "QConv1D", "QLinear"]


class PackedMatrix(OneWeight):
    """``y = Q(online(x)) W^T + bias`` with a packed ``W`` ``[out_features, in_features]``.

    Args:
        in_features, out_features: as of the float layer.
        spec: grid of the codes.
        bias: a tensor ``[out_features]`` (taken as it is), ``True`` for an empty one, or none.
        compute_dtype: dtype of the float weight, in which activations are expected.
        online: transform of the input; the codes are then those of the transformed weight.
        activation: how the input is quantized before the product; default not at all.
        device: of the empty tensors.
    """

    bias: nn.Parameter | None
    _transposed = False
    leading: LeadingToken | None  # where the first token is always the same: the others alone are multiplied
    float_class: type[nn.Module] | None = None  # what `dequantize_modules` puts back; None: nn.Linear

    def __init__(
        self, in_features: int, out_features: int, spec: QuantSpec, *, bias: torch.Tensor | bool | None = None,
        compute_dtype: torch.dtype = torch.float32, online: OnlinePart | None = None, device: Any = None,
        activation: InputSpec | None = None,
    ) -> None:
        slot = Slot(spec, out_features, in_features, transposed=self._transposed)
        super().__init__({"weight": slot}, compute_dtype=compute_dtype, device=device, activation=activation)
        self.in_features, self.out_features = in_features, out_features
        self.leading = None
        if online is not None:
            self.online = online
        self._take_bias(bias, device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in_features]`` to ``[..., out_features]``, dtype of ``x`` (of the autocast region
        inside one, and no narrower than ``compute_dtype`` outside)."""
        return self._product(x) if self.leading is None else self.leading(x, self._product)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        x = self._arriving(x)
        if self.banks is not None:
            return self._grouped(x)
        if self.activation is not None:
            params, factor = self.input_of("weight")
            operand = self.operand("weight")
            if isinstance(self.activation, TwinSpec):
                return twin.linear_twin(x, operand, self.bias, self.activation, params, before=self.online)  # type: ignore[arg-type]
            return kernels.linear_int(x, operand, self.bias, self.activation, params, factor, before=self.online)
        if self.online is not None:
            x = self.online(x)
        return kernels.linear(x, self.operand("weight"), self.bias)

    @torch._dynamo.disable  # which bank is in use is known to Python alone
    def _grouped(self, x: torch.Tensor) -> torch.Tensor:
        assert self.banks is not None
        self.banks.seen(x.shape[-2] if x.dim() > 1 else 1)
        return grouped.linear(x, self.banks.bank(), self.operand("weight"), self.bias)

    def describe(self) -> dict[str, Any]:
        leading = {} if self.leading is None else {"leading": self.leading.describe()}
        return {**super().describe(), "activation": describe_input(self.activation), **leading}

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.bias is not None else ", no bias")


class QLinear(PackedMatrix):
    """In the place of ``nn.Linear``, and not one: libraries read and re-initialise the weight of those."""

    _kind = "linear"


class QConv1D(PackedMatrix):
    """In the place of transformers' ``Conv1D``: the float weight is ``[in, out]``, the codes are those of a linear."""

    _kind = "conv1d"
    _transposed = True

    @property
    def nx(self) -> int:
        return self.in_features

    @property
    def nf(self) -> int:
        return self.out_features
