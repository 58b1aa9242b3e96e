"""Which tile, split and scale mode a matrix product uses: measured tables first, then a rule.

No table is shipped yet: the rule has not been timed on a GPU, only compiled and its output inspected.

A table is a JSON file ``tables/<gpu>.json`` (or the user's own, written by :mod:`hfq.kernels.triton.tune`)::

    {"devices": ["H100"], "triton": "3.6.0", "entries": [{"op": "wna16", "bits": 4, "group": 128, "n": 4096, "k": 4096,
      "m": 16, "dtype": "bfloat16", "us": 7.1, "config": {"bm": 16, "bn": 64, "split": 8, ...}}, ...]}
"""

from __future__ import annotations

import functools
import json
import math
import os
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

__all__ = ["BUCKETS", "Config", "Key", "bucket", "fits", "heuristic", "pick_config", "user_table"]

BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
MODES = {"group": 0, "group+xsum": 1, "elem": 2}  # "int": integer products
_SMALL_M, _MEDIUM_M, _FUSED_M = 16, 64, 256


@dataclass(frozen=True)
class Key:
    """What a configuration depends on; ``m`` is a member of :data:`BUCKETS`, ``bits`` the width as stored."""

    op: str
    bits: int
    group: int
    n: int
    k: int
    m: int
    dtype: str


@dataclass(frozen=True)
class Config:
    """How to run one product. ``backend``: "fused", or "dequant" (weight to a scratch buffer, then ``F.linear``)."""

    backend: str = "fused"
    bm: int = 16
    bn: int = 64
    split: int = 1
    warps: int = 4
    stages: int = 4
    mode: str = "group"
    bk: int = 128  # codes of a row in one step; only integer products with one scale a row choose it

    def label(self) -> str:
        if self.backend != "fused":
            return self.backend
        if self.mode == "int":
            return f"{self.bm}x{self.bn}x{self.bk}/w{self.warps}/s{self.stages}/k{self.split}"
        return f"{self.bm}x{self.bn}/w{self.warps}/s{self.stages}/k{self.split}/{self.mode}"


def bucket(m: int) -> int:
    """The smallest member of :data:`BUCKETS` that is at least ``m`` (the largest one above them all)."""
    return next((b for b in BUCKETS if b >= m), BUCKETS[-1])


def _power_of_2(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def split_for(n: int, m: int, bn: int, bm: int, blocks: int, processors: int, most: int = 16) -> int:
    """Splits of K that give at least two programs a processor, each split at least two blocks long."""
    tiles = math.ceil(n / bn) * math.ceil(m / bm)
    want = _power_of_2(math.ceil(2 * processors / tiles))
    return max(1, min(want, most, blocks // 2))


def _integer(key: Key, blocks: int, processors: int) -> Config:
    """Integer products. ``bn`` rows of the weight and ``bm`` tokens a tile; four bits a code come in steps of 128."""
    grouped, step = key.group > 0, 128 if key.bits == 4 or key.group > 0 else 256
    if key.m <= _SMALL_M:
        # A second kernel for partial sums costs as much as the smallest products: rather tiles that fill the device.
        bn = 64 if 2 * math.ceil(key.n / 64) >= 3 * processors else 32
        split = split_for(key.n, key.m, bn, 16, blocks, processors // 4, 8)
        return Config(bm=16, bn=bn, warps=4, stages=5, split=split, mode="int", bk=step)
    if key.m <= _MEDIUM_M:
        bm = _power_of_2(key.m)
        split = split_for(key.n, key.m, 64, bm, blocks, processors // 2, 8)
        return Config(bm=bm, bn=64, warps=4, stages=4, split=split, mode="int", bk=step)
    if 4 * math.ceil(key.n / 128) * math.ceil(key.m / 128) < 3 * processors:  # larger tiles leave processors idle
        split = split_for(key.n, key.m, 64, 64, blocks, processors // 2, 4)
        return Config(bm=64, bn=64, warps=4, stages=4, split=split, mode="int", bk=step)
    if grouped or 4 * math.ceil(key.n / 128) * math.ceil(key.m / 256) < 3 * processors:
        return Config(bm=128, bn=128, warps=8, stages=4, mode="int", bk=128)
    return Config(bm=256, bn=128, warps=8, stages=4, mode="int", bk=128)


def heuristic(key: Key, blocks: int, processors: int = 132) -> Config:
    """The configuration to use where nothing was measured. ``blocks``: pack blocks along K."""
    if key.op == "wnan":
        return _integer(key, blocks, processors)
    if key.m <= _SMALL_M:
        return Config(bm=16, bn=64, warps=4, stages=4, split=split_for(key.n, key.m, 64, 16, blocks, processors))
    if key.m <= _MEDIUM_M:
        bm = _power_of_2(key.m)
        # Eight warps: with four, 128 rows of accumulators take 240 registers, and zero points go through shared memory.
        return Config(bm=bm, bn=128, warps=8, stages=3, split=split_for(key.n, key.m, 128, bm, blocks, processors, 8))
    if key.m <= _FUSED_M:
        split = split_for(key.n, key.m, 128, 128, blocks, processors // 2, 4)
        return Config(bm=128, bn=128, warps=8, stages=3, split=split, mode="elem")
    return Config(backend="dequant")


def shared_bytes(config: Config, block: int, slice_size: int, bits: int) -> int:
    """Shared memory of the pipelined tiles of words and activations."""
    word_tiles = 3 if bits == 3 else 1
    return config.stages * 2 * (word_tiles * config.bn * slice_size + block * config.bm)


def fits(config: Config, block: int, slice_size: int, bits: int, blocks: int, limit: int) -> Config:
    """``config`` with stages and splits cut to what the device and the row length allow."""
    while config.stages > 2 and shared_bytes(config, block, slice_size, bits) > limit:
        config = replace(config, stages=config.stages - 1)
    while config.bm > 16 and shared_bytes(config, block, slice_size, bits) > limit:
        config = replace(config, bm=config.bm // 2)
    if shared_bytes(config, block, slice_size, bits) > limit:
        config = replace(config, stages=1)
    return replace(config, split=max(1, min(config.split, blocks)))


def integer_shared_bytes(config: Config, bits: int) -> int:
    """Shared memory of the pipelined tiles of an integer product."""
    return config.stages * config.bk * (config.bn * bits // 8 + config.bm)


def fits_integer(config: Config, bits: int, step: int, padded: int, limit: int) -> Config:
    """``config`` with what the device and the weight allow. ``step``: codes that one step must take; 0 for any."""
    config = replace(config, bk=step or math.gcd(config.bk, padded))
    while config.stages > 2 and integer_shared_bytes(config, bits) > limit:
        config = replace(config, stages=config.stages - 1)
    while config.bm > 16 and integer_shared_bytes(config, bits) > limit:
        config = replace(config, bm=config.bm // 2)
    return replace(config, split=max(1, min(config.split, padded // config.bk)))


def user_table() -> Path:
    """The file that tuning on this machine writes: ``$HFQ_CACHE`` or ``~/.cache/hfq``."""
    root = os.environ.get("HFQ_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "hfq")
    return Path(root) / "wna16.json"


def _parse(text: str) -> dict[str, Any]:
    data = json.loads(text)
    rows = {Key(**{f: e[f] for f in Key.__dataclass_fields__}): Config(**e["config"]) for e in data["entries"]}
    return {"devices": data["devices"], "rows": rows}


@functools.cache
def _tables() -> list[dict[str, Any]]:
    found = []
    own = user_table()
    if own.is_file():  # measured on this machine: before what is shipped
        found.append(_parse(own.read_text()))
    folder = resources.files(__package__) / "tables"
    if folder.is_dir():
        names = sorted(f.name for f in folder.iterdir() if f.name.endswith(".json"))
        found += [_parse((folder / name).read_text()) for name in names]
    return found


def _distance(a: Key, b: Key) -> float:
    size = abs(math.log2(a.n * a.k / (b.n * b.k)))
    return size + (0 if a.group == b.group else 1) + (0 if a.dtype == b.dtype else 0.5)


@functools.lru_cache(maxsize=4096)
def pick_config(op: str, key: Key, device: str, blocks: int, processors: int = 132) -> Config:
    """The configuration for ``key`` on the GPU called ``device``.

    A measured entry for exactly this shape; else the measured entry of the same width and bucket whose shape is nearest
    (at most a factor 8 of ``n * k`` away), with its splits scaled to keep the number of programs; else the rule.
    """
    near: list[tuple[float, Key, Config]] = []
    for table in _tables():
        if not any(name in device for name in table["devices"]):
            continue
        rows = table["rows"]
        if key in rows:
            return rows[key]
        near += [(_distance(k, key), k, c) for k, c in rows.items() if (k.op, k.bits, k.m) == (op, key.bits, key.m)]
    near.sort(key=lambda item: item[0])
    if near and near[0][0] <= 3:
        _, at, config = near[0]
        split = max(1, min(round(config.split * at.n / key.n), 16, blocks // 2))
        return replace(config, split=split)
    return heuristic(key, blocks, processors)


def entry(key: Key, config: Config, microseconds: float) -> dict[str, Any]:
    """One row of a table file."""
    return {**asdict(key), "us": round(microseconds, 2), "config": asdict(config)}
