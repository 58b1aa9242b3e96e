"""Rows of the integer product for ``hfq bench kernels``: quantization of the activations included."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from hfq import kernels
from hfq.evaluation import bench_kernels as bench
from hfq.evaluation.kernel_rows import Row
from hfq.formats import ActivationSpec, activation, twolevel
from hfq.kernels import PackedWeight, reference

__all__ = ["cpu"]

TOKEN, SIGNED = ActivationSpec(8), ActivationSpec(8, True)
# Weight bits, group, whole-number group scales, activations, memory.
CASES: tuple[tuple[int, int, bool, str, ActivationSpec, str], ...] = (
    (8, -1, False, "a8", TOKEN, "compact"),
    (8, -1, False, "a8s", SIGNED, "compact"),
    (4, -1, False, "a8", TOKEN, "compact"),
    (4, -1, False, "a4s", ActivationSpec(4, True), "compact"),
    (4, 64, False, "a8", TOKEN, "compact"),
    (4, 64, True, "a8-two-level", TOKEN, "compact"),
    (4, 64, False, "a8", TOKEN, "cached"),
)
# Least ratio to float32 F.linear of W8A8: (4096 x 4096, smaller shapes).
TARGETS: dict[int, tuple[float, float | None]] = {1: (2.5, None), 16: (3.0, 1.2), 128: (3.0, 1.2), 512: (3.0, 1.2)}


def _weight(bits: int, group: int, whole: bool, n: int, k: int) -> PackedWeight:
    packed = bench.operands(bits, group, n, k)
    if whole:
        packed.scale = twolevel.snap(packed.scale, packed.spec)
    return packed


def _error(y: torch.Tensor, x: torch.Tensor, packed: PackedWeight, act: ActivationSpec) -> float:
    want = reference.linear_int(activation.quantize(x, act), packed, dtype=torch.float64)
    return float((y.double() - want).norm() / want.norm()) if torch.isfinite(y).all() else float("inf")


def _candidates(
    n: int, k: int, m: int, options: bench.Options, prepared: dict[Any, Any]
) -> Iterator[bench.Candidate]:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
    x[:, k // 3] *= 30
    for bits, group, whole, name, act, memory in CASES[:1] + CASES[3:4] if options.quick else CASES:
        config = f"{name} {memory}"
        head = Row("wnan", bits, group, m, n, k, "float32", "", config)
        if not options.wants(head, any_backend=True):
            continue
        key = bits, group, whole, act, memory
        if key not in prepared:
            packed = _weight(bits, group, whole, n, k)
            runtime = kernels.prepare(packed, dtype=torch.float32, memory=memory, activation=act)  # type: ignore[arg-type]
            if runtime.packed().qweight.ne(packed.qweight).any():
                raise AssertionError(f"{packed.name}: layout {runtime.layout} does not give the codes back")
            prepared[key] = packed, runtime
        packed, runtime = prepared[key]
        backend = next(line.backend for line in kernels.explain(runtime, m, activation=act) if line.chosen)
        target = TARGETS[m][n * k < 4096 * 4096] if bits == 8 and m in TARGETS else None
        held = round(8 * runtime.nbytes / (n * k), 2)
        row = Row(**(asdict(head) | {"backend": backend, "bits_held": held, "target": target}))
        if not options.wants(row):
            continue

        def call(runtime: Any = runtime, act: ActivationSpec = act) -> torch.Tensor:
            return kernels.linear_int(x, runtime, None, act)

        row.error = _error(call(), x, packed, act)
        limit = 1e-6 if backend == "aten_int8" else bench.LIMIT
        if not row.error <= limit:
            row.ok = f"wrong: error {row.error:.1e} is above {limit:.0e}"
        yield row, call


def cpu(options: bench.Options) -> Iterator[Row]:
    """All shapes and numbers of rows, against ``F.linear`` in float32 in the same turns."""
    for n, k in bench.SHAPES[1:] if options.quick else bench.SHAPES:
        weight, prepared = torch.randn(n, k), {}
        for m in (1, 128) if options.quick else bench.ROWS:
            base = partial(torch.nn.functional.linear, torch.randn(m, k), weight)
            yield from bench.timed(base, partial(_candidates, n, k, m, options, prepared), options)
