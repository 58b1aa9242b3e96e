"""Trees of tensors, and the store that spills."""

from __future__ import annotations

from collections import OrderedDict, namedtuple

import pytest
import torch

from hfq.calibration.cache import ActivationCache, Slot, Store, Stored, leaves, rebuild, structure
from hfq.errors import QuantizationError

Pair = namedtuple("Pair", "a b")


def tree():
    return (
        (torch.ones(2), Pair(torch.zeros(3), None)),
        {"m": [torch.ones(1), 5], "o": OrderedDict(x=torch.ones(4)), "s": "s"},
    )


def test_rebuild_keeps_structure():
    doubled = rebuild(tree(), lambda _, t: t * 2)
    assert isinstance(doubled[0][1], Pair) and isinstance(doubled[1]["o"], OrderedDict) and doubled[1]["s"] == "s"
    assert [path for path, _ in leaves(doubled)] == [(0, 0), (0, 1, 0), (1, "m", 0), (1, "o", "x")]
    assert structure(doubled) == structure(tree()) != structure((torch.ones(1),))


def test_spilled_tensors_come_back_equal(tmp_path):
    tensors = [torch.randn(64).to(d) for d in (torch.float32, torch.bfloat16, torch.float16)] + [
        torch.arange(64),
        torch.ones(64) > 0,
    ]
    store = Store(limit=300, folder=tmp_path)
    stored = [store.put(t) for t in tensors]
    assert store.bytes <= 300 and store.spilled > 0 and any(tmp_path.iterdir())
    for t, s in zip(tensors, stored, strict=True):
        assert torch.equal(store.get(s), t) and store.get(s).dtype == t.dtype
    for s in stored:
        store.drop(s)
    assert store.bytes == store.spilled == 0 and not list(tmp_path.rglob("*.safetensors"))
    store.close()
    assert not any(tmp_path.iterdir())


def test_views_do_not_keep_their_base():
    base = torch.randn(1000, 10)
    store = Store()
    kept = store.put(base[:2])
    assert store.get(kept).untyped_storage().nbytes() == 80


def test_shared_tensors_are_kept_once():
    store = Store()
    a, b = store.put(torch.ones(8), shared=True), store.put(torch.ones(8), shared=True)
    assert a is b and store.bytes == 32
    store.drop(a)
    assert torch.equal(store.get(b), torch.ones(8))
    store.drop(b)
    assert store.bytes == 0
    with pytest.raises(QuantizationError, match="after its block"):
        store.get(b)


def test_cache_fills_slots():
    store = Store()
    call = ((Slot(0),), {"mask": store.put(torch.zeros(3))})
    cache = ActivationCache(store, [call, call], [[store.put(torch.ones(1))], [store.put(torch.ones(1) * 2)]], (0, 0))
    args, kwargs = cache[1]
    assert args[0].item() == 2 and torch.equal(kwargs["mask"], torch.zeros(3)) and len(cache[:]) == 2
    assert cache.hidden(0).item() == 1
    assert isinstance(cache.calls[0][1]["mask"], Stored)
