"""Rows of decoding over a long cache for ``hfq bench kernels``: one token is stored, and attends to all of them.

The baseline is the float32 cache of a model that decodes: keys and values are joined with the new ones
(``torch.cat``), then scaled dot product attention reads them. Rows "... read" time attention alone, against attention
alone. In a row M is the number of query heads, N the cached tokens, K the channels of all key-value heads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

from hfq import kernels
from hfq.evaluation import bench_kernels as bench
from hfq.evaluation.kernel_rows import Row
from hfq.formats import codebook
from hfq.formats.kv import KVFormat, SideSpec
from hfq.kernels import kv
from hfq.layers.kv_cache import CacheQuant
from hfq.layers.kv_store import KVStore
from hfq.layers.rotary import RotarySpec

__all__ = ["cpu"]

TOKENS = 8192
HEADS = ((32, 8, 128), (9, 3, 64))  # query heads, key-value heads, width
LIMIT = 2e-3  # relative error of the attention against the reference on the same codes
TARGET = 1.0  # least ratio of uniform 4-bit codes, keys with their positions


def _table(bits: int, pre_rope: bool) -> KVFormat:
    key = SideSpec(bits, "channel", table=True, outliers=0.01)
    return KVFormat(key, SideSpec(bits, group_size=0, table=True, outliers=0.01), pre_rope, 1)


FORMS: dict[str, tuple[int, KVFormat]] = {
    "uniform": (4, KVFormat(SideSpec(4), SideSpec(4))),
    "uniform8": (8, KVFormat(SideSpec(8), SideSpec(8))),
    "uniform3": (3, KVFormat(SideSpec(3), SideSpec(3))),
    "uniform2": (2, KVFormat(SideSpec(2), SideSpec(2))),
    "channel": (4, KVFormat(SideSpec(4, "channel"), SideSpec(4, group_size=0))),
    "windows": (4, KVFormat(SideSpec(4, "window", 32), SideSpec(4, group_size=32), residual=128)),
    "codebook": (4, _table(4, False)),
    "codebook-pre-rope": (4, _table(4, True)),
    "codebook3-pre-rope": (3, _table(3, True)),
}


class _Case:
    """The float cache of one model shape, and stores of the formats that are asked for."""

    def __init__(self, heads: tuple[int, int, int]) -> None:
        self.query_heads, self.heads, self.width = heads
        draw = torch.Generator().manual_seed(self.query_heads)
        shape = (1, self.heads, TOKENS, self.width)
        self.key, self.value = torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)
        self.new = torch.randn(1, self.heads, 1, self.width, generator=draw)
        self.query = torch.randn(1, self.query_heads, 1, self.width, generator=draw)
        angles = torch.arange(TOKENS + 1)[None, :, None] / 10 ** torch.linspace(0, 4, self.width // 2)
        self.pair = tuple(torch.cat([t, t], -1) for t in (angles.cos(), angles.sin()))

    def store(self, form: KVFormat) -> KVStore:
        channels, tables = self.heads * self.width, {}
        if form.key.axis == "channel":
            tables |= {"key_low": torch.full((channels,), -2.5), "key_high": torch.full((channels,), 2.5)}
        for side, spec in (("key", form.key), ("value", form.value)):
            if spec.table:
                tables |= dict.fromkeys((f"{side}_encode", f"{side}_decode"), codebook.normal(spec.bits))
        rotary = RotarySpec(0, self.width, "half", "half")
        made = KVStore(CacheQuant(form, self.heads, self.width, rotary=rotary, tables=tables))
        made.append(self.key, self.value, tuple(t[:, :TOKENS] for t in self.pair))  # type: ignore[arg-type]
        return made

    def attention(self, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        query = self.query.view(1, self.heads, -1, self.width)  # one token: its heads stand for queries
        return F.scaled_dot_product_attention(query, key, value)

    def step(self) -> torch.Tensor:
        return self.attention(*(torch.cat([old, self.new], -2) for old in (self.key, self.value)))

    def quantized_step(self, store: KVStore) -> torch.Tensor:
        store.crop(TOKENS)
        store.append(self.new, self.new, tuple(t[:, -1:] for t in self.pair))  # type: ignore[arg-type]
        return self.read(store)

    def read(self, store: KVStore) -> torch.Tensor:
        return store.attend(self.query, None, scaling=self.width**-0.5)

    def error(self, store: KVStore) -> float:
        with kernels.use(kv="reference"):
            wanted = self.read(store).double()
        return float((self.read(store).double() - wanted).norm() / wanted.norm())


def cpu(options: bench.Options) -> Iterator[Row]:
    """Rows of every format and shape, each checked against the reference before it is timed."""
    for heads in HEADS[1:] if options.quick else HEADS:
        case, found = _Case(heads), []
        forms = dict(list(FORMS.items())[:1]) if options.quick else FORMS
        for name, (bits, form) in forms.items():
            for way in ("step", "read"):
                row = Row("kv", bits, -1, heads[0], TOKENS, heads[1] * heads[2], "float32", "", f"{name}-{way}")
                row.target = TARGET if row.config == "uniform-step" else None
                if options.wants(row, any_backend=True):
                    found.append((row, form, way))
        if found:
            yield from _timed(case, found, options)


def _timed(case: _Case, found: list[tuple[Row, KVFormat, str]], options: bench.Options) -> Iterator[Row]:
    stores: dict[KVFormat, KVStore] = {}
    calls: list[Callable[[], Any]] = []
    good = []
    with bench.environment(threads=1), torch.inference_mode():
        for row, form, way in found:
            if form not in stores:
                stores[form] = case.store(form)
            store = stores[form]
            row.error = case.error(store)
            row.backend = kv.backend_of(store.sides["key"], case.query, TOKENS, store.positions is None)
            row.bits_held = round(8 * store.nbytes / (2 * case.key.numel()), 2)
            if not row.error <= LIMIT:
                row.ok = f"wrong: error {row.error:.1e} is above {LIMIT:.0e}"
                continue
            good.append((row, way))
            action = case.quantized_step if way == "step" else case.read
            calls.append(lambda action=action, store=store: action(store))  # type: ignore[misc]
        plain = [case.step, lambda: case.attention(case.key, case.value)]
        step, read, *times = bench.best_of([*plain, *calls], options.rounds, time.thread_time)
    for (row, way), spent in zip(good, times, strict=True):
        bench.measured(row, spent, step if way == "step" else read)
    yield from (row for row, _, _ in found)
