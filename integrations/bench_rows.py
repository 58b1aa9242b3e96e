"""Rows of a table measured one by one, each in a process of its own, and kept in a JSON file as they are finished.

:mod:`hfq.integrations.bench_methods`, :mod:`hfq.integrations.bench_vision` and
:mod:`hfq.integrations.bench_diffusion` say what a row is; a run that finds rows in its file measures only what is
missing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hfq.errors import ConfigError, HfqError, QuantizationError
from hfq.integrations.bench_tables import Case
from hfq.integrations.results import markdown

__all__ = ["FLOAT", "child", "chosen", "pivot", "quantized_row", "read", "run", "table"]

FLOAT = "–"  # the width of the float model in the name of a row


def chosen(tables: Mapping[str, Callable[[str], list[Case]]], model: str, names: Sequence[str]) -> list[Case]:
    """The rows of the tables ``names`` for ``model``, each once.

    Raises:
        ConfigError: an unknown table, or no row because no method of it is there yet.
    """
    unknown = [name for name in names if name not in tables]
    if unknown:
        raise ConfigError(f"--table {unknown[0]!r}: {', '.join(tables)} are the tables of such models")
    found = {case.name: case for name in names for case in tables[name](model)}
    if not found:
        raise ConfigError(f"--table {','.join(names)}: this version of hfq has no method for its rows")
    return list(found.values())


def run(
    cases: Iterable[Case], inputs: Mapping[str, Any], output: Path, *, module: str, protocol: str,
    progress: Callable[[int, str], Any] | None = None,
) -> list[dict[str, Any]]:
    """Measure every case that ``output`` does not hold yet, one child process each, and write the rows to ``output``.

    Args:
        inputs: what all rows are measured on; JSON values.
        module: the module that a child runs; it calls :func:`child`.
        protocol: a sentence that is kept with the rows.

    Raises:
        QuantizationError: a child failed; its last lines are in the message, and the rows before it are kept.
    """
    cases = list(cases)
    known = {row["name"]: row for row in read(output)}
    missing = [case for case in cases if case.name not in known]
    bar = None if progress is None else progress(len(missing), "methods")
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(folder) / "inputs.json"
        shared.write_text(json.dumps(inputs))
        for case in missing:
            known[case.name] = _measured(case, shared, module)
            _write(output, list(known.values()), protocol)
            if bar is not None:
                bar.update()
    if bar is not None:
        bar.close()
    return [known[case.name] for case in cases]


def child(measure: Callable[[Case, dict[str, Any]], dict[str, Any]]) -> int:
    """The main function of a child: ``measure(case, inputs)`` gives the row."""
    shared = json.loads(Path(sys.argv[2]).read_text())
    try:
        row = measure(Case(**json.loads(sys.argv[1])), shared)
    except HfqError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    sys.stdout.write(json.dumps(row) + "\n")
    return 0


def quantized_row(report: Any, config: Any, cpu_seconds: float) -> dict[str, Any]:
    """What every row says about a quantization."""
    return {
        "bits_per_weight": report.bits_per_weight(),
        "quantize_seconds": report.totals["seconds"],
        "cpu_seconds": round(cpu_seconds, 1),  # other work on the machine hardly shows
        "peak_memory_bytes": report.totals["peak_memory_bytes"],
        "cache_bits": next((line.bits for line in report.packed if line.kind == "cache"), None),
        "kernel": ", ".join(sorted({line.kernel for line in report.packed if line.kernel})) or None,
        "details": {"config": config.to_dict() | {"manifest": None, "summary": None}, "totals": report.totals},
    }


def table(rows: Sequence[Mapping[str, Any]], protocol: str) -> str:
    """The rows in Markdown, with the protocol and the machine under them."""
    machines = sorted({row["machine"] for row in rows if row.get("machine")})
    return "\n".join([markdown(rows), "", f"{protocol}. Measured on {'; '.join(machines)}."])


def pivot(rows: Sequence[Mapping[str, Any]], cell: Callable[[Mapping[str, Any]], str]) -> str:
    """One line a method, one column a model and width: rows are called "model: method, width".

    The float model's own column is called like the model.
    """
    cells: dict[tuple[str, str], str] = {}
    columns: list[str] = []
    labels: list[str] = []
    for row in rows:
        model, _, rest = row["name"].partition(": ")
        label, _, width = rest.rpartition(", ")
        column = model if width == FLOAT else f"{model} {width}"
        cells[label, column] = cell(row)
        columns += [column] if column not in columns else []
        labels += [label] if label not in labels else []
    lines = ["| method | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
    lines += [f"| {label} | " + " | ".join(cells.get((label, column), "–") for column in columns) + " |"
              for label in labels]
    return "\n".join(lines)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; none if it is not there.

    Raises:
        ConfigError: the file holds something else.
    """
    if not path.exists():
        return []
    try:
        return json.loads(path.read_text())["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a file of measured rows ({error}): remove it or name another") from None


def _write(path: Path, rows: Sequence[Mapping[str, Any]], protocol: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"protocol": protocol, "rows": rows}, indent=1, sort_keys=True) + "\n")
    os.replace(temporary, path)


def _measured(case: Case, shared: Path, module: str) -> dict[str, Any]:
    command = [sys.executable, "-P", "-m", module, json.dumps(asdict(case)), str(shared)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-3:])
        raise QuantizationError(f"{case.name}: the measuring process ended with {done.returncode}: {tail}")
    return json.loads(done.stdout.splitlines()[-1])
