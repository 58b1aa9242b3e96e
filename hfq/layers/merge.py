"""Change what a packed layer stands for: another weight rounded to codes, or a constant added to every group.

A constant a group needs no rounding: ``scale (code - zero) + d = scale (code - (zero - d / scale))``, so zero points
that are floats take it exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from hfq.errors import QuantizationError
from hfq.formats import PER_TENSOR, Codes, QuantSpec, affine, bitpack
from hfq.layers.one_weight import OneWeight
from hfq.layers.slot import Slot

__all__ = ["Snapshot", "recode", "requantize", "shift_groups"]


@dataclass(frozen=True)
class Snapshot:
    """Codes, grid and bias of a packed layer, to put back later bit for bit."""

    slot: Slot
    tensors: dict[str, torch.Tensor]
    bias: torch.Tensor | None

    @classmethod
    def of(cls, layer: OneWeight) -> Snapshot:
        slot = layer.slots["weight"]
        codes = layer.packed("weight")[0]
        held = {slot.names[0]: codes.qweight, slot.names[1]: codes.scale}
        if codes.zero_point is not None:
            held[slot.names[2]] = codes.zero_point
        bias = layer._parameters.get("bias")
        return cls(slot, {name: t.detach().clone() for name, t in held.items()},
                   None if bias is None else bias.detach().clone())  # fmt: skip

    def codes(self) -> Codes:
        q, s, z = (self.tensors.get(name) for name in self.slot.names)
        assert q is not None and s is not None
        return Codes(bitpack.unpack(q, self.slot.spec.bits, self.slot.columns), s, z, self.slot.spec)

    def put_back(self, layer: OneWeight) -> None:
        recode(layer, self.codes())
        if self.bias is not None:
            layer.bias.data.copy_(self.bias)  # type: ignore[union-attr]


def recode(layer: OneWeight, codes: Codes) -> None:
    """Fill ``layer`` with codes ``[rows, columns]`` of any grid, and make its runtime form again if it had one."""
    _one_part(layer)
    prepared, slot = layer.prepared, layer.slots["weight"]
    layer.restore()
    if codes.spec != slot.spec:
        if codes.spec.symmetric:
            layer.register_parameter(slot.names[2], None)
        layer.slots["weight"] = replace(slot, spec=codes.spec)
    layer.set_codes("weight", codes)
    if prepared:
        layer.prepare(layer._memory or "compact")


def requantize(layer: OneWeight, weight: torch.Tensor) -> float:
    """Let ``layer`` stand for ``weight``, as near as codes of its format come.

    Every group keeps its grid or gets a new one from minimum to maximum, whichever is nearer: a weight that did not
    change keeps its codes.

    Args:
        weight: in the layout of the float module that the layer replaced.

    Returns:
        The relative error, ``||W - Q|| / ||W||``.

    Raises:
        QuantizationError: the weight has another shape or is not finite, or the layer is made of two parts.
    """
    _one_part(layer)
    slot, where = layer.slots["weight"], layer.label or "weight"
    if tuple(weight.shape) != slot.weight_shape:
        raise QuantizationError(f"{where}: a weight of {tuple(weight.shape)}; {slot.weight_shape} is needed")
    if not torch.isfinite(weight).all():
        raise QuantizationError(f"{where}: the new weight has NaN or infinite elements")
    matrix = slot.to_matrix(weight.detach().float())
    matrix = (matrix if layer.online is None else layer.online.fold(matrix)).contiguous()
    one, spec = layer.packed("weight")[0], slot.spec
    fitted, fitted_zero = affine.fit(matrix, spec)
    kept = _group_errors(matrix, one.scale, one.zero_point, spec)
    better = _group_errors(matrix, fitted, fitted_zero, spec) < kept
    scale = torch.where(better, fitted, one.scale)
    zero = None if one.zero_point is None else torch.where(better, fitted_zero, one.zero_point)  # type: ignore[arg-type]
    codes = Codes(affine.encode(matrix, scale, zero, spec), scale, zero, spec)
    recode(layer, codes)
    return float((affine.dequantize(codes) - matrix).norm() / matrix.norm().clamp(min=1e-30))


def _group_errors(
    matrix: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, spec: QuantSpec
) -> torch.Tensor:
    found = affine.decode(affine.encode(matrix, scale, zero, spec), scale, zero, spec)
    errors = affine.grouped((found - matrix).square_(), spec).sum(-1)
    return errors.sum().reshape(1, 1) if spec.group_size == PER_TENSOR else errors


def shift_groups(layer: OneWeight, offsets: torch.Tensor) -> None:
    """Add ``offsets`` ``[rows, groups]`` to the weights of each group, exactly: the zero points take them.

    They become float32, and with them the scales (32 + 32 bits a group instead of 16 + 8); the codes stay.

    Raises:
        QuantizationError: one offset does not belong to each group.
    """
    _one_part(layer)
    slot, one = layer.slots["weight"], layer.packed("weight")[0]
    if tuple(offsets.shape) != tuple(one.scale.shape):
        raise QuantizationError(f"{layer.label or 'weight'}: offsets {tuple(offsets.shape)} for groups "
                                f"{tuple(one.scale.shape)}")
    spec = replace(slot.spec, symmetric=False, zero_point="float", scale_dtype="float32")
    scale = one.scale.float()
    zero = torch.full_like(scale, slot.spec.middle) if one.zero_point is None else one.zero_point.float()
    codes = bitpack.unpack(one.qweight, slot.spec.bits, slot.columns)
    recode(layer, Codes(codes, scale, zero - offsets.detach().float() / scale, spec))


def _one_part(layer: Any) -> None:
    if not isinstance(layer, OneWeight) or len(layer.slots) != 1:
        where = getattr(layer, "label", "") or type(layer).__name__
        raise QuantizationError(f"{where}: a weight made of several parts cannot be changed")
