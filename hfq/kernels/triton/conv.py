"""Integer convolutions on NVIDIA GPUs: an implicit product on int8 tensor cores, channels last.

Entry points: :func:`constraint`, :func:`prepare`, :func:`canonical`, :func:`multiply` (codes in). Codes of fewer than
eight bits are held as bytes. The kernel has been compiled and interpreted, and not timed on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hfq.formats import ActivationCodes, ActivationSpec, bitpack
from hfq.kernels.conv import Operand
from hfq.kernels.geometry import Geometry
from hfq.kernels.packed import PackedWeight, Runtime

__all__ = ["Tile", "canonical", "constraint", "multiply", "multiply_two", "prepare", "run", "tile_of"]

STEP = 32  # channels are padded to a multiple of what a tensor core instruction takes
LONGEST = 65_000  # products whose sums, and those less what the zero point adds, certainly fit an int32


@dataclass(frozen=True)
class Tile:
    """How a convolution runs: sizes of the tiles, warps, stages of loads."""

    bn: int = 64
    bm: int = 128
    bk: int = 64
    warps: int = 4
    stages: int = 3


def tile_of(positions: int, outputs: int, channels: int, dual: bool = False) -> Tile:
    """The rule; it has not been timed. Two sums take the registers of twice the tile."""
    bk = 128 if channels % 128 == 0 and not dual else 64 if channels % 64 == 0 else 32
    bn = 128 if outputs >= 128 and not dual else 64
    bm = 128 if positions >= 4096 else 64
    return Tile(bn, bm, bk, 8 if bn * bm >= 128 * 128 else 4, 3 if bk == 128 else 4)


def constraint(geometry: Geometry, bits: int, per_row: bool, whole_zeros: bool) -> str:
    """Why the kernel cannot serve a weight; empty if it can."""
    if geometry.groups != 1:
        return "one group of channels is needed"
    if not per_row:
        return "one scale for each output channel is needed"
    if not whole_zeros:
        return "zero points of 8-bit weights must be 128"
    if geometry.taps * _padded(geometry.in_channels) > LONGEST:
        return f"the int32 sums of {geometry.columns} products may overflow"
    return ""


def _padded(channels: int) -> int:
    return -(-channels // STEP) * STEP


def prepare(
    packed: PackedWeight, geometry: Geometry, dtype: torch.dtype, activation: ActivationSpec | None
) -> Runtime:
    """int8 ``[O, taps, C]`` of ``code - zero_point``, channels padded with zeros; scales and sums of the rows."""
    spec = packed.spec
    codes = bitpack.unpack(packed.qweight, spec.bits, packed.in_features).to(torch.int16)
    whole = (codes - _offset(packed)).to(torch.int8).view(packed.out_features, geometry.in_channels, geometry.taps)
    more = _padded(geometry.in_channels) - geometry.in_channels
    weight = torch.nn.functional.pad(whole.transpose(1, 2), (0, more)).contiguous()
    tensors = {
        "codes": weight, "scale": packed.scale,
        "row_scale": packed.scale[:, 0].float().expand(packed.out_features).contiguous(),
        "sums": weight.flatten(1).sum(1, dtype=torch.int32),
    }
    if packed.zero_point is not None:
        tensors["zero_point"] = packed.zero_point
    return Runtime(
        "triton_conv", tensors, spec, packed.in_features, packed.out_features, dtype,
        f"codes as bytes, channels padded to {weight.shape[2]}; scales and sums again", packed.name,
    )


def _offset(packed: PackedWeight | Runtime) -> torch.Tensor | int:
    return packed.spec.middle if packed.zero_point is None else packed.zero_point.to(torch.int16)


def canonical(runtime: Runtime) -> torch.Tensor:
    """The canonical ``qweight``, bit for bit."""
    weight = runtime.tensors["codes"]
    channels = runtime.in_features // weight.shape[1]
    matrix = weight[:, :, :channels].transpose(1, 2).reshape(runtime.out_features, -1)
    return bitpack.pack((matrix.to(torch.int16) + _offset(runtime)).to(torch.uint8), runtime.spec.bits)


def multiply(x: ActivationCodes, one: Operand, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Codes ``[B, C, H, W]`` to ``[B, O, H', W']``, channels last."""
    return multiply_two(x, [one], bias, dtype)


def multiply_two(
    x: ActivationCodes, operands: Sequence[Operand], bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """One weight, or a whole kernel and its centre over the same input, in one pass."""
    shape = operands[0].geometry.output(x.codes.shape)
    tile = tile_of(shape[0] * shape[2] * shape[3], shape[1], _padded(x.codes.shape[1]), len(operands) > 1)
    return run(x, operands, bias, dtype, tile)


def _shifted(x: ActivationCodes, geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes ``[B, H, W, C]`` with a border of the code of zero and padded channels; zero point int32 ``[1]``."""
    codes, zero = x.codes, x.zero_point
    if zero is None:
        point = torch.zeros(1, dtype=torch.int32, device=codes.device)
    else:
        codes, point = codes.bitwise_xor(128).view(torch.int8), zero.reshape(1).to(torch.int32) - 128
    codes = codes.permute(0, 2, 3, 1)
    images, height, width, channels = codes.shape
    top, bottom, left, right = geometry.pads
    if not any(geometry.pads) and channels == _padded(channels):
        return codes.contiguous(), point
    # Filled without asking the GPU for the number.
    size = (images, height + top + bottom, width + left + right, _padded(channels))
    whole = point.to(torch.int8).expand(size).contiguous()
    inner = codes[:, max(-top, 0) : height - max(-bottom, 0), max(-left, 0) : width - max(-right, 0)]
    first, start = max(top, 0), max(left, 0)
    whole[:, first : first + inner.shape[1], start : start + inner.shape[2], :channels] = inner
    return whole, point


def run(
    x: ActivationCodes, operands: Sequence[Operand], bias: torch.Tensor | None, dtype: torch.dtype, tile: Tile
) -> torch.Tensor:
    """One convolution with the tile given."""
    from hfq.kernels.triton import conv_jit as jit

    geometry, first, last = operands[0].geometry, operands[0].runtime.tensors, operands[-1].runtime.tensors
    codes, zero = _shifted(x, geometry)
    shape = geometry.output(x.codes.shape)
    positions = shape[0] * shape[2] * shape[3]
    y = torch.empty(positions, shape[1], dtype=dtype, device=codes.device)
    centre = operands[1].geometry.kernel if len(operands) > 1 else (0, 0)
    constants: dict[str, Any] = {
        "KH": geometry.kernel[0], "KW": geometry.kernel[1], "SH": geometry.stride[0], "SW": geometry.stride[1],
        "DH": geometry.dilation[0], "DW": geometry.dilation[1], "CH": centre[0], "CW": centre[1],
        "HAS_BIAS": bias is not None,
    }
    grid = (-(-shape[1] // tile.bn) * -(-positions // tile.bm),)
    jit.conv_kernel[grid](
        codes, first["codes"], first["row_scale"], first["sums"], last["codes"], last["row_scale"], last["sums"],
        x.scale.float(), zero, x.scale if bias is None else bias, y, positions, shape[1], codes.shape[3],
        codes.shape[1], codes.shape[2], shape[2], shape[3],
        BK=tile.bk, BN=tile.bn, BM=tile.bm, num_warps=tile.warps, num_stages=tile.stages, **constants,
    )
    return y.view(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)
