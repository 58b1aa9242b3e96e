"""``hfq card`` and ``hfq push``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from hfq.integrations.cli import screen

__all__ = ["register"]


def card(
    folder: Path = typer.Argument(help="Folder of a packed model."),
    repo_id: str = typer.Option("", "--repo-id", help="Name that the card loads the model by."),
    show: bool = typer.Option(False, "--show", help="Print it instead of writing README.md."),
) -> None:
    """Write the model card from the config, the report and the numbers that `hfq eval --save` kept.

    [dim]hfq card out/rsq-4bit --repo-id me/smollm2-rsq-4bit[/]
    """
    from hfq.integrations import card as cards

    if show:
        screen.say(str(cards.folder_card(folder, repo_id)))
        return
    screen.say(f"wrote {cards.write_card(folder, repo_id)}")


def push(
    folder: Path = typer.Argument(help="Folder of a packed model."),
    repo_id: str = typer.Argument(help="name or organisation/name"),
    private: bool = typer.Option(False, "--private", help="Make a new repository private."),
    revision: str = typer.Option("", "--revision", help="Branch to push to."),
    message: str = typer.Option("Upload quantized model", "--message", "-m"),
) -> None:
    """Push a packed model to the Hub, with a card written for its name there.

    [dim]hfq push out/rsq-4bit me/smollm2-rsq-4bit --private[/]
    """
    from hfq.integrations import card as cards
    from hfq.integrations import hub

    cards.write_card(folder, repo_id)
    address = hub.push_folder(folder, repo_id, private=private or None, revision=revision or None,
                              commit_message=message)
    screen.say(f"pushed to {address}")


def register(app: Any) -> None:
    app.command()(card)
    app.command()(push)
