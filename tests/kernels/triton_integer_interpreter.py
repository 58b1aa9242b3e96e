"""Numerics of the integer products and their producers in Triton's interpreter, float16 and float32.

Run by ``test_triton_integer.py`` in a process of its own: TRITON_INTERPRET must be set before the kernels are imported.
"""

import os

import pytest
import torch
from torch.nn import functional

from hfq import kernels
from hfq.formats import QuantSpec, affine, bitpack
from hfq.formats.activation import ActivationSpec, dequantize, quantize
from hfq.kernels import dispatch, hadamard, reference
from hfq.kernels import producers as plain
from hfq.kernels.packed import PackedWeight
from hfq.kernels.triton import integer, producers
from hfq.kernels.triton.config import Config
from hfq.kernels.triton.producers import Front
from hfq.layers.online import Hadamard

assert os.environ.get("TRITON_INTERPRET") == "1"

# bits, group, in_features: ragged last groups, in_features that no block divides, both halves of a byte.
FORMATS = [(8, -1, 192), (8, 32, 100), (4, -1, 200), (4, 64, 256), (4, 128, 320), (4, 32, 96), (2, 96, 192),
           (6, 64, 128)]
WEIGHTS = {"int": {}, "symmetric": {"symmetric": True}, "float": {"zero_point": "float"}}
ASYMMETRIC, SYMMETRIC = ActivationSpec(8), ActivationSpec(8, symmetric=True)
ONCE = Hadamard(96, 32, signs=hadamard.random_signs(96))


def packed(n, k, *, seed, **fields):
    generator = torch.Generator().manual_seed(seed)
    spec = QuantSpec(**fields)
    codes = affine.quantize(torch.randn(n, k, generator=generator), spec)
    return PackedWeight(bitpack.pack(codes.codes, spec.bits), codes.scale, codes.zero_point, spec, k, n)


def activations(m, k, seed=0, dtype=torch.float16):
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed))
    x[:, k // 3] *= 30
    x[m // 2] = x[m // 2].abs()  # one-sided: the zero point is at the end of the grid
    return x.to(dtype)


def error(y, want):
    assert torch.isfinite(y).all()
    return float((y.double() - want).norm() / want.norm())


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Buffers start as NaN, or as large integers, so that an element that no program writes shows."""
    empty = torch.empty

    def bad(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", bad)


CASES = [(*one, "int") for one in FORMATS]
CASES += [(*one, kind) for one in ((8, -1, 192), (4, 64, 256), (4, -1, 200)) for kind in ("symmetric", "float")]


@pytest.mark.parametrize(("bits", "group", "k", "kind"), CASES)
def test_products_are_exact(bits, group, k, kind):
    weight = packed(40, k, seed=bits, bits=bits, group_size=group, **WEIGHTS[kind])
    runtime = integer.prepare(weight, torch.float16)
    assert torch.equal(integer.canonical(runtime), weight.qweight)
    layout, grouped = integer._layout(runtime), 0 < group < k
    step = integer.fixed_step(layout, group if grouped else 0) or 64
    matrix = reference.dequantize(weight, torch.float64)
    for spec, split in ((ASYMMETRIC, 2), (ActivationSpec(4, symmetric=True), 1)):
        x = producers.quantize_rows(activations(3, k, bits), spec)
        want = dequantize(x, torch.float64) @ matrix.t()
        config = Config(bm=16, bn=32, split=split, mode="int", bk=step)
        y = integer.run(x, runtime, None, torch.float32, config)
        assert error(y, want) <= 1e-6, (spec, split)


def test_without_groups_the_sums_are_exact_integers():
    k = 256
    spec = QuantSpec(8, -1, scale_dtype="float32")
    codes = torch.stack([torch.zeros(k), torch.full((k,), 255), torch.arange(k) % 2 * 255, torch.arange(k)])
    codes = codes.to(torch.uint8).repeat(8, 1)
    zero = torch.tensor([0, 255, 7]).repeat(11)[:32, None].to(torch.uint8)
    weight = PackedWeight(bitpack.pack(codes, 8), torch.ones(32, 1), zero, spec, k, 32)
    x = torch.tensor([[0.0, 255.0]]).repeat(3, k // 2)
    x[1] = -torch.arange(k)
    x[2] = 0
    made = producers.quantize_rows(x, ActivationSpec(8))
    qa, qw = dequantize(made, torch.float64) / made.scale.double(), codes.double() - zero.double()
    y = integer.multiply(made, integer.prepare(weight, torch.float32), None, torch.float32)
    assert torch.equal(y, (qa @ qw.t()).float() * made.scale)


def test_bias_batch_of_one_codes_from_elsewhere_and_splits():
    weight = packed(40, 256, seed=1, bits=4, group_size=64)
    runtime, bias = integer.prepare(weight, torch.float16), torch.randn(40)
    x = activations(3, 256)
    codes = quantize(x, ASYMMETRIC)  # plain uint8
    want = reference.linear_int(codes, weight, bias, torch.float64)
    assert error(integer.multiply(codes, runtime, bias, torch.float32), want) <= 1e-6
    assert error(integer.multiply(codes, runtime, bias.half(), torch.float16), want) <= 5e-4
    made = producers.quantize_rows(x, ASYMMETRIC)
    args = (runtime, bias, torch.float32)
    results = [integer.run(made, *args, Config(bm=16, bn=32, split=s, mode="int", bk=128)) for s in (1, 2, 2)]
    assert torch.equal(results[1], results[2]) and error(results[0], results[1].double()) < 1e-6
    assert integer.multiply(producers.quantize_rows(x[:0], ASYMMETRIC), runtime, None, torch.float16).shape == (0, 40)


def test_long_rows_finish_in_64_bits(monkeypatch):
    monkeypatch.setattr(integer, "EXACT", 100)
    weight = packed(32, 192, seed=2, bits=8, group_size=-1)
    runtime, x = integer.prepare(weight, torch.float16), producers.quantize_rows(activations(3, 192), ASYMMETRIC)
    want = dequantize(x, torch.float64) @ reference.dequantize(weight, torch.float64).t()
    assert error(integer.multiply(x, runtime, None, torch.float32), want) <= 1e-6


def test_layers_find_these_kernels():
    weight = packed(40, 128, seed=3, bits=4, group_size=64)
    runtime, x = integer.prepare(weight, torch.float16), activations(3, 128)
    want = reference.linear_int(quantize(x, ASYMMETRIC), weight, None, torch.float64)
    y = dispatch.BACKENDS["wnan_codes", "triton"](quantize(x, ASYMMETRIC), runtime, None, torch.float16)
    assert error(y, want) <= 1e-3
    case = dispatch.Case("wnan", "cuda", torch.float16, 4, 3, 40, 128, 64, activation=ActivationSpec(8, group_size=32))
    (row,) = (line for line in kernels.table() if (line.op, line.backend) == ("wnan", "triton"))
    assert "one group" in row.why_not(case)


# Producers

GRIDS = [
    ActivationSpec(8), ActivationSpec(8, symmetric=True), ActivationSpec(4), ActivationSpec(3, symmetric=True),
    ActivationSpec(8, factor=True), ActivationSpec(6, symmetric=True, factor=True),
]


def same_codes(made, want, share=1e-3):
    """Equal up to ties (the compiler fuses a multiplication and an addition)."""
    shift = 0 if want.spec.symmetric else 1 << (want.spec.bits - 1)
    difference = (made.codes.int() + shift - want.codes.int()).abs()
    assert int(difference.max()) <= 1 and float(difference.float().mean()) <= share
    torch.testing.assert_close(made.scale, want.scale, rtol=2e-6, atol=0)
    if want.zero_point is not None:
        assert torch.equal(made.zero_point + shift, want.zero_point.int())
    whole = made.codes.as_strided((made.codes.shape[0], made.codes.stride(0)), (made.codes.stride(0), 1))
    assert not whole[:, made.codes.shape[1] :].any()
    if made.sums is not None:
        assert torch.equal(made.sums.sum(1), made.codes.sum(1, dtype=torch.int32))


@pytest.mark.parametrize("spec", GRIDS, ids=str)
def test_rows(spec):
    factor = torch.tensor([0.8]) if spec.factor else None
    for m, k, dtype in ((4, 100, torch.float16), (1, 9000, torch.float16)):
        x = activations(m, k, dtype=dtype)
        if m > 1:
            x[1], x[3] = 0, 5
        same_codes(producers.quantize_rows(x, spec, None, factor), quantize(x, spec, None, factor))


def test_rows_static_tensor_units_and_strides():
    x = activations(4, 200)
    params = (torch.tensor([0.03]), torch.tensor([117.0]))
    static = ActivationSpec(8, granularity="tensor", dynamic=False)
    same_codes(producers.quantize_rows(x, static, params), quantize(x, static, params))
    signed = ActivationSpec(8, symmetric=True, granularity="tensor")
    same_codes(producers.quantize_rows(x, signed), quantize(x, signed))
    wide = torch.randn(4, 400).half()[:, :200]
    made = producers.quantize_rows(wide, ASYMMETRIC, unit=64)
    same_codes(made, quantize(wide, ASYMMETRIC))
    padded = torch.nn.functional.pad(made.codes, (0, 56))
    assert torch.equal(made.sums, padded.view(4, 4, 64).sum(-1, dtype=torch.int32))
    made.sums = None
    assert torch.equal(producers.unit_sums(made, 64), padded.view(4, 4, 64).sum(-1, dtype=torch.int32))


@pytest.mark.parametrize("spec", [ASYMMETRIC, SYMMETRIC], ids=["asymmetric", "symmetric"])
def test_what_is_not_finite_stays_loud(spec):
    x = activations(4, 128)
    x[0, 3], x[1, 5], x[2, 7] = float("nan"), float("inf"), -float("nan")
    made = producers.quantize_rows(x, spec)
    assert not torch.isfinite(made.scale[:3]).any() and torch.isfinite(made.scale[3]).all()


@pytest.mark.parametrize("k", [96, 8200])
def test_norms_activations_and_vectors(k):
    m = 4 if k < 1000 else 1
    norms = slice(None) if k < 1000 else slice(2, 5)
    x, u = activations(m, k, dtype=torch.float32), torch.randn(m, k)
    gain, centre, mul, add = torch.rand(k) + 0.5, torch.randn(k), torch.rand(k) + 0.5, torch.randn(k)
    rms = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
    layer = functional.layer_norm(x, (k,), gain, centre, 1e-5)
    batch = torch.arange(m) // 2
    shift, scale = torch.randn(2, k), torch.randn(2, k) * 0.1
    cases = [
        (Front(norm="rms", gain=gain, eps=1e-5), rms * gain),
        (Front(norm="rms", gain=gain, gain_offset=1.0, eps=1e-5), rms * (gain + 1)),
        (Front(norm="layer", gain=gain, centre=centre, eps=1e-5), layer),
        (Front(norm="layer", gain=gain, centre=centre, eps=1e-5, mul=scale, add=shift, tokens=2),
         layer * (1 + scale[batch]) + shift[batch]),
        (Front(act="silu", times=u), functional.silu(x) * u),
        (Front(act="gelu"), functional.gelu(x)),
        (Front(act="gelu_tanh"), functional.gelu(x, approximate="tanh")),
        (Front(act="relu", mul=mul), functional.relu(x) * mul),
        (Front(mul=mul, add=add), x * mul + add),
    ]
    for front, y in cases[norms]:
        same_codes(producers.quantize_rows(x, ASYMMETRIC, front=front), quantize(y, ASYMMETRIC), 5e-3)


def test_a_step_from_rows_and_columns():
    x = activations(6, 160, dtype=torch.float32)
    alpha, spec = 0.15, ActivationSpec(8, symmetric=True)
    column = x.abs().amax(0).clamp(min=1e-5) ** (1 - alpha)
    scale = x.abs().amax(1, keepdim=True) ** alpha / 127
    made = producers.quantize_rows(x, spec, front=Front(mul=1 / column, exponent=alpha))
    torch.testing.assert_close(made.scale, scale, rtol=1e-5, atol=0)
    want = (x / column / scale).round().clamp(-127, 127)
    assert float((made.codes - want).abs().max()) <= 1 and float((made.codes != want).float().mean()) < 1e-2


def test_functions_that_serve_every_device_find_these_kernels(monkeypatch):
    calls = []
    monkeypatch.setitem(plain.DEVICES, "cpu", lambda *a, **k: calls.append(a[0]) or producers.serve(*a, **k))
    k = 96
    x, gate, gain, shift = activations(4, k, 1, torch.float32), torch.randn(4, k), torch.rand(k) + 0.5, torch.randn(k)
    cases = [
        lambda **o: plain.quantize_rows(x, ASYMMETRIC, add=shift, **o),
        lambda **o: plain.norm_quant(x, gain, shift, 1e-5, ASYMMETRIC, mean=True, scale=gain, shift=shift, **o),
        lambda **o: plain.norm_quant(x, gain, None, 1e-5, SYMMETRIC, mean=False, **o),
        lambda **o: plain.act_quant(x, functional.silu, SYMMETRIC, gate=gate, **o),
        lambda **o: plain.cross_quant(x, gain, SYMMETRIC, alpha=0.15, **o),
    ]
    for case in cases:
        same_codes(case(), case(fused=False), 5e-3)
    same_codes(plain.hadamard_quant(x, ONCE, ASYMMETRIC), quantize(ONCE(x), ASYMMETRIC), 5e-3)
    same_codes(plain.hadamard_quant(x, lambda y: -y, ASYMMETRIC), quantize(-x, ASYMMETRIC))
    assert calls == ["rows", "norm", "norm", "act", "cross", "hadamard", "hadamard"]
    assert producers.serve("act", x, ASYMMETRIC, None, None, function=torch.sin, gate=None) is None
    assert producers.serve("rows", x, ActivationSpec(8, group_size=32), None, None) is None


ORDERS = [(64, 64), (64, 192), (128, 128), (12, 48), (48, 48), (96, 96), (1, 5), (160, 320)]


@pytest.mark.parametrize(("order", "k"), ORDERS)
def test_hadamard(order, k):
    x = activations(3, k, order, torch.float32)
    signs = hadamard.random_signs(k)
    want = hadamard.transform((x * signs).double(), order)
    y = producers.mix(x, order, signs=signs)
    assert error(y, want) < 1e-6
    for spec in (ASYMMETRIC, SYMMETRIC):
        same_codes(producers.mix(x, order, spec, signs=signs), quantize(want.float(), spec), 5e-3)
    half = producers.mix(x.half(), order, act="silu", times=signs.expand(3, k).float())
    assert half.dtype == torch.float16
    assert error(half, hadamard.transform(functional.silu(x.half().double()) * signs, order)) < 1e-3


def test_hadamard_static_grid():
    x, params = activations(2, 192), (torch.tensor([0.1]), torch.tensor([100.0]))
    static = ActivationSpec(8, granularity="tensor", dynamic=False)
    want = quantize(hadamard.transform(x.float(), 64), static, params)
    same_codes(producers.mix(x, 64, static, params), want, 5e-3)


@pytest.mark.parametrize("case", [
    ("wnan", 8, -1, 17, 64, 64), ("wnan", 4, 128, 1, 64, 256), ("silu_mul", 8, -1, 2, 0, 64),
    ("hadamard", 8, -1, 2, 0, 64), ("kv_pre_rope", 3, 0, 1, 64, 32),
], ids=lambda case: case[0])
def test_benchmark_cases_are_right_before_they_are_timed(case, monkeypatch):
    from hfq.kernels.triton import benchmark_integer as bench

    half, plain_randn = torch.float16, torch.randn  # the interpreter has no bfloat16
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    monkeypatch.setattr(bench, "baseline", lambda n, k, x: 10.0)
    monkeypatch.setattr(bench.tune, "copies_for", lambda nbytes, device: 1)
    monkeypatch.setattr(bench.tune, "graph_time", lambda calls: float(calls[0]() is None) + 5.0)
    monkeypatch.setattr(torch, "bfloat16", half)
    monkeypatch.setattr(torch, "randn", lambda *size, **more: plain_randn(*size, **more))
    row = bench.run_case(case)
    assert row["ok"] in ("", "y", "n") and row["us"] == 5.0 and row["floor_us"] > 0, row
    wanted = {"wnan", "rows", "rmsnorm", "silu_mul", "hadamard", "kv", "kv_table", "kv_pre_rope"}
    assert {c[0] for c in bench.cases()} == wanted
