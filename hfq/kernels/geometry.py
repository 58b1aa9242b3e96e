"""Where the taps of a two-dimensional convolution lie over its input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.nn import functional as F

from hfq.errors import KernelError, QuantizationError

__all__ = ["Geometry"]

Pair = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """Sizes of a convolution of ``[B, in_channels, H, W]``; ``pads`` are ``(top, bottom, left, right)``.

    A negative pad leaves out that many rows or columns of the input.
    """

    in_channels: int
    out_channels: int
    kernel: Pair
    stride: Pair = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    LENGTH: ClassVar[int] = 13

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def columns(self) -> int:
        """Columns of the weight as a matrix: input channels of a group times taps."""
        return self.in_channels // self.groups * self.taps

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return (self.out_channels, self.in_channels // self.groups, *self.kernel)

    @property
    def even(self) -> bool:
        """Whether opposite pads are equal and none is negative: what other libraries call padding."""
        top, bottom, left, right = self.pads
        return top == bottom >= 0 and left == right >= 0

    def output(self, shape: Sequence[int], name: str = "") -> tuple[int, int, int, int]:
        """Shape of the result for an input ``shape``.

        Raises:
            KernelError: the input has other channels, is no image, or is smaller than the kernel.
        """
        where = f" of {name}" if name else ""
        if len(shape) != 4 or shape[1] != self.in_channels:
            raise KernelError(f"x is {tuple(shape)}; the convolution{where} needs [B, {self.in_channels}, H, W]")
        sizes = []
        for axis in (0, 1):
            before, after = self.pads[2 * axis : 2 * axis + 2]
            room = shape[2 + axis] + before + after - self.dilation[axis] * (self.kernel[axis] - 1) - 1
            if room < 0:
                raise KernelError(f"x is {tuple(shape)}: smaller than the kernel {self.kernel}{where} with its pads")
            sizes.append(room // self.stride[axis] + 1)
        return (shape[0], self.out_channels, sizes[0], sizes[1])

    def padded(self, x: torch.Tensor, value: float) -> tuple[torch.Tensor, list[int]]:
        """``x`` and the padding that is left for a library to add: uneven pads are filled with ``value`` here."""
        top, bottom, left, right = self.pads
        if self.even:
            return x, [top, left]
        return F.pad(x, (left, right, top, bottom), value=value), [0, 0]

    def centre(self, size: Pair) -> Geometry:
        """The convolution of the central ``size`` taps alone: same outputs, less of a border.

        Raises:
            QuantizationError: the kernel has no such centre.
        """
        pads = list(self.pads)
        for axis in (0, 1):
            gone = self.kernel[axis] - size[axis]
            if gone < 0 or gone % 2 or size[axis] < 1:
                raise QuantizationError(f"a kernel {self.kernel} has no centre of {size} taps")
            for side in (2 * axis, 2 * axis + 1):
                pads[side] -= self.dilation[axis] * gone // 2
        return replace(self, kernel=size, pads=tuple(pads))  # type: ignore[arg-type]

    def halves(self, at: int) -> tuple[Geometry, Geometry]:
        """The convolutions of the first ``at`` channels of the input and of the others, whose results add up.

        Raises:
            QuantizationError: one of them would be empty, or the channels are in groups.
        """
        if self.groups != 1 or not 0 < at < self.in_channels:
            raise QuantizationError(f"{self.in_channels} input channels in {self.groups} groups cannot be cut at {at}")
        return replace(self, in_channels=at), replace(self, in_channels=self.in_channels - at)

    def to_list(self) -> list[int]:
        return [self.in_channels, self.out_channels, *self.kernel, *self.stride, *self.pads, *self.dilation,
                self.groups]  # fmt: skip

    @classmethod
    def from_list(cls, numbers: Sequence[int]) -> Geometry:
        i, o, kh, kw, sh, sw, top, bottom, left, right, dh, dw, groups = numbers
        return cls(i, o, (kh, kw), (sh, sw), (top, bottom, left, right), (dh, dw), groups)
