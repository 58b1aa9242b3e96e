"""What a quantization run did: one row a module, with the reason wherever the module did not get what was asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Report", "Row"]


@dataclass
class Row:
    """One module.

    Attributes:
        module: qualified name in the model.
        kind: site kind ("linear", "embedding", "experts", ...).
        status: "packed" (holds codes), "float" (left alone on purpose), "refused" (asked for, not done) or "attached"
            (a float part that the method added; its bits count).
        reason: why a module is not packed, or packed differently than asked; empty otherwise.
        asked: what the config asked for this module (bits, group_size, ...).
        bits: stored bits per weight with all metadata.
        numel: number of weights.
        error: relative error of the weight, ``||W - Q|| / ||W||``.
        output_error: relative error of the module's (or block's) output on the calibration data.
        tokens: rows of calibration input that the module saw.
        kernel: backend that serves the module on its device.
        extra: whatever the method adds (clip share, damping tries, ...); JSON values only.
    """

    module: str
    kind: str = "linear"
    status: str = "packed"
    reason: str = ""
    asked: dict[str, Any] = field(default_factory=dict)
    bits: float | None = None
    numel: int = 0
    error: float | None = None
    output_error: float | None = None
    tokens: int | None = None
    kernel: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Report:
    """Rows by module name, notes, and whole-run quantities. JSON in, JSON out."""

    method: str = ""
    rows: dict[str, Row] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    pairs: list[dict[str, Any]] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)
    totals: dict[str, Any] = field(default_factory=dict)

    def add(self, row: Row) -> Row:
        self.rows[row.module] = row
        return row

    def leave(
        self, module: str, reason: str, *, kind: str = "linear", numel: int = 0, bits: float | None = None
    ) -> None:
        """Record a module that stays float on purpose."""
        self.add(Row(module, kind=kind, status="float", reason=reason, numel=numel, bits=bits))

    def refuse(
        self, module: str, reason: str, *, kind: str = "linear", asked: dict[str, Any] | None = None, numel: int = 0
    ) -> None:
        """Record a module that was asked for and not done: an error at the end unless ``allow_partial=True``."""
        self.add(Row(module, kind=kind, status="refused", reason=reason, asked=asked or {}, numel=numel))

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    @property
    def packed(self) -> list[Row]:
        return [row for row in self.rows.values() if row.status == "packed"]

    @property
    def attached(self) -> list[Row]:
        """Float parts that were added; ``bits`` and ``numel`` are of the part."""
        return [row for row in self.rows.values() if row.status == "attached"]

    @property
    def refused(self) -> list[Row]:
        return [row for row in self.rows.values() if row.status == "refused"]

    def bits_per_weight(self) -> float | None:
        """Mean stored bits of the packed weights, with metadata and attached parts; ``None`` if nothing is packed."""
        total = sum(row.numel for row in self.packed if row.bits is not None and row.numel)
        return self.stored_bits() / total if total else None

    def stored_bits(self) -> float:
        """Bits that the packed weights and the attached parts take together."""
        return sum(row.bits * row.numel for row in (*self.packed, *self.attached) if row.bits is not None)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows.values())

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        data["rows"] = list(data["rows"].values())
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        rows = {row["module"]: Row(**row) for row in data.get("rows", [])}
        return cls(**{**data, "rows": rows})

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, sort_keys=True, allow_nan=False)

    def __str__(self) -> str:
        bits = self.bits_per_weight()
        counts = {s: sum(r.status == s for r in self) for s in ("packed", "float", "refused")}
        lines = [f"{self.method or 'hfq'}: " + ", ".join(f"{n} {s}" for s, n in counts.items() if n)
                 + (f"; {bits:.3f} bits per packed weight" if bits else "")]
        lines += [f"  {row.module}: {row.status}, {row.reason}" for row in self if row.reason]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)
