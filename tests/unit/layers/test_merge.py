"""Weights that change inside packed layers: rounded again, or moved by a constant a group."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hfq.errors import QuantizationError
from hfq.formats import QuantSpec, affine
from hfq.kernels import use
from hfq.layers import merge, substitute
from hfq.layers.conv import QConv2d
from hfq.layers.linear import QConv1D, QLinear
from hfq.layers.online import Hadamard

SPECS = [QuantSpec(4, 16), QuantSpec(3, -1, symmetric=True), QuantSpec(4, 16, zero_point="float"), QuantSpec(8, 0)]


def layer(spec: QuantSpec = SPECS[0], online: bool = False) -> QLinear:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 32, generator=generator) * 0.1
    part = Hadamard(32) if online else None
    new = QLinear(32, 24, spec, bias=torch.ones(24), online=part)
    new.set_codes("weight", affine.quantize(weight if part is None else part.fold(weight), spec))
    new.prepare()
    return new


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_an_unchanged_weight_keeps_its_codes(spec):
    one = layer(spec)
    before = merge.Snapshot.of(one)
    assert merge.requantize(one, one.dequantize(dtype=torch.float32)) < 1e-6
    after = merge.Snapshot.of(one)
    assert all(torch.equal(before.tensors[key], after.tensors[key]) for key in before.tensors)


@pytest.mark.parametrize("online", [False, True])
def test_a_new_weight_is_as_near_as_a_fresh_one(online):
    """And far nearer than on the old grid: ranges grow where the weight does."""
    one = layer(online=online)
    wanted = one.dequantize(dtype=torch.float32) * 3 + noise(24, 32) * 0.1
    error = merge.requantize(one, wanted)
    folded = one.online.fold(wanted) if online else wanted
    fresh = affine.dequantize(affine.quantize(folded, one.spec))
    assert error <= float((fresh - folded).norm() / folded.norm()) + 1e-6
    torch.testing.assert_close(one.dequantize(dtype=torch.float32), wanted, rtol=0, atol=0.2)
    assert one.prepared


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_offsets_of_groups_are_exact_and_taken_back(spec):
    one, x = layer(spec), noise(5, 32)
    before, weight = merge.Snapshot.of(one), one.dequantize(dtype=torch.float32)
    offsets = noise(*one.scale.shape) * 0.05
    merge.shift_groups(one, offsets)
    wanted = weight + affine.expand(offsets, 32, spec)
    torch.testing.assert_close(one.dequantize(dtype=torch.float32), wanted, rtol=0, atol=1e-6)
    with use(wna16="reference"):
        torch.testing.assert_close(one(x), x @ wanted.t() + 1, rtol=0, atol=1e-5)
    assert one.spec.zero_point == "float" and one.describe()["spec"]["zero_point"] == "float"
    before.put_back(one)
    assert one.spec == spec and torch.equal(one.dequantize(dtype=torch.float32), weight)
    assert set(one.state_dict()) == set(layer(spec).state_dict())


def test_what_cannot_change_raises():
    one = layer()
    with pytest.raises(QuantizationError, match="is needed"):
        merge.requantize(one, torch.zeros(3, 3))
    with pytest.raises(QuantizationError, match="NaN or infinite"):
        merge.requantize(one, torch.full((24, 32), float("nan")))
    with pytest.raises(QuantizationError, match="offsets"):
        merge.shift_groups(one, torch.zeros(24, 1))
    conv = QConv2d(nn.Conv2d(4, 8, 3), SPECS[0], coarse=((1, 1), SPECS[0]))
    with pytest.raises(QuantizationError, match="several parts"):
        merge.requantize(conv, torch.zeros(8, 4, 3, 3))


def packed(module: nn.Module, spec: QuantSpec = SPECS[0]) -> nn.Module:
    return substitute.pack(module, affine.quantize(substitute.matrix(module), spec))


MODULES = [
    lambda: nn.Linear(32, 24), lambda: nn.Linear(32, 24, bias=False),
    lambda: nn.Conv2d(4, 8, 3, stride=2, padding=1), lambda: nn.Conv2d(4, 8, 3, padding="same"),
    lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"),
]  # fmt: skip


@pytest.mark.parametrize("make", MODULES)
def test_the_own_weight_gives_the_own_output(make):
    """Float layers bit for bit; packed ones (within rounding of their kernel) as float layers with the same weight."""
    torch.manual_seed(0)
    module = make().requires_grad_(False)
    x = noise(3, 32) if isinstance(module, nn.Linear) else noise(2, 4, 6, 6)
    assert torch.equal(substitute.product(module, x, substitute.matrix(module)), module(x))
    quantized = packed(module)
    module.weight.copy_(quantized.dequantize(dtype=torch.float32))
    weight = substitute.matrix(quantized).requires_grad_()
    found = substitute.product(quantized, x, weight)
    torch.testing.assert_close(found, module(x), rtol=0, atol=1e-5)
    found.sum().backward()
    assert weight.grad.abs().sum() > 0


def test_transformed_inputs_and_turned_weights():
    one, x = layer(online=True), noise(3, 32)
    found = substitute.product(one, x, substitute.matrix(one))
    torch.testing.assert_close(found, x @ one.dequantize(dtype=torch.float32).t() + 1, rtol=0, atol=1e-4)
    turned = QConv1D(32, 24, SPECS[0])
    turned.set_codes("weight", affine.quantize(noise(24, 32), SPECS[0]))
    torch.testing.assert_close(substitute.product(turned, x, substitute.matrix(turned)), x @ turned.dequantize(),
                               rtol=0, atol=1e-4)  # fmt: skip


def test_digests_see_the_weight_and_not_its_dtype():
    torch.manual_seed(0)
    module = nn.Linear(32, 24)
    first = substitute.digest(module)
    assert substitute.digest(module.to(torch.bfloat16)) == first
    one, other = packed(module.float()), packed(module, QuantSpec(3, 16))
    assert len({first, substitute.digest(one), substitute.digest(other)}) == 3
    same = substitute.digest(one)
    one.set_codes("weight", affine.quantize(noise(24, 32), one.spec))
    assert substitute.digest(one) != same
    with torch.no_grad():
        module.weight[3, 3] += 1
    assert substitute.digest(module) != first


def test_what_has_no_product_says_so():
    for module, why in ((nn.Embedding(4, 4), "looked up"), (nn.Conv2d(4, 4, 3, groups=4), "4 groups"),
                        (nn.LayerNorm(4), "LayerNorm")):  # fmt: skip
        with pytest.raises(QuantizationError, match=why):
            substitute.check(module)
