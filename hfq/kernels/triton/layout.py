"""Slice-planar words: the form in which the Triton kernels read codes.

A word is an int16 that holds ``c = 16 // width`` codes. For a pack block ``B`` of ``P = c * slice`` codes of a row,
word ``t`` and field ``j``::

    word[n, B * slice + t] >> (width * j) & (2**width - 1) == code[n, B * P + j * slice + t]

so field ``j`` of a tile of words is a *contiguous* slice of the row, and multiplies a contiguous slice of the
activations without any interleaving. Three-bit codes are a plane of two bits and a plane of one bit; 5-, 6- and 7-bit
codes are stored in 8 bits (in memory only). Rows are padded with code 0 to a whole block; the kernels mask the
activations there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = ["WordLayout", "choose", "pack_words", "unpack_words"]

SLICES = (32, 16)


@dataclass(frozen=True)
class WordLayout:
    """How one matrix is stored.

    Attributes:
        bits: width of a stored code: 1, 2, 3, 4 or 8.
        slice: codes of a row that one field of a word tile covers.
        padded: row length after padding, a multiple of :attr:`block`.
        fold: consecutive codes that certainly share a scale and start at a multiple of this in a block; 0 where the
            group size allows no such stretch of at least one slice (the matrix kernel cannot run, the dequantizer can).
    """

    bits: int
    slice: int
    padded: int
    fold: int

    @property
    def fields(self) -> int:
        """Slices in a block."""
        return 16 if self.bits == 3 else 16 // self.bits

    @property
    def block(self) -> int:
        return self.fields * self.slice

    @property
    def blocks(self) -> int:
        return self.padded // self.block

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of the planes, lowest bits of the code first."""
        return (2, 1) if self.bits == 3 else (self.bits,)


def _candidate(bits: int, step: int, in_features: int, group: int) -> WordLayout:
    block = step * (16 if bits == 3 else 16 // bits)
    padded = -(-in_features // block) * block
    fold = block if group >= in_features else math.gcd(group, block)
    return WordLayout(bits, step, padded, fold if fold % step == 0 else 0)


def choose(bits: int, in_features: int, group: int, slice_size: int | None = None) -> WordLayout:
    """The layout for codes of ``bits`` bits in rows of ``in_features`` with groups of ``group`` (0: one group a row).

    Prefers a layout that the matrix kernel can run, then the least memory, then the longest slice. Three-bit codes fall
    back to four bits where padding would take as much.
    """
    group = group or in_features
    stored = {1: (1,), 2: (2,), 3: (3, 4), 4: (4,)}.get(bits, (8,))
    slices = SLICES if slice_size is None else (slice_size,)
    found = [_candidate(b, s, in_features, group) for b in stored for s in slices]
    return min(found, key=lambda c: (c.fold == 0, c.padded * c.bits, c.bits == 3, -c.slice))


def _pack_plane(codes: torch.Tensor, width: int, step: int) -> torch.Tensor:
    rows, length = codes.shape
    fields = codes.reshape(rows, length // (16 // width * step), 16 // width, step)
    words = torch.zeros(rows, fields.shape[1], step, dtype=torch.int32, device=codes.device)
    for j in range(16 // width):
        words |= fields[:, :, j].to(torch.int32) << (width * j)
    # int32 to int16 keeps the low 16 bits; the sign bit is the top bit of the last field.
    return words.to(torch.int16).reshape(rows, -1)


def pack_words(codes: torch.Tensor, layout: WordLayout) -> list[torch.Tensor]:
    """uint8 codes ``[rows, in_features]`` to one int16 tensor ``[rows, padded * width / 16]`` for each plane."""
    codes = torch.nn.functional.pad(codes, (0, layout.padded - codes.shape[1]))
    out, shift = [], 0
    for width in layout.widths:
        out.append(_pack_plane((codes >> shift) & ((1 << width) - 1), width, layout.slice))
        shift += width
    return out


def unpack_words(planes: list[torch.Tensor], layout: WordLayout, in_features: int) -> torch.Tensor:
    """Inverse of :func:`pack_words`: uint8 codes ``[rows, in_features]``."""
    rows = planes[0].shape[0]
    codes = torch.zeros(rows, layout.padded, dtype=torch.uint8, device=planes[0].device)
    shift = 0
    for words, width in zip(planes, layout.widths, strict=True):
        count, mask = 16 // width, (1 << width) - 1
        view = codes.view(rows, layout.padded // (count * layout.slice), count, layout.slice)
        tiles = words.reshape(rows, -1, layout.slice)
        for j in range(count):
            view[:, :, j] |= (((tiles >> (width * j)) & mask) << shift).to(torch.uint8)
        shift += width
    return codes[:, :in_features].contiguous()
