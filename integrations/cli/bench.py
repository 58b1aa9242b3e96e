"""``hfq bench kernels`` and ``hfq bench methods``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from hfq.errors import ConfigError, KernelError
from hfq.integrations.cli import screen

__all__ = ["register"]

bench = typer.Typer(no_args_is_help=True, help="Measure kernels and methods on this machine.")
SHAPES = [(4096, 4096), (576, 1536), (1536, 576)]  # out, in


@bench.command()
def kernels(
    bits: str = typer.Option("2,3,4,8", "--bits", help="Widths, separated by commas."),
    tokens: str = typer.Option("1,128,512", "--rows", help="Rows of the input."),
    group_size: int = typer.Option(64, "--group-size", "-g"),
    seconds: float = typer.Option(0.3, "--seconds", help="Time spent on each measurement."),
    output: Path = typer.Option(None, "--output", "-o", help="Also write the rows as JSON."),
) -> None:
    """Time the packed product against the float one, in the same process; wrong results are not timed.

    [dim]hfq bench kernels --bits 4 --rows 1,512[/]
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    widths, counts = _numbers(bits, "--bits"), _numbers(tokens, "--rows")
    rows = [
        kernel_row(shape, width, count, group_size, memory, device, dtype, seconds)
        for shape in SHAPES for width in widths for count in counts
        for memory in (("compact", "cached") if device == "cpu" else ("compact",))
    ]
    headings = ["out×in", "bits", "rows", "memory", "kernel", "float µs", "packed µs", "ratio", "bytes", "error"]
    cells = [[f"{r['out']}×{r['in']}", str(r["bits"]), str(r["rows"]), r["memory"], r["kernel"], f"{r['float_us']:.0f}",
              f"{r['packed_us']:.0f}", f"{r['ratio']:.2f}", str(r["bytes"]), f"{r['error']:.1e}"] for r in rows]
    screen.table(headings, cells, title=_where(), numbers=[1, 2, 5, 6, 7, 8, 9])
    _write(output, rows)


def kernel_row(shape: tuple[int, int], bits: int, count: int, group_size: int, memory: Any, device: str, dtype: Any,
               seconds: float) -> dict[str, Any]:
    """Verify one packed product against its dequantized weight, then time both.

    Raises:
        KernelError: the packed product is wrong.
    """
    import torch
    from torch.nn import functional as F

    from hfq import kernels as ops
    from hfq.formats import QuantSpec, affine, bitpack

    out, width = shape
    torch.manual_seed(0)
    weight = torch.randn(out, width) / width**0.5
    spec = QuantSpec(bits=bits, group_size=group_size)
    codes = affine.quantize(weight, spec)
    packed = ops.PackedWeight(
        bitpack.pack(codes.codes, bits).to(device), codes.scale.to(device),
        None if codes.zero_point is None else codes.zero_point.to(device), spec, width, out,
    )
    dense = ops.dequantize(packed, torch.float32).to(dtype)
    runtime = ops.prepare(packed, dtype=dtype, memory=memory)
    x = torch.randn(count, width, device=device, dtype=dtype)
    expected, found = F.linear(x.float(), dense.float()), ops.linear(x, runtime).float()
    error = ((found - expected).norm() / expected.norm()).item()
    # Some backends multiply in bfloat16 (8 bits of mantissa, 2^-8 an element); a wrong code is off by 0.1 and more.
    if not error < 2**-7:
        raise KernelError(f"{bits} bits, {out}x{width}, {count} rows: relative error {error:.2e}, so it is not timed")
    chosen = next(choice.backend for choice in ops.explain(runtime, count) if choice.chosen)
    float_us, packed_us = _turns([lambda: F.linear(x, dense), lambda: ops.linear(x, runtime)], seconds, device)
    return {"out": out, "in": width, "bits": bits, "rows": count, "memory": memory, "kernel": chosen,
            "float_us": float_us, "packed_us": packed_us, "ratio": float_us / packed_us, "bytes": runtime.nbytes,
            "error": error}


def _turns(calls: list[Callable[[], Any]], seconds: float, device: str) -> list[float]:
    """Best microseconds of each call; they take turns, so that a busy machine slows all of them."""
    import torch

    best = [float("inf")] * len(calls)
    with torch.no_grad():
        for call in calls:
            call()
        stop, turns = time.perf_counter() + seconds, 0
        while time.perf_counter() < stop or turns < 3:
            for index, call in enumerate(calls):
                started = time.perf_counter()
                call()
                if device == "cuda":
                    torch.cuda.synchronize()
                best[index] = min(best[index], (time.perf_counter() - started) * 1e6)
            turns += 1
    return best


@bench.command()
def methods(
    model: str = typer.Argument("demo", help="Float model: folder, Hub id, or demo."),
    tables: str = typer.Option("", "--table", "-t", help="Prepared tables, separated by commas: weights, rsq, ..."),
    names: str = typer.Option("rtn,gptq", "--methods", "-m", help="Without --table: methods, separated by commas."),
    bits: str = typer.Option("4,3", "--bits", help="Widths of these methods."),
    group_size: int = typer.Option(64, "--group-size", "-g"),
    data: str = typer.Option("demo", "--data", "-d", help="Text for calibration and evaluation."),
    samples: int = typer.Option(64, "--samples", help="Calibration windows of these methods."),
    seqlen: int = typer.Option(512, "--seqlen", help="Tokens a window."),
    windows: int = typer.Option(24, "--windows", help="Windows to evaluate on."),
    rescaled: bool = typer.Option(False, "--rescaled", help="On the exactly rescaled model (same function)."),
    options: list[str] = typer.Option([], "--set", "-s", metavar="KEY=VALUE", help="Options of the methods."),
    output: Path = typer.Option(Path("out/bench-methods.json"), "--output", "-o", help="Rows; found ones are kept."),
) -> None:
    """Quantize one model in several ways, each in its own process, and put them in one table.

    A run that finds rows in the output file measures only what is missing.

    [dim]hfq bench methods demo --table weights,rsq --output out/table.json[/]

    [dim]hfq bench methods demo --methods rtn,gptq --bits 4,3,2 --rescaled[/]
    """
    from hfq.integrations import bench_methods, environment, measure

    if tables:
        wanted = [name.strip() for name in tables.split(",")]
        unknown = [name for name in wanted if name not in bench_methods.TABLES]
        if unknown:
            raise ConfigError(f"--table {unknown[0]!r}: {', '.join(bench_methods.TABLES)} are the tables")
        cases = list({case.name: case for name in wanted for case in bench_methods.TABLES[name]}.values())
    else:
        cases = _cases(names, _numbers(bits, "--bits"), group_size, samples, seqlen, options, rescaled)
    text = measure.open_text(data)
    test = text.windows(measure.load_tokenizer(model), windows, seqlen)
    rows = bench_methods.run(cases, measure.resolve(model), text.train, test, output, progress=environment.progress)
    screen.results_table(rows, title=f"{model}; {text.title}; {_where()}")
    screen.say(f"rows in {output}")


def _cases(names: str, widths: list[int], group_size: int, samples: int, seqlen: int, options: list[str],
           rescaled: bool) -> list[Any]:
    """The float model and every method at every width; the options are checked before anything runs."""
    from hfq.integrations.bench_methods import Case
    from hfq.integrations.cli.quantize import options_of
    from hfq.methods import config_class

    given, suffix = options_of(options), ", rescaled" if rescaled else ""
    cases = [Case(f"float{suffix}", rescaled=rescaled)]
    for method in (name.strip() for name in names.split(",")):
        cls = config_class(method)
        calibrated = {"calibration_samples": samples, "calibration_seqlen": seqlen} if cls.needs_calibration else {}
        for width in widths:
            chosen = {"bits": width, "group_size": group_size, **calibrated, **given}
            cls(**chosen)
            extra = "".join(f", {key}={value}" for key, value in given.items())
            cases.append(Case(f"{method}, {width} bits{extra}{suffix}", method, chosen, rescaled))
    return cases


def _numbers(text: str, label: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{label} {text!r}: whole numbers separated by commas are needed") from None


def _where() -> str:
    from hfq.integrations.results import machine

    return machine()


def _write(path: Path | None, rows: list[dict[str, Any]]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": _where(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


def register(app: Any) -> None:
    app.add_typer(bench, name="bench")
