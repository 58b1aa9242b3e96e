"""Rows of the kernel benchmark: where they were measured, as a table, as JSON, and against the best known ones."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import hfq
from hfq.kernels.isa import isa

__all__ = ["BASELINE", "Row", "about", "format_table", "regressions", "to_json"]

BASELINE = {"cpu": "F.linear float32", "cuda": "F.linear bfloat16"}


@dataclass
class Row:
    """One measured case. Times in microseconds; ``ratio`` is the baseline's time over this one's (more is faster).

    ``ok``: "y" or "n" where there is a target, empty where there is none, else why the case was not timed.
    """

    op: str
    bits: int
    group: int
    M: int
    N: int
    K: int
    dtype: str
    backend: str
    config: str
    us: float | None = None
    baseline_us: float | None = None
    ratio: float | None = None
    wall_us: float | None = None
    wall_ratio: float | None = None
    error: float | None = None
    bits_held: float | None = None
    target: float | None = None
    ok: str = ""
    device: str = "cpu"
    floor_us: float | None = None  # what the memory or the arithmetic of the device takes at least
    library_us: float | None = None  # the vendor's product of integers alone

    @property
    def label(self) -> str:
        """What ``only`` is matched against, and the key of the regression file."""
        parts = f"{self.op} w{self.bits} g{self.group} M{self.M} {self.N}x{self.K} {self.dtype} {self.config}"
        return f"{self.device} {parts} {self.backend}"


def _revision() -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=Path(hfq.__file__).parent, capture_output=True, text=True,
            timeout=10, check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def about(device: str = "cpu") -> dict[str, Any]:
    """Where and with what the rows were measured."""
    found: dict[str, Any] = {
        "hfq": hfq.__version__, "revision": _revision(), "torch": torch.__version__,
        "python": platform.python_version(), "device": device, "baseline": BASELINE[device],
    }
    if device == "cuda":
        return found | {"name": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found | {
        "name": _cpu_name(), "cores": os.cpu_count(), "isa": isa(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load": [round(value, 2) for value in os.getloadavg()],
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def format_table(rows: Sequence[Row], device: str = "cpu") -> str:
    """One line a case, after a line that names the machine and the baseline."""
    where = about(device)
    head = (f"{'op':<6} {'bits':>4} {'group':>5} {'M':>5} {'N':>6} {'K':>6} {'dtype':<9} {'backend':<17} "
            f"{'config':<10} {'held':>5} {'us':>9} {'base_us':>9} {'ratio':>6} {'wall':>6} {'error':>8} "
            f"{'target':>6} ok")
    lines = [", ".join(f"{key} {value}" for key, value in where.items()), head]
    for r in rows:
        text = (f"{r.op:<6} {r.bits:>4} {r.group:>5} {r.M:>5} {r.N:>6} {r.K:>6} {r.dtype:<9} {r.backend:<17} "
                f"{r.config:<10} {_number(r.bits_held, 5, 2)} {_number(r.us, 9, 1)} {_number(r.baseline_us, 9, 1)} "
                f"{_number(r.ratio, 6, 2)} {_number(r.wall_ratio, 6, 2)} ")
        error = "-" if r.error is None else f"{r.error:.1e}"
        lines.append(text + f"{error:>8} {_number(r.target, 6, 2)} {r.ok}")
    return "\n".join(lines)


def _number(value: float | None, width: int, digits: int) -> str:
    return f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"


def to_json(rows: Sequence[Row], device: str = "cpu") -> str:
    return json.dumps({"about": about(device), "rows": [asdict(row) for row in rows]}, indent=1)


def regressions(rows: Sequence[Row], path: str | Path, *, tolerance: float = 0.1) -> list[str]:
    """Labels of rows whose ratio is more than ``tolerance`` below the best known one; the file keeps the best.

    Args:
        rows: measured rows.
        path: JSON file of best ratios by machine and label; made if it is missing.
    """
    path = Path(path)
    known: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    worse = []
    for row in rows:
        if row.ratio is None:
            continue
        where = about(row.device)
        best = known.setdefault(f"{where['name']} {where.get('isa', '')}".strip(), {})
        if row.ratio < (1 - tolerance) * best.get(row.label, 0.0):
            worse.append(row.label)
        best[row.label] = max(best.get(row.label, 0.0), round(row.ratio, 3))
    path.write_text(json.dumps(known, indent=1, sort_keys=True))
    return worse
