"""Tables of pipelines that draw: method x {W8A8, W4A8, W4A16, mixed} for the demo pipelines or any of the Hub.

    hfq bench methods text --table widths --output examples/diffusion/methods.json
    hfq bench methods turbo --table widths,mixed --output examples/diffusion/methods.json
    hfq bench methods stable-diffusion-v1-5/stable-diffusion-v1-5 --data prompts.txt --images 32 --output out/sd.json

Every row draws from the same seeds. Demo pipelines are judged by the classifier of digits; others have no judge and are
compared with the pictures of their own float model. Pictures of all rows lie beside the output file, and one grid a
width: float, round to nearest, methods.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from hfq.errors import ConfigError
from hfq.integrations import bench_rows, demo_models, measure_diffusion, plots
from hfq.integrations.bench_tables import Case
from hfq.integrations.inputs_diffusion import RECIPES
from hfq.integrations.results import machine

__all__ = ["CARDS", "MODELS", "PROTOCOL", "TABLES", "TITLES", "cases", "grids", "measure", "pivot", "run"]

COUNT = 500  # pictures a row
SEED = 10_000  # of the drawn pictures; calibration has others
SHOWN = 10  # of them, in a grid
PROTOCOL = (
    f"{COUNT} pictures from fixed seeds, float32, steps and guidance as the model's recipe says; FID and KID in the "
    "features of the digit classifier, against 2,000 pictures of held-out digits; digits as asked: share that the "
    "classifier takes for the digit of the prompt (without prompts: for any digit); PSNR and distance of feature maps "
    "to the float model's picture of the same seed; prompts of the calibration are not those that are drawn"
)
# What calibration data is recorded: so many timesteps of the loop, so many pictures at each.
RECORDING = {"steps": 10, "samples": 20}
WIDTHS = ((8, 8), (4, 8), (4, 16))
BASELINES: dict[str, tuple[str, dict[str, Any]]] = {
    "round to nearest, min-max": ("rtn", {"group_size": -1}),
    "round to nearest, percentile": ("rtn", {"group_size": -1, "observer": "percentile", "clip": "mse"}),
}
# Steps that small pipelines need; published are 20 000 and 5 000 a unit.
LEARN = {"steps": 400, "activation_steps": 200, "batch_size": 16, "lr": 1e-2}
# Steps and rates of a distillation, and the loops that it runs on; published are 16 000 steps on 160 loops of 100.
DISTIL = {"steps": 1200, "update_lr": 0.02, "table_lr": 5e-3, "scale_lr": 1e-5,
          "record": {"steps": 20, "samples": 64}}  # fmt: skip
LEARN_ONE = {"steps": 400, "batch_size": 16, "lr": 1e-2}
# Training through the whole model; published are 2,200 updates at smaller rates.
TUNE = {"rounding_steps": 400, "rounding_batch_size": 16, "rounding_lr": 1e-2, "batch_size": 16, "time_steps": 4,
        "critical_steps": 30, "lr": 3e-4, "lr_scales": 2e-3, "lr_time_scales": 3e-4, "local_loss": False}  # fmt: skip
# Label to method and options; rows of methods that this version of hfq does not have are left out.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "Q-Diffusion": ("q_diffusion", LEARN),
    "MixDQ": ("mixdq", {}),
    "ViDiT-Q": ("vidit_q", {}),
    "DGQ": ("dgq", LEARN_ONE),
}
# Methods that choose widths: label to method and options that give the mean width of weights.
MIXED: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "MixDQ": ("mixdq", lambda bits: {"target_bits": float(bits)}),
    "ViDiT-Q": ("vidit_q", lambda bits: {"target_bits": float(bits)}),
}
# Methods whose rows only some of the demo pipelines have.
ONLY = {"vidit_q": ("dit",), "mixdq": ("text", "turbo")}  # (transformers; UNets that read a text)


def _meant(method: str, model: str) -> bool:
    from hfq.methods import METHODS as known

    return known[method].available and (model not in RECIPES or model in ONLY.get(method, RECIPES))


def _float(model: str) -> Case:
    return Case(f"{model}: float, {bench_rows.FLOAT}", model=model)


def _rows(model: str, chosen: Mapping[str, tuple[str, dict[str, Any]]], widths: Iterable[tuple[int, int]]
          ) -> list[Case]:
    return [
        Case(f"{model}: {label}, W{bits}A{inputs}", method, {"bits": bits, "activation_bits": inputs, **options},
             model=model)
        for bits, inputs in widths for label, (method, options) in chosen.items() if _meant(method, model)
    ]  # fmt: skip


def widths(model: str) -> list[Case]:
    """Every method at every width against round to nearest with two observers."""
    return [_float(model), *_rows(model, {**BASELINES, **METHODS}, WIDTHS)]


def narrow(model: str) -> list[Case]:
    """Inputs of 6 bits; and what groups and attention that follows the prompt do alone."""
    parts = {
        "DGQ, one group": ("dgq", {**LEARN_ONE, "groups": 1}),
        "DGQ, groups alone": ("dgq", {**LEARN_ONE, "softmax": "uniform", "start_token": "never", "time_aware": False}),
    }
    return [_float(model), *_rows(model, {**BASELINES, **METHODS, **parts}, ((4, 6),))]


def mixed(model: str) -> list[Case]:
    """Widths chosen by layer at a mean of 8, 5 and 4 bits, inputs of 8 bits."""
    return [_float(model)] + [
        Case(f"{model}: {label}, mixed {bits}", method, options(bits), model=model)
        for bits in (8, 5, 4) for label, (method, options) in MIXED.items() if _meant(method, model)
    ]  # fmt: skip


def trajectory(model: str) -> list[Case]:
    """Shortcuts with and without grids of their own for both halves; calls of the whole loop, and of its first step."""
    chosen: dict[str, tuple[str, dict[str, Any]]] = {
        "Q-Diffusion": ("q_diffusion", LEARN),
        "Q-Diffusion, one grid a shortcut": ("q_diffusion", {**LEARN, "split_shortcut": False}),
        "Q-Diffusion, first timestep alone": ("q_diffusion", {**LEARN, "record": {"steps": 1, "samples": 200}}),
    }
    return [_float(model), *_rows(model, chosen, ((4, 8),))]


def balance(model: str) -> list[Case]:
    """Dynamic inputs with both halves of the balance of channels, with one, and with none."""
    chosen: dict[str, tuple[str, dict[str, Any]]] = {
        "ViDiT-Q": ("vidit_q", {}),
        "ViDiT-Q, scale alone": ("vidit_q", {"rotate": False}),
        "ViDiT-Q, rotation alone": ("vidit_q", {"scale": False}),
        "ViDiT-Q, neither": ("vidit_q", {"scale": False, "rotate": False}),
    }
    return [_float(model), *_rows(model, chosen, ((8, 8), (4, 8), (4, 4)))]


def first_token(model: str) -> list[Case]:
    """The first token of the text exact and on one grid with the others; float inputs of the most sensitive layers."""
    chosen: dict[str, tuple[str, dict[str, Any]]] = {
        "MixDQ": ("mixdq", {}),
        "MixDQ, all inputs quantized": ("mixdq", {"protected": 0.0}),
        "MixDQ, first token quantized": ("mixdq", {"first_token": False}),
        "MixDQ, one grid a shortcut": ("mixdq", {"split_shortcut": False}),
    }
    return [_float(model), *_rows(model, chosen, ((8, 8),))]


def trained(model: str) -> list[Case]:
    """Four bits of weights and of inputs: layers learned one by one, and through the whole model."""
    every = {"end_bits": 4, "keep_shortcuts": False}
    weights = {**DISTIL, "learn": "weights", "update_lr": 5e-3}
    chosen: dict[str, tuple[str, dict[str, Any]]] = {
        "Q-Diffusion": ("q_diffusion", LEARN),
        "QuEST": ("quest", TUNE),
        "QuEST, not tuned": ("quest", {**TUNE, "time_steps": 0, "critical_steps": 0}),
        "QuEST, steps of inputs alone": ("quest", {**TUNE, "tune_weights": False}),
        "EfficientDM": ("efficientdm", DISTIL),
        "EfficientDM, all layers": ("efficientdm", {**DISTIL, **every}),
        "full quantization-aware training": ("efficientdm", weights),
        "full quantization-aware training, three times as long": ("efficientdm", {**weights, "steps": 3600}),
    }
    return [_float(model), *_rows(model, {**BASELINES, **chosen}, ((4, 4),))]


TABLES: dict[str, Callable[[str], list[Case]]] = {
    "widths": widths, "narrow": narrow, "mixed": mixed, "trajectory": trajectory,
    "balance": balance, "first_token": first_token, "trained": trained,
}  # fmt: skip
# The demo pipelines that a table is meant for; any other pipeline may be asked too.
MODELS: dict[str, tuple[str, ...]] = {
    "widths": ("unet", "text", "dit", "turbo"), "narrow": ("text",), "mixed": ("turbo", "dit"),
    "trajectory": ("unet", "text"), "balance": ("dit",),
    "first_token": ("text", "turbo"), "trained": ("unet",),
}  # fmt: skip
TITLES = {
    "widths": "One width for all layers",
    "narrow": "Inputs of 6 bits",
    "mixed": "Widths chosen by layer",
    "trajectory": "What is calibrated on, and how shortcuts are rounded",
    "balance": "Channels balanced by a scale and a rotation",
    "first_token": "What W8A8 of MixDQ is made of",
    "trained": "Four bits of weights and inputs",
}
# Model card to its tables.
CARDS = {
    "q_diffusion": ("widths", "trajectory", "trained"), "mixdq": ("widths", "mixed", "first_token"),
    "vidit_q": ("widths", "mixed", "balance"), "dgq": ("widths", "narrow"), "quest": ("trained",),
    "efficientdm": ("trained",),
}  # fmt: skip


def cases(model: str, names: Sequence[str]) -> list[Case]:
    """The rows of tables for ``model``; see :func:`hfq.integrations.bench_rows.chosen`."""
    return bench_rows.chosen(TABLES, model, names)


def measure(case: Case, shared: Mapping[str, Any]) -> dict[str, Any]:
    """Load the float pipeline, quantize its denoiser as ``case`` says, draw, and measure; in this process.

    The option "record" of a case is not the method's: it says which calls are recorded, see
    :func:`hfq.record_calls`.

    Args:
        shared: "data" ("demo" or a file of prompts), "count" of pictures (``None``: 500) and "pictures", the folder
            where they are kept.
    """
    pipe = measure_diffusion.load(case.model)
    asked = measure_diffusion.conditions(pipe, "test", shared["count"] or COUNT, shared["data"])
    sampling, folder = measure_diffusion.sampling(case.model), Path(shared["pictures"])
    reference = _float_pictures(pipe, case.model, asked, sampling, folder)
    row: dict[str, Any] = {"name": case.name, "model": case.model}
    pictures = reference
    if case.method:
        row |= _quantize(pipe, case, sampling, shared["data"])
        cpu = time.process_time()
        pictures = measure_diffusion.draw(pipe, asked, seed=SEED, **sampling)
        row["draw_seconds"] = round(time.process_time() - cpu, 1)
    row["disk_bytes"] = _saved_bytes(getattr(pipe, measure_diffusion.denoiser(pipe)))
    row |= measure_diffusion.numbers(pictures, asked, reference if case.method else None,
                                     by_judge=case.model in RECIPES)
    shown = asked[:SHOWN] if case.model in RECIPES else [None] * SHOWN
    measure_diffusion.sheet(pictures[:SHOWN], shown, _strip(folder, case.name), SHOWN)
    return row | {"machine": machine()}


def _quantize(pipe: Any, case: Case, sampling: Mapping[str, Any], data: str) -> dict[str, Any]:
    import hfq

    options = dict(case.options)
    record = {**RECORDING, **options.pop("record", {})}
    record["steps"] = min(record["steps"], sampling.get("num_inference_steps", record["steps"]))
    config, component = hfq.HfqConfig(method=case.method, **options), measure_diffusion.denoiser(pipe)
    asked = measure_diffusion.conditions(pipe, "train", record["samples"], data) if config.wants_data else None
    prompts = None if asked is None or asked[0] is None else asked
    if sampling.get("guidance_scale", 2.0) <= 1:
        record["guidance"] = False  # made to draw without
    cpu = time.process_time()
    hfq.quantize_pipeline(pipe, {component: config}, prompts, **(record | sampling if config.wants_data else {}))
    report = getattr(pipe, component).hfq_report
    return bench_rows.quantized_row(report, config, time.process_time() - cpu)


def _float_pictures(pipe: Any, model: str, asked: Sequence[Any], sampling: Mapping[str, Any], folder: Path) -> Tensor:
    """What the float pipeline draws; kept in ``folder``, as every row needs it."""
    name = demo_models.digest(measure_diffusion.resolve(model), list(asked), dict(sampling), SEED)
    path = folder / f"float-{name}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"pictures": measure_diffusion.draw(pipe, asked, seed=SEED, **sampling).contiguous()}, path)
    return load_file(path)["pictures"]


def _saved_bytes(component: Any) -> int:
    from hfq.evaluation.memory import disk_bytes

    with tempfile.TemporaryDirectory() as scratch:
        component.save_pretrained(scratch)
        return disk_bytes(scratch)


def _strip(folder: Path, name: str) -> Path:
    return folder / f"{demo_models.file_name(name)}.png"


def run(rows: Iterable[Case], data: str, count: int | None, output: Path, *,
        progress: Callable[[int, str], Any] | None = None) -> list[dict[str, Any]]:
    """Measure every row that ``output`` does not hold yet, and draw the grids; see :mod:`hfq.integrations.bench_rows`.

    Raises:
        ConfigError: a pipeline of the Hub, and no file of prompts.
    """
    rows = list(rows)
    strange = next((case.model for case in rows if case.model not in RECIPES), None)
    if strange is not None and data == "demo":
        raise ConfigError(f"{strange} draws no digits: give it prompts, --data FILE with one a line")
    inputs = {"data": data, "count": count, "pictures": str(_folder(output))}
    found = bench_rows.run(rows, inputs, output, module=__name__, protocol=PROTOCOL, progress=progress)
    grids(found, output)
    return found


def grids(rows: Sequence[Mapping[str, Any]], output: Path) -> list[Path]:
    """One picture a model and width: what the float model, round to nearest and the methods draw from the same seeds.

    Args:
        rows: measured ones; those whose pictures are not there any more are left out.
        output: their file; the grids lie beside it, "<model>-<width>.png".
    """
    from PIL import Image

    groups: dict[str, dict[str, dict[str, Any]]] = {}  # model, width, label
    for row in rows:
        model, _, rest = row["name"].partition(": ")
        label, _, width = rest.rpartition(", ")
        path = _strip(_folder(output), row["name"])
        if path.exists():
            groups.setdefault(model, {}).setdefault(width, {})[label] = Image.open(path)
    found = []
    for model, widths in groups.items():
        plain = widths.pop(bench_rows.FLOAT, {})
        for width, strips in (widths or {"float": {}}).items():
            name = re.sub(r"[^\w.]+", "-", f"{Path(model).name}-{width}")
            found.append(plots.strips({**plain, **strips}, output.with_name(f"{name}.png")))
    return found


def _folder(output: Path) -> Path:
    return output.with_name(f"{output.stem}-pictures")


def pivot(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a method, one column a model and width: ``FID / digits as asked in percent / PSNR to float``."""

    def cell(row: Mapping[str, Any]) -> str:
        near = f" / {row['psnr']:.1f} dB" if row.get("psnr") is not None else ""
        judged = f"{row['fid']:.2f} / {100 * row['digits']:.1f} %" if "fid" in row else ""
        return (judged + near).removeprefix(" / ")

    return bench_rows.pivot(rows, cell)


if __name__ == "__main__":
    raise SystemExit(bench_rows.child(measure))
