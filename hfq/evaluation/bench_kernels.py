"""Benchmark of the packed products against ``F.linear``: what ``hfq bench kernels`` runs.

All candidates of one shape take turns in one process, and each keeps its best round: a busy machine then slows all of
them alike. On a CPU the headline is the CPU time of one thread; wall time with all cores is a second column when the
machine is idle. A candidate is checked against float64 before it is timed, and not timed if it fails.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from hfq import kernels
from hfq.errors import ConfigError
from hfq.evaluation.kernel_rows import BASELINE, Row, about, format_table, regressions, to_json
from hfq.formats import QuantSpec, affine, bitpack
from hfq.kernels import PackedWeight, Runtime, dispatch

__all__ = ["BASELINE", "SUITES", "Options", "Row", "about", "format_table", "regressions", "run", "to_json"]

SHAPES = ((4096, 4096), (1536, 576), (576, 1536))  # N, K
FORMATS = ((4, 128), (4, 64), (4, -1), (2, 64), (8, -1), (8, 128))  # bits, group
ROWS = (1, 16, 128, 512)  # M
ROUNDS = 20
LIMIT = 5e-3  # relative error of a product in bfloat16
# Least ratio to the baseline: (bits, memory) -> M -> (4096 x 4096, smaller shapes).
TARGETS = {
    (4, "compact"): {1: (3.0, 2.0), 128: (0.5, 0.5), 512: (0.5, 0.5)},
    (4, "cached"): {1: (3.0, 2.0), 128: (0.9, 0.9), 512: (0.9, 0.9)},
}


@dataclass(frozen=True)
class Options:
    """What a suite is asked for: see :func:`run`."""

    quick: bool = False
    only: tuple[str, ...] = ()
    rounds: int = ROUNDS
    every_backend: bool = False
    all_cores: bool | None = None

    def wants(self, row: Row, *, any_backend: bool = False) -> bool:
        """Whether the label of ``row`` has all words; ``any_backend`` while its backend is not known."""
        backends = {line.backend for line in kernels.table()} if any_backend else set()
        return set(self.only) - backends <= set(row.label.split())


Clock = Callable[[], float]
Candidate = tuple[Row, Callable[[], torch.Tensor]]


def best_of(calls: Sequence[Callable[[], Any]], rounds: int, clock: Clock) -> list[float]:
    """Microseconds of the best round of each call. The calls take turns, another one first in each round.

    Short calls get more rounds, a third of a second in all, because one interruption spoils a round.
    """
    best = [float("inf")] * len(calls)
    turn, end = 0, time.perf_counter() + 0.3
    while turn < rounds + 2 or (turn < 20 * rounds and time.perf_counter() < end):
        for i in range(len(calls)):
            i = (i + turn) % len(calls)
            start = clock()
            calls[i]()
            spent = clock() - start
            if turn >= 2:  # the first turns fill caches and plans
                best[i] = min(best[i], spent)
        turn += 1
    return [1e6 * seconds for seconds in best]


@contextmanager
def environment(threads: int | None = None, **variables: str) -> Iterator[None]:
    before, old = torch.get_num_threads(), {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        torch.set_num_threads(threads or before)
        yield
    finally:
        torch.set_num_threads(before)
        for name, value in old.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def operands(bits: int, group: int, n: int, k: int) -> PackedWeight:
    """Uniform codes with the scales of real numbers: zeros and constants would run faster than life."""
    generator = torch.Generator().manual_seed(bits * 1000 + n + k)
    spec = QuantSpec(bits, group, symmetric=bits == 8)
    scale, zero = affine.fit(torch.randn(n, k, generator=generator), spec)
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    return PackedWeight(bitpack.pack(codes, bits), scale, zero, spec, k, n, f"w{bits}g{group} {n}x{k}")


def relative_error(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> float:
    """``||y - x W^T|| / ||x W^T||`` in float64; infinite if anything in ``y`` is not finite."""
    if not torch.isfinite(y).all():
        return float("inf")
    want = x.double() @ weight.t()
    return float((y.double() - want).norm() / want.norm())


def _call(x: torch.Tensor, runtime: Runtime, forced: str | None) -> Callable[[], torch.Tensor]:
    if forced is None:
        return lambda: kernels.linear(x, runtime)

    def call() -> torch.Tensor:
        with kernels.use(wna16=forced):
            return kernels.linear(x, runtime)

    return call


class _CpuShape:
    """The candidates of one (N, K), prepared once for all M."""

    def __init__(self, n: int, k: int, options: Options) -> None:
        self.n, self.k, self.options = n, k, options
        self.formats: tuple[tuple[int, int], ...] = FORMATS[:1] + FORMATS[4:5] if options.quick else FORMATS
        if k % 128:  # a group of 128 has a ragged tail there; 64 is what such models use
            self.formats = tuple((b, 64 if g == 128 else g) for b, g in self.formats)
            self.formats = tuple(dict.fromkeys(self.formats))
        self.float_weight = torch.randn(n, k)
        self.prepared: dict[Any, tuple[torch.Tensor, Runtime]] = {}

    def weight(self, bits: int, group: int, memory: str) -> tuple[torch.Tensor, Runtime]:
        key = bits, group, memory
        if key not in self.prepared:
            packed = operands(bits, group, self.n, self.k)
            runtime = kernels.prepare(packed, dtype=torch.float32, memory=memory)  # type: ignore[arg-type]
            if runtime.packed().qweight.ne(packed.qweight).any():
                raise AssertionError(f"{packed.name}: layout {runtime.layout} does not give the codes back")
            self.prepared[key] = kernels.dequantize(packed, torch.float64), runtime
        return self.prepared[key]

    def names(self, runtime: Runtime, m: int, dtype: torch.dtype) -> list[str]:
        """Backends to time: the one chosen, or all that could run."""
        case = dispatch.case_of(runtime, m, dtype, "cpu")
        if not self.options.every_backend:
            return [dispatch.choose(case).backend]
        rows = [row for row in kernels.table() if row.op == "wna16" and not row.why_not(case, forced=True)]
        return list(dict.fromkeys(row.backend for row in rows if row.backend != "reference"))

    def candidates(self, m: int) -> Iterator[Candidate]:
        dtypes = (torch.float32,) if self.options.quick else (torch.float32, torch.bfloat16)
        for bits, group in self.formats:
            for dtype in dtypes:
                for memory in ("compact", "cached"):
                    name = str(dtype).removeprefix("torch.")
                    head = Row("wna16", bits, group, m, self.n, self.k, name, "", memory)
                    if self.options.wants(head, any_backend=True):
                        yield from self._of(head, dtype, memory)

    def _of(self, head: Row, dtype: torch.dtype, memory: str) -> Iterator[Candidate]:
        exact, runtime = self.weight(head.bits, head.group, memory)
        x = torch.randn(head.M, self.k, generator=torch.Generator().manual_seed(head.M))
        x[:, self.k // 3] *= 30
        x = x.to(dtype)
        held = round(8 * runtime.nbytes / (self.n * self.k), 2)
        least = TARGETS.get((head.bits, memory), {}).get(head.M)
        for name in self.names(runtime, head.M, dtype):
            target = None if least is None else least[self.n * self.k < 4096 * 4096]
            row = Row(**(asdict(head) | {"backend": name, "bits_held": held, "target": target}))
            if not self.options.wants(row):
                continue
            call = _call(x, runtime, name if self.options.every_backend else None)
            row.error = relative_error(call(), x, exact)
            if not row.error <= LIMIT:
                row.ok = f"wrong: error {row.error:.1e} is above {LIMIT:.0e}"
            yield row, call


def _cpu(options: Options) -> Iterator[Row]:
    shapes = SHAPES[1:] if options.quick else SHAPES
    for n, k in shapes:
        shape = _CpuShape(n, k, options)
        for m in (1, 128) if options.quick else ROWS:
            x = torch.randn(m, k)
            base = partial(torch.nn.functional.linear, x, shape.float_weight)
            yield from timed(base, partial(shape.candidates, m), options)


def timed(base: Callable[[], Any], candidates: Callable[[], Iterator[Candidate]], options: Options) -> list[Row]:
    """Rows of all candidates, timed in the same turns as ``base``; those found wrong are passed on untimed.

    Args:
        base: the float operation.
        candidates: makes them, and checks them (under one thread and without fallbacks).
    """
    with environment(threads=1, HFQ_STRICT="1"), torch.inference_mode():
        found = list(candidates())
        good = [(row, call) for row, call in found if not row.ok]
        calls = [base, *(call for _, call in good)]
        times = best_of(calls, options.rounds, time.thread_time) if good else []
    walls: list[float] = []
    idle = os.getloadavg()[0] < 1 if options.all_cores is None else options.all_cores
    if good and idle and (os.cpu_count() or 1) > 1:
        with environment(threads=os.cpu_count(), HFQ_STRICT="1"), torch.inference_mode():
            walls = best_of(calls, options.rounds, time.perf_counter)
    for i, (row, _) in enumerate(good, 1):
        measured(row, times[i], times[0])
        if walls:
            row.wall_us, row.wall_ratio = walls[i], walls[0] / walls[i]
    return [row for row, _ in found]


def measured(row: Row, spent: float, base: float) -> None:
    """Write the time of a row and of its baseline (microseconds), and whether it reaches its target."""
    row.us, row.baseline_us, row.ratio = spent, base, base / spent
    if row.target is not None:
        row.ok = "y" if row.ratio >= row.target else "n"


def _integer(options: Options) -> Iterator[Row]:
    from hfq.evaluation import bench_integer

    yield from bench_integer.cpu(options)


def _cache(options: Options) -> Iterator[Row]:
    from hfq.evaluation import bench_kv

    yield from bench_kv.cpu(options)


def _convolutions(options: Options) -> Iterator[Row]:
    from hfq.evaluation import bench_conv

    yield from bench_conv.cpu(options)


def _attention(options: Options) -> Iterator[Row]:
    from hfq.evaluation import bench_attention

    yield from bench_attention.cpu(options)


def _cuda(options: Options) -> Iterator[Row]:
    """Rows of the Triton kernels, measured as CUDA graphs that rotate over more weights than the L2 cache holds."""
    from hfq.kernels.triton import benchmark

    cases = [case for case in benchmark.cases() if not options.quick or case[2] in (1, 16)]
    for case in cases:
        bits, group, m, n, k = case
        if not options.wants(Row("wna16", bits, group, m, n, k, "bf16", "triton", "", device="cuda")):
            continue
        found, _ = benchmark.run_case(case, False, time.monotonic())
        yield Row(
            "wna16", bits, group, m, n, k, found["dtype"], "triton", found["config"], us=found.get("us"),
            baseline_us=found.get("bf16_us"), ratio=found.get("ratio"), error=found["relerr"], target=found["target"],
            ok=found["ok"], device="cuda",
        )


def _cuda_integer(options: Options) -> Iterator[Row]:
    """Integer products with the quantization of their input, producers, and attention over packed keys and values."""
    from hfq.kernels.triton import benchmark_integer

    for case in benchmark_integer.cases():
        op, bits, group, m, n, k = case
        head = Row(op, bits, group, m, n, k, "bf16", "triton", "", device="cuda")
        if not options.wants(head) or (options.quick and (m > 16 or n * k > 2**24)):
            continue
        found = benchmark_integer.run_case(case)
        yield Row(
            op, bits, group, m, n, k, "bf16", "triton", found["config"], us=found["us"], baseline_us=found["base_us"],
            ratio=found.get("ratio"), error=found["relerr"], target=found["target"], ok=found["ok"], device="cuda",
            floor_us=found["floor_us"], library_us=found.get("library_us"),
        )


# What is measured on a device: add to the list of a device to have more operations in the table.
SUITES: dict[str, list[Callable[[Options], Iterator[Row]]]] = {
    "cpu": [_cpu, _integer, _cache, _convolutions, _attention], "cuda": [_cuda, _cuda_integer],
}


def run(
    device: str = "cpu", *, quick: bool = False, only: str | Sequence[str] | None = None, rounds: int = ROUNDS,
    every_backend: bool = False, all_cores: bool | None = None, on_row: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Measure the kernels of ``device``.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        quick: small shapes and few formats (under a minute on a CPU).
        only: words that a row's label must have, all of them: ``"w4"``, ``"M1"``, ``"576x1536"``, ``"compact"``,
            ``"bfloat16"``, or the name of a backend.
        rounds: turns, of which the best counts.
        every_backend: time each backend that can serve a case instead of the chosen one (to find thresholds).
        all_cores: also take wall time with all cores; default when the load average is below 1.
        on_row: called with each row as it is measured.

    Raises:
        ConfigError: an unknown device, or no such device on this machine.
    """
    if device not in SUITES:
        raise ConfigError(f"device={device!r}: one of {sorted(SUITES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda': torch finds no CUDA device on this machine")
    words = tuple(only.split()) if isinstance(only, str) else tuple(only or ())
    options = Options(quick, words, rounds, every_backend, all_cores)
    rows = []
    for suite in SUITES[device]:
        for row in suite(options):
            rows.append(row)
            if on_row is not None:
                on_row(row)
    return rows
