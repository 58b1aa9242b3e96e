"""The dispatch table: first row that holds, reasons for the others, forced backends, the slow-path warning."""

import threading
import warnings

import pytest
import torch

from hfq import kernels
from hfq.errors import KernelError
from hfq.formats import QuantSpec, affine, bitpack
from hfq.kernels import PackedWeight, dispatch
from hfq.kernels.isa import THRESHOLDS, isa

NOTHING_FAST = pytest.mark.skipif(isa() == "default", reason="every backend of this CPU is a slow one")


def packed(n=64, k=128, spec=None, name="model.layers.0.mlp.up_proj"):
    spec = spec or QuantSpec(4, 32)
    codes = affine.quantize(torch.randn(n, k), spec)
    return PackedWeight(bitpack.pack(codes.codes, spec.bits), codes.scale, codes.zero_point, spec, k, n, name)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.delenv("HFQ_STRICT", raising=False)


def test_rows_are_plain_data_and_the_last_one_serves_everything():
    rows = kernels.table()
    for row in rows:  # integer products have two forms of backends
        forms = {(row.op, row.backend), (f"{row.op}_codes", row.backend)}
        # Other operations find their functions themselves.
        assert row.reason and (row.op not in ("wna16", "wnan") or forms & set(dispatch.BACKENDS))
    assert rows[-1].backend == "reference" and not rows[-1].dtypes
    rows.clear()
    assert kernels.table()


@NOTHING_FAST
def test_thresholds_decide_by_rows():
    limit = THRESHOLDS[isa()].int4
    runtime = kernels.prepare(packed(), dtype=torch.float32)
    picked = {m: [c.backend for c in kernels.explain(runtime, m) if c.chosen] for m in (1, limit, limit + 1)}
    assert picked == {1: ["int4pack"], limit: ["int4pack"], limit + 1: ["int4pack_dequant"]}


def test_explain_gives_a_reason_for_every_row():
    lines = kernels.explain(kernels.prepare(packed(), dtype=torch.float32), 1)
    rows = [row for row in kernels.table() if row.op == "wna16"]
    assert len(lines) == len(rows) and sum(line.chosen for line in lines) == 1
    assert all(line.reason for line in lines)
    assert "runs on cuda" in next(line.reason for line in lines if line.backend == "triton")


def test_explain_takes_canonical_weights_and_layers():
    weight = packed()

    class Layer:
        def explain(self, M, dtype):
            return kernels.explain(weight, M, dtype)

    assert kernels.explain(Layer(), 1) == kernels.explain(weight, 1)


@NOTHING_FAST
@pytest.mark.parametrize("name", ["reference", "dequant", "int4pack", "int4pack_dequant"])
def test_a_forced_backend_runs(name, monkeypatch):
    runtime, x = kernels.prepare(packed(), dtype=torch.float32), torch.randn(300, 128)
    called = []
    real = dispatch.BACKENDS["wna16", name]
    monkeypatch.setitem(dispatch.BACKENDS, ("wna16", name), lambda *a: called.append(name) or real(*a))
    kernels.linear(x, runtime)
    called.clear()
    with kernels.use(wna16=name):
        y = kernels.linear(x, runtime)
        assert [c.backend for c in kernels.explain(runtime, 300) if c.chosen] == [name]
    assert called == [name]
    with kernels.use(wna16="reference"):
        want = kernels.linear(x, runtime)
    assert float((y - want).norm() / want.norm()) < 5e-3
    called.clear()
    kernels.linear(x, runtime)
    assert called == ([name] if name == "int4pack_dequant" else [])  # the block is over


@pytest.mark.parametrize("name", ["int8pack", "triton", "copy"])
def test_a_forced_backend_that_cannot_run_raises(name):
    runtime = kernels.prepare(packed(), dtype=torch.float32)
    with kernels.use(wna16=name), pytest.raises(KernelError, match=name):
        kernels.linear(torch.randn(1, 128), runtime)
    with kernels.use(wna16=name), pytest.raises(KernelError, match=name):
        kernels.prepare(packed(spec=QuantSpec(4, 16)), dtype=torch.float32)


def test_unknown_names_raise():
    with pytest.raises(KernelError, match="no backend 'fast'.*reference"), kernels.use(wna16="fast"):
        pass
    with pytest.raises(KernelError, match="no such operation"), kernels.use(conv="reference"):
        pass
    with pytest.raises(KernelError, match="compact"):
        kernels.prepare(packed(), dtype=torch.float32, memory="fast")


def test_the_environment_forces_in_every_thread(monkeypatch):
    runtime = kernels.prepare(packed(), dtype=torch.float32)
    kernels.linear(torch.randn(1, 128), runtime)  # a plan exists already
    monkeypatch.setenv("HFQ_BACKEND", "wna16:int8pack")
    dispatch.read_environment()
    errors = []

    def attempt():
        try:
            kernels.linear(torch.randn(1, 128), runtime)
        except KernelError as error:
            errors.append(error)

    try:
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
        attempt()
    finally:
        monkeypatch.delenv("HFQ_BACKEND")
        dispatch.read_environment()
    assert len(errors) == 2
    monkeypatch.setenv("HFQ_BACKEND", "wna16")
    with pytest.raises(KernelError, match="op:backend"):
        dispatch.read_environment()


@NOTHING_FAST
def test_slow_paths_warn_once_with_layer_constraint_and_cure():
    weight = packed(spec=QuantSpec(4, 16))
    with pytest.warns(RuntimeWarning) as caught:
        runtime = kernels.prepare(weight, dtype=torch.float32)
        kernels.linear(torch.randn(1, 128), runtime)
        kernels.prepare(packed(spec=QuantSpec(4, 16), name="another"), dtype=torch.float32)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "model.layers.0.mlp.up_proj" in text and "groups of 16" in text and "use group_size" in text


@NOTHING_FAST
def test_strict_turns_the_warning_into_an_error(monkeypatch):
    monkeypatch.setenv("HFQ_STRICT", "1")
    with pytest.raises(KernelError, match="groups of 16"):
        kernels.prepare(packed(spec=QuantSpec(4, 16)), dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runtime = kernels.prepare(packed(), dtype=torch.float32)
        kernels.linear(torch.randn(1, 128), runtime)
        kernels.linear(torch.randn(1000, 128), runtime)  # a threshold is not a constraint


def test_rows_can_be_added_in_front():
    calls = []
    before = kernels.table()
    row = dispatch.Row("wna16", "cpu", (), (4,), "*", lambda case: case.N == 80, "mine", "needs N=80, not {N}")
    dispatch.BACKENDS["wna16", "mine"] = lambda x, runtime, bias: calls.append(1) or x.new_zeros(x.shape[0], 80)
    try:
        dispatch.add_rows([row], before=before[0].backend)
        assert kernels.linear(torch.randn(2, 128), packed(n=80)).shape == (2, 80) and calls
        assert any("needs N=80, not 64" in line.reason for line in kernels.explain(packed(), 1))
    finally:
        dispatch.TABLE[:] = before
        del dispatch.BACKENDS["wna16", "mine"]
        dispatch._choose.cache_clear()


def test_float64_takes_the_reference():
    weight = packed()
    x = torch.randn(3, 128, dtype=torch.float64)
    y = kernels.linear(x, weight)
    torch.testing.assert_close(y, x @ kernels.dequantize(weight, torch.float64).t(), rtol=1e-12, atol=1e-12)
