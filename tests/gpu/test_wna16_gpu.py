"""The Triton kernels on a real GPU: every width, both dtypes, every scale mode, against float64."""

import pytest
import torch

from hfq import kernels
from hfq.formats import QuantSpec, affine, bitpack
from hfq.kernels import reference
from hfq.kernels.packed import PackedWeight
from hfq.kernels.triton import wna16
from hfq.kernels.triton.config import Config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

FORMATS = [(4, 128), (4, 64), (4, 32), (2, 64), (1, 128), (3, 64), (8, 128), (8, -1), (5, 64), (4, -1), (4, 0), (4, 48)]
LIMIT = {  # relative error: (fp16, bf16)
    "group": (5e-4, 4e-3), "group+xsum": (5e-4, 4e-3), "elem": (1e-3, 5e-3),
}


def packed(n, k, *, seed=0, **fields):
    generator = torch.Generator().manual_seed(seed)
    spec = QuantSpec(**fields)
    codes = affine.quantize(torch.randn(n, k, generator=generator), spec)
    zero = None if codes.zero_point is None else codes.zero_point.cuda()
    qweight = bitpack.pack(codes.codes, spec.bits).cuda()
    return PackedWeight(qweight, codes.scale.cuda(), zero, spec, k, n)


def activations(m, k, dtype):
    x = torch.randn(m, k, device="cuda")
    x[:, k // 3] *= 30
    return x.to(dtype)


def error(y, want):
    assert torch.isfinite(y).all()
    rows = (y.double() - want).norm(dim=0) / want.norm(dim=0).clamp(min=1e-6)
    total = float((y.double() - want).norm() / want.norm())
    assert float(rows.max()) <= 12 * max(total, 1e-4), "one output channel is off"
    return total


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_every_mode_against_float64(bits, group, dtype):
    n, k = 272, 1152
    for fields in ({}, {"symmetric": True}, {"zero_point": "float"}):
        weight = packed(n, k, bits=bits, group_size=group, **fields)
        runtime = wna16.prepare(weight, dtype)
        layout, args = wna16._layout(runtime), wna16._weight_args(runtime)
        grouped = wna16._group(group, k)
        for m, bm in ((1, 16), (17, 32), (197, 128)):
            x = activations(m, k, dtype)
            want = reference.linear(x.double(), weight, accumulate=torch.float64)
            for mode in LIMIT:
                for split, bn, warps in ((1, 64, 4), (3, 128, 8)):
                    config = Config(bm=bm, bn=bn, warps=warps, stages=3, split=split, mode=mode)
                    y = wna16.run_fused(x, *args, None, layout, grouped, weight.spec.middle, config)
                    got = error(y, want)
                    assert got <= LIMIT[mode][dtype == torch.bfloat16], (fields, m, config, got)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_inline_assembly_equals_the_plain_form(bits, dtype):
    weight = packed(128, 1024, bits=bits, group_size=128)
    runtime = wna16.prepare(weight, dtype)
    layout, args = wna16._layout(runtime), wna16._weight_args(runtime)
    x = activations(16, 1024, dtype)
    fast, plain = (
        wna16.run_fused(x, *args, None, layout, 128, weight.spec.middle, Config(), asm=asm) for asm in (True, False)
    )
    assert torch.equal(fast, plain)


SHAPES = [(576, 1536, 4, 64), (1536, 576, 4, 64), (48, 100, 4, 32), (130, 576, 2, 64), (64, 200, 3, 20)]


@pytest.mark.parametrize(("n", "k", "bits", "group"), SHAPES)
@pytest.mark.parametrize("m", [1, 5, 17, 130, 300])
def test_linear_and_dequantize_with_the_chosen_configuration(n, k, bits, group, m):
    weight = packed(n, k, bits=bits, group_size=group)
    runtime = wna16.prepare(weight, torch.bfloat16)
    assert torch.equal(wna16.canonical(runtime), weight.qweight)
    assert torch.equal(wna16.dequantize(runtime), reference.dequantize(weight))
    x, bias = activations(m, k, torch.bfloat16), torch.randn(n, device="cuda", dtype=torch.bfloat16)
    want = reference.linear(x.double(), weight, bias, accumulate=torch.float64)
    assert error(wna16.linear(x, runtime, bias), want) <= 6e-3


def test_the_table_names_these_kernels():
    weight = packed(256, 512, bits=4, group_size=128)
    assert kernels.prepare(weight, dtype=torch.bfloat16).layout == "triton"
    for m, name in ((1, "triton"), (4096, "triton_dequant")):
        assert [c.backend for c in kernels.explain(weight, m, torch.bfloat16) if c.chosen] == [name]


def test_deterministic_capturable_and_differentiable():
    weight = packed(512, 1024, bits=4, group_size=128)
    runtime = wna16.prepare(weight, torch.bfloat16)
    x = activations(8, 1024, torch.bfloat16)
    first = wna16.linear(x, runtime)
    assert all(torch.equal(first, wna16.linear(x, runtime)) for _ in range(5))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = wna16.linear(x, runtime)
    y.fill_(float("nan"))
    graph.replay()
    assert torch.equal(first, y)
    leaf = x.clone().requires_grad_()
    kernels.linear(leaf, runtime).sum().backward()
    want = torch.ones(8, 512, device="cuda").double() @ reference.dequantize(weight, torch.float64)
    assert error(leaf.grad, want) <= 8e-3


def test_fullgraph_compile_with_a_dynamic_batch():
    weight = packed(256, 512, bits=4, group_size=128)
    runtime = wna16.prepare(weight, torch.bfloat16)
    compiled = torch.compile(lambda x: kernels.linear(x, runtime) * 2, fullgraph=True, dynamic=True)
    for m in (3, 40):
        x = activations(m, 512, torch.bfloat16)
        assert torch.equal(compiled(x), wna16.linear(x, runtime) * 2)
