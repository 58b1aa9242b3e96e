"""Packed keys and values: blocks round trip, and every backend computes what the reference does."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hfq import kernels
from hfq.errors import KernelError
from hfq.formats import codebook
from hfq.formats import kv as codec
from hfq.formats.kv import SideSpec, Tables
from hfq.kernels import kv
from hfq.kernels.isa import isa

INT8 = isa() in ("avx512", "amx")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


def side(spec: SideSpec, x: torch.Tensor, cuts: list[int]) -> kv.Side:
    """``x`` in blocks that hold the tokens between the cuts; the last one has room left."""
    tables = Tables()
    if spec.axis == "channel":
        flat = x.transpose(1, 2).flatten(2).flatten(0, 1)
        tables.low, tables.high = flat.amin(0).half(), flat.amax(0).half()
    if spec.table:
        tables.encode = tables.decode = codebook.normal(spec.bits)
    made = kv.Side(spec, tables)
    for start, stop in zip([0, *cuts], [*cuts, x.shape[2]], strict=True):
        run = codec.encode(x[:, :, start:stop], spec, tables)
        capacity = stop - start if stop in cuts else -(-(stop - start) // 32) * 32 + 32
        block = kv.empty_block(run, spec, capacity)
        kv.write(block, 0, run, spec)
        made.blocks.append(block)
    return made


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("width", [1, 5, 16])
def test_any_run_of_codes_comes_back(bits: int, width: int) -> None:
    spec = SideSpec(bits)
    codes = torch.randint(0, 2**bits, (2, 3, 48, width), generator=generator(bits), dtype=torch.uint8)
    meta = torch.zeros(2, 3, 48, 1, dtype=torch.float16)
    block = kv.empty_block(codec.Encoded(codes, meta, meta), spec, 48)
    assert block.packed.nbytes == math.ceil(2 * 3 * 48 * width * bits / 8)
    block.packed.fill_(0xA5)  # what was there before must not shine through
    at = 0
    for count in (1, 7, 8, 3, 29):
        part = codes[:, :, at:at + count]
        kv.write(block, at, codec.Encoded(part, meta[:, :, :count], meta[:, :, :count]), spec)
        at += count
    for start, stop in ((0, 48), (0, 1), (5, 6), (7, 41), (47, 48)):
        out = torch.full((2, 3, stop - start, width), 99, dtype=torch.uint8)
        assert torch.equal(kv.read_codes(block, start, stop, bits, out), codes[:, :, start:stop])


def test_single_tokens_can_be_replaced() -> None:
    spec, codes = SideSpec(3), torch.randint(0, 8, (1, 1, 16, 4), generator=generator(), dtype=torch.uint8)
    meta = torch.zeros(1, 1, 16, 1, dtype=torch.float16)
    block = kv.empty_block(codec.Encoded(codes, meta, meta), spec, 16)
    kv.write(block, 0, codec.Encoded(codes, meta, meta), spec)
    new = (codes[:, :, 5:6] + 3) % 8
    kv.write(block, 5, codec.Encoded(new, meta[:, :, :1], meta[:, :, :1]), spec)
    codes[:, :, 5:6] = new
    assert torch.equal(kv.read_codes(block, 0, 16, 3, torch.empty_like(codes)), codes)


SIDES = {
    "token": SideSpec(4), "two bits": SideSpec(2), "three bits": SideSpec(3), "eight bits": SideSpec(8),
    "all heads": SideSpec(4, group_size=0), "integer zero": SideSpec(4, zero_point="int"),
    "integer zero, eight bits": SideSpec(8, zero_point="int"), "groups": SideSpec(4, group_size=5),
    "window": SideSpec(4, "window", 8), "table": SideSpec(3, group_size=0, table=True, outliers=0.05),
    "floats": SideSpec(16),
}  # fmt: skip
KEYS = {**SIDES, "channel": SideSpec(4, "channel"), "channel table": SideSpec(3, "channel", table=True, outliers=0.05)}


class Turned:
    """A rotation that depends on the token, to see that tiles get the right ones."""

    def __init__(self, batch: int, tokens: int, width: int) -> None:
        self.signs = torch.randint(0, 2, (batch, 1, tokens, width), generator=generator(9)) * 2.0 - 1

    def rotate(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        return x * self.signs[:, :, start:stop].to(x.dtype)


def expected(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, **more: Any) -> torch.Tensor:
    """Attention as it is written in books, in float64."""
    scores = query.double() @ key.double().transpose(-1, -2) * scaling
    if more.get("softcap"):
        scores = torch.tanh(scores / more["softcap"]) * more["softcap"]
    if more.get("mask") is not None:
        scores = scores.masked_fill(~more["mask"], -math.inf)
    return torch.softmax(scores, -1) @ value.double()


@pytest.mark.parametrize("backend", ["chosen", "float", "reference"])
@pytest.mark.parametrize("name", KEYS)
def test_attention_is_that_over_the_decoded_tokens(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv, "TILE_BYTES", 1 << 14)  # several tiles
    batch, heads, columns, width, tokens, new = 2, 2, 3, 10, 168, 3
    key, value = random(batch, heads, tokens, width, seed=1), random(batch, heads, tokens, width, seed=2)
    key[..., 3] *= 8
    query = random(batch, heads, columns, width, seed=3)
    keys = side(KEYS[name], key, [64, 96])
    values = side(SIDES.get(name, SideSpec(4)), value, [64, 96])
    decoded = [kv._Reference.whole(s, tokens) for s in (keys, values)]
    assert (decoded[0] - key).norm() < 0.6 * key.norm()
    recent = random(batch, heads, new, width, seed=4), random(batch, heads, new, width, seed=5)
    sink = key[:, :, 4:7], value[:, :, 4:7], torch.tensor([[4, 5, 6], [4, 5, 6]])
    mask = torch.rand(batch, 1, columns, tokens + new, generator=generator(6)) > 0.2
    for rotary in (None, Turned(batch, tokens, width)):
        exact_keys = decoded[0] if rotary is None else rotary.rotate(decoded[0], 0, tokens)
        for more in ({}, {"mask": mask, "softcap": 2.0}):
            whole = [exact_keys.clone(), decoded[1].clone()]
            for tensor, kept in zip(whole, sink, strict=False):
                tensor[:, :, 4:7] = kept
            wanted = expected(query, *(torch.cat(p, 2) for p in zip(whole, recent, strict=True)), 0.3, **more)
            arguments = {"scaling": 0.3, "recent": recent, "sink": sink, "rotary": rotary, **more}
            if backend == "chosen":
                found = kv.attend(query, keys, values, tokens, **arguments)
            else:
                with kernels.use(kv=backend):
                    found = kv.attend(query, keys, values, tokens, **arguments)
            # two int8 planes hold fifteen bits of a query, and sixteen of a weight
            assert found.dtype == torch.float32 and (found - wanted).norm() <= 1e-3 * wanted.norm()


@pytest.mark.skipif(not INT8, reason="integer products need AVX512")
@pytest.mark.parametrize("name", ["token", "two bits", "three bits", "eight bits", "all heads", "integer zero",
                                  "channel"])
def test_uniform_codes_are_read_by_integer_products(name: str) -> None:
    key, value, query = random(1, 2, 512, 16), random(1, 2, 512, 16, seed=1), random(1, 2, 4, 16, seed=2)
    keys, values = side(KEYS[name], key, []), side(SIDES.get(name, SideSpec(4)), value, [])
    assert kv.backend_of(keys, query, 512) == kv.backend_of(values, query, 512) == "int8"
    with kernels.use(kv="reference"):
        wanted = kv.attend(query, keys, values, 512, scaling=0.25)
    error = (kv.attend(query, keys, values, 512, scaling=0.25) - wanted).norm() / wanted.norm()
    assert 0 < error < 5e-4


@pytest.mark.skipif(not INT8, reason="integer products need AVX512")
def test_sums_of_long_tiles_fit() -> None:
    """Equal weights and largest codes over more tokens than 32 bits hold sums of."""
    tokens, spec = 70_016, SideSpec(8)
    value = torch.full((1, 1, tokens, 8), 3.0)
    value[..., 0] = -1.0
    values = side(spec, value, [])
    assert kv.backend_of(values, value[:, :, :1], tokens) == "int8"
    out = torch.zeros(1, 1, 1, 8)
    kv._Int8.mix(torch.full((1, 1, 1, tokens), 1 / tokens), values, tokens, out)
    assert torch.allclose(out, value[:, :, :1], rtol=1e-2)


def test_saturating_products_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv, "exact_unsigned", lambda: False)
    kernels.dispatch._choose.cache_clear()
    try:
        key = random(1, 2, 64, 10)
        assert kv.backend_of(side(SideSpec(4), key, []), key[:, :, :1], 64) == "float"
    finally:
        monkeypatch.undo()
        kernels.dispatch._choose.cache_clear()


def test_other_codes_say_why_they_are_not() -> None:
    key, query = random(1, 2, 64, 10), random(1, 2, 1, 10)
    for spec in (SideSpec(4, group_size=5), SideSpec(4, "window", 8), SideSpec(3, "channel", table=True)):
        found = side(spec, key, [])
        assert kv.backend_of(found, query, 64) == "float"
        with pytest.raises(KernelError, match="uniform codes"), kernels.use(kv="int8"):
            kv.backend_of(found, query, 64)
    if INT8:
        assert kv.backend_of(side(SideSpec(4), key, []), query, 64, plain=False) == "float"  # rotated when read


def test_a_query_that_attends_to_nothing_gets_zeros() -> None:
    key, query = random(1, 1, 32, 8), random(1, 1, 2, 8)
    mask = torch.ones(1, 1, 2, 32, dtype=torch.bool)
    mask[:, :, 0] = False
    stored = side(SideSpec(4), key, [])
    found = kv.attend(query, stored, stored, 32, scaling=1.0, mask=mask)
    assert (found[:, :, 0] == 0).all() and (found[:, :, 1] != 0).any()
    with pytest.raises(KernelError, match="empty"):
        kv.attend(query, kv.Side(SideSpec(4), Tables()), kv.Side(SideSpec(4), Tables()), 0, scaling=1.0)
