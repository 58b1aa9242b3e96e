"""Measure configurations on this machine's GPU and keep the fastest: fills the tables that ``pick_config`` reads.

Never called from a forward pass. Times are those of CUDA graphs that rotate over enough copies of the weight to exceed
twice the L2 cache, as a model's layers do.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hfq.errors import KernelError
from hfq.kernels.triton import config as configs
from hfq.kernels.triton import wna16
from hfq.kernels.triton.config import Config, Key, bucket, split_for
from hfq.kernels.triton.layout import WordLayout, choose

__all__ = ["Operands", "candidates", "graph_time", "make_operands", "tune", "tune_shape"]


@dataclass
class Operands:
    """Random weights for timing: ``copies`` of the same shape, and the activations."""

    layout: WordLayout
    group: int
    middle: int
    weights: list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]]
    x: torch.Tensor

    def call(self, config: Config) -> list[Callable[[], torch.Tensor]]:
        """One zero-argument function for each copy."""
        k = self.x.shape[1]

        def one(weight: tuple[Any, ...]) -> Callable[[], torch.Tensor]:
            if config.backend == "dequant":
                return lambda: torch.nn.functional.linear(
                    self.x, wna16.run_dequant(*weight, self.layout, self.group, self.middle, k, self.x.dtype)
                )
            return lambda: wna16.run_fused(self.x, *weight, None, self.layout, self.group, self.middle, config)

        return [one(w) for w in self.weights]


def copies_for(nbytes: int, device: torch.device) -> int:
    """Copies of ``nbytes`` that exceed twice the L2 cache, at most 40."""
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 50 << 20)
    return max(1, min(40, math.ceil(2 * cache / nbytes)))


def make_operands(
    bits: int, group: int, n: int, k: int, m: int, dtype: torch.dtype, device: torch.device, *,
    symmetric: bool = False, slice_size: int | None = None, copies: int | None = None,
) -> Operands:
    """Uniform random codes, integer zero points near the middle, scales of a unit-variance weight."""
    group = 0 if group <= 0 or group >= k else group
    layout = choose(bits, k, group, slice_size)
    middle, groups = 1 << (bits - 1), 1 if group == 0 else -(-k // group)
    nbytes = n * layout.padded * layout.bits // 8
    weights = []
    for _ in range(copies_for(nbytes, device) if copies is None else copies):
        planes = [
            torch.randint(-(2**15), 2**15, (n, layout.padded * w // 16), dtype=torch.int16, device=device)
            for w in layout.widths
        ]
        scale = ((torch.rand(groups, n, device=device) + 0.5) / 2**bits).half().t()
        zero = None
        if not symmetric:
            zero = torch.randint(middle // 2, middle + 1, (groups, n), device=device).to(torch.uint8).t()
        weights.append((planes[0], planes[1] if len(planes) > 1 else None, scale, zero))
    return Operands(layout, group, middle, weights, torch.randn(m, k, device=device).to(dtype))


def graph_time(calls: Sequence[Callable[[], torch.Tensor]], *, least: int = 20, replays: int = 15) -> float:
    """Median microseconds of one call, from replays of a CUDA graph of at least ``least`` calls in rotation."""
    count = -(-least // len(calls)) * len(calls)
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            calls[i % len(calls)]()
    times = []
    for i in range(replays + 3):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(stop) * 1000 / count)
    del graph
    return statistics.median(times)


def candidates(key: Key, layout: WordLayout, processors: int = 132) -> list[Config]:
    """At most twelve configurations worth timing, the rule's choice first."""

    def split(bn: int, bm: int, waves: int) -> int:
        return split_for(key.n, key.m, bn, bm, layout.blocks, processors * waves // 2)

    found = [configs.heuristic(key, layout.blocks, processors)]
    if key.m <= 16:
        for bn, warps, stages, waves in (
            (64, 4, 4, 4), (64, 4, 4, 8), (64, 4, 3, 6), (32, 2, 4, 4), (32, 2, 4, 8), (32, 1, 4, 8), (16, 1, 4, 8),
            (128, 8, 4, 2), (128, 8, 3, 4),
        ):
            found.append(Config(bm=16, bn=bn, warps=warps, stages=stages, split=split(bn, 16, waves)))
        found.append(Config(bm=16, bn=64, split=split(64, 16, 4), mode="group+xsum"))
    elif key.m <= 64:
        bm = 32 if key.m <= 32 else 64
        for bn, warps, stages, waves, mode in (
            (64, 4, 3, 1, "group"), (64, 4, 3, 2, "group"), (64, 4, 4, 4, "group"), (64, 4, 3, 2, "elem"),
            (64, 4, 3, 4, "elem"), (128, 8, 3, 1, "group"), (128, 8, 3, 2, "group"), (128, 8, 3, 2, "elem"),
            (128, 4, 3, 2, "elem"),
        ):
            found.append(Config(bm=bm, bn=bn, warps=warps, stages=stages, split=split(bn, bm, waves), mode=mode))
    elif key.m <= 512:
        for bm, bn, warps, stages, waves in (
            (128, 128, 8, 3, 1), (128, 64, 4, 3, 1), (128, 64, 4, 3, 2), (64, 128, 8, 3, 2), (64, 128, 4, 3, 2),
            (128, 128, 8, 4, 1), (128, 128, 4, 3, 1), (256, 64, 8, 3, 1), (256, 128, 8, 3, 1),
        ):
            if bm <= 2 * key.m:
                found.append(Config(
                    bm=bm, bn=bn, warps=warps, stages=stages, split=split(bn, bm, waves), mode="elem"
                ))
    found.append(Config(backend="dequant"))
    return list(dict.fromkeys(found))[:12]


def tune_shape(operands: Operands, key: Key, *, deadline: float | None = None) -> list[tuple[float, Config]]:
    """Time the candidates of one bucket; fastest first. Configurations that the GPU cannot hold are left out."""
    device = operands.x.device
    _, processors, limit = wna16._device(device)
    layout, timed = operands.layout, []
    for config in candidates(key, layout, processors):
        if deadline is not None and time.monotonic() > deadline and timed:
            break
        if configs.fits(config, layout.block, layout.slice, layout.bits, layout.blocks, limit) != config:
            continue
        if config.backend == "fused" and not layout.fold:
            continue
        timed.append((graph_time(operands.call(config)), config))
    return sorted(timed, key=lambda item: item[0])


def tune(
    shapes: Sequence[tuple[int, int]], *, bits: Sequence[int] = (4,), group: int = 128,
    ms: Sequence[int] = (1, 16, 64, 128), dtype: torch.dtype = torch.bfloat16, seconds: float | None = None,
) -> list[dict[str, Any]]:
    """Time the candidates for weights ``(out_features, in_features)`` on the current GPU and write the user's table.

    Args:
        shapes: ``(out_features, in_features)`` of the layers.
        bits, group: the weight format.
        ms: numbers of tokens; each is rounded up to a member of :data:`~hfq.kernels.triton.config.BUCKETS`.
        seconds: stop starting new measurements after this long.

    Returns:
        the table entries, also written to :func:`~hfq.kernels.triton.config.user_table` and used from then on.

    Raises:
        KernelError: there is no GPU that these kernels run on.
    """
    reason = wna16.available("cuda")
    if reason:
        raise KernelError(f"cannot tune: {reason}")
    device, deadline = torch.device("cuda", torch.cuda.current_device()), None
    if seconds is not None:
        deadline = time.monotonic() + seconds
    entries = []
    for b in bits:
        for n, k in shapes:
            for m in sorted({bucket(m) for m in ms}):
                if deadline is not None and time.monotonic() > deadline:
                    break
                operands = make_operands(b, group, n, k, m, dtype, device)
                key = Key("wna16", operands.layout.bits, operands.group, n, k, m, wna16._DTYPES[dtype])
                best = tune_shape(operands, key, deadline=deadline)[0]
                entries.append(configs.entry(key, best[1], best[0]))
    _write(entries, torch.cuda.get_device_name(device))
    return entries


def _write(entries: list[dict[str, Any]], device: str) -> None:
    import triton

    path = configs.user_table()
    path.parent.mkdir(parents=True, exist_ok=True)
    kept: list[dict[str, Any]] = []
    if path.is_file():
        old = json.loads(path.read_text())
        if old["devices"] == [device] and old["triton"] == triton.__version__:
            new = {tuple(e[f] for f in Key.__dataclass_fields__) for e in entries}
            kept = [e for e in old["entries"] if tuple(e[f] for f in Key.__dataclass_fields__) not in new]
    table = {"devices": [device], "triton": triton.__version__, "entries": kept + entries}
    path.write_text(json.dumps(table, indent=1))
    configs._tables.cache_clear()
    configs.pick_config.cache_clear()
    wna16._config.cache_clear()
