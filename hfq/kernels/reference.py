"""What every kernel must compute, in plain torch: unpack, dequantize, multiply in float32 (float64 where asked).

Written from the definition, without a thought for speed; it serves every shape and every device.
"""

from __future__ import annotations

import torch

from hfq.formats import ActivationCodes, affine, bitpack
from hfq.kernels.geometry import Geometry
from hfq.kernels.packed import Layout, PackedWeight, Runtime, register

__all__ = ["conv2d", "conv2d_int", "conv2d_sums", "dequantize", "embedding", "linear", "linear_int"]


def dequantize(weight: PackedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``scale * (code - zero_point)``, ``[out_features, in_features]``: in float32 (or float64), then cast."""
    codes = bitpack.unpack(weight.qweight, weight.spec.bits, weight.in_features)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    return affine.decode(codes, weight.scale, weight.zero_point, weight.spec, working).to(dtype)


def linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, *, accumulate: torch.dtype = torch.float32
) -> torch.Tensor:
    """``x @ W.T + bias``: ``x`` ``[..., in_features]`` to ``[..., out_features]`` of the dtype of ``x``.

    Args:
        accumulate: dtype of the dequantized weight and of the product; tests pass float64.
    """
    y = torch.nn.functional.linear(x.to(accumulate), dequantize(weight, accumulate))
    if bias is not None:
        y = y + bias.to(accumulate)
    return y.to(x.dtype)


def linear_int(
    x: ActivationCodes, weight: PackedWeight, bias: torch.Tensor | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Codes ``[..., in_features]`` times packed codes, ``[..., out_features]``, from the formula.

    For each range of K in which both scales are constant,
    ``s_a s_w (acc - z_a Sw - z_w Sa + n z_a z_w)`` with ``acc = sum qa qw``, ``Sw = sum qw``, ``Sa = sum qa`` over its
    ``n`` elements; sums of integers are exact, scales are applied in float64, and ``y`` is rounded once.
    """
    spec, columns = weight.spec, weight.in_features
    qa = x.codes.double()
    qw = bitpack.unpack(weight.qweight, spec.bits, columns).double()
    middle = torch.full_like(weight.scale, spec.middle)
    s_w, z_w = (
        t.double().expand(weight.out_features, -1)
        for t in (weight.scale, middle if weight.zero_point is None else weight.zero_point)
    )
    s_a = x.scale.double()
    z_a = torch.zeros_like(s_a) if x.zero_point is None else x.zero_point.double()
    length_w, length_a = spec.group_length(columns), columns if x.spec.group_size == -1 else x.spec.group_size
    edges = sorted({*range(0, columns, length_w), *range(0, columns, length_a), columns})
    y = qa.new_zeros(*qa.shape[:-1], weight.out_features)
    for start, stop in zip(edges, edges[1:], strict=False):
        a, w = qa[..., start:stop], qw[:, start:stop]
        sa, za = (t if t.shape[-1] == 1 else t[..., start // length_a, None] for t in (s_a, z_a))
        sw, zw = s_w[:, start // length_w], z_w[:, start // length_w]
        total = a @ w.t() - za * w.sum(-1) - zw * a.sum(-1, keepdim=True) + (stop - start) * za * zw
        y = y + sa * sw * total
    return (y if bias is None else y + bias.double()).to(dtype)


def conv2d(
    x: torch.Tensor, weight: PackedWeight, geometry: Geometry, bias: torch.Tensor | None = None, *,
    accumulate: torch.dtype = torch.float32,
) -> torch.Tensor:
    """``x`` ``[B, C, H, W]`` convolved with the dequantized weight: ``[B, O, H', W']`` of the dtype of ``x``."""
    accumulate = torch.float64 if x.dtype == torch.float64 else accumulate
    matrix = dequantize(weight, accumulate).view(geometry.weight_shape)
    y = _convolve(x.to(accumulate), matrix, geometry)
    return (y if bias is None else y + bias.to(accumulate).view(-1, 1, 1)).to(x.dtype)


def conv2d_sums(x: ActivationCodes, weight: PackedWeight, geometry: Geometry) -> torch.Tensor:
    """The accumulators ``sum (qx - z_x) (qw - z_w)``, exact whole numbers in float64, of one scale a row.

    Outside of the image ``qx`` is ``z_x``, the code of zero: there is nothing to add.
    """
    qw = bitpack.unpack(weight.qweight, weight.spec.bits, weight.in_features).double()
    qw = qw - (weight.spec.middle if weight.zero_point is None else weight.zero_point.double())
    qx = x.codes.double() if x.zero_point is None else x.codes.double() - x.zero_point.double()
    return _convolve(qx, qw.view(geometry.weight_shape), geometry)


def conv2d_int(
    x: ActivationCodes, weight: PackedWeight, geometry: Geometry, bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Codes ``[B, C, H, W]`` convolved with packed codes: exact sums, scales in float64, rounded once to ``dtype``."""
    if weight.scale.shape[1] == 1:
        rows = weight.scale[:, 0].double().expand(weight.out_features)
        y = conv2d_sums(x, weight, geometry) * rows.view(-1, 1, 1) * x.scale.double()
    else:
        qx = x.codes.double() if x.zero_point is None else x.codes.double() - x.zero_point.double()
        y = _convolve(qx * x.scale.double(), dequantize(weight, torch.float64).view(geometry.weight_shape), geometry)
    return (y if bias is None else y + bias.double().view(-1, 1, 1)).to(dtype)


def _convolve(x: torch.Tensor, weight: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    x, padding = geometry.padded(x, 0)
    return torch.nn.functional.conv2d(x, weight, None, geometry.stride, padding, geometry.dilation, geometry.groups)


def embedding(ids: torch.Tensor, weight: PackedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows ``ids`` (any shape ``[...]``) of the dequantized matrix: ``[..., in_features]``."""
    return dequantize(weight, dtype)[ids]


def _make(packed: PackedWeight, dtype: torch.dtype) -> Runtime:
    tensors = {"qweight": packed.qweight, "scale": packed.scale}
    if packed.zero_point is not None:
        tensors["zero_point"] = packed.zero_point
    return Runtime(
        "canonical", tensors, packed.spec, packed.in_features, packed.out_features, dtype, "canonical codes",
        packed.name,
    )


# The canonical form as a layout: for backends that read the codes as they are stored.
register("canonical", Layout(
    make=_make,
    canonical=lambda runtime: runtime.tensors["qweight"],
    dequantize=lambda runtime, dtype: dequantize(runtime.packed(), dtype),
))
