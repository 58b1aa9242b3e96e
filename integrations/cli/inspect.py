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
    from hfq.layers import kv_install, swap

    loaded = measure.load_model(model)
    packed, caches = swap.packed_modules(loaded), kv_install.explain(loaded, rows)
    if not packed and not caches:
        raise ConfigError(f"{model} has no packed layers: there is nothing to explain")
    if module:
        if module not in packed and module not in caches:
            from hfq.fields import did_you_mean

            known = [*list(packed)[:20], *list(caches)[:4]]
            raise ConfigError(f"{model} has no packed module {module!r}{did_you_mean(module, known)}")
        lines = explain_kernel(packed[module], rows) if module in packed else caches[module]
        _backends(f"{module}, {rows} rows", lines)
        if module in caches:
            _backends("on an NVIDIA GPU", kv_install.explain(loaded, rows, "cuda")[module])
        return
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    report = getattr(loaded, "hfq_report", None)
    for name, layer in packed.items():
        chosen = next((choice for choice in explain_kernel(layer, rows) if choice.chosen), None)
        row = report.rows.get(name) if report else None
        bits = f"{row.bits:.3f}" if row is not None and row.bits else "–"
        shape = "×".join(str(getattr(layer, side, "?")) for side in ("out_features", "in_features"))
        groups[type(layer).__name__, shape, bits, chosen.backend if chosen else "–"].append(name)
    if groups:
        screen.table(
            ["modules", "layer", "shape", "bits per weight", "kernel", "first"],
            [[str(len(names)), *key, names[0]] for key, names in groups.items()],
            title=f"{model}, {rows} rows", numbers=[0, 3],
        )
    _caches(loaded, caches, rows)
    for row in report or ():
        if row.status != "packed":
            screen.say(f"{row.module}: {row.status}, {row.reason}")


def _backends(title: str, lines: Any) -> None:
    rows = [["→" if c.chosen else "", c.backend, c.reason] for c in lines]
    screen.table(["", "backend", "reason"], rows, title=title)


def _caches(model: Any, here: dict[str, Any], rows: int) -> None:
    """One line for all caches of a kind."""
    from hfq.layers import attention, kv_install

    there = kv_install.explain(model, rows, "cuda")
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, lines in here.items():
        place, side = name.rsplit(".", 1)
        cache = attention.installed(model.get_submodule(place.rsplit(".", 1)[0])).cache
        bits = getattr(cache.form, side).bits_per_element(cache.heads or 1, cache.head_dim)
        used, gpu = (next(c.backend for c in found if c.chosen) for found in (lines, there[name]))
        groups[side, f"{cache.heads or '?'}×{cache.head_dim}", f"{bits:.3f}", used, gpu].append(name)
    if groups:
        screen.table(
            ["caches", "of", "heads", "bits per number", "kernel", "on an NVIDIA GPU", "first"],
            [[str(len(names)), *key, names[0]] for key, names in groups.items()],
            title=f"key-value cache, {rows} queries a head", numbers=[0, 3],
        )


def register(app: Any) -> None:
    app.command()(explain)
