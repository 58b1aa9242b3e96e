"""``hfq bench methods``: quality and cost of methods on one model, each row measured in a process of its own.

A row is a name, the fields of a Config and, where asked, an exact rescaling of the float model. Rows are written to a
JSON file as they are finished; a run that finds the file measures only what is missing.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hfq.integrations import bench_rows, bench_tables
from hfq.integrations.bench_tables import Case
from hfq.integrations.bench_tables import case as _case
from hfq.integrations.results import machine, markdown

__all__ = ["PROTOCOL", "TABLES", "Case", "measure", "run", "table"]

PROTOCOL = (
    "24 windows of 512 tokens of the test articles, no overlap, mean next-token loss, fp32 model; "
    "calibration: 64 windows of 512 tokens of the training articles (seed 0); output head and embedding float"
)
EVAL_WINDOWS = 24
# The solver at its best, the same for every row that uses it.
GPTQ = {
    "clip": "mse", "clip_norm": 2.0, "clip_grid": 40, "weigh_clip": True, "act_order": True, "static_groups": True,
}
SEARCH = {**GPTQ, "refine": 4}
RSQ = {"r_min": 0.1, **SEARCH}
FLEXROUND = {
    "start": "gptq", "steps": 100, "lr": 5e-4, "scale_lr": 5e-5, "batch_size": 4, "mixed_precision": True,
}


def _layerwise(bits: tuple[int, int], target: float, backend: dict[str, Any]) -> list[Case]:
    common = {"high_bits": bits[0], "low_bits": bits[1], "target_bits": target, "backend": backend}
    orders: list[tuple[str, dict[str, Any]]] = [("LIM", {"score": "lim"}), ("ZD", {"score": "zd"})]
    orders.append(("reversed LIM", {"score": "lim", "order": "reversed"}))
    orders += [(f"random {seed}", {"order": "random", "seed": seed}) for seed in range(3)]
    label = f"layer-wise {bits[0]}/{bits[1]} at {target} over {backend['method']}"
    return [_case(f"{label}, {name}", "layerwise_quant", **common, **more)
            for name, more in orders]


TABLES: dict[str, list[Case]] = {
    "weights": [
        Case("float"),
        *[_case(f"round to nearest, {bits} bits", "rtn", bits=bits) for bits in (4, 3, 2)],
        *[_case(f"GPTQ, {bits} bits", "gptq", bits=bits, **GPTQ) for bits in (4, 3, 2)],
        *[_case(f"RSQ, {bits} bits", "rsq", bits=bits, **RSQ) for bits in (4, 3, 2)],
        *[_case(f"FlexRound, {bits} bits", "flexround", bits=bits, **FLEXROUND) for bits in (4, 3, 2)],
    ],
    "rsq": [
        _case("GPTQ of RSQ alone", "rsq", bits=4, rotate=False, strategy="uniform", **SEARCH),
        _case("+ token importance", "rsq", bits=4, rotate=False, **RSQ),
        _case("+ rotation", "rsq", bits=4, strategy="uniform", **SEARCH),
        _case("+ both", "rsq", bits=4, **RSQ),
    ],
    "rescaled": [
        Case("float, rescaled", rescaled=True),
        _case("round to nearest, 4 bits, rescaled", "rtn", bits=4, rescaled=True),
        _case("GPTQ, 4 bits, rescaled", "gptq", bits=4, **GPTQ, rescaled=True),
        _case("RSQ, 4 bits, rescaled", "rsq", bits=4, rescaled=True, **RSQ),
        _case("FlexRound, 4 bits, rescaled", "flexround", bits=4, rescaled=True, **FLEXROUND),
    ],
    "layerwise": [
        *[_case(f"round to nearest, {bits} bits", "rtn", bits=bits) for bits in (4, 3)],
        *_layerwise((4, 3), 3.5, {"method": "rtn"}),
        *_layerwise((4, 2), 3.0, {"method": "gptq", **GPTQ}),
    ],
    **bench_tables.TABLES,
}


def measure(case: Case, model: str | Path, train: str, windows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Load the float model, quantize it as ``case`` says, and measure; in this process.

    Returns:
        A row with the keys of :data:`hfq.integrations.results.COLUMNS` and the report's totals under ``"details"``.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import hfq
    from hfq.evaluation import perplexity, rescale

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    row: dict[str, Any] = {"name": case.name}
    if case.rescaled:
        rescale.rescale(loaded)
    if case.method:
        processor = AutoTokenizer.from_pretrained(model)
        options = _with_control(loaded, dict(case.options), train, processor)
        config = hfq.HfqConfig(method=case.method, processor=processor, **options)
        cpu = time.process_time()
        report = hfq.quantize(loaded, config, [train] if config.wants_data else None)
        row |= bench_rows.quantized_row(report, config, time.process_time() - cpu)
    started = time.perf_counter()
    row["perplexity"] = perplexity.perplexity(loaded, windows)
    row["evaluation_seconds"] = round(time.perf_counter() - started, 1)
    row["machine"] = machine()
    return row


def _with_control(model: Any, options: dict[str, Any], train: str, processor: Any) -> dict[str, Any]:
    """Turn the option "order" into an importance of every block."""
    from hfq import graph
    from hfq.allocation import sensitivity
    from hfq.calibration import data

    order = options.pop("order", None)
    if order is None:
        return options
    plan = graph.read(model)
    if order == "random":
        draw = random.Random(options["seed"])
        return options | {"importance": {block.name: draw.random() for block in plan.blocks}}
    batches = data.normalise([train], processor=processor, samples=50, seqlen=options["calibration_seqlen"], seed=0)
    own = sensitivity.input_modifications(plan, batches)
    return options | {"importance": {name: -value for name, value in own.items()}}


def run(
    cases: Iterable[Case], model: str | Path, train: str, windows: Sequence[Sequence[int]], output: Path,
    *, progress: Callable[[int, str], Any] | None = None,
) -> list[dict[str, Any]]:
    """Measure every case that ``output`` does not hold yet, one child process each, and write the rows to ``output``.

    Raises:
        QuantizationError: a child failed; its last lines are in the message, and the rows before it are kept.
    """
    inputs = {"model": str(model), "train": train, "windows": [list(w) for w in windows]}
    return bench_rows.run(cases, inputs, output, module=__name__, protocol=PROTOCOL, progress=progress)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in Markdown, with the protocol and the machine under them."""
    machines = sorted({row["machine"] for row in rows if row.get("machine")})
    return "\n".join([markdown(rows), "", f"{PROTOCOL}. Measured on {'; '.join(machines)}."])


def _row(case: Case, shared: Mapping[str, Any]) -> dict[str, Any]:
    return measure(case, shared["model"], shared["train"], shared["windows"])


if __name__ == "__main__":
    raise SystemExit(bench_rows.child(_row))
