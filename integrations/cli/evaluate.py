"""``hfq eval`` and ``hfq compare``: quality, size and speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from hfq.errors import ConfigError
from hfq.integrations.cli import screen

__all__ = ["register"]

DATA = typer.Option("demo", "--data", "-d", help="Text: file, Hub id, or demo; every tenth text is evaluated on.")
WINDOWS = typer.Option(24, "--windows", min=1, help="Windows to evaluate on.")
LENGTH = typer.Option(512, "--length", min=2, help="Tokens a window.")


def evaluate(
    model: str = typer.Argument(help="Folder, Hub id, or demo."),
    data: str = DATA,
    windows: int = WINDOWS,
    length: int = LENGTH,
    reference: str = typer.Option("", "--reference", "-r", help="Float model to compare logits and speed with."),
    speed: bool = typer.Option(False, "--speed", help="Also measure decode and prefill speed."),
    save: bool = typer.Option(False, "--save", help="Keep the numbers in the folder, for its card."),
    tasks: str = typer.Option("", "--tasks", "-t", help="Instead: tasks of lm-eval, separated by commas."),
    limit: int = typer.Option(None, "--limit", min=1, help="Examples of each task, or images; default all."),
    plots: bool = typer.Option(False, "--plots", help="Image models: with --save, also draw pictures for the card."),
    task_folder: Path = typer.Option(None, "--task-folder", help="Folder of your own task definitions."),
) -> None:
    """Measure one model: perplexity, or top-1 of images, and agreement with the float model where one is named.

    [dim]hfq eval out/rsq-4bit --data demo --reference demo --speed --save[/]

    [dim]hfq eval out/rsq-4bit --tasks arc_easy,piqa --limit 200[/]

    [dim]hfq eval out/vit-4bit --data imagenet/ --reference google/vit-base-patch16-224 --save --plots[/]
    """
    if tasks:
        run_tasks(model, [name.strip() for name in tasks.split(",")], limit, task_folder)
        return
    if save and not Path(model).is_dir():
        raise ConfigError(f"--save needs a folder, {model!r} is none")
    if plots and not save:
        raise ConfigError("--plots draws beside the card: pass --save too")
    rows, about = measured([reference, model] if reference else [model], data, windows, length, speed=speed,
                           limit=limit)
    screen.results_table(rows, title=about.dataset)
    if save:
        from hfq.integrations.results import Results

        rows[-1]["this"] = True
        old = Results.load(model)
        about.rows = rows
        about.base_model, about.license = old.base_model, old.license
        about.samples = old.samples
        about.save(model)
        if plots:
            _draw_plots(model, data, rows)
        screen.say(f"kept in {model}; `hfq card {model}` writes them into the card")


def _draw_plots(model: str, data: str, rows: list[dict[str, Any]]) -> None:
    from hfq.integrations import measure_vision
    from hfq.integrations import plots as pictures
    from hfq.integrations.inputs_vision import open_images

    if not measure_vision.is_image_model(model):
        raise ConfigError("--plots is for image models; `hfq compare --plot` draws others")
    pixels = open_images(data, "test", 8).pixels(measure_vision.load_processor(model))
    for path in pictures.write(model, measure_vision.load(model), pixels, rows):
        screen.say(f"wrote {path}")


def run_tasks(model: str, tasks: list[str], limit: int | None, folder: Path | None) -> None:
    """A table of task, metric and value."""
    from hfq.integrations import measure
    from hfq.integrations import tasks as task_module

    rows = task_module.evaluate(
        measure.load_model(model), measure.load_tokenizer(model), tasks, limit=limit, folder=folder
    )
    cells = [[row["task"], row["metric"], f"{row['value']:.4f}",
              "–" if row["stderr"] is None else f"{row['stderr']:.4f}", str(row["examples"] or "–")] for row in rows]
    screen.table(["task", "metric", "value", "standard error", "examples"], cells, title=model, numbers=[2, 3, 4])


def compare(
    models: list[str] = typer.Argument(help="Folders or Hub ids; ratios refer to the first."),
    data: str = DATA,
    windows: int = WINDOWS,
    length: int = LENGTH,
    speed: bool = typer.Option(False, "--speed", help="Also measure decode and prefill speed."),
    plot: Path = typer.Option(None, "--plot", help="Write perplexity over size as a picture (.png, .svg, .pdf)."),
) -> None:
    """Measure several models on the same windows, and put them side by side.

    [dim]hfq compare demo out/rtn-4bit out/rsq-4bit --speed --plot compare.png[/]
    """
    if len(models) < 2:
        raise ConfigError("compare needs at least two models")
    if plot is not None:
        _check_plot(plot)
    rows, about = measured(models, data, windows, length, speed=speed)
    screen.results_table(rows, title=about.dataset)
    if plot is not None:
        draw(rows, plot, about.dataset, key="accuracy" if "accuracy" in rows[0] else "perplexity")
        screen.say(f"plot in {plot}")


def measured(names: list[str], data: str, count: int, length: int, *, speed: bool,
             limit: int | None = None) -> tuple[list[dict[str, Any]], Any]:
    """One row a model, the first being the baseline of agreement and speed, and where the numbers come from."""
    from hfq.integrations import measure, measure_vision
    from hfq.integrations.results import Results, machine

    kinds = [measure_vision.is_image_model(name) for name in names]
    if any(kinds):
        if not all(kinds) or speed:
            wrong = "--speed measures text" if all(kinds) else f"{names[kinds.index(False)]} does not classify images"
            raise ConfigError(f"{wrong}: image models are compared on images only")
        rows, images = measure_vision.compared(names, data, limit)
        protocol = measure_vision.PROTOCOL.format(count=len(images))
        return rows, Results(dataset=images.title, protocol=protocol, machine=machine())
    text = measure.open_text(data)
    windows = text.windows(measure.load_tokenizer(names[0]), count, length)
    rows: list[dict[str, Any]] = []
    loaded: dict[str, Any] = {}
    for name in names:
        model = measure.load_model(name)
        first = next(iter(loaded.values()), None)
        if first is not None and model.config.vocab_size != first.config.vocab_size:
            raise ConfigError(f"{name} and {names[0]} have different vocabularies: they cannot be compared")
        label = _label(name, loaded)
        rows.append(measure.row(label, model, windows, folder=measure.resolve(name), reference=first))
        if speed or first is None:
            loaded[label] = model
    if speed:
        measure.timed_rows(rows, loaded, windows)
    protocol = measure.PROTOCOL.format(count=len(windows), length=length)
    return rows, Results(dataset=text.title, protocol=protocol, machine=machine())


def draw(rows: list[dict[str, Any]], path: Path, title: str, key: str = "perplexity") -> None:
    """Perplexity or accuracy over bytes on disk, one labelled point a model."""
    from matplotlib.figure import Figure

    points = [row for row in rows if row.get("disk_bytes") and row.get(key) is not None]
    if not points:
        raise ConfigError("no row has both a size on disk and a quality: nothing to plot (name folders)")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for row in points:
        axes.scatter(row["disk_bytes"] / 1e6, row[key], s=40)
        axes.annotate(row["name"], (row["disk_bytes"] / 1e6, row[key]), textcoords="offset points",
                      xytext=(6, 4), fontsize=8)
    axes.set(xlabel="weights on disk (MB)", ylabel=key, title=title)
    if key == "perplexity" and max(row[key] for row in points) > 10 * min(row[key] for row in points):
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def _check_plot(path: Path) -> None:
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'hfq[plots]'")
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--plot {path}: end the name in .png, .svg or .pdf")


def _label(name: str, taken: dict[str, Any]) -> str:
    label = Path(name).name or name
    return name if label in taken else label


def register(app: Any) -> None:
    app.command("eval")(evaluate)
    app.command()(compare)
