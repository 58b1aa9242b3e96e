"""Numerics of the Triton kernels in Triton's interpreter, float16 (it has no bfloat16).

Run by ``test_triton.py`` in a process of its own: TRITON_INTERPRET must be set before the kernels are imported.
"""

import os

import pytest
import torch

from hfq import kernels
from hfq.formats import QuantSpec, affine, bitpack
from hfq.kernels import reference
from hfq.kernels.packed import PackedWeight
from hfq.kernels.triton import wna16
from hfq.kernels.triton.config import Config

assert os.environ.get("TRITON_INTERPRET") == "1"

LIMIT = {"group": 5e-4, "group+xsum": 5e-4, "elem": 1e-3}
# bits, group, in_features: two pack blocks or fewer; ragged last groups; in_features that no block divides.
FORMATS = [
    (4, 64, 256), (4, 32, 100), (2, 64, 512), (1, 128, 512), (3, 64, 512), (3, 64, 160), (8, 32, 128), (5, -1, 72),
    (4, 0, 256), (6, 48, 96), (7, 64, 64), (4, 64, 128),
]


def packed(n, k, *, seed, **fields):
    generator = torch.Generator().manual_seed(seed)
    spec = QuantSpec(**fields)
    codes = affine.quantize(torch.randn(n, k, generator=generator), spec)
    return PackedWeight(bitpack.pack(codes.codes, spec.bits), codes.scale, codes.zero_point, spec, k, n)


def activations(m, k, seed):
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed))
    x[:, k // 3] *= 30
    return x.half()


def check(y, want, limit):
    assert torch.isfinite(y).all()
    got = float((y.double() - want).norm() / want.norm())
    assert got <= limit, got
    rows = (y.double() - want).norm(dim=0) / want.norm(dim=0)
    assert float(rows.max()) <= 12 * max(got, 1e-4), "one output channel is off"


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Every output buffer starts as NaN, so that an element that no program writes shows."""
    empty = torch.empty

    def nan(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", nan)


ZEROS = [{}, {"symmetric": True}, {"zero_point": "float"}]


@pytest.mark.parametrize("fields", ZEROS, ids=["int", "symmetric", "float"])
@pytest.mark.parametrize(("bits", "group", "k"), FORMATS)
def test_every_scale_mode_and_split(bits, group, k, fields):
    weight = packed(48, k, seed=bits, bits=bits, group_size=group, **fields)
    runtime = wna16.prepare(weight, torch.float16)
    assert torch.equal(wna16.canonical(runtime), weight.qweight)
    assert torch.equal(wna16.dequantize(runtime), reference.dequantize(weight))
    assert torch.equal(wna16.dequantize(runtime, torch.float16), reference.dequantize(weight, torch.float16))
    layout, x = wna16._layout(runtime), activations(5, k, group)
    want = reference.linear(x.double(), weight, accumulate=torch.float64)
    outputs = []
    for mode, limit in LIMIT.items():
        for split in (1, 2):
            config = Config(bm=16, bn=32, split=split, mode=mode)
            args = (*wna16._weight_args(runtime), None, layout, wna16._group(group, k), weight.spec.middle, config)
            outputs.append(wna16.run_fused(x, *args))
            check(outputs[-1], want, limit)


def test_linear_takes_batches_biases_and_both_backends():
    weight = packed(40, 192, seed=1, bits=4, group_size=64)
    runtime = wna16.prepare(weight, torch.float16)
    bias = torch.randn(40).half()
    for shape, limit in (((2, 3, 192), 1e-3), ((192,), 1e-3), ((300, 192), 1.5e-3)):
        x = torch.randn(*shape).half()
        y = wna16.linear(x, runtime, bias)
        assert y.shape == (*shape[:-1], 40) and y.dtype == torch.float16
        want = reference.linear(x.double(), weight, bias, accumulate=torch.float64)
        check(y.reshape(-1, 40), want.reshape(-1, 40), limit)
    assert wna16.config_of(runtime, 300, torch.float16).backend == "dequant"
    assert wna16.linear(torch.empty(0, 192).half(), runtime).shape == (0, 40)
    wide = torch.randn(4, 384).half()[:, ::2]
    check(wna16.linear(wide, runtime), reference.linear(wide.double(), weight, accumulate=torch.float64), 1e-3)
    exact = wna16.linear(torch.randn(4, 192), runtime)  # float32 activations: dequantize and multiply
    assert exact.dtype == torch.float32


def test_activations_with_a_large_mean_keep_their_precision():
    weight = packed(32, 256, seed=2, bits=4, group_size=-1)
    runtime = wna16.prepare(weight, torch.float16)
    x = (torch.randn(3, 256).abs() * 20 + 50).half()
    want = reference.linear(x.double(), weight, accumulate=torch.float64)
    size = float(x.double().norm() * reference.dequantize(weight, torch.float64).norm())
    args = (*wna16._weight_args(runtime), None, wna16._layout(runtime), 0, weight.spec.middle)
    for mode in LIMIT:
        y = wna16.run_fused(x, *args, Config(bn=32, mode=mode)).double()
        assert float((y - want).norm()) / size < 1e-4  # relative to the products: they cancel in the result


def test_splits_agree_and_repeat_bit_for_bit():
    weight = packed(64, 512, seed=3, bits=4, group_size=64)
    runtime, x = wna16.prepare(weight, torch.float16), activations(4, 512, 3)
    args = (*wna16._weight_args(runtime), None, wna16._layout(runtime), 64, weight.spec.middle)
    results = [wna16.run_fused(x, *args, Config(bn=32, split=s)) for s in (1, 2, 3, 4, 4)]
    assert torch.equal(results[-1], results[-2])
    for other in results[1:]:
        difference = (results[0].double() - other.double()).norm() / results[0].double().norm()
        assert float(difference) < 5e-4  # of rounding to float16


def test_extreme_codes_and_constant_rows():
    spec = QuantSpec(8, 32)
    rows = [torch.zeros(64), torch.full((64,), 255), torch.arange(64) % 2 * 255, torch.arange(64)]
    codes = torch.stack(rows).to(torch.uint8).repeat(8, 1)
    zero = torch.tensor([0, 255]).repeat(16).to(torch.uint8)[:, None].expand(32, 2).contiguous()
    weight = PackedWeight(bitpack.pack(codes, 8), torch.rand(32, 2).half() + 0.01, zero, spec, 64, 32)
    runtime, x = wna16.prepare(weight, torch.float16), torch.randn(2, 64).half()
    want = reference.linear(x.double(), weight, accumulate=torch.float64)
    y = wna16.linear(x, runtime)
    assert float((y.double() - want).norm() / want.norm()) < 5e-4
    assert not y[:, ::4][:, :1].any()  # code 0, zero point 0: exactly zero


def test_a_group_size_that_no_slice_fits_is_dequantized():
    weight = packed(32, 100, seed=4, bits=4, group_size=20)
    runtime, x = wna16.prepare(weight, torch.float16), activations(3, 100, 4)
    assert "multiple of 16" in wna16.constraint(weight)
    assert torch.equal(wna16.dequantize(runtime), reference.dequantize(weight))
    check(wna16.linear(x, runtime), reference.linear(x.double(), weight, accumulate=torch.float64), 1.5e-3)


def test_gradients_of_the_activations():
    weight = packed(48, 128, seed=5, bits=4, group_size=32)
    runtime = wna16.prepare(weight, torch.float16)
    x = activations(3, 128, 5).requires_grad_()
    kernels.linear(x, runtime).sum().backward()
    want = torch.ones(3, 48).double() @ reference.dequantize(weight, torch.float64)
    assert float((x.grad.double() - want).norm() / want.norm()) < 2e-3
