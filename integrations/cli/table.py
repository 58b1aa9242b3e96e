"""``hfq methods``: the table of methods."""

from __future__ import annotations

from typing import Any

import typer

from hfq.integrations.cli import screen
from hfq.methods import METHODS

__all__ = ["markdown", "register"]


def markdown() -> str:
    """The table of methods for the README."""
    lines = ["| method | paper | made for | Config | |", "|---|---|---|---|---|"]
    for method in sorted(METHODS.values(), key=lambda m: not m.available):
        paper = f"[{method.title}]({method.url})" if method.url else method.title
        state = "works" if method.available else "planned"
        lines.append(f"| `{method.slug}` | {paper} | {method.domain} | `{method.config}` | {state} |")
    return "\n".join(lines)


def methods(
    as_markdown: bool = typer.Option(False, "--markdown", help="As a Markdown table (the README's)."),
    planned: bool = typer.Option(False, "--all", help="Also the methods that this version does not have yet."),
) -> None:
    """List the methods.

    [dim]hfq methods --all[/]
    """
    if as_markdown:
        screen.say(markdown())
        return
    rows = [
        [m.slug, m.title, f"arXiv {m.arxiv}" if m.arxiv else "", m.domain, m.config, m.status]
        for m in METHODS.values() if planned or m.available
    ]
    screen.table(["method", "paper", "", "made for", "Config", "status"], rows)


def register(app: Any) -> None:
    app.command()(methods)
