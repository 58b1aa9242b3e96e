"""Integer products of inputs in groups (:mod:`hfq.formats.groups`).

    y = linear(x, bank, weight, bias)                    # x [..., rows, columns]
    y = conv2d(x, geometry, bank, weight, bias)          # x [B, C, H, W], groups of its unfolded form

Groups of rows are one integer product whose scales and zero points are those of its rows. Groups of columns are brought
side by side by one permutation of codes and weight; every group has a sum of integers, scaled when it is added:
``y_j = s_j sum_g s_g (sum_{k in g} q_k w_jk - z_g sum_{k in g} w_jk) + b_j``. Convolutions are products of their
unfolded input, a part at a time: zeros of the padding are inputs like any other, coded with the grid of their place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F

from hfq.errors import KernelError
from hfq.formats import ActivationCodes, ActivationSpec, groups
from hfq.formats.groups import Axis
from hfq.kernels import cpu_bytes, dispatch, integer, reference
from hfq.kernels.byte_mm import integer_mm
from hfq.kernels.dispatch import ANY_BITS, FLOATS, Case, Row
from hfq.kernels.geometry import Geometry
from hfq.kernels.packed import LAYOUTS, PackedWeight, Runtime

__all__ = ["Bank", "conv2d", "decoded", "fake", "fake_unfolded", "linear", "row_grid", "row_spec"]

# Bytes of an unfolded input, as floats, that are coded at once.
CHUNK = 8 << 20
# Elements of an output that is accumulated at once.
TILE = 1 << 16
ROWS = 512


@dataclass(frozen=True, eq=False)
class Bank:
    """The groups of one noise level, on the device of the input.

    Attributes:
        axis: which one is in groups.
        scale, zero: ``[groups]`` float32, zero points whole.
        labels: int64 ``[length of the axis]``; of "tensor" there are none.
        bits: width of a code.
        largest: zero point of ranges that are found in the input, see :func:`row_grid`.
        order: columns, group by group, and ``bounds`` where each group begins and the last one ends; of "columns".
    """

    axis: Axis
    scale: torch.Tensor
    zero: torch.Tensor
    labels: torch.Tensor
    bits: int
    largest: int = groups.LARGEST_ZERO
    order: torch.Tensor | None = None
    bounds: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, axis: Axis, scale: torch.Tensor, zero: torch.Tensor, labels: torch.Tensor, bits: int,
        largest: int = groups.LARGEST_ZERO,
    ) -> Bank:
        """A bank with the order of its columns."""
        scale, zero = scale.float(), zero.to(torch.float32)
        if axis != "columns":
            return cls(axis, scale, zero, labels, bits, largest)
        counts = torch.bincount(labels, minlength=len(scale)).cpu().tolist()
        bounds = [0]
        for count in counts:
            bounds.append(bounds[-1] + count)
        return cls(axis, scale, zero, labels, bits, largest, labels.argsort(stable=True), tuple(bounds))

    def parameters(self, rows: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Scale and zero point as they broadcast to ``[..., rows, columns]``; ``None``: rows were another number."""
        if self.axis == "tensor":
            return self.scale[:1], self.zero[:1]
        if self.axis == "columns":
            return self.scale[self.labels], self.zero[self.labels]
        if rows != len(self.labels):
            return None
        return self.scale[self.labels, None], self.zero[self.labels, None]


def row_spec(bits: int) -> ActivationSpec:
    """The format of codes whose rows have grids of their own, as integer products know it."""
    return ActivationSpec(bits)


def row_grid(x: torch.Tensor, bank: Bank) -> tuple[torch.Tensor, torch.Tensor]:
    """A grid for each row of ``x`` ``[..., rows, columns]``, found in it: for another number of rows than was
    calibrated, for which the groups have no meaning."""
    low, high = (part.float() for part in x.detach().aminmax(dim=-1, keepdim=True))
    return groups.grid(low, high, bank.bits, bank.largest)


def parameters(x: torch.Tensor, bank: Bank) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of ``x`` ``[..., rows, columns]``, as they broadcast to it; vectors have one row."""
    return bank.parameters(x.shape[-2] if x.dim() > 1 else 1) or row_grid(x, bank)


def decoded(x: torch.Tensor, bank: Bank, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``x`` ``[..., rows, columns]`` on its grids, computed in ``dtype`` from codes of float32."""
    scale, zero = parameters(x, bank)
    codes = groups.encode(x.float(), scale, zero, bank.bits).to(dtype)
    return (codes - zero.to(dtype)) * scale.to(dtype)


def fake(x: torch.Tensor, bank: Bank) -> torch.Tensor:
    """``x`` on its grids, same dtype; gradients pass straight through where nothing is clamped."""
    scale, zero = parameters(x, bank)
    value = decoded(x.detach(), bank).to(x.dtype)
    if not x.requires_grad:
        return value
    with torch.no_grad():
        q = (x.float() * (1 / scale)).round_() + zero
        inside = ((q >= 0) & (q <= (1 << bank.bits) - 1)).to(x.dtype)
    return (x - x.detach()) * inside + value


# Products


def linear(
    x: torch.Tensor, bank: Bank, weight: PackedWeight | Runtime, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``Q(x) @ W.T + bias``: ``x`` ``[..., rows, columns]`` (or ``[columns]``) to ``[..., rows, out_features]``.

    Args:
        weight: prepared for inputs of :func:`row_spec`, or canonical; one scale a row.
        bank: groups of rows are those of the last axis but one.

    Raises:
        KernelError: ``x`` has other columns than the weight.
    """
    runtime = weight if isinstance(weight, Runtime) else LAYOUTS["canonical"].make(weight, torch.float32)
    if x.shape[-1] != runtime.in_features:
        raise KernelError(f"x has {x.shape[-1]} features, the weight of {runtime.name} has {runtime.in_features}")
    if not x.numel():
        return x.new_empty(*x.shape[:-1], runtime.out_features)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        matrix = LAYOUTS[runtime.layout].dequantize(runtime, x.dtype)
        return F.linear(fake(x, bank), matrix, None if bias is None else bias.to(x.dtype))
    with torch.no_grad():
        y = _product(x, parameters(x, bank), bank, runtime, bias, x.dtype)
        return y.view(*x.shape[:-1], runtime.out_features)


def _product(
    x: torch.Tensor, grid: tuple[torch.Tensor, torch.Tensor], bank: Bank, runtime: Runtime,
    bias: torch.Tensor | None, dtype: torch.dtype,
) -> torch.Tensor:
    """Codes of ``x`` ``[..., columns]`` times the weight, ``[M, out_features]``; ``grid`` broadcasts to ``x``."""
    scale, zero = grid
    codes = groups.encode(x, scale, zero, bank.bits).reshape(-1, x.shape[-1])
    if bank.axis == "columns":
        return _columns(codes, bank, runtime, bias, dtype)
    each = [t.expand(*x.shape[:-1], 1).reshape(-1, 1) if t.dim() > 1 else t.expand(len(codes), 1) for t in grid]
    return integer.product(ActivationCodes(codes, each[0], each[1], row_spec(bank.bits)), runtime, bias, dtype)


def _columns(
    codes: torch.Tensor, bank: Bank, runtime: Runtime, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    case = replace(dispatch.case_of(runtime, len(codes), dtype, codes.device.type, row_spec(bank.bits)),
                   op="grouped", sums=len(bank.scale))  # fmt: skip
    name = dispatch.choose(case, runtime.name).backend
    return dispatch.BACKENDS["grouped", name](codes, bank, runtime, bias, dtype)


@dispatch.backend("grouped", "reference")
def _reference(
    codes: torch.Tensor, bank: Bank, runtime: Runtime, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Dequantize and multiply, in float64."""
    scale, zero = (t[bank.labels].double() for t in (bank.scale, bank.zero))
    y = ((codes.double() - zero) * scale) @ reference.dequantize(runtime.packed(), torch.float64).t()
    return (y if bias is None else y + bias.double()).to(dtype)


@dispatch.backend("grouped", "dequant")
def _dequant(
    codes: torch.Tensor, bank: Bank, runtime: Runtime, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The same numbers in a float32 product: any layout and device."""
    scale, zero = bank.scale[bank.labels], bank.zero[bank.labels]
    matrix = LAYOUTS[runtime.layout].dequantize(runtime, torch.float32)
    y = F.linear((codes.float() - zero) * scale, matrix)
    return (y if bias is None else y.add_(bias)).to(dtype)


@dispatch.backend("grouped", "partial_sums")
def _partial_sums(
    codes: torch.Tensor, bank: Bank, runtime: Runtime, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """A sum of integers a group, on permuted codes and bytes; some outputs at a time."""
    assert bank.order is not None
    rows = len(codes)
    codes = codes.index_select(1, bank.order)
    spans = [(g, a, b) for g, (a, b) in enumerate(zip(bank.bounds, bank.bounds[1:], strict=False)) if b > a]
    scales, zeros = bank.scale.tolist(), bank.zero.to(torch.int64).tolist()
    y = torch.empty(rows, runtime.out_features, dtype=torch.float32)
    rest = runtime.tensors.get("rest")
    for part, number in cpu_bytes.parts(runtime, max(TILE // min(rows, ROWS), 64)):
        weights = cpu_bytes.weights(runtime, part, number).index_select(1, bank.order)
        for first in range(0, rows, ROWS):
            here = slice(first, min(first + ROWS, rows))
            total = torch.zeros(here.stop - first, part.stop - part.start)
            for g, start, stop in spans:
                x, w = codes[here, start:stop], weights[:, start:stop]
                acc = integer_mm(x, w.t()).sub_(w.sum(-1, dtype=torch.int32), alpha=zeros[g])
                share = acc.float()
                if rest is not None:  # what the bytes lack of the weight's zero points
                    moved = x.sum(-1, keepdim=True, dtype=torch.int32) - zeros[g] * (stop - start)
                    share.addcmul_(moved.float(), rest[0, part], value=-1)
                total.add_(share, alpha=scales[g])
            row = runtime.tensors["row_scale"][part]
            y[here, part] = total.mul_(row) if bias is None else torch.addcmul(bias[part].float(), total, row)
    return y if dtype == torch.float32 else y.to(dtype)


def _bytes(case: Case) -> bool:
    return case.per_row and case.K * 255 * 128 < 2**31


_ONE_SCALE = "needs one scale a row of the weight, sums within 32 bits, and a weight held as bytes ({layout})"
dispatch.add_rows([
    *(Row("grouped", "cpu", FLOATS, ANY_BITS, layout, _bytes, "partial_sums", _ONE_SCALE)
      for layout in ("integer4", "integer8")),
    Row("grouped", "*", FLOATS, ANY_BITS, "*", lambda case: True, "dequant", "serves every format"),
    Row("grouped", "*", (), ANY_BITS, "*", lambda case: True, "reference", "serves every format"),
])


# Convolutions


def _windows(x: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """A view of ``x`` ``[B, C, H, W]``, padded with zeros if it has to be, as ``[B, H', W', C, kh, kw]``."""
    shape = geometry.output(x.shape)
    if any(geometry.pads):
        top, bottom, left, right = geometry.pads
        x = F.pad(x, (left, right, top, bottom))
    (sh, sw), (dh, dw), (b, c, h, w) = geometry.stride, geometry.dilation, x.stride()
    return x.as_strided((shape[0], shape[2], shape[3], x.shape[1], *geometry.kernel),
                        (b, h * sh, w * sw, c, h * dh, w * dw), x.storage_offset())  # fmt: skip


def unfolded(x: torch.Tensor, geometry: Geometry) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Parts of the unfolded input: images, output positions, and floats ``[images, positions, columns]``.

    A convolution of one tap is not copied where its channels come last in memory.
    """
    windows = _windows(x, geometry)
    images, height, width = windows.shape[:3]
    row = 4 * width * geometry.columns
    lines = min(height, max(1, CHUNK // row))
    several = max(1, CHUNK // (row * height)) if lines == height else 1
    for first in range(0, images, several):
        for top in range(0, height, lines):
            part = windows[first : first + several, top : top + lines]
            positions = slice(top * width, (top + part.shape[1]) * width)
            yield slice(first, first + part.shape[0]), positions, part.reshape(len(part), -1, geometry.columns)


def conv2d(
    x: torch.Tensor, geometry: Geometry, bank: Bank, weight: PackedWeight | Runtime, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The convolution of ``x`` ``[B, C, H, W]`` coded in its unfolded form: ``[B, out_channels, H', W']``, its dtype.

    Args:
        bank: columns are (channel, tap) pairs in the order of the weight, rows output positions.
        weight: see :func:`linear`; columns in the canonical order.

    Raises:
        KernelError: channels in groups, or an input that does not fit.
    """
    if geometry.groups != 1:
        raise KernelError(f"{geometry.groups} groups of channels: inputs in groups are for plain convolutions")
    shape = geometry.output(x.shape)
    runtime = weight if isinstance(weight, Runtime) else LAYOUTS["canonical"].make(weight, torch.float32)
    if not x.numel() or 0 in shape:
        return x.new_empty(shape)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        matrix = LAYOUTS[runtime.layout].dequantize(runtime, x.dtype)
        y = fake_unfolded(x, geometry, bank) @ matrix.t()
        y = y if bias is None else y + bias.to(y.dtype)
        return y.transpose(1, 2).reshape(shape)
    with torch.no_grad():
        positions = shape[2] * shape[3]
        grid = bank.parameters(positions)
        y = torch.empty(shape[0], positions, shape[1], dtype=x.dtype, device=x.device)
        for images, at, part in unfolded(x, geometry):
            own = row_grid(part, bank) if grid is None else grid
            if bank.axis == "rows" and grid is not None:
                own = (grid[0][at], grid[1][at])
            found = _product(part, own, bank, runtime, bias, x.dtype)
            y[images, at] = found.view(len(part), -1, shape[1])
        return y.view(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)


def fake_unfolded(x: torch.Tensor, geometry: Geometry, bank: Bank) -> torch.Tensor:
    """``[B, positions, columns]`` on its grids, in floats: for gradients."""
    top, bottom, left, right = geometry.pads
    padded = F.pad(x, (left, right, top, bottom))
    columns = F.unfold(padded, geometry.kernel, geometry.dilation, 0, geometry.stride)
    return fake(columns.transpose(1, 2), bank)


def explain(runtime: Runtime, M: int, dtype: torch.dtype, bits: int) -> list[dispatch.Choice]:
    """Which backend serves groups of columns for ``M`` rows, and why no other does."""
    case: Any = dispatch.case_of(runtime, M, dtype, runtime.scale.device.type, row_spec(bits))
    return dispatch.explain(replace(case, op="grouped"))
