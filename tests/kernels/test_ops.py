"""The torch.library operators: opcheck, tracing with a dynamic number of rows, gradients, meta tensors."""

import pytest
import torch

from hfq import kernels
from hfq.formats import QuantSpec, affine, bitpack
from hfq.kernels import PackedWeight, ops

SPECS = [QuantSpec(4, 32), QuantSpec(8, -1, symmetric=True), QuantSpec(8, 64), QuantSpec(3, 16, zero_point="float")]
pytestmark = pytest.mark.filterwarnings("ignore:.*slow backend")


def packed(n=48, k=128, spec=SPECS[0]):
    codes = affine.quantize(torch.randn(n, k), spec)
    return PackedWeight(bitpack.pack(codes.codes, spec.bits), codes.scale, codes.zero_point, spec, k, n)


def arguments(x, runtime):
    names = list(runtime.tensors)
    return x, [runtime.tensors[name] for name in names], names, runtime.layout, ops.format_of(runtime)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_opcheck(spec):
    runtime = kernels.prepare(packed(spec=spec), dtype=torch.float32)
    for x in (torch.randn(5, 128, requires_grad=True), torch.randn(2, 3, 128).bfloat16(), torch.randn(0, 128)):
        torch.library.opcheck(torch.ops.hfq.wna16.default, arguments(x, runtime))
    torch.library.opcheck(torch.ops.hfq.wna16_dx.default, arguments(torch.randn(2, 48), runtime))


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("memory", ["compact", "cached"])
def test_one_graph_for_every_number_of_rows(prepared, memory):
    weight = packed()
    runtime = kernels.prepare(weight, dtype=torch.float32, memory=memory) if prepared else weight
    bias = torch.randn(48)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    options = dict(fullgraph=True, dynamic=True, backend=backend)
    compiled = torch.compile(lambda x: kernels.linear(x.relu(), runtime, bias), **options)
    with torch.no_grad():
        for m in (3, 17, 300):
            x = torch.randn(m, 128)
            torch.testing.assert_close(compiled(x), kernels.linear(x.relu(), runtime, bias), rtol=1e-2, atol=1e-2)
    assert len(graphs) == 1


def test_compiled_training_through_the_operator():
    runtime = kernels.prepare(packed(), dtype=torch.float32)
    torch._dynamo.reset()
    options = dict(fullgraph=True, backend="aot_eager")
    compiled = torch.compile(lambda x: kernels.linear(x * 2, runtime).square().sum(), **options)
    x = torch.randn(6, 128, requires_grad=True)
    compiled(x).backward()
    got, x.grad = x.grad, None
    kernels.linear(x * 2, runtime).square().sum().backward()
    torch.testing.assert_close(got, x.grad)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("prepared", [True, False])
def test_gradients_reach_x_and_bias_only(spec, prepared):
    weight = packed(spec=spec)
    operand = kernels.prepare(weight, dtype=torch.float32) if prepared else weight
    x, bias = torch.randn(2, 5, 128, requires_grad=True), torch.randn(48, requires_grad=True)
    y = kernels.linear(x, operand, bias)
    dy = torch.randn_like(y)
    y.backward(dy)
    torch.testing.assert_close(x.grad, dy @ kernels.dequantize(weight), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias.grad, dy.sum((0, 1)))
    with torch.no_grad():
        plain = kernels.linear(x, operand, bias)
    torch.testing.assert_close(y.detach(), plain, rtol=1e-5, atol=1e-5)
    assert not plain.requires_grad


def test_gradients_in_bfloat16():
    weight = packed()
    x = torch.randn(3, 128, dtype=torch.bfloat16, requires_grad=True)
    kernels.linear(x, kernels.prepare(weight, dtype=torch.bfloat16)).sum().backward()
    assert x.grad.dtype == torch.bfloat16
    want = kernels.dequantize(weight).sum(0)
    assert float((x.grad[0].float() - want).norm() / want.norm()) < 1e-2


def test_meta_and_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    weight = packed()
    meta = PackedWeight(
        weight.qweight.to("meta"), weight.scale.to("meta"), weight.zero_point.to("meta"), weight.spec, 128, 48
    )
    runtime = kernels.prepare(meta, dtype=torch.float32)
    y = kernels.linear(torch.empty(7, 128, device="meta"), runtime)
    assert y.is_meta and y.shape == (7, 48)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = kernels.linear(mode.from_tensor(torch.randn(2, 3, 128)), kernels.prepare(weight, dtype=torch.float32))
    assert y.shape == (2, 3, 48)
    with pytest.raises(RuntimeError, match="127 features"):
        kernels.linear(torch.empty(7, 127, device="meta"), runtime)
