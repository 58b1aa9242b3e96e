"""``hfq bench kernels``, ``hfq bench speed`` and ``hfq bench methods``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from hfq.errors import ConfigError, KernelError
from hfq.integrations.cli import screen

__all__ = ["register"]

bench = typer.Typer(no_args_is_help=True, help="Measure kernels and methods on this machine.")


@bench.command()
def kernels(
    only: str = typer.Option("", "--only", help="Words that a row must have, all of them: w4, M1, 576x1536, compact."),
    quick: bool = typer.Option(False, "--quick", help="Small shapes and few formats, under a minute."),
    rounds: int = typer.Option(20, "--rounds", min=1, help="Turns, of which the best counts."),
    every_backend: bool = typer.Option(False, "--every-backend", help="Every backend that can serve a case."),
    device: str = typer.Option("", "--device", help="cpu or cuda; default: a GPU if there is one."),
    output: Path = typer.Option(None, "--output", "-o", help="Also write the rows as JSON."),
    best: Path = typer.Option(None, "--best", help="File of best-known times; rows that are 10 % worse fail."),
) -> None:
    """Time the packed products against the float one, in the same process; wrong results are not timed.

    The headline is the time of one thread; wall time with all cores is added when the machine is idle.

    [dim]hfq bench kernels --only "w4 4096x4096"[/]
    """
    import torch

    from hfq.evaluation import bench_kernels

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows = bench_kernels.run(where, quick=quick, only=only or None, rounds=rounds, every_backend=every_backend,
                             on_row=lambda row: screen.say(row.label))
    if not rows:
        raise ConfigError(f"--only {only!r} matches no row")
    screen.say(bench_kernels.format_table(rows, where))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(bench_kernels.to_json(rows, where) + "\n", encoding="utf-8")
    worse = bench_kernels.regressions(rows, best) if best is not None else []
    if worse:
        raise KernelError("; ".join(worse))


@bench.command()
def speed(
    model: str = typer.Argument("demo", help="Folder, Hub id, demo, or a shape (width x blocks): random:2048x2, "
                                             "vit:384x6, swin:384x6, resnet:512x2, unet:128x2."),
    rows: str = typer.Option("w4,w8a8", "--rows", "-r", help="w4, w8, w8a8, w4a8; of language models kv4 and "
                                                             "kv4-codebook, of image models w8a8-attention."),
    prompt: int = typer.Option(512, "--prompt", min=1, help="Tokens of the prompt whose prefill is timed."),
    context: int = typer.Option(0, "--context", min=0, help="Tokens in the cache before decoding; 0: a short prompt."),
    new_tokens: int = typer.Option(32, "--new-tokens", min=1, help="Decoded tokens a turn."),
    batch: int = typer.Option(16, "--batch", min=1, help="Image models: images a call."),
    rounds: int = typer.Option(5, "--rounds", min=1, help="Turns of every model, of which the best counts."),
    output: Path = typer.Option(None, "--output", "-o", help="Also write the rows as JSON."),
) -> None:
    """Time whole quantized models against the float one, in turns in one process.

    [dim]hfq bench speed random:2048x2 --rows w8a8[/]

    [dim]hfq bench speed demo --rows kv4,kv4-codebook --context 8192[/]

    [dim]hfq bench speed vit:384x6 --rows w8a8 --batch 16[/]
    """
    import json

    from hfq.integrations import bench_speed, bench_speed_images, measure_vision

    names = [row.strip() for row in rows.split(",")]
    protocol: dict[str, Any] = {"model": model, "where": _where()}
    if bench_speed_images.is_shape(model) or measure_vision.is_image_model(model):
        found = bench_speed_images.measured(model, names, batch=batch, rounds=rounds, say=screen.say)
        protocol |= {"batch": batch}
        title = f"{model}; {batch} images a call"
    else:
        found = bench_speed.measured(model, names, prompt=prompt, context=context, new_tokens=new_tokens,
                                     rounds=rounds, say=screen.say)
        protocol |= {"prompt": prompt, "context": context, "new_tokens": new_tokens}
        title = f"{model}; prefill of {prompt}, decode after {context or 8} tokens"
    screen.results_table(found, title=f"{title}; {_where()}")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({**protocol, "rows": found}, indent=1) + "\n", encoding="utf-8")


@bench.command()
def methods(
    model: str = typer.Argument("demo", help="Float model: folder, Hub id, or demo."),
    tables: str = typer.Option("", "--table", "-t", help="Prepared tables, separated by commas: weights, rsq, ..."),
    names: str = typer.Option("rtn,gptq", "--methods", "-m", help="Without --table: methods, separated by commas."),
    bits: str = typer.Option("4,3", "--bits", help="Widths of these methods."),
    group_size: int = typer.Option(None, "--group-size", "-g", help="Weights that share a scale; default 64."),
    data: str = typer.Option("demo", "--data", "-d", help="Text for calibration and evaluation."),
    samples: int = typer.Option(64, "--samples", help="Calibration windows of these methods."),
    seqlen: int = typer.Option(512, "--seqlen", help="Tokens a window."),
    windows: int = typer.Option(24, "--windows", help="Windows to evaluate on."),
    images: int = typer.Option(0, "--images", min=0, help="Image models: images to measure or draw; 0: all, or 500."),
    rescaled: bool = typer.Option(False, "--rescaled", help="On the exactly rescaled model (same function)."),
    options: list[str] = typer.Option([], "--set", "-s", metavar="KEY=VALUE", help="Options of the methods."),
    output: Path = typer.Option(Path("out/bench-methods.json"), "--output", "-o", help="Rows; found ones are kept."),
) -> None:
    """Quantize one model in several ways, each in its own process, and put them in one table.

    A run that finds rows in the output file measures only what is missing.

    [dim]hfq bench methods demo --table weights,rsq --output out/table.json[/]

    [dim]hfq bench methods demo --methods rtn,gptq --bits 4,3,2 --rescaled[/]

    [dim]hfq bench methods vit --table widths --output out/vision.json[/]

    [dim]hfq bench methods text --table widths --output out/diffusion.json[/]

    [dim]hfq bench methods wan --output out/video.json[/]
    """
    from hfq.integrations import bench_methods, bench_video, environment, measure, measure_diffusion, measure_vision

    if any(model in models for models in bench_video.MODELS.values()):
        _video_methods(model, tables or "training", data, images, output)
        return
    if measure_diffusion.is_pipeline(model):
        _drawn_methods(model, tables or "widths", data, images, output)
        return
    if measure_vision.is_image_model(model):
        _image_methods(model, tables or "widths", data, images, output)
        return
    if tables:
        wanted = [name.strip() for name in tables.split(",")]
        unknown = [name for name in wanted if name not in bench_methods.TABLES]
        if unknown:
            raise ConfigError(f"--table {unknown[0]!r}: {', '.join(bench_methods.TABLES)} are the tables")
        cases = list({case.name: case for name in wanted for case in bench_methods.TABLES[name]}.values())
    else:
        cases = _cases(names, _numbers(bits, "--bits"), group_size, samples, seqlen, options, rescaled)
    text = measure.open_text(data)
    test = text.windows(measure.load_tokenizer(model), windows, seqlen)
    rows = bench_methods.run(cases, measure.resolve(model), text.train, test, output, progress=environment.progress)
    screen.results_table(rows, title=f"{model}; {text.title}; {_where()}")
    screen.say(f"rows in {output}")


def _image_methods(model: str, tables: str, data: str, images: int, output: Path) -> None:
    """Prepared tables of an image model: ``--table`` widths, plain, mixed, repquant, noisyquant, merged, cnn."""
    from hfq.integrations import bench_vision, environment

    cases = bench_vision.cases(model, [name.strip() for name in tables.split(",")])
    rows = bench_vision.run(cases, data, images or None, output, progress=environment.progress)
    screen.results_table(rows, title=f"{model}; {_where()}")
    screen.say(f"rows in {output}")


def _video_methods(model: str, tables: str, data: str, images: int, output: Path) -> None:
    """Prepared tables of the pipeline that draws clips: ``--table`` training."""
    from hfq.integrations import bench_video, environment

    cases = bench_video.cases(model, [name.strip() for name in tables.split(",")])
    rows = bench_video.run(cases, data, images or None, output, progress=environment.progress)
    screen.results_table(rows, title=f"{model}; {_where()}")
    screen.say(f"rows in {output}, pictures beside it")


def _drawn_methods(model: str, tables: str, data: str, images: int, output: Path) -> None:
    """Prepared tables of a pipeline that draws: ``--table`` widths, narrow, mixed; ``--data`` may be a prompt file."""
    from hfq.integrations import bench_diffusion, environment

    cases = bench_diffusion.cases(model, [name.strip() for name in tables.split(",")])
    rows = bench_diffusion.run(cases, data, images or None, output, progress=environment.progress)
    screen.results_table(rows, title=f"{model}; {_where()}")
    screen.say(f"rows in {output}, pictures beside it")


def _cases(names: str, widths: list[int], group_size: int | None, samples: int, seqlen: int, options: list[str],
           rescaled: bool) -> list[Any]:
    """The float model and every method at every width; the options are checked before anything runs."""
    from hfq.integrations.bench_methods import Case
    from hfq.integrations.cli.quantize import grid_of, options_of
    from hfq.methods import config_class

    given, suffix = options_of(options), ", rescaled" if rescaled else ""
    cases = [Case(f"float{suffix}", rescaled=rescaled)]
    for method in (name.strip() for name in names.split(",")):
        cls = config_class(method)
        calibrated = {"calibration_samples": samples, "calibration_seqlen": seqlen} if cls.needs_calibration else {}
        for width in widths:
            chosen = {**grid_of(cls, bits=width, group_size=group_size), **calibrated, **given}
            cls(**chosen)
            extra = "".join(f", {key}={value}" for key, value in given.items())
            cases.append(Case(f"{method}, {width} bits{extra}{suffix}", method, chosen, rescaled))
    return cases


def _numbers(text: str, label: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{label} {text!r}: whole numbers separated by commas are needed") from None


def _where() -> str:
    from hfq.integrations.results import machine

    return machine()


def register(app: Any) -> None:
    app.add_typer(bench, name="bench")
