"""Integer products, producers and attention over packed keys and values on a real GPU, against float64."""

import pytest
import torch
from torch.nn import functional

from hfq import kernels
from hfq.formats import ActivationSpec, QuantSpec, affine, bitpack
from hfq.formats.activation import dequantize, quantize
from hfq.formats.kv import SideSpec, Tables, encode
from hfq.kernels import dispatch, hadamard, kv, reference
from hfq.kernels.packed import PackedWeight
from hfq.kernels.triton import cache, integer, producers
from hfq.kernels.triton.config import Config
from hfq.kernels.triton.producers import Front

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

FORMATS = [(8, -1), (8, 128), (8, 32), (4, -1), (4, 128), (4, 64), (4, 32), (3, -1), (2, 64), (6, 64), (4, 0)]
WEIGHTS = {"int": {}, "symmetric": {"symmetric": True}, "float": {"zero_point": "float"}}
GRIDS = [ActivationSpec(8), ActivationSpec(8, symmetric=True), ActivationSpec(4, symmetric=True), ActivationSpec(4)]
LIMIT = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def packed(n, k, *, seed=0, **fields):
    generator = torch.Generator().manual_seed(seed)
    spec = QuantSpec(**fields)
    codes = affine.quantize(torch.randn(n, k, generator=generator), spec)
    zero = None if codes.zero_point is None else codes.zero_point.cuda()
    return PackedWeight(bitpack.pack(codes.codes, spec.bits).cuda(), codes.scale.cuda(), zero, spec, k, n)


def activations(m, k, dtype=torch.bfloat16):
    x = torch.randn(m, k, device="cuda")
    x[:, k // 3] *= 30
    x[m // 2] = x[m // 2].abs()
    return x.to(dtype)


def error(y, want):
    assert torch.isfinite(y).all()
    return float((y.double() - want).norm() / want.norm())


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_products_against_float64(bits, group, kind):
    n, k = 272, 1152
    weight = packed(n, k, bits=bits, group_size=group, **WEIGHTS[kind])
    runtime, matrix = integer.prepare(weight, torch.bfloat16), reference.dequantize(weight, torch.float64)
    assert torch.equal(integer.canonical(runtime), weight.qweight)
    step = integer.fixed_step(integer._layout(runtime), group if 0 < group < k else 0) or 128
    for spec in GRIDS:
        for m, bm in ((1, 16), (17, 32), (197, 64)):
            x = producers.quantize_rows(activations(m, k), spec)
            want = dequantize(x, torch.float64) @ matrix.t()
            for split, bn, warps in ((1, 32, 4), (3, 64, 4), (1, 128, 8)):
                config = Config(bm=bm, bn=bn, warps=warps, stages=3, split=split, mode="int", bk=step)
                for dtype, limit in LIMIT.items():
                    assert error(integer.run(x, runtime, None, dtype, config), want) <= limit, (spec, m, config, dtype)


@pytest.mark.parametrize("kind", ["int", "symmetric"])
@pytest.mark.parametrize("group", [-1, 128])
def test_inline_assembly_equals_the_plain_form(group, kind):
    runtime = integer.prepare(packed(128, 1024, bits=4, group_size=group, **WEIGHTS[kind]), torch.bfloat16)
    x = producers.quantize_rows(activations(16, 1024), GRIDS[0])
    config = Config(bm=16, bn=64, stages=3, mode="int", bk=128)
    one, other = (integer.run(x, runtime, None, torch.float32, config, asm=asm) for asm in (True, False))
    assert torch.equal(one, other)


@pytest.mark.parametrize(("n", "k", "bits", "group"), [(576, 1536, 8, -1), (1536, 576, 4, 64), (48, 100, 4, 32),
                                                       (4096, 4096, 8, -1), (4096, 4096, 4, 128)])
@pytest.mark.parametrize("m", [1, 5, 17, 130, 600])
def test_layers_call_with_the_chosen_configuration(n, k, bits, group, m):
    weight, spec = packed(n, k, bits=bits, group_size=group), GRIDS[0]
    runtime = kernels.prepare(weight, dtype=torch.bfloat16, activation=spec)
    assert runtime.layout == "triton_int"
    assert [c.backend for c in kernels.explain(weight, m, torch.bfloat16, activation=spec) if c.chosen] == ["triton"]
    x, bias = activations(m, k), torch.randn(n, device="cuda", dtype=torch.bfloat16)
    want = reference.linear_int(quantize(x, spec), weight, bias, torch.float64)
    assert error(kernels.linear_int(x, runtime, bias, spec), want) <= 5e-3


def test_capturable_and_deterministic():
    runtime, x = integer.prepare(packed(512, 1024, bits=4, group_size=128), torch.bfloat16), activations(8, 1024)
    first = kernels.linear_int(x, runtime, None, GRIDS[0])
    assert all(torch.equal(first, kernels.linear_int(x, runtime, None, GRIDS[0])) for _ in range(5))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernels.linear_int(x, runtime, None, GRIDS[0])
    y.fill_(float("nan"))
    graph.replay()
    assert torch.equal(first, y)


def same_codes(made, want, share=1e-3):
    shift = 0 if want.spec.symmetric else 1 << (want.spec.bits - 1)
    difference = (made.codes.int() + shift - want.codes.int()).abs()
    assert int(difference.max()) <= 1 and float(difference.float().mean()) <= share
    torch.testing.assert_close(made.scale, want.scale, rtol=1e-5, atol=0)


@pytest.mark.parametrize("spec", GRIDS, ids=str)
@pytest.mark.parametrize(("m", "k"), [(1, 4096), (33, 576), (130, 8192), (5, 14336), (3, 28672)])
def test_producers(m, k, spec):
    x, u = activations(m, k), torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    gain = torch.rand(k, device="cuda") + 0.5
    made = producers.quantize_rows(x, spec)
    same_codes(made, quantize(x, spec), 1e-4)
    assert torch.equal(made.sums[:, 0], made.codes.sum(1, dtype=torch.int32))
    rms = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5) * gain
    same_codes(producers.quantize_rows(x, spec, front=Front(norm="rms", gain=gain, eps=1e-5)), quantize(rms, spec))
    product = functional.silu(x.float()) * u.float()
    same_codes(producers.quantize_rows(x, spec, front=Front(act="silu", times=u)), quantize(product, spec))


@pytest.mark.parametrize(("k", "order"), [(4096, 4096), (4096, 64), (576, 64), (1536, 1536), (14336, 14336),
                                          (11008, 11008), (28672, 28672)])
def test_hadamard(k, order):
    x, signs = activations(5, k), hadamard.random_signs(k).cuda()
    want = hadamard.transform((x * signs).double(), order)
    assert error(producers.mix(x, order, signs=signs), want) <= 4e-3  # bfloat16 result
    same_codes(producers.mix(x, order, GRIDS[0], signs=signs), quantize(want.float(), GRIDS[0]), 5e-3)


SIDES = [
    (SideSpec(4), SideSpec(4)), (SideSpec(2, zero_point="int"), SideSpec(2)), (SideSpec(3), SideSpec(3)),
    (SideSpec(8), SideSpec(4)), (SideSpec(4, axis="channel"), SideSpec(4, group_size=0)),
    (SideSpec(2, axis="window", group_size=32), SideSpec(2, group_size=32)),
    (SideSpec(3, axis="channel", table=True, outliers=0.01), SideSpec(3, group_size=0, table=True, outliers=0.01)),
]


def side(x, spec, capacity):
    ends = torch.full((x.shape[1] * x.shape[3],), 4.0, device="cuda")
    levels = torch.linspace(-1, 1, 1 << spec.bits, device="cuda")
    tables = Tables(-ends, ends, levels, levels)
    run = encode(x, spec, tables)
    block = kv.empty_block(run, spec, capacity)
    kv.write(block, 0, run, spec)
    return kv.Side(spec, tables, [block])


class Turned:
    def __init__(self, tokens, width):
        turn = torch.arange(tokens, device="cuda")[:, None] * torch.logspace(0, -4, width // 2, device="cuda")
        self.pair = (turn.cos()[None], turn.sin()[None])

    def halves(self):
        return True

    def angles(self, start, stop):
        return tuple(t[:, start:stop] for t in self.pair)

    def rotate(self, x, start, stop):
        cos, sin = (t.to(x.dtype) for t in self.angles(start, stop))
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("sides", SIDES, ids=str)
@pytest.mark.parametrize(("width", "tokens"), [(64, 500), (128, 2000)])
def test_attention_over_packed_tokens(sides, rotary, width, tokens):
    k, v = torch.randn(2, 4, tokens, width, device="cuda"), torch.randn(2, 4, tokens, width, device="cuda")
    key, value = side(k, sides[0], 2048), side(v, sides[1], 2048)
    query = torch.randn(2, 4, 5, width, device="cuda")
    recent = (torch.randn(2, 4, 7, width, device="cuda"), torch.randn(2, 4, 7, width, device="cuda"))
    sink = (recent[0][:, :, :2], recent[1][:, :, :2], torch.tensor([[0, 1], [3, 4]], device="cuda"))
    more = {"scaling": width**-0.5, "rotary": Turned(tokens, width) if rotary else None, "recent": recent, "sink": sink}
    with dispatch.use(kv="reference"):
        want = kv.attend(query, key, value, tokens, **more).double()
    made = cache.attend(query, key, value, tokens, **more)
    assert error(made, want) <= 2e-3
    assert torch.equal(kv.attend(query, key, value, tokens, **more), made)


@pytest.mark.parametrize(("spec", "tokens"), [(SideSpec(4), 1), (SideSpec(3), 5), (SideSpec(2, zero_point="int"), 1),
                                              (SideSpec(4, axis="channel", table=True), 1),
                                              (SideSpec(2, axis="window", group_size=32), 32)], ids=str)
def test_appending_gives_the_same_bytes(spec, tokens):
    x = torch.randn(2, 4, 32 + tokens, 128, device="cuda")
    one, other = side(x[:, :, :32], spec, 64), side(x[:, :, :32], spec, 64)
    kv.write(one.blocks[0], 32, encode(x[:, :, 32:], spec, one.tables), spec)
    assert kv.append(other, 32, x[:, :, 32:])
    for name, tensor in one.blocks[0].tensors().items():
        assert torch.equal(tensor, other.blocks[0].tensors()[name]), name
