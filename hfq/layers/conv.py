"""Packed convolutions in the place of ``nn.Conv2d``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hfq.errors import QuantizationError
from hfq.formats import ActivationSpec, Codes, QuantSpec
from hfq.formats.activation import Parameters
from hfq.kernels import PackedWeight, Runtime, conv, dispatch, grouped
from hfq.kernels.conv import Operand
from hfq.kernels.geometry import Geometry
from hfq.layers.banks import InputBanks
from hfq.layers.deferred import Deferred
from hfq.layers.inputs import describe_input
from hfq.layers.one_weight import OneWeight
from hfq.layers.online import OnlinePart
from hfq.layers.packed import Memory
from hfq.layers.slot import Slot

__all__ = ["QConv2d", "SecondHalf", "geometry_of"]

# How functional.pad calls what a convolution calls its padding mode.
_PAD_MODES = {"reflect": "reflect", "replicate": "replicate", "circular": "circular"}


@dataclass(frozen=True)
class SecondHalf:
    """What a convolution does with the input channels from ``at`` on.

    Attributes:
        at: input channels of the first half.
        codes: of the weight of the others, ``[out, (in - at) * kh * kw]``.
        params: ``(scale, zero point)`` of the range of the others, for inputs with a stored range.
    """

    at: int
    codes: Codes
    params: Parameters | None = None


def geometry_of(module: nn.Module) -> Geometry:
    """The taps of an ``nn.Conv2d``, pads in front of the kernel left out where they are no zeros.

    Raises:
        QuantizationError: a padding mode that no kernel knows.
    """
    m: Any = module
    mode = m.padding_mode
    if mode != "zeros" and mode not in _PAD_MODES:
        raise QuantizationError(f"padding_mode={mode!r} of {type(module).__name__} is not known")
    pads = pads_of(module) if mode == "zeros" else (0, 0, 0, 0)
    return Geometry(m.in_channels, m.out_channels, tuple(m.kernel_size), tuple(m.stride), pads, tuple(m.dilation),
                    m.groups)  # fmt: skip


def pads_of(module: nn.Module) -> tuple[int, int, int, int]:
    """``(top, bottom, left, right)`` of an ``nn.Conv2d``: "same" gives the larger half to the bottom and the right."""
    m: Any = module
    if m.padding == "valid":
        return (0, 0, 0, 0)
    if m.padding == "same":
        total = [d * (k - 1) for d, k in zip(m.dilation, m.kernel_size, strict=True)]
        return (total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2)
    height, width = m.padding
    return (height, height, width, width)


class QConv2d(OneWeight):
    """``y = conv(Q(online(x)), W) + bias``, with a packed ``W`` ``[out_channels, in_channels / groups * kh * kw]``.

    With ``coarse``, ``W`` is the sum of two packed weights over one input: the whole kernel (slot "weight") and its
    central taps (slot "coarse"), each with scales of its own. With ``cut``, the input channels before it and the
    others (slot "second") have grids of their own, weights and inputs alike: two sums, each scaled, and the bias once.

    Inputs in groups are those of the unfolded input: columns are (channel, tap) pairs, rows output positions.

    Args:
        module: the float convolution, for its sizes and its padding; its tensors are not kept.
        spec: grid of the codes.
        bias: a tensor ``[out_channels]`` (taken as it is), ``True`` for an empty one, or none.
        compute_dtype: dtype of the float weight, in which activations are expected.
        online: transform of the input ``[B, C, H, W]``; the codes are then those of the transformed weight.
        activation: how the input is quantized before the convolution; one scale for all of it.
        coarse: taps and grid of the second weight.
        cut: number of input channels of the first half, and grid of the weight of the other one.
        device: of the empty tensors.
    """

    bias: nn.Parameter | None
    _kind = "conv2d"

    def __init__(
        self, module: nn.Module, spec: QuantSpec, *, bias: torch.Tensor | bool | None = None,
        compute_dtype: torch.dtype = torch.float32, online: OnlinePart | None = None,
        activation: ActivationSpec | None = None, coarse: tuple[tuple[int, int], QuantSpec] | None = None,
        cut: tuple[int, QuantSpec] | None = None, device: Any = None,
    ) -> None:
        if activation is not None and activation.granularity != "tensor":
            raise QuantizationError(
                "the inputs of a convolution share one scale: ActivationSpec(..., granularity='tensor')")
        if cut is not None and (coarse is not None or online is not None):
            raise QuantizationError("a convolution whose input is cut has no coarse part and no online transform")
        geometry = geometry_of(module)
        rows, kernel = geometry.out_channels, geometry.kernel
        slots = {"weight": Slot(spec, rows, geometry.columns, tail=kernel)}
        self._places = {"weight": geometry}
        if coarse is not None:
            size, grid = coarse
            inner = geometry.centre(size)
            slots["coarse"] = Slot(grid, rows, inner.columns, prefix="coarse_", tail=size, shared=True)
            self._places["coarse"] = inner
        if cut is not None:
            first, second = geometry.halves(cut[0])
            self._places = {"weight": first, "second": second}
            slots = {"weight": Slot(spec, rows, first.columns, tail=kernel),
                     "second": Slot(cut[1], rows, second.columns, prefix="second_", tail=kernel)}  # fmt: skip
        self.cut, self._whole = None if cut is None else cut[0], geometry
        super().__init__(slots, compute_dtype=compute_dtype, device=device, activation=activation)
        m: Any = module
        self.in_channels, self.out_channels, self.kernel_size = m.in_channels, m.out_channels, m.kernel_size
        self.stride, self.padding, self.dilation, self.groups = m.stride, m.padding, m.dilation, m.groups
        self.padding_mode = m.padding_mode
        self._pads = pads_of(module)
        if online is not None:
            self.online = online
        self._take_bias(bias, device)

    def assign_weight(self, key: str, value: torch.Tensor) -> None:
        if len(self.slots) > 1 and not torch.equal(value.to(self.device, self.compute_dtype), self.dequantize()):
            raise QuantizationError(f"{self.label or key}: the weight of two parts cannot be assigned")
        if len(self.slots) == 1:
            super().assign_weight(key, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, in_channels, H, W]`` (or without ``B``) to ``[B, out_channels, H', W']``, dtype as of a linear."""
        x = self._arriving(x)
        if x.dim() == 3:
            return self.forward(x[None])[0]
        if self.online is not None:
            x = self.online(x)
        x = self.padded(x)
        if self.banks is not None:
            return self._grouped(x)
        if torch.compiler.is_compiling() and any(r.hidden for held in self._runtimes.values() for r in held):
            return self._eager(x)
        return self._convolved(x)

    @torch._dynamo.disable  # a layout of oneDNN has no form that a compiler could trace
    def _eager(self, x: torch.Tensor) -> torch.Tensor:
        return self._convolved(x)

    def _convolved(self, x: torch.Tensor) -> torch.Tensor:
        operands, params = self.operands(), self.input_of("weight")[0]
        if self.cut is None:
            return conv.conv2d(x, operands, self.bias, self.activation, params)
        halves = x[:, : self.cut], x[:, self.cut :]
        y = conv.conv2d(halves[0], operands[:1], self.bias, self.activation, params)
        return y + conv.conv2d(halves[1], operands[1:], None, self.activation, self.input_of("second")[0])

    def weight_view(self, key: str) -> torch.Tensor:
        if self.cut is None or torch.compiler.is_compiling():
            return super().weight_view(key)
        return Deferred(self.dequantize, self._whole.weight_shape, self.compute_dtype, self.device)

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` ``[B, C, H, W]`` with its border, where that is none of zeros (which kernels make)."""
        if self.padding_mode == "zeros":
            return x
        top, bottom, left, right = self._pads
        return F.pad(x, (left, right, top, bottom), mode=_PAD_MODES[self.padding_mode])

    @property
    def place(self) -> Geometry:
        """Where the taps of the weight lie over the input with its border."""
        return self._places["weight"]

    @torch._dynamo.disable  # which bank is in use is known to Python alone
    def _grouped(self, x: torch.Tensor) -> torch.Tensor:
        assert self.banks is not None
        place = self._places["weight"]
        self.banks.seen(math.prod(place.output(x.shape, self.label)[2:]))
        return grouped.conv2d(x, place, self.banks.bank(), self.operand("weight"), self.bias)

    def group_inputs(self, part: InputBanks) -> None:
        if self._places["weight"].groups != 1:
            raise QuantizationError(f"{self.label or 'a convolution'}: channels in {self.groups} groups, and inputs in "
                                    "groups are for plain convolutions")
        super().group_inputs(part)

    def operands(self) -> list[Operand]:
        """What a kernel convolves with, one for each slot."""
        found = []
        for key, place in self._places.items():
            held = self.operand(key)
            runtime = held if isinstance(held, Runtime) else conv.LAYOUTS["canonical"].make(held, self.compute_dtype)
            found.append(Operand(runtime, place))
        return found

    def dequantize(
        self, key: str | None = None, dtype: torch.dtype | None = None, index: int | None = None
    ) -> torch.Tensor:
        """The float weight; of a layer with a coarse part the sum of both, of one whose input is cut both halves."""
        if key in ("coarse", "second") or len(self.slots) == 1:
            return super().dequantize(key, dtype, index)
        if self.cut is not None:
            return torch.cat([super(QConv2d, self).dequantize(half, dtype) for half in self.slots], 1)
        whole = super().dequantize("weight", torch.float32)
        part = super().dequantize("coarse", torch.float32)
        (top, left), (height, width) = (
            [(k - c) // 2 for k, c in zip(self.kernel_size, part.shape[2:], strict=True)], part.shape[2:])
        whole[:, :, top : top + height, left : left + width] += part
        return whole.to(dtype or self.compute_dtype)

    def runtime_of(self, one: PackedWeight, key: str, memory: Memory) -> Runtime:
        if self.banks is not None:  # a product of the unfolded input
            return super().runtime_of(one, key, memory)
        options: dict[str, Any] = {"memory": memory, "activation": self.activation}
        return conv.prepare(one, self._places[key], dtype=self.compute_dtype, **options)

    def explain(self, M: int = 1, dtype: torch.dtype | None = None) -> list[dispatch.Choice]:
        """Which backend serves ``M`` output positions, and why no other does."""
        if self.banks is not None:
            return super().explain(M, dtype)
        return conv.explain(self.operands()[0], M, dtype or self.compute_dtype, self.activation)

    def describe(self) -> dict[str, Any]:
        coarse, cut = self.slots.get("coarse"), {}
        if self.cut is not None:
            cut = {"cut": {"at": self.cut, "spec": self.slots["second"].spec.to_dict()}}
        return {
            **super().describe(), "in_features": self._whole.columns, "activation": describe_input(self.activation),
            "coarse": None if coarse is None else {"taps": list(coarse.tail), "spec": coarse.spec.to_dict()}, **cut,
        }

    def extra_repr(self) -> str:
        taps = f"kernel {tuple(self.kernel_size)}, stride {tuple(self.stride)}, padding {self.padding}"
        groups = f", {self.groups} groups" if self.groups > 1 else ""
        return f"{super().extra_repr()}, {taps}{groups}" + ("" if self.bias is not None else ", no bias")
