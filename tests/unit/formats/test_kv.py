"""Formats of a key-value cache: errors within half a step, exact outliers, counted bits, specs that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hfq.errors import ConfigError
from hfq.formats import codebook, kv, kv_fit
from hfq.formats.kv import KVFormat, SideSpec, Tables


def tokens(batch: int = 2, heads: int = 3, count: int = 20, width: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, heads, count, width, generator=torch.Generator().manual_seed(seed))


def rows(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(2).flatten(0, 1)


def tables_for(spec: SideSpec, x: torch.Tensor) -> Tables:
    found = Tables()
    if spec.axis == "channel":
        found.low, found.high = kv_fit.ends(rows(x), spec.outliers)
    if spec.table:
        found.encode = found.decode = codebook.normal(spec.bits)
    return found


SPECS = {
    "token": SideSpec(4),
    "all heads": SideSpec(3, group_size=0),
    "groups": SideSpec(4, group_size=5),
    "integer zero": SideSpec(4, zero_point="int"),
    "window": SideSpec(2, "window", 8),
    "channel": SideSpec(4, "channel"),
    "table": SideSpec(3, group_size=0, table=True),
    "channel table": SideSpec(3, "channel", table=True),
    "outliers": SideSpec(3, group_size=0, table=True, outliers=0.1),
    "channel outliers": SideSpec(3, "channel", table=True, outliers=0.1),
    "uniform outliers": SideSpec(3, "channel", outliers=0.1),
}


@pytest.mark.parametrize("name", SPECS)
def test_numbers_come_back_within_a_step(name: str) -> None:
    spec, x = SPECS[name], tokens()
    tables = tables_for(spec, x)
    stored = kv.encode(x, spec, tables)
    assert stored.codes.dtype == torch.uint8 and stored.codes.shape == x.shape and stored.codes.max() <= spec.max_code
    assert all(t.dtype in (torch.float16, torch.int16) for t in stored.tensors().values())
    found = kv.decode(stored, spec, tables)
    coarse = (found - x).norm() / x.norm()
    fine_spec = SideSpec(**{**spec.to_dict(), "bits": 8, "table": False})
    fine = (kv.fake(x, fine_spec, tables_for(fine_spec, x)) - x).norm() / x.norm()
    beyond = 0.05 if spec.axis == "channel" and spec.outliers else 0.01  # more outliers than slots are cut
    assert fine < beyond < coarse < {2: 0.6, 3: 0.3, 4: 0.12}[spec.bits]
    assert torch.equal(kv.fake(x, spec, tables), found)
    assert kv.fake(x.bfloat16(), spec, tables).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["token", "all heads", "groups", "integer zero", "window"])
def test_errors_are_at_most_half_a_step(name: str) -> None:
    spec, x = SPECS[name], tokens(seed=3)
    stored = kv.encode(x, spec, Tables())
    step = kv._expand(stored.scale.float(), x, spec)
    # offsets are float16 too: what their rounding adds is at most half a step more at the ends
    assert ((kv.decode(stored, spec, Tables()) - x).abs() <= 0.5 * step * 1.01 + 2**-10 * x.abs().max()).all()


@pytest.mark.parametrize("name", ["outliers", "channel outliers", "uniform outliers"])
def test_outliers_are_exact_and_at_most_so_many(name: str) -> None:
    spec, x = SPECS[name], tokens(seed=4)
    tables = tables_for(spec, x)
    stored = kv.encode(x, spec, tables)
    n = spec.side_slots(36)
    assert n == 2 and stored.values.shape == stored.index.shape == (2, 20, 2 * n)
    flat, wanted = (t.transpose(1, 2).flatten(2) for t in (kv.decode(stored, spec, tables), x))
    used = stored.values != 0
    at = stored.index.long()
    error = (flat - wanted).gather(-1, at).abs()
    assert used.float().mean() > 0.3 and (error[used] <= 2**-10 * stored.values.float().abs()[used] + 1e-6).all()
    plain = SideSpec(**{**spec.to_dict(), "outliers": 0.0})
    assert (flat - wanted).norm() < (kv.fake(x, plain, tables_for(plain, x)) - x).norm()


def test_a_dynamic_token_keeps_its_largest_and_smallest() -> None:
    spec, x = SPECS["outliers"], tokens(1, 2, 4, 8)
    stored = kv.encode(x, spec, tables_for(spec, x))
    flat = x.transpose(1, 2).flatten(2)
    n = spec.side_slots(16)
    order = flat.argsort(-1)
    for t in range(4):
        assert set(stored.index[0, t].tolist()) == {*order[0, t, :n].tolist(), *order[0, t, -n:].tolist()}
    codes = stored.codes.transpose(1, 2).flatten(2).gather(-1, stored.index.long())
    assert (codes == 3).all()  # the middle code of three bits


def test_errors_fall_with_bits_and_with_outliers() -> None:
    x = tokens(1, 4, 200, 16) ** 3
    for base in ({"axis": "channel"}, {"group_size": 0}):
        def error(bits: int, outliers: float, base: Any = base) -> float:
            spec = SideSpec(bits, outliers=outliers, **base)
            return float((kv.fake(x, spec, tables_for(spec, x)) - x).norm())

        by_bits = [error(bits, 0.0) for bits in (2, 3, 4, 5, 6, 8)]
        assert by_bits == sorted(by_bits, reverse=True)
        by_share = [error(3, share) for share in (0.0, 0.01, 0.05, 0.1)]
        assert by_share == sorted(by_share, reverse=True) and by_share[0] > by_share[-1]


@pytest.mark.parametrize("name", SPECS)
def test_constants_and_zeros_come_back(name: str) -> None:
    spec = SPECS[name]
    for constant in (0.0, 3.25, -7.5):
        x = torch.full((1, 3, 16, 12), constant)
        found = kv.fake(x, spec, tables_for(spec, x))
        assert torch.isfinite(found).all() and (found - x).abs().max() <= 1e-3 * max(abs(constant), 0.1)


def test_bits_count_everything() -> None:
    x = tokens(1, 3, 40, 64)
    for spec in (SideSpec(4), SideSpec(3, group_size=0, table=True, outliers=0.01), SideSpec(2, "window", 8),
                 SideSpec(4, group_size=32), SideSpec(3, "channel", table=True, outliers=0.01)):
        stored = kv.encode(x, spec, tables_for(spec, x))
        held = x.numel() * spec.bits + 8 * sum(t.nbytes for t in stored.tensors().values())
        assert spec.bits_per_element(3, 64) == pytest.approx(held / x.numel())
    assert KVFormat(SideSpec(4), SideSpec(16)).bits_per_element(3, 64) == (4.5 + 32) / 2


WRONG = [
    lambda: SideSpec(9), lambda: SideSpec("4"), lambda: SideSpec(4, "row"), lambda: SideSpec(4, "window", -1),
    lambda: SideSpec(4, outliers=0.01), lambda: SideSpec(4, "channel", outliers=0.7),
    lambda: SideSpec(4, zero_point="int", table=True), lambda: KVFormat(sink=-1), lambda: KVFormat(prefill="never"),
    lambda: KVFormat(SideSpec(4, "window", 32), residual=16), lambda: KVFormat(value=SideSpec(4, "channel")),
    lambda: KVFormat(SideSpec(4, "window", 32), SideSpec(4, "window", 16), residual=32),
    lambda: KVFormat.from_dict({"key": {"bitz": 4}}), lambda: KVFormat.from_dict({"tail": 3}),
]  # fmt: skip


@pytest.mark.parametrize("make", WRONG)
def test_formats_that_make_no_sense_are_refused(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()


def test_formats_survive_json() -> None:
    form = KVFormat(SideSpec(3, "channel", table=True, outliers=0.01), SideSpec(4, group_size=0), True, 2)
    assert KVFormat.from_dict(form.to_dict()) == form
