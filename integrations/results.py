"""Measured numbers of one or more models, in one form for the terminal, the model card and the file beside the weights.

A number is here because a run measured it; what was not measured is absent and shows as a dash.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hfq.errors import CheckpointError

__all__ = ["COLUMNS", "RESULTS_FILE", "Results", "columns_of", "format_value", "machine", "markdown"]

RESULTS_FILE = "hfq_results.json"


def _bytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


# key of a row -> heading, how a value is written
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "name": ("model", str),
    "accuracy": ("top-1", lambda v: f"{100 * v:.2f} %"),
    "agreement": ("same class as float", lambda v: f"{100 * v:.2f} %"),
    "perplexity": ("perplexity", _perplexity),
    "fid": ("FID", lambda v: f"{v:.2f}"),
    "inception_fid": ("FID (Inception)", lambda v: f"{v:.2f}"),
    "kid": ("KID", lambda v: f"{v:.4f}"),
    "digits": ("digits as asked", lambda v: f"{100 * v:.1f} %"),
    "motion": ("motion as asked", lambda v: f"{100 * v:.1f} %"),
    "psnr": ("PSNR to float", lambda v: f"{v:.1f} dB"),
    "feature_distance": ("distance to float", lambda v: f"{v:.3f}"),
    "kl": ("KL to float", lambda v: f"{v:.4f}"),
    "top1": ("same top token", lambda v: f"{100 * v:.1f} %"),
    "bits_per_weight": ("bits per weight", lambda v: f"{v:.3f}"),
    "cache_bits": ("bits per cached number", lambda v: f"{v:.3f}"),
    "disk_bytes": ("on disk", _bytes),
    "quantize_seconds": ("quantized in", lambda v: f"{v:.1f} s"),
    "cpu_seconds": ("CPU time", lambda v: f"{v:.0f} s"),
    "draw_seconds": ("drawing, CPU time", lambda v: f"{v:.0f} s"),
    "peak_memory_bytes": ("peak memory", _bytes),
    "decode": ("decode tokens/s", lambda v: f"{v:.1f}"),
    "decode_ratio": ("decode ratio", lambda v: f"{v:.2f}"),
    "seconds_per_call": ("time of a call", lambda v: f"{1000 * v:.1f} ms"),
    "speed_ratio": ("speed ratio", lambda v: f"{v:.2f}"),
    "prefill_ratio": ("prefill ratio", lambda v: f"{v:.2f}"),
    "kernel": ("kernel", str),
    "shares": ("most time in", lambda v: ", ".join(f"{name} {100 * part:.0f} %" for name, part in v.items())),
}


@dataclass
class Results:
    """What was measured, on what, where.

    Attributes:
        base_model: Hub id of the float model; empty if it has none.
        license: licence of the base model, as the Hub writes it.
        dataset: what the numbers were measured on, in a few words.
        protocol: how, in a sentence.
        machine: CPU, GPU, versions.
        rows: one mapping a model with keys of :data:`COLUMNS`; the row of this very checkpoint has ``"this": True``.
        samples: name of a row to a text it generated.
    """

    base_model: str = ""
    license: str = ""
    dataset: str = ""
    protocol: str = ""
    machine: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)
    samples: dict[str, str] = field(default_factory=dict)

    @property
    def this(self) -> dict[str, Any] | None:
        return next((row for row in self.rows if row.get("this")), None)

    def save(self, folder: str | os.PathLike[str]) -> None:
        text = json.dumps(asdict(self), indent=1, allow_nan=False)
        (Path(folder) / RESULTS_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Results:
        """The results in ``folder``; empty ones if there are none.

        Raises:
            CheckpointError: the file is not one of results.
        """
        path = Path(folder) / RESULTS_FILE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            known = {f.name for f in fields(cls)}
            return cls(**{key: value for key, value in data.items() if key in known})
        except FileNotFoundError:
            return cls()
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is not a file of results: {error}; remove it and measure again") from None


def columns_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The columns that at least one row has, in order."""
    present = {key for row in rows for key, value in row.items() if value is not None}
    return [key for key in COLUMNS if key in present]


def format_value(key: str, value: Any) -> str:
    return "–" if value is None else COLUMNS[key][1](value)


def markdown(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows as a table."""
    rows = list(rows)
    columns = columns_of(rows)
    lines = ["| " + " | ".join(COLUMNS[key][0] for key in columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(format_value(key, row.get(key)) for key in columns) + " |" for row in rows]
    return "\n".join(lines)


def machine() -> str:
    """Processor, cores used, GPU and versions of this process."""
    import torch

    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # not Linux: the architecture has to do
    parts = [f"{name}, {torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join([*parts, f"torch {torch.__version__}", f"Python {platform.python_version()}"])
