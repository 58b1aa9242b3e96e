"""CPU layouts and backends of the convolution of codes.

"conv_onednn" holds the weight in the blocked form of oneDNN, which gives the codes back bit for bit. "conv_rows" holds
the matrix with columns ordered row, column, channel in the layout of the integer product, and lays the input out so
that each output position is a row. Large weights that few positions share are faster as rows: ``hfq bench kernels
--only conv --every-backend`` compares both on either side of :data:`LARGE`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from hfq import kernels
from hfq.formats import ActivationCodes, ActivationSpec, bitpack
from hfq.kernels import conv, dispatch, integer, reference
from hfq.kernels.conv import Operand
from hfq.kernels.dispatch import ANY_BITS, FLOATS, Case, Row
from hfq.kernels.geometry import Geometry
from hfq.kernels.packed import Layout, PackedWeight, Runtime, register

__all__ = ["available"]

# Weights from this size on are convolved as a product of rows: oneDNN's blocks of them leave the caches.
LARGE = 1 << 20
# Bytes of laid-out input that are multiplied at once.
CHUNK = 2 << 20


# oneDNN


def _prepack(weight: torch.Tensor, scale: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    padding = [geometry.pads[0], geometry.pads[2]] if geometry.even else [0, 0]
    # The scale and zero point of the input are told with every call: here they choose nothing but a compensation that
    # every form has.
    return torch.ops.onednn.qconv_prepack(
        weight, scale, 1.0, 1, list(geometry.stride), padding, list(geometry.dilation), geometry.groups, None)


def _convolve(
    codes: torch.Tensor, zero: int, scale: torch.Tensor, held: Any, geometry: Geometry, bias: torch.Tensor | None
) -> torch.Tensor:
    """``scale * sum (codes - zero) weight + bias`` as float32; ``codes`` uint8, channels last."""
    packed, zeros = held
    codes, padding = geometry.padded(codes, zero)
    return torch.ops.onednn.qconv_pointwise(
        codes, 1.0, zero, packed, scale, zeros, bias, list(geometry.stride), padding, list(geometry.dilation),
        geometry.groups, 1.0, 0, torch.float32, "none", [None], None)


@functools.cache
def available() -> str:
    """Empty if oneDNN convolves bytes exactly in this process, else the reason why it is not used."""
    if not hasattr(torch.ops.onednn, "qconv_prepack"):
        return "this torch has no oneDNN convolution of bytes"
    for code, value in ((255, -128), (255, 127), (0, 127), (128, -128)):
        for channels, groups in ((16, 1), (8, 8), (3, 1)):
            geometry = Geometry(channels, 16 if groups == 1 else channels, (3, 3), pads=(1, 1, 1, 1), groups=groups)
            weight = torch.full(geometry.weight_shape, value, dtype=torch.int8)
            scale = torch.ones(geometry.out_channels)
            x = torch.full((1, channels, 5, 5), code, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
            held = (_prepack(weight, scale, geometry), torch.zeros(geometry.out_channels, dtype=torch.int64))
            y = _convolve(x, 3, scale, held, geometry, None)
            want = reference._convolve(x.double() - 3, weight.double(), geometry)
            if not torch.equal(y.double(), want):
                return "oneDNN's convolution of bytes is not exact on this CPU"
    return ""


def _offset(packed: PackedWeight | Runtime) -> torch.Tensor | int:
    return packed.spec.middle if packed.zero_point is None else packed.zero_point.to(torch.int16)


def _make_onednn(
    packed: PackedWeight, geometry: Geometry, dtype: torch.dtype, activation: ActivationSpec | None
) -> Runtime:
    codes = bitpack.unpack(packed.qweight, packed.spec.bits, packed.in_features).to(torch.int16)
    weight = (codes - _offset(packed)).to(torch.int8).view(geometry.weight_shape)
    tensors = {"scale": packed.scale, "row_scale": packed.scale[:, 0].float().expand(packed.out_features).contiguous()}
    if packed.zero_point is not None:
        tensors["zero_point"] = packed.zero_point
    held = (_prepack(weight, tensors["row_scale"], geometry), torch.zeros(packed.out_features, dtype=torch.int64))
    return Runtime(
        "conv_onednn", tensors, packed.spec, packed.in_features, packed.out_features, dtype,
        "codes as bytes in oneDNN's blocks", packed.name, extra=held, hidden=weight.numel() + held[1].nbytes,
    )


def _canonical_onednn(runtime: Runtime) -> torch.Tensor:
    weight = runtime.extra[0].to_dense().reshape(runtime.out_features, runtime.in_features)
    return bitpack.pack((weight.to(torch.int16) + _offset(runtime)).to(torch.uint8), runtime.spec.bits)


def _dequantize(runtime: Runtime, dtype: torch.dtype) -> torch.Tensor:
    return reference.dequantize(runtime.packed(), dtype)


def _unsigned(x: ActivationCodes) -> tuple[torch.Tensor, int]:
    if x.zero_point is None:
        return x.codes.view(torch.uint8).bitwise_xor(128), 128
    return x.codes, int(x.zero_point)


@dispatch.backend("qconv2d_codes", "onednn")
def _onednn(x: ActivationCodes, one: Operand, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """oneDNN's convolution, scales and bias in the same pass."""
    codes, zero = _unsigned(x)
    y = _one(codes, zero, x.scale, one, bias)
    return y if dtype == torch.float32 else y.to(dtype)


def _one(
    codes: torch.Tensor, zero: int, scale: torch.Tensor, one: Operand, bias: torch.Tensor | None
) -> torch.Tensor:
    both = one.runtime.tensors["row_scale"] * scale
    return _convolve(codes, zero, both, one.runtime.extra, one.geometry, None if bias is None else bias.float())


def _onednn_two(
    x: ActivationCodes, operands: list[Operand], bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Two parts over one input: the codes are made unsigned once."""
    codes, zero = _unsigned(x)
    y = _one(codes, zero, x.scale, operands[0], bias)
    y.add_(_one(codes, zero, x.scale, operands[1], None))
    return y if dtype == torch.float32 else y.to(dtype)


# Rows


def _permute(matrix: torch.Tensor, geometry: Geometry, back: bool = False) -> torch.Tensor:
    """Columns from (channel, tap) to (tap, channel), or back."""
    channels = geometry.in_channels // geometry.groups
    shape = (-1, geometry.taps, channels) if back else (-1, channels, geometry.taps)
    return matrix.reshape(shape).transpose(1, 2).reshape(matrix.shape)


def _make_rows(
    packed: PackedWeight, geometry: Geometry, dtype: torch.dtype, activation: ActivationSpec | None
) -> Runtime:
    """The integer product's own layout of the permuted matrix, under another name."""
    codes = bitpack.unpack(packed.qweight, packed.spec.bits, packed.in_features)
    turned = PackedWeight(
        bitpack.pack(_permute(codes, geometry).contiguous(), packed.spec.bits), packed.scale, packed.zero_point,
        packed.spec, packed.in_features, packed.out_features, packed.name,
    )
    inner = kernels.prepare(turned, dtype=dtype, activation=activation)
    return Runtime(
        _PREFIX + inner.layout, inner.tensors, inner.spec, inner.in_features, inner.out_features, dtype,
        inner.bytes_note + "; columns by tap", packed.name, extra=(inner, geometry),
    )


def _revive_rows(runtime: Runtime, geometry: Geometry) -> Any:
    inner = Runtime(
        runtime.layout.removeprefix(_PREFIX), runtime.tensors, runtime.spec, runtime.in_features,
        runtime.out_features, runtime.dtype,
    )
    return inner, geometry


def _canonical_rows(runtime: Runtime) -> torch.Tensor:
    inner, geometry = runtime.extra
    codes = bitpack.unpack(inner.canonical(), runtime.spec.bits, runtime.in_features)
    return bitpack.pack(_permute(codes, geometry, back=True).contiguous(), runtime.spec.bits)


def _rows_of(codes: torch.Tensor, geometry: Geometry, start: int, stop: int, size: tuple[int, int]) -> torch.Tensor:
    """Images ``[start, stop)`` of ``codes`` ``[B, H, W, C]`` (padded) as ``[positions, taps * C]``."""
    part = codes[start:stop]
    images, _, _, channels = part.shape
    b, h, w, c = part.stride()
    (sh, sw), (dh, dw) = geometry.stride, geometry.dilation
    view = part.as_strided(
        (images, *size, *geometry.kernel, channels), (b, h * sh, w * sw, h * dh, w * dw, c), part.storage_offset())
    return view.reshape(-1, geometry.taps * channels)


@dispatch.backend("qconv2d_codes", "rows")
def _rows(x: ActivationCodes, one: Operand, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """A product of integers for each output position; some images at a time."""
    geometry, inner = one.geometry, one.runtime.extra[0]
    shape = geometry.output(x.codes.shape)
    codes = x.codes.permute(0, 2, 3, 1)
    if any(geometry.pads):
        top, bottom, left, right = geometry.pads
        zero = 0 if x.zero_point is None else int(x.zero_point)
        codes = torch.nn.functional.pad(codes, (0, 0, left, right, top, bottom), value=zero)
    codes = codes.contiguous()
    positions = shape[2] * shape[3]
    y = torch.empty(shape[0], positions, shape[1], dtype=dtype, device=codes.device)
    step = max(1, CHUNK // (positions * geometry.columns))
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        rows = _rows_of(codes, geometry, start, stop, shape[2:])
        part = integer.product(ActivationCodes(rows, x.scale, x.zero_point, x.spec), inner, bias, dtype)
        if step >= shape[0]:
            y = part
            break
        y[start:stop] = part.view(stop - start, positions, -1)
    return y.view(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)


# The table


def _plain(case: Case) -> bool:
    """Quantized inputs and one scale a row; sums stay within 32 bits."""
    return case.activation is not None and case.per_row and case.K * 255 * 128 < 2**31


def _blocks(case: Case) -> bool:
    wide = case.bits > 4 or case.cached or case.geometry.groups > 1 or case.layout == "conv_onednn"
    return _plain(case) and case.whole_zeros and wide and not available()


def _favoured(case: Case) -> bool:
    return _blocks(case) and (case.layout is not None or case.geometry.taps == 1 or case.geometry.groups > 1
                              or case.N * case.K < LARGE)


def _products(case: Case) -> bool:
    return _plain(case) and case.geometry.groups == 1


def _either(case: Case) -> bool:
    """Whether any of the rows above can serve the weight, in whatever form it is held."""
    return case.activation is None or _products(case) or (case.layout is not None and _blocks(case))


_PREFIX = "conv_rows/"
_ONEDNN = (
    "needs quantized inputs, one scale a row, zero points that fit signed bytes, codes of more than 4 bits or groups, "
    f"an exact oneDNN ({{isa}}), and, to be faster, fewer than {LARGE} weights or one tap"
)
_ROWS = "needs quantized inputs, one scale a row, one group of channels"

register("conv_onednn", Layout(make=None, canonical=_canonical_onednn, dequantize=_dequantize))  # type: ignore[arg-type]
conv.MAKERS["conv_onednn"] = _make_onednn
conv.FUSED["onednn"] = _onednn_two
_NAMES = ("integer4", "integer8", "canonical")
for _inner in _NAMES:
    register(_PREFIX + _inner, Layout(make=None, canonical=_canonical_rows, dequantize=_dequantize))  # type: ignore[arg-type]
    conv.MAKERS[_PREFIX + _inner] = _make_rows
    conv.REVIVE[_PREFIX + _inner] = _revive_rows

dispatch.add_rows([
    Row("qconv2d", "cpu", FLOATS, ANY_BITS, "conv_onednn", _favoured, "onednn", _ONEDNN),
    *(Row("qconv2d", "cpu", FLOATS, ANY_BITS, _PREFIX + name, _products, "rows", _ROWS) for name in _NAMES),
    Row("qconv2d", "cpu", FLOATS, ANY_BITS, "conv_onednn", _blocks, "onednn", _ONEDNN),
    Row("qconv2d", "cpu", FLOATS, ANY_BITS, _PREFIX + "integer8", _either, "rows", _ROWS + ". And " + _ONEDNN,
        constraint=True),
], before="float_sums")
