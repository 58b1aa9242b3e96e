"""Reports of pairs as text: one line a kind, for one model or for several."""

from __future__ import annotations

from collections.abc import Mapping

from hfq.graph.links import Pair, PairReport

__all__ = ["summary", "table"]


def summary(report: PairReport) -> list[dict[str, str]]:
    """One row a kind: how many pairs were proven and refused, an example, and the reasons of refusal.

    Names are shown without the block they lie in, reasons once however many blocks they occur in.
    """
    rows = []
    for kind, (proven, refused) in report.counts().items():
        pairs = [pair for pair in report if pair.kind == kind]
        examples = list(dict.fromkeys(_shape(pair) for pair in pairs if pair.proven))
        reasons = list(dict.fromkeys(_local(pair.reason, pair) for pair in pairs if not pair.proven))
        rows.append({"kind": kind, "proven": str(proven), "refused": str(refused), "example": "; ".join(examples[:3]),
                     "reason": "; ".join(reasons[:3])})
    return rows


def table(reports: Mapping[str, PairReport], *, details: bool = False) -> str:
    """A text table: models by kinds, "proven/refused" in each cell; with ``details`` examples and reasons below.

    Args:
        reports: by model.
        details: say what the pairs are and why pairs were refused.
    """
    kinds = list(dict.fromkeys(kind for report in reports.values() for kind in report.counts()))
    width = max((len(name) for name in (*reports, "model")), default=5)
    lines = [" ".join([f"{'model':<{width}}", *(f"{kind:>9}" for kind in kinds)])]
    for name, report in reports.items():
        counts = report.counts()
        cells = [f"{counts[kind][0]}/{counts[kind][1]}" if kind in counts else "-" for kind in kinds]
        lines.append(" ".join([f"{name:<{width}}", *(f"{cell:>9}" for cell in cells)]))
        if details:
            for row in summary(report):
                lines += [f"    {row['kind']}: {row['example']}"] if row["example"] else []
                lines += [f"    {row['kind']} refused: {row['reason']}"] if row["reason"] else []
    return "\n".join(lines)


def _shape(pair: Pair) -> str:
    if pair.kind == "rotation":
        ones = ", keeping the ones vector" if pair.fix_ones else ""
        return f"{pair.place} ({pair.width} channels, {len(pair.blocks)} blocks{ones})"
    arrow = " <-> " if pair.kind == "qk" else " -> "
    right = ", ".join(_local(str(link), pair) for link in (*pair.readers, *pair.partners))
    return ", ".join(_local(str(link), pair) for link in pair.sources) + arrow + right


def _local(text: str, pair: Pair) -> str:
    """``text`` without the name of the block."""
    for block in (pair.place, *pair.blocks):
        text = text.replace(f" in {block}", "") if text.endswith(f" in {block}") else text.replace(f"{block}.", "")
    return text
