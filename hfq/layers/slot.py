"""The shapes of a packed matrix, or of a stack of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hfq.errors import KernelError
from hfq.formats import QuantSpec, bitpack

__all__ = ["Slot", "columns_of"]


@dataclass(frozen=True)
class Slot:
    """A packed matrix ``[rows, columns]``, or ``count`` of them; codes run along the columns (the input features)."""

    spec: QuantSpec
    rows: int
    columns: int
    count: int | None = None
    prefix: str = ""
    transposed: bool = False  # the float weight is [columns, rows]
    tail: tuple[int, ...] = ()  # further axes of the float weight: [rows, columns / product, *tail]
    shared: bool = False  # its input is that of the slot without a prefix, quantized once

    @property
    def names(self) -> tuple[str, str, str]:
        return tuple(self.prefix + leaf for leaf in ("qweight", "scale", "zero_point"))  # type: ignore[return-value]

    @property
    def input_prefix(self) -> str:
        """Prefix of the stored parameters of the input."""
        return "" if self.shared else self.prefix

    @property
    def stack(self) -> tuple[int, ...]:
        return () if self.count is None else (self.count,)

    @property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each canonical tensor; the leading 1 of the codes keeps them unlike a float weight."""
        q, s, z = self.names
        parameters = (*self.stack, *self.spec.parameter_shape(self.rows, self.columns))
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            q: ((1, *self.stack, self.rows, bitpack.packed_bytes(self.columns, self.spec.bits)), torch.uint8),
            s: (parameters, self.spec.torch_scale_dtype),
        }
        if not self.spec.symmetric:
            found[z] = (parameters, torch.uint8 if self.spec.zero_point == "int" else self.spec.torch_scale_dtype)
        return found

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the float weight that this stands for."""
        if self.tail:
            return (*self.stack, self.rows, self.columns // math.prod(self.tail), *self.tail)
        return (*self.stack, *((self.columns, self.rows) if self.transposed else (self.rows, self.columns)))

    def to_weight(self, matrix: torch.Tensor) -> torch.Tensor:
        """One matrix ``[rows, columns]`` in the layout of the float module."""
        return matrix.reshape(self.weight_shape) if self.tail else matrix.t() if self.transposed else matrix

    def to_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """Inverse of :meth:`to_weight`."""
        return weight.reshape(self.rows, self.columns) if self.tail else weight.t() if self.transposed else weight


def columns_of(nbytes: int, slot: Slot, where: str) -> int:
    """Input features of a row of ``nbytes`` bytes: fewer than the slot's if tensor parallelism cut the row."""
    if nbytes == bitpack.packed_bytes(slot.columns, slot.spec.bits):
        return slot.columns
    if len(bitpack.planes(slot.spec.bits)) > 1:
        raise KernelError(f"{where}: rows of {slot.spec.bits}-bit codes cannot be cut: shard this layer by rows only")
    return nbytes * 8 // slot.spec.bits
