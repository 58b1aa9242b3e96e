"""Table of the small video pipeline: training with quantized weights and inputs, step by step of the ablation.

    hfq bench methods wan --output examples/video/methods.json

Every row draws from the same seeds; the training of all rows has the same calls, steps and learning rates. The curves
of the trained rows ("curves-<width>.png") and what every row draws ("<width>.png") lie beside the output file.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from hfq.errors import ConfigError
from hfq.integrations import bench_rows, demo_models, measure_video, plots
from hfq.integrations.bench_tables import Case
from hfq.integrations.inputs_video import RECIPES, demo_pipeline, demo_prompts
from hfq.integrations.results import machine

__all__ = ["CARDS", "MODELS", "PROTOCOL", "RECIPES", "TABLES", "TITLES", "cases", "measure", "pictures", "pivot", "run"]

COUNT = 40  # clips a row
SEED = 10_000  # of the drawn clips; the recording has others
SHOWN = 3  # of them, in a picture
CURVE = 50  # first steps whose mean loss and gradient are written down
RECORDING = {"steps": 10, "samples": 16}  # timesteps of the loop, clips
# A small model learns in few steps with large ones.
TRAINING = {"steps": 180, "calls_per_step": 1, "lr": 5e-4, "lr_clips": 2e-2, "rank": 32}
PROTOCOL = (
    f"{COUNT} clips of 9 frames from fixed seeds, float32, 20 steps of flow matching, guidance 3; FID in the features "
    "of the digit classifier, of frames with the digit in the middle, against those of 300 held-out clips; digits: "
    "share of frames that the classifier takes for the digit of the prompt; motion: share of clips that move where "
    "the prompt says; PSNR to the float model's clip of the same seed. Trained rows: the float model's calls at 10 "
    "timesteps for 16 training prompts, 180 steps of one call (8 rows), AdamW, 5e-4; loss and gradient are the means "
    f"of the first {CURVE} steps (distance to the float prediction; norm of the gradient of the rounded weights). "
    "Cells: FID / digits / motion / PSNR; loss, gradient, and the loss after the last step with and without the module"
)
WIDTHS = ((4, 4), (3, 3))
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "round to nearest": ("rtn", {"group_size": -1}),
    "LSQ training": ("qvgen", {**TRAINING, "rank": 0}),
    "QVGen": ("qvgen", TRAINING),
    "QVGen, all components at once": ("qvgen", {**TRAINING, "shrink": 1.0}),
    "QVGen, module taken away at once": ("qvgen", {**TRAINING, "removal": "at_once"}),
}


def training(model: str) -> list[Case]:
    """The float model, and every row at every width."""
    return [Case(f"{model}: float, {bench_rows.FLOAT}", model=model)] + [
        Case(f"{model}: {label}, W{bits}A{inputs}", method, {"bits": bits, "activation_bits": inputs, **options},
             model=model)
        for bits, inputs in WIDTHS for label, (method, options) in ROWS.items()
    ]  # fmt: skip


TABLES: dict[str, Callable[[str], list[Case]]] = {"training": training}
MODELS: dict[str, tuple[str, ...]] = {"training": ("wan",)}
TITLES = {"training": "Quantization-aware training of a video transformer"}
CARDS = {"qvgen": ("training",)}


def cases(model: str, names: Sequence[str]) -> list[Case]:
    """The rows of tables for ``model``; see :func:`hfq.integrations.bench_rows.chosen`."""
    return bench_rows.chosen(TABLES, model, names)


def measure(case: Case, shared: Mapping[str, Any]) -> dict[str, Any]:
    """Load the float pipeline, quantize its transformer as ``case`` says, draw, and measure; in this process.

    Args:
        shared: "count" of clips (``None``: 50) and "pictures", the folder where they are kept.
    """
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(demo_pipeline(case.model))
    pipe.set_progress_bar_config(disable=True)
    asked = demo_prompts("test", shared["count"] or COUNT)
    sampling, folder = RECIPES[case.model].sampling, Path(shared["pictures"])
    clips = reference = _float_clips(pipe, case.model, asked, folder)
    row: dict[str, Any] = {"name": case.name, "model": case.model}
    if case.method:
        row |= _quantize(pipe, case)
        cpu = time.process_time()
        clips = measure_video.draw(pipe, asked, seed=SEED, **sampling)
        row["draw_seconds"] = round(time.process_time() - cpu, 1)
    row |= measure_video.numbers(clips, asked, reference if case.method else None)
    measure_video.strip(clips[:SHOWN], asked[:SHOWN], _strip(folder, case.name))
    return row | {"machine": machine()}


def _quantize(pipe: Any, case: Case) -> dict[str, Any]:
    import hfq

    config = hfq.HfqConfig(method=case.method, **case.options)
    cpu = time.process_time()
    hfq.quantize_pipeline(pipe, {"transformer": config}, demo_prompts("train", RECORDING["samples"]),
                          steps=RECORDING["steps"], **RECIPES[case.model].sampling)
    report = pipe.transformer.hfq_report
    row = bench_rows.quantized_row(report, config, time.process_time() - cpu)
    curves = {name: [float(f"{value:.5g}") for value in curve] for name, curve in report.curves.items()}
    first = {f"first_{name.split()[0]}": sum(curve[:CURVE]) / CURVE for name, curve in curves.items()}
    return row | ({"curves": curves, **first} if "loss" in curves else {})


def _float_clips(pipe: Any, model: str, asked: Sequence[str], folder: Path) -> Tensor:
    """What the float pipeline draws; kept in ``folder``, as every row needs it."""
    name = demo_models.digest(RECIPES[model].digest(), list(asked), SEED)
    path = folder / f"float-{name}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"clips": measure_video.draw(pipe, asked, seed=SEED, **RECIPES[model].sampling).contiguous()}, path)
    return load_file(path)["clips"]


def _strip(folder: Path, name: str) -> Path:
    return folder / f"{demo_models.file_name(name)}.png"


def run(rows: Iterable[Case], data: str, count: int | None, output: Path, *,
        progress: Callable[[int, str], Any] | None = None) -> list[dict[str, Any]]:
    """Measure every row that ``output`` does not hold yet, and draw the pictures.

    Raises:
        ConfigError: other data than the demo's.
    """
    if data != "demo":
        raise ConfigError(f"--data {data}: these tables are about clips of digits")
    shared = {"count": count, "pictures": str(_folder(output))}
    found = bench_rows.run(list(rows), shared, output, module=__name__, protocol=PROTOCOL, progress=progress)
    pictures(found, output)
    return found


def pictures(rows: Sequence[Mapping[str, Any]], output: Path) -> list[Path]:
    """Clips of all rows and curves of the trained ones, a picture a width each, beside the file ``output``."""
    from PIL import Image

    drawn: dict[str, dict[str, Any]] = {}
    curves: dict[str, dict[str, dict[str, Any]]] = {}  # width, curve, label
    for row in rows:
        label, _, width = row["name"].partition(": ")[2].rpartition(", ")
        path = _strip(_folder(output), row["name"])
        if path.exists():
            drawn.setdefault(width, {})[label] = Image.open(path)
        for name, curve in row.get("curves", {}).items():
            curves.setdefault(width, {}).setdefault(name, {})[label] = curve
    plain = drawn.pop(bench_rows.FLOAT, {})
    found = [plots.strips({**plain, **strips}, output.with_name(f"{width}.png")) for width, strips in drawn.items()]
    return found + [plots.curves(lines, output.with_name(f"curves-{width}.png"), title=width)
                    for width, lines in curves.items()]  # fmt: skip


def _folder(output: Path) -> Path:
    return output.with_name(f"{output.stem}-pictures")


def pivot(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a row of the ablation, one column a width: ``FID / digits / motion / PSNR; first loss, first gradient,
    loss at the end with and without the module``."""

    def cell(row: Mapping[str, Any]) -> str:
        text = f"{row['fid']:.2f} / {100 * row['digits']:.1f} % / {100 * row['motion']:.0f} %"
        text += f" / {row['psnr']:.1f} dB" if row.get("psnr") is not None else ""
        if "first_loss" in row:
            last = row["details"]["totals"]["module"][-1]
            text += (f"; {row['first_loss']:.4f}, {row['first_gradient']:.4f}, {last['with']:.4f} and "
                     f"{last['without']:.4f}")
        return text

    return bench_rows.pivot(rows, cell)


if __name__ == "__main__":
    raise SystemExit(bench_rows.child(measure))
