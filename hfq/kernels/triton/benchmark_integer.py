"""Benchmark cases of integer products, producers and attention over packed keys and values, on a GPU.

As in :mod:`hfq.kernels.triton.benchmark`: every case is checked before it is timed; kernel and baseline run in one
process, each as a CUDA graph that rotates over more data than the L2 cache holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from hfq.formats import QuantSpec, affine, bitpack
from hfq.formats.activation import ActivationSpec, dequantize
from hfq.formats.kv import SideSpec, Tables, encode
from hfq.kernels import kv, reference
from hfq.kernels.packed import PackedWeight
from hfq.kernels.triton import cache, integer, producers, tune
from hfq.kernels.triton.benchmark import LARGE, baseline
from hfq.kernels.triton.producers import Front

__all__ = ["cases", "run_case"]

# Least speed relative to bfloat16 F.linear, the quantization of x included: (bits, M) -> 4096 x 4096, middle, largest.
TARGETS = {
    (8, 16): (1.1, 1.3, 1.6), (8, 128): (1.2, 1.4, 1.6), (8, 4096): (1.4, 1.5, 1.6),
    (4, 1): (1.6, 2.0, 2.4), (4, 16): (1.4, 1.8, 2.2), (4, 128): (1.2, 1.5, 1.8), (4, 4096): (1.25, 1.35, 1.4),
}
PRODUCER_LIMIT = 1.3  # times a copy of as many bytes
CACHE_TARGET = 2.0  # times the speed of bfloat16 attention over floats, 4 bits, 8k tokens and more
COPY_GB_S, INT8_TOP_S = 3000.0, 1580.0  # ceilings of an H100; the integer rate is an estimate
LIMIT = 5e-3
DEVICE = "cuda"
SPEC = ActivationSpec(8)


def cases() -> list[tuple[str, int, int, int, int, int]]:
    """``(op, bits, group, m, n, k)``, most important first; of a producer m and k, of a cache tokens and head_dim."""
    found = [("wnan", 8, -1, m, n, k) for m in (16, 128, 4096) for n, k in LARGE]
    found += [("wnan", 4, 128, m, n, k) for m in (1, 16, 128, 4096) for n, k in LARGE]
    found += [("wnan", 4, -1, m, n, k) for m in (1, 16, 4096) for n, k in LARGE[:1]]
    found += [(op, 8, -1, m, 0, k) for op in ("rows", "rmsnorm", "silu_mul", "hadamard") for m, k in
              ((1, 4096), (512, 4096), (4096, 4096), (4096, 14336))]
    found += [("kv", bits, -1, 1, tokens, 128) for tokens in (8192, 32768) for bits in (8, 4, 2)]
    found += [(name, bits, 0, 1, 8192, 128) for name in ("kv_table", "kv_pre_rope") for bits in (4, 3)]
    return found


def run_case(case: tuple[str, int, int, int, int, int]) -> dict[str, Any]:
    """Measure one case: a row with ``us``, ``base_us``, ``ratio``, ``floor_us``, ``relerr``, ``target``, ``ok``."""
    op = case[0]
    row: dict[str, Any] = dict(zip(("op", "bits", "group", "m", "n", "k"), case, strict=True))
    with torch.inference_mode():
        found = _product(case) if op == "wnan" else _cache(case) if op.startswith("kv") else _producer(case)
    row |= found
    if not row["relerr"] <= LIMIT:
        return row | {"ok": f"wrong: {row['relerr']:.1e} > {LIMIT}", "us": None}
    row["ratio"] = row["base_us"] / row["us"]
    least = row["target"]
    return row | {"ok": "" if least is None else "y" if row["ratio"] >= least else "n"}


def _product(case: tuple[str, int, int, int, int, int]) -> dict[str, Any]:
    _, bits, group, m, n, k = case
    device = torch.device(DEVICE)
    spec = QuantSpec(bits, group, symmetric=bits == 8)
    fit = affine.fit(torch.randn(n, k, device=device), spec)
    copies = tune.copies_for(n * k * bits // 8, device)
    runtimes = []
    for _ in range(copies):
        codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, device=device)
        packed = PackedWeight(bitpack.pack(codes, bits), *fit, spec, k, n)
        runtimes.append(integer.prepare(packed, torch.bfloat16))
    x = torch.randn(m, k, device=device, dtype=torch.bfloat16)

    def call(runtime: Any) -> Callable[[], torch.Tensor]:
        unit = integer.unit_of(runtime)
        return lambda: integer.multiply(producers.quantize_rows(x, SPEC, unit=unit), runtime, None, torch.bfloat16)

    before = baseline(n, k, x)
    y = call(runtimes[0])().double()
    exact = dequantize(producers.quantize_rows(x, SPEC), torch.float64)
    want = torch.cat([exact @ part.double().t() for part in _rows_of(runtimes[0])], 1)
    us = tune.graph_time([call(r) for r in runtimes])
    base = min(before, baseline(n, k, x))
    size = 0 if n * k == 4096 * 4096 else 2 if n * k > 2 * 10**8 else 1
    least = TARGETS.get((bits, m))
    bytes_moved = n * k * bits / 8 + 2 * m * (n + k) + 2 * m * k
    floor = max(bytes_moved / COPY_GB_S / 1000, 2 * m * n * k / INT8_TOP_S / 1e6)
    row = {"us": us, "base_us": base, "floor_us": floor, "relerr": float((y - want).norm() / want.norm()),
           "target": None if least is None else least[size], "config": integer.config_of(runtimes[0], m).label()}
    if m > 16 and bits == 8:  # the library's product alone, on codes that are there already
        a = torch.randint(-127, 128, (m, k), dtype=torch.int8, device=device)
        weights = [r.tensors["codes"][:, :k] for r in runtimes]
        row["library_us"] = tune.graph_time([lambda w=w: torch._int_mm(a, w.t()) for w in weights])
    return row


def _rows_of(runtime: Any) -> Iterator[torch.Tensor]:
    matrix = reference.dequantize(runtime.packed(), torch.float32)
    yield from matrix.split(2048)


def _producer(case: tuple[str, int, int, int, int, int]) -> dict[str, Any]:
    op, _, _, m, _, k = case
    copies = tune.copies_for(3 * m * k, torch.device(DEVICE))
    xs = [torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16) for _ in range(copies)]
    up, gain = torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16), torch.rand(k, device=DEVICE)
    calls: dict[str, tuple[Callable[[torch.Tensor], Any], Callable[[torch.Tensor], torch.Tensor]]] = {
        "rows": (lambda x: producers.quantize_rows(x, SPEC), lambda x: x.float()),
        "rmsnorm": (
            lambda x: producers.quantize_rows(x, SPEC, front=Front(norm="rms", gain=gain)),
            lambda x: torch.nn.functional.rms_norm(x.float(), (k,), gain, 1e-6),
        ),
        "silu_mul": (
            lambda x: producers.quantize_rows(x, SPEC, front=Front(act="silu", times=up)),
            lambda x: torch.nn.functional.silu(x.float()) * up.float(),
        ),
        "hadamard": (lambda x: producers.mix(x, k, SPEC), lambda x: producers.hadamard.transform(x.float(), k)),
    }
    make, exact = calls[op]
    want = exact(xs[0])
    made = dequantize(make(xs[0]))
    step = (want.amax(1, keepdim=True).clamp(min=0) - want.amin(1, keepdim=True).clamp(max=0)) / 255
    wrong = float(((made - want).abs() > 0.51 * step).float().mean())  # more than half a step: a wrong code
    read = 2 * m * k * (2 if op == "silu_mul" else 1)
    source = torch.empty(copies, (read + m * k) // 2, dtype=torch.uint8, device=DEVICE)
    sinks = torch.empty_like(source[0])
    base = tune.graph_time([lambda s=s: sinks.copy_(s) for s in source])
    us = tune.graph_time([lambda x=x: make(x).codes for x in xs])
    return {"us": us, "base_us": base, "floor_us": (read + m * k) / COPY_GB_S / 1000, "relerr": wrong,
            "target": 1 / PRODUCER_LIMIT, "config": "copy of as many bytes"}


def _cache(case: tuple[str, int, int, int, int, int]) -> dict[str, Any]:
    name, bits, _, batch, tokens, width = case
    heads, groups = 8, 4
    key = SideSpec(bits, axis="channel", table=True) if name != "kv" else SideSpec(bits)
    value = SideSpec(bits, group_size=0, table=True) if name != "kv" else SideSpec(bits)
    floats = [torch.randn(batch, heads, tokens, width, device=DEVICE) for _ in range(2)]
    ends = torch.full((heads * width,), 4.0, device=DEVICE)
    levels = torch.linspace(-1, 1, 2**bits, device=DEVICE)
    tables = Tables(-ends, ends, levels, levels)
    copies = tune.copies_for(int(cache.bytes_read(key, value, heads, width, tokens)) * batch, torch.device(DEVICE))
    sides = []
    for _ in range(copies):
        pair = []
        for spec, x in zip((key, value), floats, strict=True):
            run = encode(x, spec, tables)
            block = kv.empty_block(run, spec, tokens)
            kv.write(block, 0, run, spec)
            pair.append(kv.Side(spec, tables, [block]))
        sides.append(pair)
    rotary = _Turned(tokens, width) if name == "kv_pre_rope" else None
    query = torch.randn(batch, heads, groups, width, device=DEVICE)
    scaling = width**-0.5

    def call(pair: Any) -> Callable[[], Any]:
        return lambda: cache.attend(query, *pair, tokens, scaling=scaling, rotary=rotary)

    with kv.dispatch.use(kv="reference"):
        want = kv.attend(query, *sides[0], tokens, scaling=scaling, rotary=rotary).double()
    error = float((call(sides[0])().double() - want).norm() / want.norm())
    rounds = tune.copies_for(4 * batch * heads * tokens * width, torch.device(DEVICE))
    plain = [[t.bfloat16() for t in floats] for _ in range(rounds)]
    q = query.bfloat16().flatten(1, 2)[:, :, None]
    base = tune.graph_time([
        lambda k=k, v=v: torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scaling, enable_gqa=True)
        for k, v in plain
    ])
    us = tune.graph_time([call(pair) for pair in sides])
    floor = cache.bytes_read(key, value, heads, width, tokens) * batch / COPY_GB_S / 1000
    target = CACHE_TARGET if (name, bits) == ("kv", 4) else None
    return {"us": us, "base_us": base, "floor_us": floor, "relerr": error, "target": target,
            "config": f"{heads} heads x {groups}, {tokens} tokens"}


class _Turned:
    """A rotary embedding of stored keys."""

    def __init__(self, tokens: int, width: int) -> None:
        turn = torch.arange(tokens, device=DEVICE)[:, None] * torch.logspace(0, -4, width // 2, device=DEVICE)
        self.pair = (turn.cos()[None], turn.sin()[None])

    def halves(self) -> bool:
        return True

    def angles(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pair[0][:, start:stop], self.pair[1][:, start:stop]

    def rotate(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        cos, sin = (t.to(x.dtype) for t in self.angles(start, stop))
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
