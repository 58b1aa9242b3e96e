"""The convolution of packed codes: every backend against the definition, exact sums, padding with a zero point, ops."""

import pytest
import torch
from torch.nn import functional as F

from hfq import kernels
from hfq.errors import KernelError
from hfq.formats import ActivationCodes, ActivationSpec, QuantSpec, activation, affine, bitpack
from hfq.kernels import PackedWeight, conv, dispatch, reference
from hfq.kernels.conv import Operand
from hfq.kernels.geometry import Geometry
from hfq.kernels.packed import LAYOUTS

pytestmark = pytest.mark.filterwarnings("ignore:.*slow backend")

SHAPES = [
    Geometry(3, 8, (3, 3), pads=(1, 1, 1, 1)),
    Geometry(8, 16, (3, 3), stride=(2, 2), pads=(1, 1, 1, 1), groups=2),
    Geometry(8, 8, (5, 3), pads=(4, 4, 1, 1), dilation=(2, 1), groups=8),
    Geometry(16, 24, (1, 1)),
    Geometry(8, 12, (2, 3), stride=(1, 2), pads=(0, 1, 1, 1)),
    Geometry(8, 12, (1, 1), pads=(-1, -1, -2, 0)),
]
INPUTS = [ActivationSpec(8, False, "tensor", dynamic=False), ActivationSpec(8, True, "tensor"),
          ActivationSpec(4, False, "tensor")]  # fmt: skip
EIGHT = QuantSpec(8, symmetric=True)


def ids(geometry):
    return f"{geometry.kernel}s{geometry.stride}p{geometry.pads}g{geometry.groups}"


def packed(geometry, spec=EIGHT):
    weight = torch.randn(geometry.out_channels, geometry.columns)
    codes = affine.quantize(weight, spec)
    return PackedWeight(
        bitpack.pack(codes.codes, spec.bits), codes.scale, codes.zero_point, spec, geometry.columns,
        geometry.out_channels,
    )


def given(x, spec):
    """Parameters of a static format that clamps some of ``x``."""
    return None if spec.dynamic else activation.range_parameters(x.amin().view(1) * 0.7, x.amax().view(1) * 0.7, spec)


def pad(x, geometry):
    top, bottom, left, right = geometry.pads
    return F.pad(x, (left, right, top, bottom))


def by_hand(x, weight, geometry, bias=None):
    """The float64 convolution of the dequantized weight with an input that is padded beforehand."""
    matrix = reference.dequantize(weight, torch.float64).view(geometry.weight_shape)
    x = pad(x.double(), geometry)
    return F.conv2d(x, matrix, None if bias is None else bias.double(), geometry.stride, 0, geometry.dilation,
                    geometry.groups)  # fmt: skip


@pytest.mark.parametrize("geometry", SHAPES, ids=ids)
@pytest.mark.parametrize("spec", [QuantSpec(8, symmetric=True), QuantSpec(4), QuantSpec(8), QuantSpec(6, 8)], ids=str)
@pytest.mark.parametrize("inputs", [None, *INPUTS], ids=str)
def test_every_backend_computes_the_definition(geometry, spec, inputs):
    weight, bias = packed(geometry, spec), torch.randn(geometry.out_channels)
    x = torch.randn(2, geometry.in_channels, 9, 7) + 0.3
    params = None if inputs is None else given(x, inputs)
    want = by_hand(x if inputs is None else activation.fake(x.double(), inputs, params), weight, geometry, bias)
    backends = {row.backend for row in dispatch.table() if row.op == "qconv2d"}
    served = set()
    for backend in sorted(backends):
        with kernels.use(qconv2d=backend):
            try:
                runtime = conv.prepare(weight, geometry, dtype=x.dtype, memory="cached", activation=inputs)
                y = conv.conv2d(x, [Operand(runtime, geometry)], bias, inputs, params)
            except KernelError:
                continue
        served.add(backend)
        limit = 1e-6 if inputs is not None else 4e-3  # float products may be taken in bfloat16
        assert y.shape == want.shape and float((y - want).norm() / want.norm()) < limit, backend
        assert torch.equal(runtime.canonical(), weight.qweight), backend
    assert "reference" in served and len(served) >= 2


@pytest.mark.parametrize("geometry", SHAPES[:4], ids=ids)
@pytest.mark.parametrize("backend", ["onednn", "rows"])
def test_sums_are_exact(geometry, backend):
    if backend == "rows" and geometry.groups > 1:
        pytest.skip("rows serve one group")
    weight = packed(geometry)
    weight.qweight.copy_(torch.randint(0, 2, weight.qweight.shape) * 255)  # -128 and 127
    weight.scale.fill_(1)
    for inputs in (INPUTS[0], ActivationSpec(8, True, "tensor", dynamic=False)):
        codes = torch.randint(0, 2, (2, geometry.in_channels, 6, 6)) * (inputs.max_code - inputs.min_code)
        codes = (codes + inputs.min_code).to(inputs.code_dtype).contiguous(memory_format=torch.channels_last)
        zero = None if inputs.symmetric else torch.tensor([7.0])
        x = ActivationCodes(codes, torch.ones(1), zero, inputs)
        with kernels.use(qconv2d=backend):  # all scales one: the result is the sum
            one = Operand(conv.prepare(weight, geometry, dtype=torch.float32, activation=inputs), geometry)
            y = conv.conv2d(codes.float() - (0 if zero is None else zero), [one], None, inputs, (torch.ones(1), zero))
        assert torch.equal(y.double(), reference.conv2d_sums(x, weight, geometry))


def test_the_border_holds_the_code_of_zero():
    geometry = SHAPES[0]
    weight, inputs = packed(geometry), INPUTS[0]
    x = torch.zeros(1, 3, 5, 5)
    params = (torch.tensor([0.1]), torch.tensor([77.0]))
    for backend in ("onednn", "rows", "float_sums", "reference"):
        with kernels.use(qconv2d=backend):
            runtime = conv.prepare(weight, geometry, dtype=torch.float32, activation=inputs)
            assert not conv.conv2d(x, [Operand(runtime, geometry)], None, inputs, params).any(), backend


def test_two_parts_have_sums_of_their_own():
    geometry = SHAPES[0]
    inner = geometry.centre((1, 1))
    fine, coarse = packed(geometry), packed(inner)
    x, bias, inputs = torch.randn(2, 3, 6, 6), torch.randn(8), INPUTS[1]
    want = by_hand(activation.fake(x, inputs), fine, geometry, bias) + by_hand(
        activation.fake(x, inputs), coarse, inner)
    for spec in (inputs, None):
        places = [(fine, geometry), (coarse, inner)]
        prepared = [Operand(conv.prepare(w, g, dtype=x.dtype, activation=spec), g) for w, g in places]
        canonical = [Operand(LAYOUTS["canonical"].make(w, x.dtype), g) for w, g in places]
        for operands in (prepared, canonical):
            if spec is None:
                exact = by_hand(x, fine, geometry, bias) + by_hand(x, coarse, inner)
                torch.testing.assert_close(conv.conv2d(x, operands, bias).double(), exact, rtol=0.03, atol=0.03)
            else:
                torch.testing.assert_close(conv.conv2d(x, operands, bias, spec).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prepared", [True, False])
def test_opcheck(prepared):
    geometry, inputs = SHAPES[1], INPUTS[0]
    weight = packed(geometry)
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    for spec in (None, inputs):
        runtime = LAYOUTS["canonical"].make(weight, x.dtype)
        if prepared:
            runtime = conv.prepare(weight, geometry, dtype=x.dtype, activation=spec)
        params = [] if spec is None else [torch.tensor([0.02]), torch.tensor([100.0])]
        arguments = (*conv._flatten([Operand(runtime, geometry)]), conv._activation(spec), params)
        torch.library.opcheck(torch.ops.hfq.qconv2d.default, (x, *arguments))
        torch.library.opcheck(torch.ops.hfq.qconv2d_dx.default, (torch.randn(2, 16, 3, 3), x.detach(), *arguments))


@pytest.mark.parametrize("geometry", SHAPES, ids=ids)
def test_gradients_are_those_of_straight_through_rounding(geometry):
    weight, inputs = packed(geometry), INPUTS[0]
    x = torch.randn(2, geometry.in_channels, 9, 7)
    params = given(x, inputs)
    for spec in (None, inputs):
        a, b = x.clone().requires_grad_(), x.double().requires_grad_()
        runtime = conv.prepare(weight, geometry, dtype=x.dtype, activation=spec)
        y = conv.conv2d(a, [Operand(runtime, geometry)], None, spec, params if spec else None)
        z = by_hand(b if spec is None else activation.fake(b, spec, params), weight, geometry)
        g = torch.randn_like(y)
        y.backward(g)
        z.backward(g.double())
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-4)


def test_one_graph():
    geometry, inputs = SHAPES[0], INPUTS[1]
    one = Operand(LAYOUTS["canonical"].make(packed(geometry), torch.float32), geometry)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: conv.conv2d(x.relu(), [one], None, inputs), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(compiled(x), conv.conv2d(x.relu(), [one], None, inputs))


def test_strange_inputs():
    geometry = SHAPES[0]
    weight = packed(geometry)
    one = Operand(conv.prepare(weight, geometry, dtype=torch.float32, activation=INPUTS[1]), geometry)
    x = torch.randn(2, 6, 7, 3).permute(0, 3, 1, 2)  # channels last
    contiguous = conv.conv2d(x.contiguous(), [one], None, INPUTS[1])
    torch.testing.assert_close(conv.conv2d(x, [one], None, INPUTS[1]), contiguous, rtol=0, atol=0)
    assert conv.conv2d(torch.randn(0, 3, 6, 7), [one], None, INPUTS[1]).shape == (0, 8, 6, 7)
    half = conv.conv2d(x.half(), [one], None, INPUTS[1])
    assert half.dtype == torch.float16 and float((half - contiguous).norm() / contiguous.norm()) < 0.02
    with pytest.raises(KernelError, match="3, H, W"):
        conv.conv2d(torch.randn(1, 4, 6, 6), [one], None, INPUTS[1])
    with pytest.raises(KernelError, match="smaller than the kernel"):
        SHAPES[2].output((1, 8, 0, 5))
    with pytest.raises(KernelError, match="granularity='tensor'"):
        conv.prepare(weight, geometry, dtype=torch.float32, activation=ActivationSpec(8))


def test_large_weights_are_rows_and_small_ones_blocks():
    spec = INPUTS[1]
    for channels, layout in ((16, "conv_onednn"), (360, "conv_rows/integer8")):
        geometry = Geometry(channels, channels, (3, 3), pads=(1, 1, 1, 1))
        runtime = conv.prepare(packed(geometry), geometry, dtype=torch.float32, activation=spec)
        assert runtime.layout == layout
        assert runtime.nbytes < 1.2 * geometry.columns * channels + 64 * channels
    four = conv.prepare(packed(geometry, QuantSpec(4)), geometry, dtype=torch.float32, activation=spec)
    assert four.layout == "conv_rows/integer4" and four.nbytes < 0.6 * geometry.columns * channels
