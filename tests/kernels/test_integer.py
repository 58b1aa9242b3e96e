"""The integer product: against Python integers, float64, other backends; operators, tracing, gradients; bad input."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from hfq import kernels
from hfq.errors import KernelError
from hfq.formats import ActivationCodes, ActivationSpec, QuantSpec, activation, affine, bitpack, twolevel
from hfq.kernels import PackedWeight, cpu_integer, integer, ops, producers, reference

N, K = 50, 100
ACTIVATIONS = (
    ActivationSpec(8), ActivationSpec(8, True), ActivationSpec(4, True), ActivationSpec(3, group_size=25),
    ActivationSpec(8, True, group_size=32), ActivationSpec(8, granularity="tensor"), ActivationSpec(8, factor=True),
    ActivationSpec(8, False, "tensor", dynamic=False), ActivationSpec(6, True, "tensor", dynamic=False),
)  # fmt: skip
WEIGHTS = [
    QuantSpec(bits, group, symmetric=symmetric, zero_point=zero)
    for bits in (1, 2, 4, 7, 8) for group in (-1, 0, 32)
    for symmetric, zero in ((True, "int"), (False, "int"), (False, "float"))
]  # fmt: skip


def packed(spec, levels=False, n=N, k=K, seed=0):
    g = torch.Generator().manual_seed(seed)
    scale, zero = affine.fit(torch.randn(n, k, generator=g) + 0.3, spec)
    scale = twolevel.snap(scale, spec) if levels else scale
    codes = torch.randint(0, 2**spec.bits, (n, k), dtype=torch.uint8, generator=g)
    return PackedWeight(bitpack.pack(codes, spec.bits), scale, zero, spec, k, n, "layer")


def rows(m, k=K, seed=1):
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed))
    x[:, 3] *= 30
    return x


def stored(act, x):
    """(params, factor) that the format needs."""
    if act.factor:
        return None, torch.tensor([0.9])
    if act.dynamic:
        return None, None
    return activation.range_parameters(x.amin().reshape(1) * 0.8, x.amax().reshape(1) * 0.8, act), None


def distance(y, want):
    return float((y.double() - want).norm() / want.norm())


def chosen(runtime, m, act):
    return next(line.backend for line in kernels.explain(runtime, m, activation=act) if line.chosen)


@pytest.mark.parametrize("act", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("spec", [QuantSpec(3, 20), QuantSpec(8, -1), QuantSpec(4, 32, symmetric=True)], ids=str)
def test_reference_is_the_definition_in_python_integers(spec, act):
    weight, x = packed(spec, n=4, k=44), rows(2, 44)
    codes = activation.quantize(x, act, *stored(act, x))
    w = bitpack.unpack(weight.qweight, spec.bits, 44).tolist()
    y = reference.linear_int(codes, weight, dtype=torch.float64)
    for m in range(2):
        for n in range(4):
            total = 0.0
            for j in range(44):
                g = 0 if act.group_size == -1 else j // act.group_size
                s_a = codes.scale.double().flatten()[0] if act.granularity == "tensor" else codes.scale[m, g].double()
                z_a = 0 if codes.zero_point is None else (
                    codes.zero_point.flatten()[0] if act.granularity == "tensor" else codes.zero_point[m, g])
                h = j // spec.group_length(44)
                z_w = spec.middle if weight.zero_point is None else int(weight.zero_point[n, h])
                product = (int(codes.codes[m, j]) - int(z_a)) * (w[n][j] - z_w)
                total += float(s_a) * float(weight.scale[n, h]) * product
            assert float(y[m, n]) == pytest.approx(total, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("memory", ["compact", "cached"])
@pytest.mark.parametrize("spec", WEIGHTS, ids=str)
def test_cpu_sums_are_exact(spec, memory):
    for levels in (False, True):
        weight = packed(spec, levels)
        bias = torch.randn(N)
        for act in ACTIVATIONS:
            runtime = kernels.prepare(weight, dtype=torch.float32, memory=memory, activation=act)
            assert torch.equal(runtime.canonical(), weight.qweight)
            for m in (1, 40):
                x = rows(m)
                given = stored(act, x)
                want = reference.linear_int(activation.quantize(x, act, *given), weight, bias, torch.float64)
                y = kernels.linear_int(x, runtime, bias, act, *given)
                name = chosen(runtime, m, act)
                assert name == "aten_int8" or (name == "copy" and memory == "cached")
                assert distance(y, want) <= (1e-6 if name == "aten_int8" else 5e-3), (act, m)
                with kernels.use(wnan="float_sums"):
                    assert distance(kernels.linear_int(x, runtime, bias, act, *given), want) <= 1e-6, (act, m)


@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_extreme_codes(monkeypatch, vnni, symmetric):
    monkeypatch.setattr(cpu_integer, "exact_unsigned", lambda: vnni)
    k = 4096
    for bits in (4, 8):
        spec = QuantSpec(bits, symmetric=True, scale_dtype="float32")
        for code in (0, 2**bits - 1):
            codes = torch.full((8, k), code, dtype=torch.uint8)
            weight = PackedWeight(bitpack.pack(codes, bits), torch.ones(8, 1), None, spec, k, 8)
            act = ActivationSpec(8, symmetric)
            runtime = kernels.prepare(weight, dtype=torch.float32, activation=act)
            for m in (1, 40):
                ends = (-127, 127) if symmetric else (0, 255)
                for end in ends:
                    codes = torch.full((m, k), end, dtype=act.code_dtype)
                    zero = None if symmetric else torch.full((m, 1), 255.0 - end)
                    y = kernels.linear_int(ActivationCodes(codes, torch.ones(m, 1), zero, act), runtime)
                    value = end if symmetric else end - (255 - end)
                    assert (y == float(value * (code - 2 ** (bits - 1)) * k)).all()


def test_nothing_saturates_on_cpus_without_vnni():
    script = (
        "import torch\n"
        "from hfq import kernels\n"
        "from hfq.formats import ActivationSpec, QuantSpec, activation, affine, bitpack\n"
        "from hfq.kernels import PackedWeight, byte_mm, reference\n"
        "torch.manual_seed(0)\n"
        "for spec in (QuantSpec(8, symmetric=True), QuantSpec(8), QuantSpec(7), QuantSpec(4, 64), QuantSpec(2)):\n"
        "    codes = affine.quantize(torch.randn(32, 256).sign(), spec)\n"
        "    packed = bitpack.pack(codes.codes, spec.bits)\n"
        "    weight = PackedWeight(packed, codes.scale, codes.zero_point, spec, 256, 32)\n"
        "    for act in (ActivationSpec(8), ActivationSpec(8, True), ActivationSpec(7)):\n"
        "        runtime = kernels.prepare(weight, dtype=torch.float32, activation=act)\n"
        "        assert runtime.layout.startswith('integer')\n"
        "        for m in (1, 40):\n"
        "            x = torch.randn(m, 256).sign()\n"
        "            want = reference.linear_int(activation.quantize(x, act), weight)\n"
        "            y = kernels.linear_int(x, runtime, None, act)\n"
        "            torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-4)\n"
        "print(byte_mm.exact_unsigned(), byte_mm.exact_in_steps())\n"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[1] == "True"


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.float16, 5e-4), (torch.bfloat16, 4e-3)])
def test_dtypes_strides_and_edges(dtype, limit):
    weight, act = packed(QuantSpec(4, -1)), ActivationSpec(8)
    runtime = kernels.prepare(weight, dtype=dtype, activation=act)
    x = rows(6).to(dtype)
    bias = torch.randn(N, dtype=dtype)
    want = reference.linear_int(activation.quantize(x, act), weight, bias, torch.float64)
    y = kernels.linear_int(x, runtime, bias, act)
    assert y.dtype == dtype and distance(y, want) <= limit
    assert torch.equal(kernels.linear_int(x.t().contiguous().t(), runtime, bias, act), y)
    assert torch.equal(kernels.linear_int(x.view(2, 3, K), runtime, bias, act).view(6, N), y)
    assert torch.equal(kernels.linear_int(x[2], runtime, bias, act), kernels.linear_int(x, runtime, bias, act)[2])
    assert kernels.linear_int(x[:0], runtime, bias, act).shape == (0, N)
    zeros = kernels.linear_int(torch.zeros(2, K, dtype=dtype), runtime, None, act)
    assert (zeros == 0).all()
    broken = x.clone()
    broken[1, 7] = float("nan")
    y = kernels.linear_int(broken, runtime, bias, act)
    assert y[1].isnan().all() and y[[0, 2, 3, 4, 5]].isfinite().all()
    with pytest.raises(KernelError, match="99 features"):
        kernels.linear_int(x[:, :99], runtime, bias, act)
    with pytest.raises(KernelError, match="activation format"):
        kernels.linear_int(x, runtime)


def test_what_a_token_gives_does_not_depend_on_the_others():
    for spec in (QuantSpec(8, -1, symmetric=True), QuantSpec(4, 20)):
        weight, act = packed(spec), ActivationSpec(8, True)
        runtime = kernels.prepare(weight, dtype=torch.float32, activation=act)
        x = rows(300)
        whole = kernels.linear_int(x, runtime, None, act)
        for m in (1, 3, 40):
            torch.testing.assert_close(kernels.linear_int(x[:m], runtime, None, act), whole[:m], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_many_groups_that_do_not_fold_are_summed_in_floats(bits):
    spec, act = QuantSpec(bits, 32), ActivationSpec(8)
    weight, x = packed(spec, n=700, k=1024), rows(5, 1024)  # several parts, the last one shorter
    runtime = kernels.prepare(weight, dtype=torch.float32, activation=act)
    want = reference.linear_int(activation.quantize(x, act), weight, dtype=torch.float64)
    assert torch.equal(runtime.canonical(), weight.qweight)
    for m in (1, 5, 30):  # few tokens along a diagonal, unless the zero points need a term of their own; many in floats
        x = rows(m, 1024)
        want = reference.linear_int(activation.quantize(x, act), weight, torch.ones(700), dtype=torch.float64)
        assert chosen(runtime, m, act) == ("aten_int8" if m < 30 and bits < 8 else "float_sums")
        for given in (act, ActivationSpec(8, True)):
            want = reference.linear_int(activation.quantize(x, given), weight, torch.ones(700), dtype=torch.float64)
            assert distance(kernels.linear_int(x, runtime, torch.ones(700), given), want) <= 1e-6
    x = rows(30, 1024)
    reason = next(line.reason for line in kernels.explain(runtime, 30, activation=act) if line.backend == "aten_int8"
                  and "groups" in line.reason)  # fmt: skip
    assert "32 groups do not fold" in reason
    whole = packed(QuantSpec(bits, -1), n=700, k=1024)
    runtime = kernels.prepare(whole, dtype=torch.float32, activation=act)
    want = reference.linear_int(activation.quantize(x, act), whole, dtype=torch.float64)
    assert chosen(runtime, 5, act) == "aten_int8" and torch.equal(runtime.canonical(), whole.qweight)
    assert distance(kernels.linear_int(x, runtime, None, act), want) <= 1e-6


def test_two_level_scales_cost_one_sum_and_stay_near():
    weight = torch.randn(64, 256)
    spec = QuantSpec(4, 32)
    codes = twolevel.requantize(weight, affine.quantize(weight, spec))
    step, multiple = twolevel.split(codes.scale, spec)
    assert torch.equal((step[:, None] * multiple).half(), codes.scale) and int(multiple.max()) <= 8
    free = affine.dequantize(affine.quantize(weight, spec))
    assert (affine.dequantize(codes) - weight).norm() < 1.15 * (free - weight).norm()
    packed_codes = PackedWeight(bitpack.pack(codes.codes, 4), codes.scale, codes.zero_point, spec, 256, 64)
    for memory in ("compact", "cached"):
        runtime = kernels.prepare(packed_codes, dtype=torch.float32, memory=memory, activation=ActivationSpec(8))
        assert "row_scale" in runtime.tensors and "copy" not in runtime.tensors
    free = affine.quantize(weight, spec)
    assert twolevel.split(free.scale, spec) is None


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_snapped_scales_are_found_again(dtype):
    for bits, symmetric in ((2, False), (3, True), (4, True), (4, False), (5, True)):
        spec = QuantSpec(bits, 4, symmetric=symmetric, scale_dtype=dtype)
        scale = (torch.rand(30, 7) * 0.1 + 1e-3).to(spec.torch_scale_dtype)
        new = twolevel.snap(scale, spec)
        found = twolevel.split(new, spec)
        assert found is not None and int(found[1].max()) <= twolevel.levels_for(spec)
        step = scale.float().amax(1, keepdim=True) / twolevel.levels_for(spec)
        off = (new.float() - scale.float()).abs()
        assert (off <= step * 1.15).all()
    assert twolevel.levels_for(QuantSpec(8)) == 0 or twolevel.split(scale, QuantSpec(8, 4)) is None


# Producers


@pytest.mark.parametrize("act", [a for a in ACTIVATIONS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_producers_give_the_codes_of_their_definition(act, dtype):
    x, gate = rows(700).to(dtype), rows(700, seed=5).to(dtype)
    merged = torch.cat([gate, x], -1)
    column, gain, shift = torch.rand(K) + 0.5, torch.rand(K) + 0.5, torch.randn(K)
    given, factor = stored(act, x.float())
    silu = torch.nn.functional.silu
    options = {"params": given}
    cases = [
        lambda fused: producers.quantize_rows(x, act, given, factor, fused=fused),
        lambda fused: producers.quantize_rows(x, act, given, factor, multiply=column, add=shift, fused=fused),
        lambda fused: producers.hadamard_quant(x, lambda b: b.flip(-1) * 2, act, given, factor, fused=fused),
    ]
    if factor is None:
        cases += [
            lambda fused: producers.norm_quant(x, gain, shift, 1e-5, act, mean=True, **options, fused=fused),
            lambda fused: producers.norm_quant(
                x, gain, None, 1e-5, act, mean=False, scale=column, shift=shift, **options, fused=fused),
            lambda fused: producers.act_quant(x, silu, act, **options, fused=fused),
            lambda fused: producers.act_quant(merged[:, K:], silu, act, gate=merged[:, :K], **options, fused=fused),
            lambda fused: producers.act_quant(x, silu, act, gate=gate, **options, fused=fused),
        ]
    if act.symmetric and act.dynamic:
        cases.append(lambda fused: producers.cross_quant(x, column, act, fused=fused))
    for i, case in enumerate(cases):
        fused, plain = case(True), case(False)
        torch.testing.assert_close(fused.scale, plain.scale, rtol=1e-6, atol=0)
        assert fused.codes.dtype == act.code_dtype == plain.codes.dtype and fused.codes.shape == x.shape
        off = (fused.codes.int() - plain.codes.int()).abs()
        assert int(off.max()) <= 1 and float((off > 0).double().mean()) <= 1e-4, i
        assert (fused.zero_point is None) == act.symmetric


def test_producers_compute_what_their_names_say():
    x, gain, act = rows(7), torch.rand(K) + 0.5, ActivationSpec(8, True)
    silu = torch.nn.functional.silu
    want = torch.nn.functional.rms_norm(x, (K,), gain, 1e-6)
    assert distance(activation.dequantize(producers.norm_quant(x, gain, None, 1e-6, act, mean=False)), want) < 2e-2
    want = torch.nn.functional.layer_norm(x, (K,), gain)
    assert distance(activation.dequantize(producers.norm_quant(x, gain, None, 1e-5, act, mean=True)), want) < 2e-2
    got = producers.act_quant(x, silu, act, gate=x * 2)
    assert distance(activation.dequantize(got), silu(x * 2) * x) < 2e-2
    crossed = producers.cross_quant(x, gain, act, alpha=0.15)
    top = x.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(crossed.scale, top**0.15 / 127)
    assert torch.equal(crossed.codes, (x / gain / (top**0.15 / 127)).round().clamp(-127, 127).to(torch.int8))


# Operators


def arguments(x, runtime, act, given):
    params, factor = given
    tensors = [factor] if factor is not None else [t for t in params or () if t is not None]
    return (x, *integer._weight(runtime), integer._activation(act), tensors)


@pytest.mark.filterwarnings("ignore:.*slow backend")
@pytest.mark.parametrize("act", [ACTIVATIONS[0], ACTIVATIONS[1], ACTIVATIONS[6], ACTIVATIONS[7]], ids=str)
@pytest.mark.parametrize("spec", [QuantSpec(8, -1, symmetric=True), QuantSpec(4, 20)], ids=str)
def test_opcheck(spec, act):
    runtime = kernels.prepare(packed(spec), dtype=torch.float32, activation=act)
    given = stored(act, rows(9))
    for x in (rows(5).requires_grad_(), rows(6).view(2, 3, K).bfloat16(), rows(0)):
        torch.library.opcheck(torch.ops.hfq.wnan.default, arguments(x, runtime, act, given))
    x = rows(3)
    codes = activation.quantize(x, act, *given)
    weight = integer._weight(runtime)
    torch.library.opcheck(torch.ops.hfq.wnan_codes.default, (
        codes.codes, codes.scale, codes.zero_point, *weight, integer._activation(act), 0))
    torch.library.opcheck(torch.ops.hfq.wnan_dx.default, (torch.randn(3, N), *arguments(x, runtime, act, given)))


@pytest.mark.parametrize("act", [ACTIVATIONS[0], ACTIVATIONS[4], ACTIVATIONS[7]], ids=str)
def test_one_graph_for_every_number_of_rows(act):
    runtime = kernels.prepare(packed(QuantSpec(8, -1, symmetric=True)), dtype=torch.float32, activation=act)
    bias, given, graphs = torch.randn(N), stored(act, rows(9)), []
    torch._dynamo.reset()

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def run(x):
        return kernels.linear_int(x * 2, runtime, bias, act, *given)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for m in (3, 17, 300):
            torch.testing.assert_close(compiled(rows(m)), run(rows(m)), rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1


def test_compiled_training():
    act = ActivationSpec(8)
    runtime = kernels.prepare(packed(QuantSpec(4, -1)), dtype=torch.float32, activation=act)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: kernels.linear_int(x, runtime, None, act).square().sum(), fullgraph=True, backend="aot_eager")
    x = rows(6).requires_grad_()
    compiled(x).backward()
    y = rows(6).requires_grad_()
    kernels.linear_int(y, runtime, None, act).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("act", [ACTIVATIONS[0], ACTIVATIONS[6], ACTIVATIONS[7], ACTIVATIONS[8]], ids=str)
def test_gradients_are_those_of_straight_through_rounding(act):
    weight = packed(QuantSpec(4, 20))
    runtime = kernels.prepare(weight, dtype=torch.float32, activation=act)
    x, bias = rows(6).requires_grad_(), torch.randn(N, requires_grad=True)
    params, factor = stored(act, rows(6))
    y = kernels.linear_int(x, runtime, bias, act, params, factor)
    torch.testing.assert_close(y, kernels.linear_int(rows(6), runtime, bias.detach(), act, params, factor))
    dy = torch.randn_like(y)
    y.backward(dy)
    other = rows(6).requires_grad_()
    fixed = params or activation.row_parameters(other.detach(), act, factor)
    fixed = tuple(None if t is None else t.detach() for t in fixed)
    torch.nn.functional.linear(activation.fake(other, act, fixed), kernels.dequantize(weight)).backward(dy)
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-5, atol=1e-5)
    if act.factor or not act.dynamic:
        assert (x.grad == 0).any(1).any()  # something was clamped
    torch.testing.assert_close(bias.grad, dy.sum(0))


def test_meta_and_canonical():
    act, weight = ActivationSpec(8), packed(QuantSpec(4, 20))
    runtime = kernels.prepare(weight, dtype=torch.float32, activation=act)
    assert kernels.linear_int(rows(3).to("meta"), runtime, None, act).shape == (3, N)
    with kernels.use(wnan="reference"):
        want = kernels.linear_int(rows(3), weight, None, act)
    torch.testing.assert_close(kernels.linear_int(rows(3), runtime, None, act), want)
    torch.testing.assert_close(kernels.dequantize(runtime), kernels.dequantize(weight))


# The table


def test_explain_says_why_and_forced_backends_raise(monkeypatch):
    act = ActivationSpec(8)
    runtime = kernels.prepare(packed(QuantSpec(4, 20)), dtype=torch.float32, activation=act)
    lines = kernels.explain(runtime, 4, activation=act)
    assert [line.backend for line in lines if line.chosen] == ["aten_int8"] and all(line.reason for line in lines)
    assert runtime.layout == "integer4"
    with kernels.use(wnan="copy"), pytest.raises(KernelError, match="no float copy"):
        kernels.linear_int(rows(2), runtime, None, act)
    with pytest.raises(KernelError, match="no backend 'onednn'"), kernels.use(wnan="onednn"):
        pass
    monkeypatch.setattr(cpu_integer, "exact_unsigned", lambda: False)
    monkeypatch.setattr(cpu_integer, "exact_in_steps", lambda: False)
    kernels.dispatch._choose.cache_clear()
    try:
        plain = kernels.prepare(packed(QuantSpec(8, -1)), dtype=torch.float32, activation=act)
        lines = kernels.explain(plain, 3, activation=act)
        assert next(line.backend for line in lines if line.chosen) == "float_sums"
        assert any("not exact on this CPU" in line.reason for line in lines if line.backend == "aten_int8")
        y = kernels.linear_int(rows(3), plain, None, act)
        want = reference.linear_int(activation.quantize(rows(3), act), packed(QuantSpec(8, -1)), None, torch.float64)
        assert distance(y, want) < 1e-6
    finally:
        kernels.dispatch._choose.cache_clear()


def test_long_rows_that_could_overflow_are_refused():
    case = kernels._prepare_case(packed(QuantSpec(8, -1)), 1, torch.float32, "cpu", "compact", ActivationSpec(8))
    long = type(case)(**{**vars(case), "K": 70_000})
    reasons = {line.backend: line for line in kernels.dispatch.explain(long)}
    assert not reasons["aten_int8"].chosen and "leave 32 bits" in reasons["aten_int8"].reason


def test_runtime_holds_packed_codes_only():
    weight, act = packed(QuantSpec(4, -1), n=256, k=512), ActivationSpec(8)
    compact = kernels.prepare(weight, dtype=torch.float32, activation=act)
    assert compact.tensors["bytes"].nbytes == weight.qweight.nbytes
    assert compact.nbytes < 1.1 * weight.qweight.nbytes
    wide = kernels.prepare(weight, dtype=torch.float32, memory="cached", activation=act)
    assert wide.tensors["bytes"].nbytes == 2 * weight.qweight.nbytes and not wide.cached
    assert ops.format_of(wide)[0] == 4


def test_siblings_share_codes_of_one_tensor_and_of_no_other(monkeypatch):
    act = ActivationSpec(8)
    weights = (packed(QuantSpec(8, -1), seed=seed) for seed in (0, 1))
    first, second = (kernels.prepare(one, dtype=torch.float32, activation=act) for one in weights)
    calls = []
    real = producers.quantize_rows
    monkeypatch.setattr(producers, "quantize_rows", lambda *a, **k: calls.append(1) or real(*a, **k))

    def fresh(x, runtime):
        return kernels.linear_int(x.clone(), runtime, None, act)

    with torch.no_grad():
        x = rows(6).view(2, 3, K)
        assert torch.equal(kernels.linear_int(x, first, None, act), fresh(x, first))
        kernels.linear_int(x, first, None, act)
        before = len(calls)
        y = kernels.linear_int(x, second, None, act)
        assert len(calls) == before
        assert torch.equal(y, fresh(x, second))
        for change in (lambda: x.mul_(2), lambda: x[0].add_(1), lambda: x.view(-1)[:5].zero_()):
            kernels.linear_int(x, first, None, act)
            change()
            assert torch.equal(kernels.linear_int(x, second, None, act), fresh(x, second))
        kernels.linear_int(x, first, None, act)
        other = ActivationSpec(4)
        with kernels.use(wnan="reference"):
            want = kernels.linear_int(x.clone(), first, None, other)
            torch.testing.assert_close(kernels.linear_int(x, first, None, other), want)
        kernels.linear_int(x, first, None, act)
        del x
        assert integer._local.kept is None
    with torch.inference_mode():
        x = rows(6)
        kernels.linear_int(x, first, None, act)
        x.mul_(3)
        assert torch.equal(kernels.linear_int(x, first, None, act), fresh(x, first))


@pytest.mark.parametrize("memory", ["compact", "cached"])
@pytest.mark.parametrize("bits", [4, 8])
def test_one_input_feature(bits, memory):
    """torch's product of bytes gives what happened to lie in memory for matrices of one column."""
    spec, act = QuantSpec(bits), ActivationSpec(8)
    weight, x = packed(spec, k=1), torch.tensor([[3.0], [-1.0], [0.5], [0.0], [7.0]])
    runtime = kernels.prepare(weight, dtype=torch.float32, memory=memory, activation=act)
    with kernels.use(wnan="reference"):
        want = kernels.linear_int(x, weight, None, act).double()
    for _ in range(3):
        assert distance(kernels.linear_int(x, runtime, None, act), want) <= 4e-3
