"""Numerics of the integer convolution in Triton's interpreter, float16 and float32.

Run by ``test_triton_conv.py`` in a process of its own: TRITON_INTERPRET must be set before the kernels are imported.
"""

import os

import pytest
import torch

from hfq import kernels  # noqa: F401  the layouts
from hfq.formats import ActivationSpec, QuantSpec, activation, affine, bitpack
from hfq.kernels import reference
from hfq.kernels.conv import Operand, quantize_input
from hfq.kernels.geometry import Geometry
from hfq.kernels.packed import PackedWeight
from hfq.kernels.triton import conv
from hfq.kernels.triton.conv import Tile

assert os.environ.get("TRITON_INTERPRET") == "1"

SHAPES = [
    Geometry(32, 20, (3, 3), pads=(1, 1, 1, 1)),
    Geometry(40, 16, (3, 3), stride=(2, 2), pads=(1, 1, 1, 1)),
    Geometry(3, 18, (2, 3), stride=(1, 2), pads=(0, 1, 1, 1), dilation=(2, 1)),
    Geometry(64, 33, (1, 1)),
]
INPUTS = [ActivationSpec(8, False, "tensor", dynamic=False), ActivationSpec(8, True, "tensor"),
          ActivationSpec(4, False, "tensor")]  # fmt: skip


def packed(geometry, **fields):
    spec = QuantSpec(**{"bits": 8, "symmetric": True, **fields})
    codes = affine.quantize(torch.randn(geometry.out_channels, geometry.columns), spec)
    return PackedWeight(bitpack.pack(codes.codes, spec.bits), codes.scale, codes.zero_point, spec, geometry.columns,
                        geometry.out_channels)  # fmt: skip


def given(x, spec):
    return None if spec.dynamic else activation.range_parameters(x.amin().view(1) * 0.7, x.amax().view(1) * 0.7, spec)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Buffers start as NaN, or as large integers, so that an element that no program writes shows."""
    empty = torch.empty

    def bad(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", bad)


@pytest.mark.parametrize("geometry", SHAPES, ids=str)
@pytest.mark.parametrize("fields", [{}, {"bits": 4, "symmetric": False}], ids=str)
def test_convolutions(geometry, fields):
    torch.manual_seed(0)
    weight = packed(geometry, **fields)
    runtime = conv.prepare(weight, geometry, torch.float16, None)
    assert torch.equal(conv.canonical(runtime), weight.qweight)
    x, bias = torch.randn(2, geometry.in_channels, 5, 4) + 0.2, torch.randn(geometry.out_channels)
    for spec in INPUTS:
        params = given(x, spec)
        codes = quantize_input(x, spec, params)
        want = reference.conv2d_int(codes, weight, geometry, bias, torch.float64)
        for dtype, limit in ((torch.float32, 1e-6), (torch.float16, 5e-4)):
            y = conv.run(codes, [Operand(runtime, geometry)], bias, dtype, Tile(32, 16, 32))
            assert y.dtype == dtype and torch.isfinite(y).all()
            assert (y.double() - want).norm() <= limit * want.norm()


@pytest.mark.parametrize(("kernel", "taps"), [((3, 3), (1, 1)), ((5, 5), (3, 3)), ((3, 3), (3, 3))])
@pytest.mark.parametrize("stride", [1, 2])
def test_two_sums_share_the_input(kernel, taps, stride):
    torch.manual_seed(1)
    pad = kernel[0] // 2
    geometry = Geometry(32, 20, kernel, stride=(stride, stride), pads=(pad, pad, pad, pad))
    inner = geometry.centre(taps)
    parts = [(packed(geometry), geometry), (packed(inner), inner)]
    x = torch.randn(1, 32, 6, 5)
    for spec in INPUTS[:2]:
        codes = quantize_input(x, spec, given(x, spec))
        want = sum(reference.conv2d_int(codes, weight, place, None, torch.float64) for weight, place in parts)
        operands = [Operand(conv.prepare(weight, place, torch.float32, None), place) for weight, place in parts]
        y = conv.run(codes, operands, None, torch.float32, Tile(32, 16, 32))
        assert (y.double() - want).norm() <= 1e-6 * want.norm()


def test_extreme_sums_are_exact():
    geometry = Geometry(32, 16, (3, 3), pads=(1, 1, 1, 1))
    weight = packed(geometry, scale_dtype="float32")
    weight.qweight.copy_(torch.randint(0, 2, weight.qweight.shape) * 255)
    weight.scale.fill_(1.0)
    codes = (torch.randint(0, 2, (1, 32, 4, 4)) * 255).to(torch.uint8)
    x = activation.ActivationCodes(codes, torch.ones(1), torch.tensor([255.0]), INPUTS[0])
    one = Operand(conv.prepare(weight, geometry, torch.float32, None), geometry)
    y = conv.run(x, [one], None, torch.float32, Tile(16, 16, 32))
    assert torch.equal(y.double(), reference.conv2d_sums(x, weight, geometry))
