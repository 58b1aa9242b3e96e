"""Convolutions whose input is cut in two: halves with grids of their own, two sums, the bias once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hfq.errors import CheckpointError, QuantizationError
from hfq.formats import ActivationSpec, QuantSpec, activation
from hfq.layers import swap
from hfq.layers.conv import QConv2d, SecondHalf
from hfq.report import Report
from hfq.rounding import nearest

INPUT = ActivationSpec(8, False, "tensor", dynamic=False)


def model(kernel: int = 1, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"conv": nn.Conv2d(6, 5, kernel, padding=kernel // 2, bias=bias)}).eval()


def params_of(x: torch.Tensor):
    return activation.range_parameters(x.min().reshape(1), x.max().reshape(1), INPUT)


def cut(module: nn.Module, x: torch.Tensor | None, at: int = 2) -> QConv2d:
    spec = QuantSpec(4)
    weight = module["conv"].weight.detach()
    halves = [nearest.solve(half.flatten(1), spec) for half in (weight[:, :at], weight[:, at:])]
    options = {}
    if x is not None:
        options = {"activation": INPUT, "activation_params": params_of(x[:, :at])}
    second = SecondHalf(at, halves[1], None if x is None else params_of(x[:, at:]))
    return swap.swap(module, "conv", halves[0], Report(), second=second, **options)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inputs", [True, False])
def test_two_sums_and_one_bias(kernel, bias, inputs):
    x, floats = torch.randn(2, 6, 5, 4) * torch.tensor([9.0] * 2 + [0.1] * 4).view(1, 6, 1, 1), model(kernel, bias)
    packed = copy.deepcopy(floats)
    layer = cut(packed, x if inputs else None)
    assert layer.weight.shape == floats["conv"].weight.shape
    halves = x[:, :2], x[:, 2:]
    if inputs:
        halves = tuple(activation.fake(half, INPUT, params_of(half)) for half in halves)
    expected = F.conv2d(torch.cat(halves, 1), layer.dequantize(), floats["conv"].bias, padding=kernel // 2)
    # With floats as inputs the fastest product on some CPUs rounds to 16 bits.
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-4 if inputs else 0.1)


def test_round_trip(tmp_path):
    x, floats = torch.randn(2, 6, 4, 4), model()
    packed = copy.deepcopy(floats)
    layer = cut(packed, x)
    again = copy.deepcopy(floats).to("meta")
    manifest = swap.describe(packed)
    assert manifest["layers"]["conv"]["cut"]["at"] == 2 and manifest["layers"]["conv"]["in_features"] == 6
    swap.build_empty(again, manifest)
    again.load_state_dict(packed.state_dict(), assign=True)
    swap.check(again)
    assert torch.equal(again["conv"](x), layer(x))
    swap.dequantize_modules(packed)
    assert isinstance(packed["conv"], nn.Conv2d) and torch.equal(packed["conv"].weight, layer.dequantize())
    for at, message in ((0, "cannot be cut at 0"), (6, "cannot be cut at 6"), ("2", "at='2'")):
        manifest["layers"]["conv"]["cut"]["at"] = at
        with pytest.raises(CheckpointError, match=message):
            swap.build_empty(copy.deepcopy(floats), manifest)


def test_the_bias_stays_the_first_floating_tensor():
    """Libraries take its dtype for that of the model, also after a move."""
    module = model()
    cut(module, torch.randn(1, 6, 4, 4))
    for _ in range(2):
        assert next(p.dtype for p in module.parameters() if p.is_floating_point()) == torch.float32
        module.to(torch.float64).to(torch.float32)


def test_what_cannot_be_cut():
    module = nn.ModuleDict({"conv": nn.Conv2d(6, 6, 1, groups=2), "linear": nn.Linear(6, 4)})
    codes = [nearest.solve(torch.randn(6, n), QuantSpec(4)) for n in (1, 2, 6)]
    with pytest.raises(QuantizationError, match="in 2 groups cannot be cut at 1"):
        swap.swap(module, "conv", codes[0], second=SecondHalf(1, codes[1]))
    with pytest.raises(QuantizationError, match="codes of"):
        swap.swap(module, "conv", codes[2], second=SecondHalf(1, codes[1]))
    halves = [nearest.solve(torch.randn(4, n), QuantSpec(4)) for n in (2, 4)]
    with pytest.raises(QuantizationError, match="no second part"):
        swap.swap(module, "linear", halves[0], second=SecondHalf(2, halves[1]))
