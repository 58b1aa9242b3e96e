"""Attention over packed keys and values, and appending, in Triton's interpreter (float16).

Run by ``test_triton_cache.py`` in a process of its own: TRITON_INTERPRET must be set before the kernels are imported.
"""

import os

import pytest
import torch

from hfq.formats import codebook, kv
from hfq.formats.kv import KVFormat, SideSpec, Tables
from hfq.kernels import dispatch
from hfq.kernels import kv as packed
from hfq.kernels.triton import cache
from hfq.layers.kv_cache import CacheQuant
from hfq.layers.kv_store import KVStore
from hfq.layers.rotary import RotarySpec

assert os.environ.get("TRITON_INTERPRET") == "1"

HEADS, WIDTH = 2, 32
LIMIT = 2e-3


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    empty = torch.empty

    def nan(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", nan)


def tables(spec, width=WIDTH):
    found = Tables()
    if spec.axis == "channel":
        found.low, found.high = -2 - torch.rand(HEADS * width), 2 + torch.rand(HEADS * width)
    if spec.table:
        found.encode = codebook.normal(spec.bits)
        found.decode = found.encode * 0.9
    return found


def side(x, spec, capacities):
    """A side that holds ``x`` ``[batch, heads, tokens, width]`` in blocks of these capacities."""
    torch.manual_seed(1)
    made = packed.Side(spec, tables(spec, x.shape[3]))
    run, done = kv.encode(x, spec, made.tables), 0
    for capacity in capacities:
        block = packed.empty_block(run, spec, capacity)
        count = min(capacity, x.shape[2] - done)
        packed.write(block, 0, run.part(done, done + count, spec), spec)
        made.blocks.append(block)
        done += count
    return made


class Halves:
    """A rotary embedding that turns the halves of a head, other angles in every sequence."""

    def __init__(self, batch, tokens, width=WIDTH):
        turn = torch.rand(batch, tokens, width // 2) * 6
        self.pair = turn.cos(), turn.sin()

    def halves(self):
        return True

    def angles(self, start, stop):
        return tuple(t[:, start:stop] for t in self.pair)

    def rotate(self, x, start, stop):
        cos, sin = (t[:, None, start:stop].to(x.dtype) for t in self.pair)
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def compare(key, value, tokens, query, splits=2, **more):
    with dispatch.use(kv="reference"):
        want = packed.attend(query, key, value, tokens, scaling=0.2, **more)
    got = cache.attend(query, key, value, tokens, scaling=0.2, splits=splits, **more)
    assert got is not None and got.shape == want.shape and torch.isfinite(got).all()
    error = float((got.double() - want.double()).norm() / want.double().norm())
    assert error <= LIMIT, error


def inputs(tokens, queries=3, batch=1, width=WIDTH):
    torch.manual_seed(tokens)
    k, v = torch.randn(batch, HEADS, tokens, width), torch.randn(batch, HEADS, tokens, width)
    k[:, :, :, 3] *= 4
    return k, v, torch.randn(batch, HEADS, queries, width)


KEYS = [
    SideSpec(4), SideSpec(2, zero_point="int"), SideSpec(3, axis="channel"), SideSpec(8), SideSpec(4, group_size=0),
    SideSpec(4, group_size=16), SideSpec(2, axis="window", group_size=32), SideSpec(3, axis="channel", table=True),
]
VALUES = [
    SideSpec(4), SideSpec(4, zero_point="int"), SideSpec(3, group_size=0, table=True), SideSpec(2), SideSpec(8),
    SideSpec(2, group_size=8), SideSpec(4, axis="window", group_size=32), SideSpec(4, group_size=0),
]


@pytest.mark.parametrize("number", range(len(KEYS)))
def test_decode(number):
    k, v, query = inputs(83)
    compare(side(k, KEYS[number], (64, 64)), side(v, VALUES[number], (64, 64)), 83, query)


@pytest.mark.parametrize("spec", [SideSpec(4), SideSpec(3, axis="channel", table=True),
                                  SideSpec(4, axis="channel", outliers=0.05)], ids=str)
def test_keys_before_their_rotary_embedding(spec):
    batch = 2 if spec.bits == 4 and not spec.outliers else 1
    k, v, query = inputs(64, batch=batch)
    key, value = side(k, spec, (64,)), side(v, SideSpec(4), (64,))
    compare(key, value, 64, query, rotary=Halves(batch, 64), splits=1)


def test_outliers_of_keys_and_values():
    k, v, query = inputs(50)
    k[0, 0, 7, 5], v[0, 1, 9, 11] = 40, -60
    key = side(k, SideSpec(3, axis="channel", outliers=0.06), (64,))
    value = side(v, SideSpec(3, group_size=0, table=True, outliers=0.06), (64,))
    assert key.blocks[0].extra["values"].shape[2] >= 4
    compare(key, value, 50, query)


def test_recent_tokens_sinks_masks_and_softcap():
    k, v, query = inputs(70, batch=2)
    key, value = side(k, SideSpec(8), (64, 64)), side(v, SideSpec(8), (64, 64))
    recent = (torch.randn(2, HEADS, 5, WIDTH), torch.randn(2, HEADS, 5, WIDTH))
    sink = (torch.randn(2, HEADS, 2, WIDTH), torch.randn(2, HEADS, 2, WIDTH), torch.tensor([[0, 1], [3, 4]]))
    keep = torch.rand(2, 1, 3, 75) > 0.3
    keep[1, :, :, :3] = False  # padding on the left
    added = torch.zeros(2, 1, 3, 75).masked_fill(~keep, float("-inf"))
    added += torch.rand_like(added)
    for more in (
        {"recent": recent, "sink": sink, "mask": keep}, {"sink": sink, "softcap": 5.0}, {"mask": added[..., :70]},
        {"mask": torch.finfo(torch.float32).min * (~keep[..., :70]).float()},
    ):
        compare(key, value, 70, query, splits=1, **more)
    late = (*sink[:2], torch.tensor([[0, 1], [70, 71]]))  # a sequence whose first tokens are not stored yet
    compare(key, value, 70, query, sink=late, recent=recent)


def test_a_query_that_attends_to_nothing_gives_zeros():
    k, v, query = inputs(40, batch=2)
    keep = torch.ones(2, HEADS, 3, 40, dtype=torch.bool)
    keep[1, 0, 2] = False
    key, value = side(k, SideSpec(4), (64,)), side(v, SideSpec(4), (64,))
    got = cache.attend(query, key, value, 40, scaling=0.2, mask=keep)
    assert not got[1, 0, 2].any() and got[1, 0, 1].any()


def test_exact_sides_other_widths_and_splits():
    k, v, query = inputs(90, queries=17, width=80)
    key, value = side(k, SideSpec(16), (64, 64)), side(v, SideSpec(16), (64, 64))
    compare(key, value, 90, query)
    key, value = side(k, SideSpec(4), (128,)), side(v[..., :48].contiguous(), SideSpec(4), (128,))
    results = [cache.attend(query, key, value, 90, scaling=0.2, splits=s) for s in (1, 2, 2)]
    assert torch.equal(results[1], results[2])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-3)  # probabilities have 16 bits


def test_what_is_not_served():
    k, v, query = inputs(40)
    key, value = side(k, SideSpec(4), (64,)), side(v, SideSpec(4), (64,))
    assert "queries" in cache.constraint(query.repeat(1, 1, 40, 1), key, value)
    assert "5 bits" in cache.constraint(query, side(k, SideSpec(5), (64,)), value)
    assert "floats" in cache.constraint(query, side(k, SideSpec(16), (64,)), value)
    assert "rotary" in cache.constraint(query, key, value, object())
    assert cache.attend(query, key, value, 40, scaling=1.0, rotary=object()) is None


APPENDED = [
    (SideSpec(4), 1), (SideSpec(3), 5), (SideSpec(2, zero_point="int"), 1), (SideSpec(8), 2),
    (SideSpec(3, axis="channel"), 3), (SideSpec(4, axis="channel", table=True), 1), (SideSpec(2, table=True), 1),
    (SideSpec(2, axis="window", group_size=32), 32), (SideSpec(3, axis="window", group_size=32), 32),
]


@pytest.mark.parametrize(("spec", "tokens"), APPENDED, ids=str)
def test_appending_gives_the_same_bytes(spec, tokens):
    k, _, _ = inputs(64)
    one = side(k[:, :, :32], spec, (64,))
    other = side(k[:, :, :32], spec, (64,))
    new = k[:, :, 32:32 + tokens]
    assert cache.appendable(spec, tokens, WIDTH)
    packed.write(one.blocks[0], 32, kv.encode(new, spec, one.tables), spec)
    cache.append(other.blocks[0], 32, new.transpose(1, 2).contiguous().transpose(1, 2), spec, other.tables)
    for name, tensor in one.blocks[0].tensors().items():
        assert torch.equal(tensor, other.blocks[0].tensors()[name]), name


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_has_no_scale(wrong):
    k, _, _ = inputs(64)
    for spec, tokens in ((SideSpec(4), 2), (SideSpec(2, zero_point="int"), 1), (SideSpec(2, "window", 32), 32)):
        made, new = side(k[:, :, :32], spec, (64,)), k[:, :, 32:32 + tokens].clone()
        new[0, 0, 0, 3] = wrong
        cache.append(made.blocks[0], 32, new, spec, made.tables)
        scale, exact = made.blocks[0].extra["scale"], kv.encode(new, spec, made.tables).scale
        at = 32 if spec.axis == "token" else 1
        assert torch.equal(scale[:, :, at:at + exact.shape[2]].isnan(), exact.isnan()) and exact.isnan().any()


def test_what_is_appended_otherwise():
    for spec, tokens in ((SideSpec(4, group_size=0), 1), (SideSpec(2, axis="window", group_size=32), 8),
                         (SideSpec(4), 500), (SideSpec(16), 1), (SideSpec(4, axis="channel", outliers=0.1), 1)):
        assert not cache.appendable(spec, tokens, WIDTH)


FORMS = [
    KVFormat(SideSpec(4), SideSpec(4), sink=2),
    KVFormat(SideSpec(3, axis="channel", table=True), SideSpec(4), pre_rope=True, sink=1),
    KVFormat(SideSpec(2, axis="window", group_size=8), SideSpec(2), residual=8),
]


@pytest.mark.parametrize("form", FORMS, ids=["post", "pre", "windows"])
def test_a_cache_of_a_layer(form, monkeypatch):
    torch.manual_seed(0)
    spec, rotary = form.key, RotarySpec(0, WIDTH, "half", "half")
    quant_tables = {}
    if spec.axis == "channel":
        quant_tables |= {"key_low": -torch.ones(HEADS * WIDTH) * 3, "key_high": torch.ones(HEADS * WIDTH) * 3}
        quant_tables |= {"key_encode": codebook.normal(3), "key_decode": codebook.normal(3)}
    quant = CacheQuant(form, HEADS, WIDTH, rotary=rotary if form.pre_rope else None, tables=quant_tables)
    turn = (torch.arange(30)[:, None] * torch.logspace(0, -3, WIDTH // 2)).repeat(1, 2)[None]
    keys, values = torch.randn(2, HEADS, 30, WIDTH), torch.randn(2, HEADS, 30, WIDTH)
    called = []

    def outputs():
        store, found = KVStore(quant, max_tokens=64), []
        for start, stop in ((0, 27), (27, 28), (28, 29), (29, 30)):
            pair = (turn.cos()[:, start:stop], turn.sin()[:, start:stop])
            store.append(keys[:, :, start:stop], values[:, :, start:stop], pair)
            if start:
                query = torch.randn(2, 2 * HEADS, 1, WIDTH, generator=torch.Generator().manual_seed(stop))
                found.append(store.attend(query, None, scaling=0.2))
        return torch.stack(found), store.tensors()

    plain, tensors = outputs()
    monkeypatch.setitem(packed.FUSED, "cpu", lambda *a, **k: called.append("attend") or cache.attend(*a, **k))
    monkeypatch.setitem(packed.APPEND, "cpu", lambda *a: called.append("append") or cache.append(*a))
    fused, others = outputs()
    assert called.count("attend") == 3 and (form.residual or called.count("append") >= 3)
    assert all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))
    assert float((plain - fused).norm() / plain.norm()) <= LIMIT
