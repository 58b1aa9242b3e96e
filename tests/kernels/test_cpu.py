"""CPU layouts and backends: bit-exact codes, error limits, odd shapes, memory."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from hfq import kernels
from hfq.formats import QuantSpec, affine, bitpack
from hfq.kernels import PackedWeight, cpu_int4, cpu_int8, workspace
from hfq.kernels.isa import isa

pytestmark = pytest.mark.skipif(isa() == "default", reason="torch has no vectorised int4 operator on this CPU")

LIMIT = 5e-3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def packed(n, k, spec, codes=None):
    found = affine.quantize(torch.randn(n, k), spec)
    codes = found.codes if codes is None else codes
    return PackedWeight(bitpack.pack(codes, spec.bits), found.scale, found.zero_point, spec, k, n, "layer")


def outlier_input(m, k):
    x = torch.randn(m, k)
    x[:, k // 3] *= 30
    return x


def check(weight, runtime, x, bias=None, limit=LIMIT):
    """Error against float64 from the stored codes, in all and in the worst row."""
    want = x.double() @ kernels.dequantize(weight, torch.float64).t() + (0 if bias is None else bias.double())
    y = kernels.linear(x, runtime, bias)
    assert y.dtype == x.dtype and y.shape == want.shape and y.is_contiguous()
    rows = (y.double() - want).flatten(0, -2)
    error = float(rows.norm() / want.norm())
    assert error <= limit, f"{runtime.layout} {weight.spec} {tuple(x.shape)}: {error:.1e}, seed {torch.initial_seed()}"
    # The same in each row and in each block of outputs: a wrong tile would hide in the mean of many.
    worst = float((rows.norm(dim=-1) / want.flatten(0, -2).norm(dim=-1)).max())
    assert worst <= max(4 * error, limit)
    columns = rows.norm(dim=0) / want.flatten(0, -2).norm(dim=0).clamp(min=float(want.norm()) / want.numel() ** 0.5)
    assert float(columns.max()) <= 10 * limit
    return error


def check_elements(weight, runtime, x):
    """Each element, against the sum of its terms' sizes: x, scale, zero and y are each rounded by up to 2^-9."""
    dense = kernels.dequantize(weight, torch.float64)
    error = (kernels.linear(x, runtime).double() - x.double() @ dense.t()).abs()
    assert bool((error <= 1e-2 * (x.double().abs() @ dense.abs().t()) + 1e-9).all())


def chosen(runtime, m, dtype=torch.float32):
    return next(c.backend for c in kernels.explain(runtime, m, dtype) if c.chosen)


@pytest.fixture(autouse=True)
def nan_filled(monkeypatch):
    """Memory that nobody wrote reads as NaN."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(params=["amx", "avx512"])
def compute(request, monkeypatch):
    """Both compute dtypes of the large-M paths, whatever this machine would choose."""
    monkeypatch.setenv("HFQ_CPU_ISA", request.param)
    isa.cache_clear()
    yield request.param
    isa.cache_clear()


FORMATS = [
    QuantSpec(4, 64), QuantSpec(4, 128, symmetric=True), QuantSpec(4, -1), QuantSpec(4, 0), QuantSpec(4, 192),
    QuantSpec(4, 32, zero_point="float"), QuantSpec(3, 64), QuantSpec(2, 64, zero_point="float"), QuantSpec(1, 32),
    QuantSpec(5, 64), QuantSpec(6, 96, zero_point="float"), QuantSpec(7, 64), QuantSpec(8, 64),
    QuantSpec(8, 32, symmetric=True), QuantSpec(8, -1, symmetric=True), QuantSpec(8, -1), QuantSpec(7, -1),
    QuantSpec(5, 0), QuantSpec(6, -1),
]


@pytest.mark.parametrize("spec", FORMATS, ids=str)
def test_products_and_codes(spec, compute):
    weight = packed(1152, 576, spec)
    runtime = kernels.prepare(weight, dtype=torch.float32)
    assert runtime.layout in ("int4pack", "nibbles", "int8")
    assert torch.equal(runtime.canonical(), weight.qweight)
    bias = torch.randn(1152)
    for m, dtype in ((1, torch.float32), (17, torch.bfloat16), (197, torch.float32)):
        check(weight, runtime, outlier_input(m, 576).to(dtype), bias if m == 1 else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 5, 17, 197])
@pytest.mark.parametrize("memory", ["compact", "cached"])
def test_dtypes_and_rows(dtype, m, memory):
    weight = packed(48, 1152, QuantSpec(4, 128))
    runtime = kernels.prepare(weight, dtype=dtype, memory=memory)
    check(weight, runtime, outlier_input(m, 1152).to(dtype), torch.randn(48))


@pytest.mark.parametrize("n,k,spec", [
    (50, 100, QuantSpec(4, 32)), (17, 33, QuantSpec(4, -1)), (1, 5, QuantSpec(4, 64)), (70, 200, QuantSpec(4, 96)),
    (33, 127, QuantSpec(8, -1, symmetric=True)), (33, 127, QuantSpec(8, 64)), (5, 130, QuantSpec(3, 128)),
    (50, 100, QuantSpec(5, 0)),
], ids=str)
def test_odd_sizes_are_padded(n, k, spec):
    weight = packed(n, k, spec)
    runtime = kernels.prepare(weight, dtype=torch.float32)
    assert runtime.layout != "canonical" and "padded" in runtime.bytes_note
    assert torch.equal(runtime.canonical(), weight.qweight)
    for m in (1, 5, 90):
        check_elements(weight, runtime, torch.randn(m, k))


@pytest.mark.parametrize("bits", [1, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("code", ["low", "high", "mixed"])
@pytest.mark.parametrize("group", [-1, 32])
def test_extreme_codes(bits, code, group):
    spec = QuantSpec(bits, group, symmetric=group == -1)
    top = 2**bits - 1
    ones = {"low": torch.zeros(64, 128), "high": torch.ones(64, 128), "mixed": torch.randint(0, 2, (64, 128))}
    weight = packed(64, 128, spec, (ones[code] * top).to(torch.uint8))
    weight.scale.clamp_(min=0.01)
    runtime = kernels.prepare(weight, dtype=torch.float32)
    assert torch.equal(runtime.canonical(), weight.qweight)
    # All of one sign and size: a saturating integer product would show here.
    x = torch.full((40, 128), 3.0)
    for m in (1, 40):
        check_elements(weight, runtime, x[:m])


def test_zero_rows_and_weights():
    weight = packed(64, 128, QuantSpec(2, 32))
    weight.qweight.zero_()
    weight.zero_point.zero_()
    runtime = kernels.prepare(weight, dtype=torch.float32)
    x = torch.randn(4, 128)
    assert not kernels.linear(x, runtime).any()  # code equal to zero point is zero exactly, up to 3 bits
    full = packed(64, 128, QuantSpec(4, 32))
    x[2] = 0
    assert not kernels.linear(x, kernels.prepare(full, dtype=torch.float32))[2].any()


def test_negative_and_far_zero_points():
    weight = packed(64, 256, QuantSpec(4, 64, zero_point="float"))
    weight.zero_point.copy_(torch.linspace(-40, 60, 256).reshape(64, 4))
    check_elements(weight, kernels.prepare(weight, dtype=torch.float32), torch.randn(9, 256))
    weight = packed(64, 256, QuantSpec(3, 64))
    weight.zero_point.copy_(torch.arange(256).reshape(64, 4) % 250)
    runtime = kernels.prepare(weight, dtype=torch.float32)
    assert torch.equal(runtime.canonical(), weight.qweight)
    check_elements(weight, runtime, torch.randn(9, 256))


def test_int8_rows_only_where_offsets_fit():
    weight = packed(64, 128, QuantSpec(8, -1))
    weight.zero_point.fill_(128)
    assert cpu_int8.offset_fits(weight)
    weight.zero_point[3] = 129
    assert not cpu_int8.offset_fits(weight)
    runtime = kernels.prepare(weight, dtype=torch.float32)
    assert runtime.layout == "nibbles"
    check(weight, runtime, torch.randn(5, 128))


@pytest.mark.parametrize("spec", [QuantSpec(4, 64), QuantSpec(8, -1, symmetric=True), QuantSpec(4, 16)], ids=str)
@pytest.mark.filterwarnings("ignore:.*slow backend")
def test_shapes_of_x(spec):
    weight = packed(96, 128, spec)
    runtime = kernels.prepare(weight, dtype=torch.float32)
    x = outlier_input(6, 256)
    want = kernels.linear(x[:, ::2].contiguous(), runtime)
    assert torch.equal(kernels.linear(x[:, ::2], runtime), want)
    assert torch.equal(kernels.linear(x[:, ::2].contiguous().t().contiguous().t(), runtime), want)
    assert torch.equal(kernels.linear(x[:, ::2].reshape(2, 3, 128), runtime), want.view(2, 3, 96))
    assert torch.equal(kernels.linear(x[0, ::2], runtime), kernels.linear(x[:1, ::2], runtime)[0])
    for shape in ((0, 128), (2, 0, 128)):
        assert kernels.linear(torch.randn(shape), runtime).shape == (*shape[:-1], 96)
    with pytest.raises(kernels.KernelError, match="127 features.*128"):
        kernels.linear(torch.randn(2, 127), runtime)


@pytest.mark.parametrize("spec,layout,limit", [
    (QuantSpec(4, 64), "int4pack", 4.9), (QuantSpec(4, -1), "int4pack", 4.6),
    (QuantSpec(8, -1, symmetric=True), "int8", 8.3), (QuantSpec(8, 128), "nibbles", 8.8),
], ids=str)
def test_compact_holds_no_float_copy(spec, layout, limit):
    weight = packed(256, 576 if spec.group_size != 128 else 512, spec)
    runtime = kernels.prepare(weight, dtype=torch.float32)
    assert runtime.layout == layout
    for m in (1, 197):
        kernels.linear(torch.randn(m, weight.in_features), runtime)
    numel = weight.in_features * weight.out_features
    assert runtime.nbytes == sum(t.nbytes for t in runtime.tensors.values()) <= limit / 8 * numel
    assert all(t.numel() < numel for t in runtime.tensors.values() if t.is_floating_point())
    assert runtime.bytes_note


def test_cached_reports_its_bytes_and_uses_the_copy():
    weight = packed(256, 512, QuantSpec(4, 64))
    compact = kernels.prepare(weight, dtype=torch.float32)
    cached = kernels.prepare(weight, dtype=torch.float32, memory="cached")
    assert cached.nbytes == compact.nbytes + cached.tensors["copy"].nbytes and "float copy" in cached.bytes_note
    assert (chosen(cached, 1), chosen(cached, 512), chosen(compact, 512)) == ("int4pack", "copy", "int4pack_dequant")
    assert torch.equal(cached.canonical(), weight.qweight)


def test_identity_product_reads_the_codes_back(monkeypatch):
    """The way that is left if a future torch lays nibbles out in another order."""
    weight = packed(64, 96, QuantSpec(4, 32))
    runtime = kernels.prepare(weight, dtype=torch.float32)
    monkeypatch.setattr(cpu_int4, "nibble_block", lambda: (0, False))
    assert torch.equal(runtime.canonical(), weight.qweight)


CHILD = """
import torch, hfq.kernels as k
from hfq.formats import QuantSpec, affine, bitpack
from hfq.kernels import cpu_int4
print(cpu_int4.nibble_block())
torch.manual_seed(0)
for spec in (QuantSpec(4, 32), QuantSpec(8, 32), QuantSpec(8, -1, symmetric=True)):
    c = affine.quantize(torch.randn(96, 160), spec)
    p = k.PackedWeight(bitpack.pack(c.codes, spec.bits), c.scale, c.zero_point, spec, 160, 96)
    with k.use(wna16="reference"):
        pass
    r = k.prepare(p, dtype=torch.float32)
    if r.layout == "canonical":
        r = k.packed.LAYOUTS["int4pack" if spec.bits == 4 else "nibbles"].make(p, torch.float32)
    assert torch.equal(r.canonical(), p.qweight), spec
    for m in (1, 200):
        x = torch.randn(m, 160)
        want = x.double() @ k.dequantize(p, torch.float64).t()
        assert (k.linear(x, r).double() - want).norm() <= 1e-2 * want.norm(), (spec, m)
"""


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_other_instruction_sets(capability):
    env = dict(os.environ, ATEN_CPU_CAPABILITY=capability, OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
    done = subprocess.run([sys.executable, "-c", CHILD], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == {"avx2": "(32, True)", "default": "(32, False)"}[capability]


def test_workspace_is_bounded_and_per_thread():
    assert workspace.nbytes() <= 16 * workspace.LIMIT
    big = workspace.scratch("test", (workspace.LIMIT,), torch.float32)
    assert big.nbytes > workspace.LIMIT and workspace.scratch("test", (4,), torch.float32).data_ptr() != big.data_ptr()
    mine = workspace.scratch("test", (4,), torch.float32)
    assert workspace.scratch("test", (2, 2), torch.float32).data_ptr() == mine.data_ptr()
    other = []
    thread = threading.Thread(target=lambda: other.append(workspace.scratch("test", (4,), torch.float32)))
    thread.start()
    thread.join()
    assert other[0].data_ptr() != mine.data_ptr()


def test_buffers_made_in_inference_mode_serve_training_later():
    weight = packed(64, 128, QuantSpec(4, 32))
    runtime = kernels.prepare(weight, dtype=torch.float32)
    with torch.inference_mode():
        kernels.linear(torch.randn(200, 128), runtime)
    x = torch.randn(200, 128, requires_grad=True)
    kernels.linear(x, runtime).sum().backward()
    torch.testing.assert_close(x.grad[0], kernels.dequantize(weight).sum(0), rtol=1e-4, atol=1e-4)
