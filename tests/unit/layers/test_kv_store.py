"""Tokens in a store: one by one as together, cut, reordered, counted, and never as floats of full length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hfq.errors import CheckpointError, QuantizationError
from hfq.formats import codebook
from hfq.formats import kv as codec
from hfq.formats.kv import KVFormat, SideSpec
from hfq.kernels import kv
from hfq.layers.kv_cache import CacheQuant, empty_cache, first_tokens
from hfq.layers.kv_store import KVStore
from hfq.layers.rotary import RotarySpec

HEADS, WIDTH = 2, 12
ROTARY = RotarySpec(0, WIDTH, "half", "half")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quant(form: KVFormat, heads: int = HEADS, width: int = WIDTH) -> CacheQuant:
    tables = {}
    for side, spec in (("key", form.key), ("value", form.value)):
        if spec.axis == "channel":
            tables[f"{side}_low"] = -2 - torch.rand(heads * width, generator=torch.Generator().manual_seed(1))
            tables[f"{side}_high"] = 2 + torch.rand(heads * width, generator=torch.Generator().manual_seed(2))
        if spec.table:
            tables |= {f"{side}_encode": codebook.normal(spec.bits), f"{side}_decode": codebook.normal(spec.bits)}
    rotary = RotarySpec(0, width, "half", "half") if form.pre_rope else None
    return CacheQuant(form, heads, width, rotary=rotary, tables=tables)


FORMS = {
    "floats": KVFormat(SideSpec(16), SideSpec(16)),
    "token": KVFormat(SideSpec(4), SideSpec(4)),
    "two bits": KVFormat(SideSpec(2, group_size=0), SideSpec(2, group_size=0), sink=3),
    "integer": KVFormat(SideSpec(8, zero_point="int"), SideSpec(8, zero_point="int")),
    "window": KVFormat(SideSpec(4, "window", 8), SideSpec(4, group_size=6), residual=16, sink=1),
    "channel": KVFormat(SideSpec(3, "channel", table=True, outliers=0.1),
                        SideSpec(3, group_size=0, table=True, outliers=0.1), True, 2),
}


def angles(tokens: int, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    once = torch.arange(tokens)[None, :, None] / torch.tensor([1.0, 3.0, 9.0, 20.0, 50.0, 90.0])
    full = torch.cat([once, once], -1).expand(batch, -1, -1)
    return full.cos(), full.sin()


def feed(store: KVStore, key: torch.Tensor, value: torch.Tensor, counts: list[int], mask: Any = None) -> None:
    whole, at = angles(key.shape[2]), store.length
    for count in counts:
        pair = tuple(t[:, at:at + count] for t in whole)
        seen = None if mask is None else mask[:, :, at:at + count, :at + count]
        store.append(key[:, :, at:at + count], value[:, :, at:at + count], pair, seen)
        at += count


def contents(store: KVStore) -> list[torch.Tensor]:
    """Codes and all that goes with them, in the order of the tokens, and what is kept besides."""
    found = []
    for side in store.sides.values():
        runs = [kv.read(side, block, a, b) for block, a, b, _ in side.tiles(store.stored, 1 << 20)]
        found.append(torch.cat([run.codes for run in runs], 2))
        for name in runs[0].tensors():
            axis = 1 if name in ("values", "index") else 2
            found.append(torch.cat([run.tensors()[name] for run in runs], axis))
    return [*found, *(store.recent or ()), *(store.sink or ())]


def same(a: KVStore, b: KVStore) -> bool:
    pairs = list(zip(contents(a), contents(b), strict=True))
    return a.length == b.length and a.stored == b.stored and all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.must_hold("kvquant", 8)
@pytest.mark.parametrize("name", FORMS)
def test_one_by_one_is_all_at_once(name: str) -> None:
    key, value = random(2, HEADS, 77, WIDTH), random(2, HEADS, 77, WIDTH, seed=1)
    made = [KVStore(quant(FORMS[name])) for _ in range(3)]
    for store, counts in zip(made, ([77], [1] * 77, [40, 1, 1, 35]), strict=True):
        feed(store, key, value, counts)
    assert same(made[0], made[1]) and same(made[0], made[2])
    query = random(2, 4, 1, WIDTH, seed=2)
    wanted = made[0].attend(query, None, scaling=0.3)
    for store in made[1:]:
        assert (store.attend(query, None, scaling=0.3) - wanted).norm() <= 1e-3 * wanted.norm()


@pytest.mark.parametrize("name", FORMS)
def test_reading_is_attention_over_what_teacher_forcing_sees(name: str) -> None:
    form = FORMS[name]
    key, value = random(2, HEADS, 64, WIDTH), random(2, HEADS, 64, WIDTH, seed=1)
    cache = quant(form)
    store = KVStore(cache)
    feed(store, key, value, [48, 16])
    keys, values = cache.fake(key, value, angles(64))
    if form.residual:
        assert store.recent is None  # 64 tokens are whole windows
    query = random(2, 4, 5, WIDTH, seed=2)
    grouped = query.view(2, HEADS, 10, WIDTH)
    scores = (grouped @ keys.transpose(-1, -2) * 0.3).view(2, HEADS, 2, 5, 64)
    reach = torch.arange(64) <= torch.arange(59, 64)[:, None]
    weights = scores.masked_fill(~reach, float("-inf")).softmax(-1).view(2, HEADS, 10, 64)
    wanted = (weights @ values).view(2, 4, 5, WIDTH).transpose(1, 2)
    found = store.attend(query, None, scaling=0.3)
    assert found.shape == wanted.shape and (found - wanted).norm() <= 1e-3 * wanted.norm()
    assert ((found - wanted).norm() > 0) == (name != "nothing")


@pytest.mark.must_hold("kvquant", 7)
@pytest.mark.parametrize("name", ["two bits", "window", "channel"])
def test_first_tokens_are_exact(name: str) -> None:
    form = FORMS[name]
    key, value = random(2, HEADS, 64, WIDTH), random(2, HEADS, 64, WIDTH, seed=1)
    keys, values = quant(form).fake(key, value, angles(64))
    for found, exact in ((keys, key), (values, value)):
        assert torch.equal(found[:, :, : form.sink], exact[:, :, : form.sink])
        assert not torch.equal(found[:, :, form.sink:], exact[:, :, form.sink:])
    store = KVStore(quant(form))
    feed(store, key, value, [1] * 64)
    assert all(torch.equal(kept, exact[:, :, : form.sink])
               for kept, exact in zip(store.sink, (key, value), strict=True))


@pytest.mark.must_hold("kvquant", 11)
@pytest.mark.parametrize("name", FORMS)
def test_cutting_reordering_and_starting_again(name: str) -> None:
    key, value = random(2, HEADS, 90, WIDTH), random(2, HEADS, 90, WIDTH, seed=1)
    query, form = random(2, 4, 1, WIDTH, seed=2), FORMS[name]

    def fresh(count: int, rows: Any = slice(None)) -> KVStore:
        store = KVStore(quant(form))
        feed(store, key[rows], value[rows], [count])
        return store

    store = fresh(90)
    for length in (85, 70, 33):
        store.crop(length)
        assert store.length == length
        found, wanted = (s.attend(query, None, scaling=0.3) for s in (store, fresh(length)))
        # tokens of a window that was cut are what was read, not what they were
        assert (found - wanted).norm() <= (0.1 if form.residual else 1e-3) * wanted.norm()
    feed(store, key, value, [57])
    assert (store.attend(query, None, scaling=0.3) - fresh(90).attend(query, None, scaling=0.3)).norm() <= 0.1
    order = torch.tensor([1, 1, 0])
    store = fresh(90)
    store.change_rows(lambda t: t.index_select(0, order))
    assert same(store, fresh(90, order))
    store.change_rows(lambda t: t.repeat_interleave(2, 0))
    assert store.batch == 6 and store.attend(query[:1].expand(6, -1, -1, -1), None, scaling=0.3).shape[0] == 6
    store.reset()
    assert store.length == 0 and not store.tensors()
    feed(store, key, value, [90])
    assert same(store, fresh(90))


@pytest.mark.parametrize("name", FORMS)
def test_left_padding_is_not_seen(name: str) -> None:
    """A padded row reads as the same row alone does: sinks, windows and positions count from its first token."""
    pad, form = 8, FORMS[name]
    key, value = random(2, HEADS, 72, WIDTH), random(2, HEADS, 72, WIDTH, seed=1)
    key[0, :, :pad], value[0, :, :pad] = 50.0, -50.0
    seen = torch.ones(2, 72, dtype=torch.bool)
    seen[0, :pad] = False
    mask = seen[:, None, None] & torch.ones(72, 72, dtype=torch.bool).tril()
    query = random(2, 4, 1, WIDTH, seed=2)
    padded, alone = KVStore(quant(form)), KVStore(quant(form))
    turned = angles(72)
    # each row has positions of its own
    shifted = tuple(torch.stack([torch.cat([t[0, :1].expand(pad, -1), t[0, : 72 - pad]]), t[0]]) for t in turned)
    padded.append(key[:, :, :70], value[:, :, :70], tuple(t[:, :70] for t in shifted), mask[:, :, :70, :70])
    padded.append(key[:, :, 70:], value[:, :, 70:], tuple(t[:, 70:] for t in shifted), mask[:, :, 70:])
    feed(alone, key[:1, :, pad:], value[:1, :, pad:], [62, 2])
    assert padded.start.tolist() == [pad, 0]
    found = padded.attend(query, mask[:, :, -1:], scaling=0.3)[:1]
    wanted = alone.attend(query[:1], None, scaling=0.3)
    assert (found - wanted).norm() <= (2e-3 if not form.residual else 0.1) * wanted.norm()
    added = torch.where(mask[:, :, -1:], 0.0, torch.finfo(torch.float32).min)
    assert torch.allclose(padded.attend(query, added, scaling=0.3)[:1], found, atol=1e-6)
    assert first_tokens(added, 2, 72, "cpu").tolist() == [pad, 0]


@pytest.mark.must_hold("kvquant", 11)
@pytest.mark.parametrize("name", FORMS)
def test_memory_is_that_of_the_formula(name: str) -> None:
    tokens, cache = 2100, quant(FORMS[name])
    store = KVStore(cache)
    key, value = random(1, HEADS, tokens, WIDTH), random(1, HEADS, tokens, WIDTH, seed=1)
    feed(store, key, value, [1984, *[1] * (tokens - 1984)])
    assert store.nbytes == pytest.approx(cache.nbytes_of(1, tokens), rel=0.13)  # up to one block of 256 is not full
    whole = KVStore(cache)
    feed(whole, key[:, :, :2048], value[:, :, :2048], [2048])
    assert whole.nbytes == pytest.approx(cache.nbytes_of(1, 2048), rel=0.05)
    if not FORMS[name].key.exact:
        assert whole.nbytes < 0.75 * (key.nbytes + value.nbytes)
    feed(whole, random(1, HEADS, 8193, WIDTH), random(1, HEADS, 8193, WIDTH, seed=1), [6144, 1])  # a block just begun
    assert whole.nbytes == pytest.approx(cache.nbytes_of(1, 8193), rel=0.05)


class Largest(TorchDispatchMode):
    """Records the largest float tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("name", [name for name in FORMS if name != "floats"])
def test_decoding_makes_no_floats_of_full_length(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv, "TILE_BYTES", 1 << 16)
    store = KVStore(quant(FORMS[name]))
    tokens = 4096
    feed(store, random(1, HEADS, tokens, WIDTH), random(1, HEADS, tokens, WIDTH, seed=1), [tokens])
    new = random(1, HEADS, 1, WIDTH, seed=3)
    pair = tuple(t[:, -1:] for t in angles(tokens + 1))
    with Largest() as seen:
        store.append(new, new, pair)
        store.attend(random(1, 4, 1, WIDTH, seed=2), None, scaling=0.3)
    assert 0 < seen.numel <= tokens * HEADS * WIDTH / 4 + 4 * tokens


def test_a_store_of_a_given_length_refuses_more() -> None:
    store = KVStore(quant(FORMS["token"]), max_tokens=20)
    key = random(1, HEADS, 21, WIDTH)
    feed(store, key, key, [18])
    allocated = [t.data_ptr() for t in store.tensors()]
    feed(store, key, key, [1, 1])
    assert [t.data_ptr() for t in store.tensors()] == allocated
    with pytest.raises(QuantizationError, match="allocated for 20 tokens, 21"):
        feed(store, key, key, [1])
    assert store.length == 20 and [t.data_ptr() for t in store.tensors()] == allocated  # as before the refusal
    with pytest.raises(QuantizationError, match="holds 1 sequences, 2"):
        store.append(key[:, :, :1].expand(2, -1, -1, -1), key[:, :, :1].expand(2, -1, -1, -1))
    with pytest.raises(QuantizationError, match="mask over 5"):
        store.attend(random(1, 4, 1, WIDTH), torch.ones(1, 1, 1, 5, dtype=torch.bool), scaling=1.0)


def test_history_is_not_copied() -> None:
    store = KVStore(quant(FORMS["token"]))
    key = random(1, HEADS, 700, WIDTH)
    feed(store, key, key, [300])
    before = {t.data_ptr() for t in store.tensors()}
    feed(store, key, key, [1] * 400)
    assert before <= {t.data_ptr() for t in store.tensors()}


@pytest.mark.must_hold("kvquant", 10)
def test_constants_make_no_nan() -> None:
    for name, form in FORMS.items():
        cache = quant(form)
        if form.key.axis == "channel":
            cache.key_low.data.fill_(2.0)
            cache.key_high.data.fill_(2.0)
        for constant in (0.0, 2.0):
            x = torch.full((1, HEADS, 32, WIDTH), constant)
            still = torch.ones(1, 32, WIDTH), torch.zeros(1, 32, WIDTH)
            keys, values = cache.fake(x, x, still)
            assert torch.isfinite(keys).all() and (values - x).abs().max() <= 2e-3, name
            if constant == 2.0:
                assert (keys - x).abs().max() <= 2e-3, name


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", FORMS)
def test_what_is_not_finite_stays_so(name: str, wrong: float) -> None:
    """An exact cache would give NaN; one number that looks like any other would be worse."""
    for side in range(2):
        pair = [random(1, HEADS, 32, WIDTH), random(1, HEADS, 32, WIDTH, seed=1)]
        pair[side][0, 0, 20, 5] = wrong
        store = KVStore(quant(FORMS[name]))
        feed(store, *pair, [16, 16])
        found = store.attend(random(1, 4, 1, WIDTH, seed=2), None, scaling=0.3)
        assert not torch.isfinite(found[:, :, :2]).all(), "heads that read it"
        if FORMS[name].key.axis == "token" and FORMS[name].key.group_size == -1:
            assert torch.isfinite(found[:, :, 2:]).all(), "the other key head's"
        keys, values = quant(FORMS[name]).fake(*pair, angles(32))
        assert not (torch.isfinite(keys[0, 0, 20]).all() and torch.isfinite(values[0, 0, 20]).all())


def test_half_precision_models() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        store = KVStore(quant(FORMS["channel"]))
        key = random(1, HEADS, 40, WIDTH).to(dtype)
        pair = tuple(t[:, :40].to(dtype) for t in angles(40))
        store.append(key, key, pair)
        found = store.attend(random(1, 4, 1, WIDTH, seed=2).to(dtype), None, scaling=0.3)
        assert found.dtype == dtype and torch.isfinite(found).all() and store.sink[0].dtype == dtype


def test_casts_leave_ranges_and_tables_alone() -> None:
    cache = quant(FORMS["channel"])
    before = {name: tensor.clone() for name, tensor in cache.state_dict().items()}
    cache.to(torch.bfloat16)
    assert all(torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype
               for name, tensor in cache.state_dict().items())
    assert set(before) == {"key_low", "key_high", "key_encode", "key_decode", "value_encode", "value_decode"}
    again = empty_cache(cache.describe(), "a")
    again.load_state_dict(cache.state_dict())
    assert again.same_as(cache)
    again.key_low.data[0] -= 1
    assert not again.same_as(cache)
    for name, bad in (("key_encode", cache.key_encode.flip(0)), ("key_low", cache.key_high + 1),
                      ("value_decode", cache.value_decode * float("nan"))):
        broken = empty_cache(cache.describe(), "a")
        broken.load_state_dict({**cache.state_dict(), name: bad})
        with pytest.raises(CheckpointError, match=name.removesuffix("_low").removesuffix("_encode")):
            broken.check()


def test_what_the_format_does_not_have_is_refused() -> None:
    with pytest.raises(QuantizationError, match="takes"):
        CacheQuant(FORMS["token"], 1, 4, tables={"key_low": torch.zeros(4)})
    with pytest.raises(QuantizationError, match="is needed"):
        CacheQuant(KVFormat(SideSpec(4, "channel"), SideSpec(4)), 1, 4,
                   tables={"key_low": torch.zeros(3), "key_high": torch.zeros(3)})
    entry = quant(FORMS["channel"]).describe()
    for change in ({"heads": 0}, {"format": {"bits": 4}}, {"rotary": 3}, {"more": 1}):
        with pytest.raises(CheckpointError):
            empty_cache({**entry, **change}, "a")


def test_codecs_see_what_the_store_writes() -> None:
    """The store's contents decode to what encoding everything at once gives."""
    form, key = FORMS["two bits"], random(1, HEADS, 50, WIDTH)
    cache = quant(form)
    store = KVStore(cache)
    feed(store, key, key, [1] * 50)
    assert torch.equal(kv._Reference.whole(store.sides["key"], 50).float(),
                       codec.fake(key, form.key, cache.tables("key")))
