"""Patterns that name modules: one meaning for ``modules_to_not_convert``, ``overrides`` and every list of names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

__all__ = ["exactly", "first_match", "matches", "unused"]


def matches(name: str, pattern: str) -> bool:
    """Whether ``pattern`` names the module ``name``.

    Three forms, tried in this order: ``re:...`` is a regular expression that must match the whole name; a pattern with
    ``*``, ``?`` or ``[`` is a shell pattern over the whole name; anything else is one or several whole components of
    the name (``lm_head``, ``layers.0``, ``mlp.down_proj``), so that ``layers.1`` does not name ``layers.10``.
    """
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    if any(character in pattern for character in "*?["):
        return fnmatchcase(name, pattern)
    return bool(pattern) and f".{pattern.strip('.')}." in f".{name}."


def first_match(name: str, patterns: Iterable[str]) -> str | None:
    """The first of ``patterns`` that names ``name``."""
    return next((pattern for pattern in patterns if matches(name, pattern)), None)


def unused(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    """The patterns that name nothing, so that a typing error can be reported."""
    known = list(names)
    return [pattern for pattern in patterns if not any(matches(name, pattern) for name in known)]


def exactly(names: Iterable[str]) -> list[str]:
    """Patterns that match these names and no others."""
    return [f"re:{re.escape(name)}" for name in names]
