"""Products of inputs in groups against the definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from hfq import kernels
from hfq.calibration import clusters
from hfq.errors import KernelError
from hfq.formats import ActivationSpec, QuantSpec, bitpack, groups
from hfq.formats.log import LogSpec
from hfq.kernels import PackedWeight, grouped, grouped_products
from hfq.kernels.geometry import Geometry
from hfq.kernels.grouped import Bank
from hfq.kernels.grouped_products import Probabilities
from hfq.rounding import nearest


def packed(rows: int, columns: int, bits: int, symmetric: bool = False) -> PackedWeight:
    spec = QuantSpec(bits, -1, symmetric)
    codes = nearest.solve(torch.randn(rows, columns) + 0.3, spec)
    return PackedWeight(bitpack.pack(codes.codes, bits), codes.scale, codes.zero_point, spec, columns, rows, "w")


def bank_of(x: torch.Tensor, axis: str, count: int = 8, bits: int = 6) -> Bank:
    """The groups of ``x`` ``[B, rows, columns]`` itself."""
    other = (0, 1) if axis == "columns" else (0, 2)
    made = clusters.group(axis, (x.amin(other), x.amax(other)), count, bits)  # type: ignore[arg-type]
    return Bank.of(axis, made.scale, made.zero, made.labels, bits)  # type: ignore[arg-type]


def outliers(*shape: int) -> torch.Tensor:
    x = torch.randn(*shape)
    x[..., 5] *= 15
    x[..., 9] += 10
    x[:, 3] *= 8
    return x


def distance(y: torch.Tensor, want: torch.Tensor) -> float:
    return float((y.double() - want).norm() / want.norm())


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("axis", ["columns", "rows", "tensor"])
def test_products(bits: int, symmetric: bool, axis: str) -> None:
    torch.manual_seed(bits)
    x, weight, bias = outliers(2, 16, 37), packed(12, 37, bits, symmetric), torch.randn(12)
    if axis == "tensor":
        scale, zero = groups.grid(x.amin().reshape(1), x.amax().reshape(1), 6)
        bank = Bank.of("tensor", scale, zero, torch.zeros(0, dtype=torch.int64), 6)
    else:
        bank = bank_of(x, axis)
    want = grouped.decoded(x, bank, torch.float64) @ kernels.dequantize(weight, torch.float64).t() + bias
    runtime = kernels.prepare(weight, dtype=torch.float32, activation=grouped.row_spec(6))
    for held in (weight, runtime):
        assert distance(grouped.linear(x, bank, held, bias), want) < 1e-6
    assert distance(grouped.linear(x, bank, runtime), want - bias) < 1e-6
    assert grouped.linear(x[:0], bank, runtime).shape == (0, 16, 12)


@pytest.mark.parametrize("backend", ["partial_sums", "dequant", "reference"])
def test_groups_of_any_size(backend: str) -> None:
    """One column, none, most of them, and more rows than are multiplied at once."""
    torch.manual_seed(0)
    labels = torch.tensor([2] * 30 + [0] + [3] * 6)[torch.randperm(37)]
    x, weight = torch.randn(700, 37), packed(70, 37, 8)
    bank = Bank.of("columns", torch.rand(5) + 0.1, torch.tensor([0.0, 9.0, 120.0, -40.0, 7.0]), labels, 8)
    runtime = kernels.prepare(weight, dtype=torch.float32, activation=grouped.row_spec(8))
    want = grouped.decoded(x, bank, torch.float64) @ kernels.dequantize(weight, torch.float64).t()
    with kernels.use(grouped=backend):
        assert distance(grouped.linear(x, bank, runtime), want) < 1e-6
    lines = {line.backend: line for line in grouped.explain(runtime, 700, torch.float32, 8)}
    assert lines["partial_sums"].chosen and not lines["reference"].chosen


def test_what_cannot_be_multiplied() -> None:
    with pytest.raises(KernelError, match="features"):
        grouped.linear(torch.randn(4, 36), bank_of(torch.randn(1, 4, 37), "rows"), packed(5, 37, 4))
    depthwise = Geometry(4, 4, (3, 3), groups=4)
    with pytest.raises(KernelError, match="4 groups of channels"):
        grouped.conv2d(torch.randn(1, 4, 8, 8), depthwise, bank_of(torch.randn(1, 4, 9), "columns"), packed(4, 9, 4))


GEOMETRIES = [
    Geometry(5, 12, (3, 3), pads=(1, 1, 1, 1), stride=(2, 2)), Geometry(5, 12, (1, 1)),
    Geometry(5, 12, (3, 2), pads=(0, 1, 1, 0), dilation=(2, 1)),
]  # fmt: skip


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("axis", ["columns", "rows"])
def test_convolutions(geometry: Geometry, axis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 5, 9, 8) + 1, packed(12, geometry.columns, 8), torch.randn(12)
    top, bottom, left, right = geometry.pads
    every = F.unfold(F.pad(x, (left, right, top, bottom)), geometry.kernel, geometry.dilation, 0, geometry.stride)
    every = every.transpose(1, 2)
    bank = bank_of(every, axis)
    want = grouped.decoded(every, bank, torch.float64) @ kernels.dequantize(weight, torch.float64).t() + bias
    want = want.transpose(1, 2).reshape(geometry.output(x.shape))
    runtime = kernels.prepare(weight, dtype=torch.float32, activation=grouped.row_spec(6))
    line = 4 * geometry.columns * want.shape[3]
    for chunk in (grouped.CHUNK, 2 * line, 2 * line * want.shape[2]):
        monkeypatch.setattr(grouped, "CHUNK", chunk)  # lines of one image; two images at once
        for given in (x, x.contiguous(memory_format=torch.channels_last)):
            assert distance(grouped.conv2d(given, geometry, bank, runtime, bias), want) < 1e-6


def test_another_number_of_rows_has_ranges_of_its_own() -> None:
    torch.manual_seed(0)
    x, weight = outliers(2, 16, 37), packed(12, 37, 8)
    bank, other = bank_of(x, "rows", bits=8), 9 * torch.randn(1, 11, 37)
    want = other.double() @ kernels.dequantize(weight, torch.float64).t()
    runtime = kernels.prepare(weight, dtype=torch.float32, activation=grouped.row_spec(8))
    assert distance(grouped.linear(other, bank, runtime), want) < 0.01


def test_gradients_pass_where_nothing_is_clamped() -> None:
    x, weight = torch.randn(2, 16, 37), packed(12, 37, 8)
    bank = bank_of(x, "columns")
    given = (3 * x).requires_grad_(True)
    grouped.linear(given, bank, weight).sum().backward()
    scale, zero = grouped.parameters(given, bank)
    q = (given / scale).round() + zero
    inside = (q >= 0) & (q <= 63)
    want = inside * kernels.dequantize(weight, torch.float32).sum(0)
    assert 0 < int(inside.sum()) < inside.numel() and torch.allclose(given.grad, want, atol=1e-4)


def operands(seed: int = 0, keys: int = 9) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(seed)
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 2, keys, 8), torch.randn(2, 2, keys, 8)
    q[..., 3] *= 6
    k[:, :, 4] *= 5
    return q, k, v


FORMS = [
    Probabilities(LogSpec(6, "2", "none")), Probabilities(LogSpec(8, "2", "none"), start=True),
    Probabilities(LogSpec(4, "2", "none"), whole=True, start=True, renormalise=True),
    Probabilities(ActivationSpec(8, False, "tensor", dynamic=False), renormalise=True), Probabilities(None, start=True),
]  # fmt: skip


@pytest.mark.parametrize("how", FORMS)
@pytest.mark.parametrize("axes", [("rows", "rows", "rows"), ("columns", "rows", "columns"), ("columns",) * 3,
                                  ("rows", "columns", "rows")])  # fmt: skip
def test_attention(how: Probabilities, axes: tuple[str, ...]) -> None:
    q, k, v = operands()
    parts = (q, k[:, :, 1:] if how.start else k, v)
    banks: Any = tuple(bank_of(x.flatten(0, 1), axis, 3, 8) for x, axis in zip(parts, axes, strict=True))
    mask = torch.zeros(2, 1, 7, 9)
    mask[1, :, :, -2:] = -1e4
    found = {name: None for name in ("float_codes", "reference")}
    for name in found:
        with kernels.use(attention_groups=name):
            found[name] = grouped_products.attend(q, k, v, mask, 0.3, banks, how)
    # A probability between two powers of two may fall to either side in the last bit of a softmax.
    assert distance(found["float_codes"], found["reference"].double()) < 2e-3
    assert torch.allclose(grouped_products.fake(q, k, v, mask, 0.3, banks, how), found["reference"], atol=2e-2)
    exact = torch.softmax(q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.3 + mask, -1) @ v.repeat_interleave(2, 1)
    assert distance(found["reference"], exact.double()) < 0.35
    other = operands(1, 5)
    assert torch.isfinite(grouped_products.attend(*other, None, 0.3, banks, how)).all()


def test_gradients_reach_queries_keys_and_values() -> None:
    q, k, v = (x.requires_grad_(True) for x in operands())
    banks: Any = tuple(bank_of(x.detach().flatten(0, 1), "rows", 3, 8) for x in (q, k, v))
    grouped_products.fake(q, k, v, None, 0.3, banks, Probabilities(LogSpec(8, "2", "none"))).square().sum().backward()
    assert all(float(x.grad.abs().sum()) > 0 for x in (q, k, v))
