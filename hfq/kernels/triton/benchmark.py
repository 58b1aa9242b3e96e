"""Benchmark of the Triton kernels against bfloat16 ``F.linear``: ``python -m hfq.kernels.triton.benchmark --out DIR``.

Every case is checked against float64 before it is timed. Baseline and kernel run in the same process, each as a CUDA
graph that rotates over more weights than the L2 cache holds. Writes ``bench.json``, ``bench.txt`` and, with ``--tune``,
``table.json`` (an entry for each measured bucket).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hfq.errors import KernelError
from hfq.kernels.triton import config as configs
from hfq.kernels.triton import tune, wna16
from hfq.kernels.triton.config import Config, Key, bucket
from hfq.kernels.triton.layout import unpack_words

__all__ = ["main"]

LARGE = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 28672))
SMALL = ((1536, 576), (576, 1536))
# Least speed relative to bfloat16 F.linear: (bits, M) -> 4096 x 4096, the middle sizes, 8192 x 28672.
TARGETS = {
    (4, 1): (1.6, 2.0, 2.4), (4, 16): (1.5, 1.8, 2.2), (4, 64): (0.9, 1.3, 1.6), (4, 128): (0.9, 1.0, 1.0),
    (4, 4096): (0.9, 0.9, 0.9), (2, 1): (1.7, 2.3, 2.8), (8, 1): (1.3, 1.5, 1.7),
}


def cases() -> list[tuple[int, int, int, int, int]]:
    """``(bits, group, m, n, k)``, most important first."""
    found = [(4, 128, m, n, k) for m in (1, 16, 64, 128, 4096) for n, k in LARGE]
    found += [(2, 64, 1, n, k) for n, k in LARGE] + [(8, 128, 1, n, k) for n, k in LARGE]
    found += [(4, 64, m, n, k) for m in (1, 16, 128) for n, k in SMALL]
    return found


def target(bits: int, m: int, n: int, k: int) -> float | None:
    if (bits, m) not in TARGETS or n * k < 4096 * 4096:
        return None
    return TARGETS[bits, m][0 if n * k == 4096 * 4096 else 2 if n * k > 2 * 10**8 else 1]


def reference_error(operands: tune.Operands, y: torch.Tensor) -> float:
    """Relative Frobenius error against float64 from the stored codes."""
    words, high, scale, zero = operands.weights[0]
    k = operands.x.shape[1]
    codes = unpack_words([words] if high is None else [words, high], operands.layout, k)
    worst, total = 0.0, 0.0
    for i in range(0, codes.shape[0], 2048):
        rows = slice(i, i + 2048)
        length = operands.group or k
        s = scale[rows].double().repeat_interleave(length, 1)[:, :k]
        z = operands.middle if zero is None else zero[rows].double().repeat_interleave(length, 1)[:, :k]
        want = operands.x.double() @ ((codes[rows].double() - z) * s).t()
        worst += float((y[:, rows].double() - want).square().sum())
        total += float(want.square().sum())
    return (worst / total) ** 0.5


def baseline(n: int, k: int, x: torch.Tensor) -> float:
    copies = tune.copies_for(n * k * x.element_size(), x.device)
    weights = [torch.randn(n, k, device=x.device, dtype=x.dtype) / k**0.5 for _ in range(copies)]
    return tune.graph_time([lambda w=w: torch.nn.functional.linear(x, w) for w in weights])


def run_case(case: tuple[int, int, int, int, int], tuned: bool, deadline: float) -> tuple[dict[str, Any], list[Any]]:
    bits, group, m, n, k = case
    device = torch.device("cuda")
    operands = tune.make_operands(bits, group, n, k, m, torch.bfloat16, device)
    layout = operands.layout
    key = Key("wna16", layout.bits, operands.group, n, k, bucket(m), "bfloat16")
    timed: list[tuple[float, Config]] = []
    before = baseline(n, k, operands.x)
    if tuned:
        timed = tune.tune_shape(operands, key, deadline=deadline)
        config = timed[0][1]
    else:
        config = wna16._config(device, (bucket(m), n, k), layout, operands.group, torch.bfloat16)
    error = reference_error(operands, operands.call(config)[0]())
    limit = 5e-3
    row: dict[str, Any] = {
        "op": "wna16", "bits": bits, "group": group, "m": m, "n": n, "k": k, "dtype": "bf16", "config": config.label(),
        "relerr": error, "target": target(bits, m, n, k),
    }
    if not error <= limit:
        return row | {"ok": f"wrong: {error:.2e} > {limit}"}, timed
    us = tune.graph_time(operands.call(config))
    after = baseline(n, k, operands.x)
    base = min(before, after)
    ratio = base / us
    least = row["target"]
    ok = "" if least is None else "y" if ratio >= least else "n"
    stored = n * k * bits / 8 + 3 * n * k / group
    row |= {"us": us, "bf16_us": base, "bf16_spread": abs(before - after) / base, "ratio": ratio, "ok": ok}
    row |= {"gb_s": (stored + 2 * m * (n + k)) / us / 1000}
    return row, timed


def line(row: dict[str, Any]) -> str:
    head = f"w{row['bits']} g{row['group']:<4} {row['m']:>5} {row['n']:>6} {row['k']:>6} {row['config']:<26}"
    if "us" not in row:
        return f"{head} {row['ok']}"
    least = "" if row["target"] is None else f"{row['target']:.2f}"
    return (
        f"{head} {row['us']:>8.1f} {row['bf16_us']:>8.1f} {row['ratio']:>6.2f} {least:>5} {row['ok']:<2} "
        f"{row['gb_s']:>6.0f} {row['relerr']:.1e}"
    )


def ceilings() -> dict[str, float]:
    """Copy bandwidth (GB/s, read plus written) and bfloat16 matrix rate (TFLOP/s) of this run."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    sink = torch.empty_like(source)
    copy = tune.graph_time([lambda: sink.copy_(source)], least=5)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    gemm = tune.graph_time([lambda: a @ b], least=5)
    return {"copy_gb_s": 2 * source.nbytes / copy / 1000, "bf16_tflop_s": 2 * 8192**3 / gemm / 1e6}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tune", action="store_true", help="time the candidates of every bucket first")
    parser.add_argument("--seconds", type=float, default=300)
    args = parser.parse_args(argv)
    reason = wna16.available("cuda")
    if reason:
        raise KernelError(f"cannot benchmark: {reason}")
    import triton

    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + args.seconds
    about: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__, **ceilings(),
    }
    lines = [json.dumps(about), f"{'':<44}{'us':>18} {'bf16_us':>8} {'ratio':>6} {'least':>5} ok   GB/s relerr"]
    rows, entries, trials = [], [], []
    for case in cases():
        if time.monotonic() > deadline:
            break
        row, timed = run_case(case, args.tune, deadline)
        rows.append(row)
        lines.append(line(row))
        bits, group, m, n, k = case
        if timed:
            key = Key("wna16", bits, group, n, k, bucket(m), "bfloat16")
            entries.append(configs.entry(key, timed[0][1], timed[0][0]))
            trials.append({"case": case, "timed": [(round(t, 2), c.label()) for t, c in timed]})
        sys.stdout.write(lines[-1] + "\n")
        sys.stdout.flush()
        (args.out / "bench.json").write_text(json.dumps({"about": about, "rows": rows, "trials": trials}, indent=1))
        (args.out / "bench.txt").write_text("\n".join(lines) + "\n")
        if entries:
            table = {"devices": ["H100", "H200"], "triton": about["triton"], "entries": entries}
            (args.out / "table.json").write_text(json.dumps(table, indent=1))
        torch.cuda.empty_cache()
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
