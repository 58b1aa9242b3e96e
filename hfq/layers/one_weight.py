"""What packed layers that stand for one float tensor have in common: weight, grid, bias, manifest entry."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hfq import kernels
from hfq.errors import QuantizationError
from hfq.formats import QuantSpec
from hfq.kernels import PackedWeight, Runtime, grouped
from hfq.layers.banks import InputBanks
from hfq.layers.inputs import InputSpec, input_shapes
from hfq.layers.packed import Memory, PackedModule
from hfq.layers.times import NoiseLevels

__all__ = ["OneWeight"]


class OneWeight(PackedModule):
    """Base of the packed layers with one float weight; its codes are in slot "weight".

    Attributes:
        banks: groups of the input by noise level, in the place of ``activation``.
    """

    _kind: str
    banks: InputBanks | None

    def _start(self, *given: Any) -> None:
        super()._start(*given)
        self.banks = None

    @property
    def spec(self) -> QuantSpec:
        """The grid of the codes."""
        return self.slots["weight"].spec

    @property
    def weight(self) -> torch.Tensor:
        """The float weight in the layout of the replaced module, ``compute_dtype``; dequantized when it is used."""
        return self.weight_view("weight")

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module would register a Parameter under this name, or refuse to.
        if name == "weight" and isinstance(value, torch.Tensor):
            self.assign_weight("weight", value)
        else:
            super().__setattr__(name, value)

    def _take_bias(self, bias: torch.Tensor | bool | None, device: Any) -> None:
        """Register ``bias`` (``True`` for an empty one of ``compute_dtype``), or none."""
        if bias is True:
            bias = torch.empty(self.slots["weight"].rows, dtype=self.compute_dtype, device=device)
        given = nn.Parameter(bias.detach(), requires_grad=False) if isinstance(bias, torch.Tensor) else None
        self.register_parameter("bias", given)
        # In front of the scales: libraries take the dtype of a model's first floating parameter for that of the model.
        self._parameters.update({name: self._parameters.pop(name) for name in list(self._parameters) if name != "bias"})

    def add_bias(self) -> None:
        """Give a layer without a bias one of zeros."""
        if self._parameters.get("bias") is None:
            self._take_bias(torch.zeros(self.slots["weight"].rows, dtype=self.compute_dtype, device=self.device), None)

    def _arriving(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` in the dtype of the product: that of an autocast region, else at least ``compute_dtype``.

        The first floating parameter of a model may be a scale, and libraries cast inputs to its dtype: float layers
        further on would not take what came out.
        """
        if torch.is_autocast_enabled(x.device.type):
            return x.to(torch.get_autocast_dtype(x.device.type)) if x.dtype == torch.float32 else x
        return x.to(self.compute_dtype) if x.dtype.itemsize < self.compute_dtype.itemsize else x

    def group_inputs(self, part: InputBanks) -> None:
        """Code the input in the groups of ``part`` from now on.

        Raises:
            QuantizationError: the layer quantizes or transforms its input already, or has more than one weight.
        """
        where, slot = self.label or type(self).__name__, self.slots["weight"]
        if self.activation is not None or self.online is not None or self.banks is not None or len(self.slots) > 1:
            raise QuantizationError(f"{where}: its input is quantized or transformed already, or in parts")
        if slot.spec.groups(slot.columns) > 1:
            raise QuantizationError(f"{where}: inputs in groups need one scale a row of the weight, not {slot.spec}")
        if part.spec.columns not in (0, slot.columns):
            raise QuantizationError(f"{where}: groups of {part.spec.columns} columns for {slot.columns}")
        self.restore()
        part.label = where
        self.banks = part.to(self.device)

    def follow(self, levels: NoiseLevels) -> None:
        """Hold a range of the input (or factors of its ends) for each noise level from now on, the present one until
        others are set.

        Raises:
            QuantizationError: the input has no stored range.
        """
        where, spec = self.label or type(self).__name__, self.activation
        if spec is None or (spec.dynamic and not spec.factor):
            raise QuantizationError(f"{where}: its input has no stored range that noise levels could have")
        self.levels = levels
        for slot in self.slots.values():
            for name in input_shapes(spec, slot.prefix):
                first = self._parameters[name].detach()[:1]  # type: ignore[union-attr]
                self._put(name, first.repeat(len(levels), *(1,) * (first.ndim - 1)))

    @property
    def product_input(self) -> InputSpec | None:
        """Format of the codes that the product reads; those of inputs in groups have a grid a row."""
        return self.activation if self.banks is None else grouped.row_spec(self.banks.spec.bits)

    def runtime_of(self, one: PackedWeight, key: str, memory: Memory) -> Runtime:
        return kernels.prepare(one, dtype=self.compute_dtype, memory=memory, activation=self.product_input)

    def explain(self, M: int = 1, dtype: torch.dtype | None = None) -> list[kernels.Choice]:
        if self.banks is None or not self._has_runtime:
            return super().explain(M, dtype)
        operand, dtype = self.operand("weight"), dtype or self.compute_dtype
        if "columns" in self.banks.spec.axes and isinstance(operand, Runtime):
            return grouped.explain(operand, M, dtype, self.banks.spec.bits)
        return kernels.explain(operand, M, dtype, activation=self.product_input)

    def describe(self) -> dict[str, Any]:
        slot = self.slots["weight"]
        groups = {} if self.banks is None else {"groups": self.banks.describe()}
        groups |= {} if self.levels is None else {"levels": len(self.levels)}
        return {
            "kind": self._kind, "in_features": slot.columns, "out_features": slot.rows,
            "bias": self._parameters.get("bias") is not None, "spec": slot.spec.to_dict(),
            "online": None if self.online is None else self.online.describe(), **groups,
        }
