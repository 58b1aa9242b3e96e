"""``hfq explain``: what became of each module, and which kernel serves it."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import typer

from hfq.errors import ConfigError
from hfq.integrations.cli import screen

__all__ = ["register"]


def explain(
    model: str = typer.Argument(help="Folder or Hub id of a packed model."),
    module: str = typer.Option("", "--module", help="One module: every backend, and why it was passed over."),
    rows: int = typer.Option(1, "--rows", min=1, help="Tokens at once: 1 is decoding, more is prefill."),
) -> None:
    """Show how a packed model computes: format, size, and kernel of each kind of module.

    [dim]hfq explain out/rsq-4bit --rows 512[/]

    [dim]hfq explain out/rsq-4bit --module model.layers.0.mlp.down_proj[/]
    """
    from hfq.integrations import measure
    from hfq.kernels import explain as explain_kernel
    from hfq.layers import swap

    loaded = measure.load_model(model)
    packed = swap.packed_modules(loaded)
    if not packed:
        raise ConfigError(f"{model} has no packed layers: there is nothing to explain")
    if module:
        if module not in packed:
            from hfq.fields import did_you_mean

            raise ConfigError(f"{model} has no packed module {module!r}{did_you_mean(module, list(packed)[:20])}")
        lines = explain_kernel(packed[module], rows)
        screen.table(["", "backend", "reason"], [["→" if c.chosen else "", c.backend, c.reason] for c in lines],
                     title=f"{module}, {rows} rows")
        return
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    report = getattr(loaded, "hfq_report", None)
    for name, layer in packed.items():
        chosen = next((choice for choice in explain_kernel(layer, rows) if choice.chosen), None)
        row = report.rows.get(name) if report else None
        bits = f"{row.bits:.3f}" if row is not None and row.bits else "–"
        shape = "×".join(str(getattr(layer, side, "?")) for side in ("out_features", "in_features"))
        groups[type(layer).__name__, shape, bits, chosen.backend if chosen else "–"].append(name)
    screen.table(
        ["modules", "layer", "shape", "bits per weight", "kernel", "first"],
        [[str(len(names)), *key, names[0]] for key, names in groups.items()],
        title=f"{model}, {rows} rows", numbers=[0, 3],
    )
    for row in report or ():
        if row.status != "packed":
            screen.say(f"{row.module}: {row.status}, {row.reason}")


def register(app: Any) -> None:
    app.command()(explain)
