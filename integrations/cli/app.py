"""The application: its commands, and errors as one clear line."""

from __future__ import annotations

import importlib
from typing import Any

import typer
from typer.core import TyperGroup

from hfq.errors import HfqError
from hfq.integrations.cli import screen

__all__ = ["app"]


class Group(TyperGroup):
    """Takes ``--debug`` anywhere on the line; turns errors into one line and an exit status."""

    debug = False

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        self.debug = "--debug" in args
        return super().parse_args(ctx, [arg for arg in args if arg != "--debug"])

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            if self.debug:
                raise
            screen.error("interrupted; an unfinished quantization continues with --resume")
            raise typer.Exit(130) from None
        except BrokenPipeError:  # the reader (head, less) has seen enough
            raise typer.Exit(1) from None
        except (HfqError, OSError, ValueError, ImportError) as error:
            if self.debug:
                raise
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            # A foreign error may be short on context: say its kind and how to see where it came from.
            known = isinstance(error, HfqError)
            screen.error(first if known else f"{type(error).__name__}: {first} (--debug shows where)")
            raise typer.Exit(1) from None


app = typer.Typer(
    name="hfq", cls=Group, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False,
    help="Quantize models of the Hugging Face libraries with published methods, measure them, share them.\n\n"
         "A MODEL is a folder, the id of a model on the Hub, or [bold]demo[/bold] (a small real model that installs "
         "from the package index). DATA is a .txt, .json or .jsonl file, the id of a dataset on the Hub, or "
         "[bold]demo[/bold].",
)


def _version(value: bool) -> None:
    if value:
        from hfq import __version__

        screen.say(f"hfq {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
    debug: bool = typer.Option(False, "--debug", help="Show the whole trace of an error (anywhere on the line)."),
) -> None:
    """Quantize models of the Hugging Face libraries."""


# Each module adds its commands to the application; the order here is the order of the help.
for name in ("table", "quantize", "evaluate", "inspect", "bench", "share"):
    importlib.import_module(f"hfq.integrations.cli.{name}").register(app)
