"""The command ``hfq``. Heavy imports happen inside the commands: help must come at once."""

from __future__ import annotations

import importlib.util
import sys

__all__ = ["main"]


def main() -> None:
    """Entry point of the console script."""
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"hfq: the command line needs {' and '.join(missing)}: pip install 'hfq[cli]'")
    from hfq.integrations.cli.app import app

    app()
