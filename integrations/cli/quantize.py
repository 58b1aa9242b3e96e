"""``hfq quantize``: a float model in, a packed folder out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import typer

from hfq.errors import ConfigError
from hfq.fields import in_range
from hfq.integrations.cli import screen

__all__ = ["grid_of", "options_of", "register"]


def options_of(pairs: list[str]) -> dict[str, Any]:
    """``["key=value", ...]`` as options of a Config; values are JSON, or else plain strings.

    Raises:
        ConfigError: an entry without ``=``, or a key given twice.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not separator or not key:
            raise ConfigError(f"--set {pair!r}: write key=value")
        if key in found:
            raise ConfigError(f"--set {key} is given twice")
        try:
            found[key] = json.loads(text)
        except json.JSONDecodeError:
            found[key] = {"True": True, "False": False, "None": None}.get(text, text)
    return found


def quantize(
    model: str = typer.Argument(help="Folder, Hub id, or demo."),
    output: Path = typer.Option(..., "--output", "-o", help="Folder for the packed model."),
    method: str = typer.Option("rsq", "--method", "-m", help="One of `hfq methods`."),
    bits: int = typer.Option(None, "--bits", "-b", help="Bits of a weight; default 4."),
    group_size: int = typer.Option(
        None, "--group-size", "-g", help="Weights that share a scale; -1: a whole row; default 64."),
    data: str = typer.Option("", "--data", "-d", help="Calibration text: file, Hub id, or demo."),
    samples: int = typer.Option(64, "--samples", help="Calibration windows."),
    seqlen: int = typer.Option(512, "--seqlen", help="Tokens a window."),
    seed: int = typer.Option(0, "--seed"),
    options: list[str] = typer.Option([], "--set", "-s", metavar="KEY=VALUE", help="Any other option of the method."),
    dtype: str = typer.Option("auto", "--dtype", help="Load the float weights as this."),
    device_map: str = typer.Option("", "--device-map", help="As in transformers: auto, cpu, cuda, ..."),
    resume: bool = typer.Option(False, "--resume", help="Continue a run that was stopped."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace what is in the output folder."),
) -> None:
    """Quantize a model and save it packed, with its report and its card.

    [dim]hfq quantize demo --method rsq --bits 4 --group-size 64 --data demo --output out/rsq-4bit[/]

    [dim]hfq quantize org/model -m gptq -b 3 -d texts.jsonl -o out/gptq --set clip=mse --resume[/]
    """
    from hfq.integrations import card, measure, measure_vision, saving
    from hfq.methods import config_class

    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file: name a folder")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ConfigError(f"{output} is not empty: name another folder, or pass --overwrite")
    progress = output.absolute().with_name(f".{output.name}.progress")
    if progress.exists() and any(progress.iterdir()) and not resume:
        if not overwrite:
            raise ConfigError(f"{output} has an unfinished run: continue it with --resume, or pass --overwrite")
        shutil.rmtree(progress)
    given = options_of(options)
    cls = config_class(method)
    common = {**grid_of(cls, bits=bits, group_size=group_size), "seed": seed, "calibration_samples": samples,
              "calibration_seqlen": seqlen, "work_dir": progress}
    if not cls.needs_calibration and not data:
        common = {key: value for key, value in common.items() if not key.startswith("calibration")}
    elif cls.needs_calibration and not data:
        raise ConfigError(f"{method} needs calibration data: pass --data FILE, a Hub id, or demo")
    elif measure_vision.is_image_model(model):
        prepare = measure_vision.load_processor(model)
        common["calibration"] = measure_vision.calibration(data, prepare, samples, seed)
    else:
        common["calibration"] = [measure.open_text(data).train] if data == measure.DEMO else data
    config = cls(**{**common, **given})
    where = {"device_map": device_map} if device_map else {}
    packed = measure.load_model(model, quantization_config=config, dtype=dtype, **where)
    results = measure.origin(model)
    saving.save(packed, output, overwrite, processor=_processor(model),
                extra=lambda folder: card.write_card(folder, results=results))
    shutil.rmtree(progress, ignore_errors=True)
    screen.say(summary(packed.hfq_report))
    screen.say(f"saved in {output}")


def grid_of(cls: Any, **given: int | None) -> dict[str, int]:
    """Bits and group size as given, else those of this command, where the method has them, else its own."""
    found = {name: value for name, value in given.items() if value is not None}
    for name, value in {"bits": 4, "group_size": 64}.items():
        if in_range(value, cls.__dataclass_fields__[name].metadata):
            found.setdefault(name, value)
    return found


def summary(report: Any) -> str:
    """The report's first lines in words."""
    totals, lines = report.totals, [str(report).splitlines()[0]]
    if totals.get("seconds") is not None:
        peak = totals.get("peak_memory_bytes")
        memory = f", {peak / 1e6:.0f} MB of memory above the level at the start" if peak else ""
        lines.append(f"{totals['seconds']:.1f} s{memory}")
    reasons = {row.reason for row in report if row.status != "packed" and row.reason}
    lines += [f"left in float: {reason}" for reason in sorted(reasons)]
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])


def _processor(model: str) -> Any:
    """Tokenizer or image processor to save beside the weights, if the model has one."""
    from hfq.errors import DataError
    from hfq.integrations import measure, measure_vision

    try:
        if measure_vision.is_image_model(model):
            return measure_vision.load_processor(model)
        return measure.load_tokenizer(model)
    except DataError:
        screen.warn(f"{model} has no tokenizer or image processor: none is saved")
        return None


def register(app: Any) -> None:
    app.command()(quantize)
