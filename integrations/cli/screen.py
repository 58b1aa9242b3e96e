"""What the commands write on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hfq.integrations.results import COLUMNS, columns_of, format_value

__all__ = ["error", "results_table", "say", "table", "warn"]


def say(text: str = "") -> None:
    """A line, without wrapping or markup."""
    Console(soft_wrap=True, highlight=False).print(escape(text))


def error(text: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]error[/]: {escape(text)}")


def warn(text: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"[yellow]note[/]: {escape(text)}")


def table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "", numbers: Sequence[int] = ()
) -> None:
    """A table; the columns whose index is in ``numbers`` are aligned to the right."""
    shown = Table(title=escape(title) or None, title_justify="left", header_style="bold")
    for index, heading in enumerate(headings):
        shown.add_column(escape(heading), justify="right" if index in numbers else "left", overflow="fold")
    for cells in rows:
        shown.add_row(*(escape(cell) for cell in cells))
    Console(highlight=False).print(shown)


def results_table(rows: Sequence[Mapping[str, Any]], title: str = "") -> None:
    """Rows of measured numbers (keys of ``results.COLUMNS``)."""
    columns = columns_of(rows)
    cells = [[format_value(key, row.get(key)) for key in columns] for row in rows]
    texts = {"name", "kernel", "shares"}
    table([COLUMNS[key][0] for key in columns], cells, title=title,
          numbers=[index for index, key in enumerate(columns) if key not in texts])
