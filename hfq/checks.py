"""Checks of single values against a type hint and limits, with messages that say what is allowed."""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

__all__ = ["accepts", "allowed", "did_you_mean", "in_range", "type_hints"]

_NAMES = {bool: "True or False", int: "an integer", float: "a finite number", str: "a string", type(None): "None"}


@cache
def type_hints(cls: type) -> dict[str, Any]:
    """Resolved annotations of a class and its bases."""
    return typing.get_type_hints(cls)


def accepts(value: Any, hint: Any) -> bool:
    """Whether ``value`` is of the type that ``hint`` names. An integer passes as float; a bool only as bool."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(accepts(value, option) for option in args)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in args)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    kind = origin or hint
    if not isinstance(kind, type):
        return True
    if not isinstance(value, kind):
        return False
    if isinstance(value, (str, bytes)):
        return kind in (str, bytes, object)
    if args and issubclass(kind, Sequence) and Ellipsis not in args and len(args) == 1:
        return all(accepts(item, args[0]) for item in value)
    return True


def in_range(value: Any, metadata: Mapping[str, Any]) -> bool:
    """Whether ``value`` obeys the limits of ``metadata`` ("range", "choices", "also")."""
    if value is None or value in metadata.get("also", ()):
        return True
    limits, choices = metadata.get("range"), metadata.get("choices")
    if limits is not None and not limits[0] <= value <= limits[1]:
        return False
    return choices is None or value in choices


def allowed(hint: Any, metadata: Mapping[str, Any]) -> str:
    """What :func:`accepts` and :func:`in_range` let through, in words."""
    limits, choices = metadata.get("range"), metadata.get("choices")
    also = "".join(f" or {value!r}" for value in metadata.get("also", ()))
    none = " or None" if type(None) in get_args(hint) else ""
    if choices is not None:
        return f"one of {', '.join(map(repr, choices))}{also}{none}"
    words = _words(hint)
    return (f"{words} from {limits[0]:g} to {limits[1]:g}{also}" if limits is not None else words) + none


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` or the list of what there is."""
    known = sorted(set(known))
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def _words(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(option) for option in args if option is not type(None))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    kind = origin or hint
    if kind in _NAMES:
        return _NAMES[kind]
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return "a dict"
    if isinstance(kind, type) and issubclass(kind, Sequence):
        return "a list" + (f" of {_words(args[0]).removeprefix('an ').removeprefix('a ')}s" if args else "")
    return "a path" if getattr(kind, "__name__", "") == "PathLike" else getattr(kind, "__name__", str(hint))
