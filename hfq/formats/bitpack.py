"""The canonical packing of codes (see FORMAT.md): along the last axis, lowest index in the lowest bits, uint8.

Widths 1, 2, 4 and 8 are one bit plane; 3, 5, 6 and 7 are the planes of 4, 2 and 1 bits that sum to them, the widest
plane first and holding the lowest bits of the code. Planes follow each other in a row; each is padded with zeros to a
whole byte. Packing is independent of every kernel.
"""

from __future__ import annotations

import sys

import torch

from hfq.errors import CheckpointError

__all__ = ["pack", "packed_bytes", "planes", "unpack"]

_PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def planes(bits: int) -> tuple[int, ...]:
    """Widths of the bit planes of a ``bits``-wide code, widest (lowest bits of the code) first."""
    return _PLANES[bits]


def packed_bytes(length: int, bits: int) -> int:
    """Bytes that ``length`` codes of ``bits`` bits take."""
    return sum(-(-length * width // 8) for width in planes(bits))


def _pack_plane(codes: torch.Tensor, width: int) -> torch.Tensor:
    if width == 8:
        return codes.contiguous()
    per_byte = 8 // width
    length = codes.shape[-1]
    padded = torch.nn.functional.pad(codes, (0, -length % per_byte))
    fields = padded.reshape(*codes.shape[:-1], -1, per_byte)
    out = fields[..., 0].clone()
    for i in range(1, per_byte):
        out |= fields[..., i] << (i * width)
    return out


# Spreading the fields of a byte over the bytes of a word: (shift, mask) steps, each of which halves the distance to go.
_SPREAD: dict[int, tuple[torch.dtype, tuple[tuple[int, int], ...]]] = {
    4: (torch.int16, ((4, 0x0F0F),)),
    2: (torch.int32, ((12, 0x000F000F), (6, 0x03030303))),
    1: (torch.int64, ((28, 0x0000000F0000000F), (14, 0x0003000300030003), (7, 0x0101010101010101))),
}


def _unpack_plane(packed: torch.Tensor, width: int, length: int) -> torch.Tensor:
    if width == 8:
        return packed[..., :length]
    dtype, steps = _SPREAD[width]
    words = packed.contiguous().to(dtype)
    for shift, mask in steps:
        words = (words << shift).bitwise_or_(words).bitwise_and_(mask)
    out = words.view(torch.uint8)
    if sys.byteorder == "big":
        out = out.unflatten(-1, (-1, 8 // width)).flip(-1).flatten(-2)
    return out[..., :length]


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes ``[..., length]`` below ``2**bits`` to bytes ``[..., packed_bytes(length, bits)]``."""
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes are {codes.dtype}, torch.uint8 is needed")
    if bits < 8 and codes.numel() and int(codes.max()) >> bits:
        raise CheckpointError(f"code {int(codes.max())} does not fit {bits} bits")
    parts, shift = [], 0
    for width in planes(bits):
        parts.append(_pack_plane((codes >> shift) & ((1 << width) - 1) if bits < 8 else codes, width))
        shift += width
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def unpack(packed: torch.Tensor, bits: int, length: int) -> torch.Tensor:
    """Inverse of :func:`pack`: uint8 codes ``[..., length]``."""
    expected = packed_bytes(length, bits)
    if packed.dtype != torch.uint8 or packed.shape[-1] != expected:
        raise CheckpointError(
            f"{length} codes of {bits} bits take {expected} bytes (uint8); found {packed.shape[-1]} ({packed.dtype})"
        )
    out, shift, start = None, 0, 0
    for width in planes(bits):
        stop = start + -(-length * width // 8)
        part = _unpack_plane(packed[..., start:stop], width, length) << shift
        out = part if out is None else out | part
        shift, start = shift + width, stop
    assert out is not None
    return out
