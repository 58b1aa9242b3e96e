"""Packed weights and what a backend makes of them at load time.

``PackedWeight`` is the canonical form (what a checkpoint holds). ``Runtime`` is the form one backend computes from; it
replaces the canonical tensor in memory and gives it back bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from hfq.errors import CheckpointError
from hfq.formats import QuantSpec
from hfq.formats.bitpack import packed_bytes

__all__ = ["LAYOUTS", "Layout", "PackedWeight", "Runtime", "register"]


@dataclass
class PackedWeight:
    """A weight matrix ``[out_features, in_features]`` in the canonical packing of :mod:`hfq.formats.bitpack`.

    Attributes:
        qweight: uint8 ``[out_features, packed_bytes(in_features, bits)]``.
        scale: ``[out_features, groups]``, or ``[1, 1]`` for one scale per tensor.
        zero_point: same shape, uint8 or the scale's dtype; ``None`` for a symmetric grid.
        spec: the grid.
        name: qualified name of the layer, for messages only.
    """

    qweight: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    spec: QuantSpec
    in_features: int
    out_features: int
    name: str = ""

    def check(self) -> None:
        """Raise :class:`~hfq.errors.CheckpointError` unless the tensors have the shapes that ``spec`` asks for."""
        where = f" of {self.name}" if self.name else ""
        want = (self.out_features, packed_bytes(self.in_features, self.spec.bits))
        if self.qweight.dtype != torch.uint8 or tuple(self.qweight.shape) != want:
            found = f"{self.qweight.dtype} {tuple(self.qweight.shape)}"
            raise CheckpointError(f"qweight{where} is {found}; torch.uint8 {want} is needed")
        shape = self.spec.parameter_shape(self.out_features, self.in_features)
        for label, tensor in (("scale", self.scale), ("zero_point", self.zero_point)):
            if tensor is not None and tuple(tensor.shape) != shape:
                raise CheckpointError(f"{label}{where} has shape {tuple(tensor.shape)}; {shape} is needed")
        if (self.zero_point is None) != self.spec.symmetric:
            state = "missing" if self.zero_point is None else "unexpected"
            raise CheckpointError(f"zero_point{where} is {state} for {self.spec}")


@dataclass(eq=False)
class Runtime:
    """One weight in the layout of one backend. Made by :func:`hfq.kernels.prepare`, never saved.

    Attributes:
        layout: name of the layout (a key of :data:`LAYOUTS`).
        tensors: what the backend reads, by name. ``scale`` and ``zero_point`` are the canonical ones, shared.
        spec, in_features, out_features, name: as in :class:`PackedWeight`.
        dtype: activation dtype the layout was made for.
        nbytes: bytes of all tensors, including the shared scales and zero points.
        bytes_note: where these bytes differ from the canonical form, and why.
        cached: holds a float copy of the weight too (``tensors["copy"]``).
        plan: backend by ``(M, dtype)`` and, of integer products, activation format; filled as calls come.
        extra: what the layout derives from the fields above (padded sizes, ...), or holds in a form of a library.
        hidden: bytes of that form, which has no storage that torch could show.
    """

    layout: str
    tensors: dict[str, torch.Tensor]
    spec: QuantSpec
    in_features: int
    out_features: int
    dtype: torch.dtype
    bytes_note: str = ""
    name: str = ""
    cached: bool = False
    plan: dict[Any, Any] = field(default_factory=dict, repr=False)
    extra: Any = field(default=None, repr=False)
    hidden: int = 0

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values()) + self.hidden

    @property
    def scale(self) -> torch.Tensor:
        return self.tensors["scale"]

    @property
    def zero_point(self) -> torch.Tensor | None:
        return self.tensors.get("zero_point")

    def canonical(self) -> torch.Tensor:
        """The canonical ``qweight`` ``[out_features, bytes]``, bit for bit what :func:`prepare` was given."""
        return LAYOUTS[self.layout].canonical(self)

    def packed(self) -> PackedWeight:
        """The canonical form."""
        return PackedWeight(
            self.canonical(), self.scale, self.zero_point, self.spec, self.in_features, self.out_features, self.name
        )


@dataclass(frozen=True)
class Layout:
    """One way to hold a weight.

    Attributes:
        make: ``(packed, dtype) -> Runtime``.
        canonical: ``runtime -> qweight`` uint8 ``[out_features, bytes]``, bit exact.
        dequantize: ``(runtime, dtype) -> [out_features, in_features]``.
        operator: ``(x, runtime, bias) -> y`` if the layout has an operator of its own that can be traced and
            differentiated; else tracing and gradients go through ``hfq::wna16``.
    """

    make: Callable[[PackedWeight, torch.dtype], Runtime]
    canonical: Callable[[Runtime], torch.Tensor]
    dequantize: Callable[[Runtime, torch.dtype], torch.Tensor]
    operator: Callable[[torch.Tensor, Runtime, torch.Tensor | None], torch.Tensor] | None = None


LAYOUTS: dict[str, Layout] = {}


def register(name: str, layout: Layout) -> None:
    """Add a layout; a name is taken once."""
    if name in LAYOUTS:
        raise ValueError(f"layout {name!r} is already registered")
    LAYOUTS[name] = layout
