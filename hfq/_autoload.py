"""Entry point of the group ``torch.backends``: standard library only, and it never raises."""

from __future__ import annotations


def install() -> None:
    """Called by ``import torch``."""
