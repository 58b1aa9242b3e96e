"""The form in which the integer kernels read a weight: int8 codes around zero, or two of four bits in a byte.

Rows are padded with zeros, which add nothing to a product, to a multiple of the pack block. With four bits the byte
``t`` of pack block ``B`` (``P`` codes) holds code ``B * P + t`` in its low and ``B * P + P / 2 + t`` in its high half,
both in two's complement: each half of a tile of bytes is a *contiguous* slice of the row, and becomes 16 times the code
in place, by one mask (and one shift). Where there are integer zero points, the halves are the codes themselves and
become 8 times ``code - zero`` on the way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = ["IntegerLayout", "choose", "pack", "unpack"]

# The tensor cores take at least 32 int8 codes at once along the row.
LEAST = 32
STEP = 64  # int8 rows are padded to a multiple of this


@dataclass(frozen=True)
class IntegerLayout:
    """How one matrix is stored.

    Attributes:
        bits: 4 (two codes a byte) or 8.
        block: codes of a row in a pack block (two halves); 8-bit codes: what one fold may take at most.
        padded: row length after padding.
        fold: consecutive codes that share a scale, at most a block: the sum of their products becomes a float at once.
            0 where groups allow no such stretch of at least 32 codes: the kernel cannot run.
        signed: holds ``code - middle``; else the codes, and the kernel subtracts the zero points from them.
    """

    bits: int
    block: int
    padded: int
    fold: int
    signed: bool = True

    @property
    def row_bytes(self) -> int:
        return self.padded * self.bits // 8

    @property
    def units(self) -> int:
        """Folds in a row."""
        return self.padded // self.fold


def _candidate(stored: int, block: int, in_features: int, group: int, signed: bool) -> IntegerLayout:
    step = block if stored == 4 else (STEP if not group else 0) or math.gcd(group, block)
    padded = -(-in_features // step) * step
    if not group:
        return IntegerLayout(stored, block, padded, padded, signed)
    fold = math.gcd(group, block)
    if stored == 4 and fold < block:  # a fold is a whole half, so that it is the operand of one product
        fold = block // 2 if fold == block // 2 else 0
    return IntegerLayout(stored, block, padded, fold if fold >= LEAST else 0, signed)


def choose(bits: int, in_features: int, group: int, integer_zero: bool = False) -> IntegerLayout:
    """The layout of codes of ``bits`` bits in rows of ``in_features`` with groups of ``group`` (0: one a row).

    Up to four bits are stored in four. Prefers what the kernel can run, then the least memory, then the larger block.
    """
    group = 0 if group <= 0 or group >= in_features else group
    stored = 4 if bits <= 4 else 8
    signed = not (integer_zero and stored == 4)
    found = [_candidate(stored, block, in_features, group, signed) for block in (128, 64)]
    return min(found, key=lambda c: (c.fold == 0, c.padded, -c.block))


def pack(codes: torch.Tensor, middle: int, layout: IntegerLayout) -> torch.Tensor:
    """uint8 codes ``[rows, in_features]`` to int8 ``[rows, row_bytes]``."""
    shifted = codes.to(torch.int8) if not layout.signed else (codes.to(torch.int16) - middle).to(torch.int8)
    shifted = torch.nn.functional.pad(shifted, (0, layout.padded - codes.shape[1]))
    if layout.bits == 8:
        return shifted
    halves = shifted.view(codes.shape[0], layout.padded // layout.block, 2, layout.block // 2)
    return ((halves[:, :, 0] & 15) | (halves[:, :, 1] << 4)).reshape(codes.shape[0], -1)


def unpack(packed: torch.Tensor, middle: int, layout: IntegerLayout, in_features: int) -> torch.Tensor:
    """Inverse of :func:`pack`: uint8 codes ``[rows, in_features]``."""
    shifted = packed
    if layout.bits == 4:
        tiles = packed.view(packed.shape[0], layout.padded // layout.block, layout.block // 2)
        halves = torch.stack([tiles << 4 >> 4, tiles >> 4], dim=2)  # shifts of int8 keep the sign
        shifted = halves.reshape(packed.shape[0], layout.padded)
    shifted = shifted[:, :in_features]
    if not layout.signed:
        return (shifted & 15).to(torch.uint8)
    return (shifted.to(torch.int16) + middle).to(torch.uint8)
