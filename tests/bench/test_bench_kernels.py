"""The kernel benchmark: rows, filters, refusal of wrong kernels, formats. No speed is asserted here."""

import json

import pytest
import torch

from hfq.errors import ConfigError
from hfq.evaluation import bench_conv, bench_kernels
from hfq.kernels import dispatch


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(bench_kernels, "SHAPES", ((64, 128), (96, 128), (64, 160)))
    def instant(calls, rounds, clock):
        return [10.0 + 0 * len(call()) for call in calls]

    monkeypatch.setattr(bench_kernels, "best_of", instant)


def test_rows_and_formats():
    seen = []
    rows = bench_kernels.run("cpu", quick=True, only="wna16", rounds=1, all_cores=False, on_row=seen.append)
    assert seen == rows and {row.M for row in rows} == {1, 128} and {row.bits for row in rows} == {4, 8}
    for row in rows:
        assert row.ratio == 1.0 and row.error <= bench_kernels.LIMIT and row.bits_held > row.bits
        assert row.ok == ("" if row.target is None else "n" if row.target > 1 else "y")
    text = bench_kernels.format_table(rows)
    assert "F.linear float32" in text and len(text.splitlines()) == len(rows) + 2
    data = json.loads(bench_kernels.to_json(rows))
    assert {"torch", "isa", "revision", "baseline"} <= set(data["about"]) and len(data["rows"]) == len(rows)


def test_only_filters_by_words():
    rows = bench_kernels.run("cpu", quick=True, only="wna16 w4 M1 cached", rounds=1, all_cores=False)
    assert rows and all(row.bits == 4 and row.M == 1 and row.config == "cached" for row in rows)
    assert bench_kernels.run("cpu", quick=True, only="w3", rounds=1) == []


def test_every_backend_is_timed_when_asked():
    options = {"quick": True, "only": "wna16 w4 M128 cached", "every_backend": True}
    rows = bench_kernels.run("cpu", **options, rounds=1, all_cores=False)
    assert {"copy", "dequant"} <= {row.backend for row in rows}


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    for key, real in list(dispatch.BACKENDS.items()):
        monkeypatch.setitem(dispatch.BACKENDS, key, lambda *args, real=real: real(*args) * 1.01)
    rows = bench_kernels.run("cpu", quick=True, only="wna16 w4 M1 compact", rounds=1, all_cores=False)
    assert rows and all(row.us is None and row.ok.startswith("wrong") for row in rows)
    one = torch.ones(1, 1)
    assert bench_kernels.relative_error(one * float("nan"), one, one.double()) == float("inf")


def test_the_threads_are_put_back(monkeypatch):
    before = torch.get_num_threads()
    bench_kernels.run("cpu", quick=True, only="wna16 w4 M1", rounds=1, all_cores=True)
    assert torch.get_num_threads() == before


def test_regressions_keep_the_best(tmp_path):
    rows = bench_kernels.run("cpu", quick=True, only="wna16 w4 M1 compact", rounds=1, all_cores=False)
    file = tmp_path / "best.json"
    assert bench_kernels.regressions(rows, file) == []
    for row in rows:
        row.ratio = 0.85
    assert bench_kernels.regressions(rows, file) == [row.label for row in rows]
    for row in rows:
        row.ratio = 0.95
    assert bench_kernels.regressions(rows, file) == []


def test_unknown_devices():
    with pytest.raises(ConfigError, match="cpu"):
        bench_kernels.run("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="CUDA"):
            bench_kernels.run("cuda")


def test_integer_products_have_rows_with_targets():
    rows = bench_kernels.run("cpu", quick=True, only="wnan", rounds=1, all_cores=False)
    assert {(row.bits, row.M) for row in rows} == {(8, 1), (8, 128), (4, 1), (4, 128)}
    assert all(row.error <= 1e-6 and row.backend == "aten_int8" and row.ratio == 1.0 for row in rows)
    assert {row.ok for row in rows if row.bits == 8 and row.M == 128} == {"n"}


def test_attention_compares_its_backends():
    options = {"quick": True, "only": "attention", "rounds": 1, "all_cores": False}
    chosen = bench_kernels.run("cpu", **options)
    assert [(row.backend, row.M, row.N, row.K) for row in chosen] == [("float_codes", 3 * 197, 197, 64)]
    rows = bench_kernels.run("cpu", **options, every_backend=True)
    assert {row.backend for row in rows} == {"float_codes", "aten_int8"} and all(0 < row.error < 1e-3 for row in rows)


def test_convolutions_compare_their_backends(monkeypatch):
    monkeypatch.setattr(bench_conv, "CASES", ((1, 8, 16, 24, 3, 1, 1),))
    options = {"only": "conv a8s w8", "rounds": 1, "all_cores": False}
    (chosen,) = bench_kernels.run("cpu", **options)
    rows = bench_kernels.run("cpu", **options, every_backend=True)
    assert chosen.backend in {row.backend for row in rows} and {"rows", "float_sums"} <= {row.backend for row in rows}
    assert all(row.us == 10.0 and row.error <= 1e-5 for row in rows)
