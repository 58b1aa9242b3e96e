"""Fields of Config classes: how they are declared, checked against their type and limits, and made ready for JSON."""

from __future__ import annotations

import copy
import difflib
import math
import os
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

__all__ = ["QuantMethodName", "accepts", "allowed", "did_you_mean", "in_range", "option", "plain", "type_hints"]

_NAMES = {bool: "True or False", int: "an integer", float: "a finite number", str: "a string", type(None): "None"}


def option(default: Any, *, range: tuple[float, float] | None = None, choices: Sequence[Any] | None = None,
           also: Sequence[Any] = (), saved: bool = True, per_module: bool = False, why: str = "") -> Any:
    """A field of a Config class, with the values it allows.

    Args:
        default: default value; a list or dict is copied for every instance.
        range: inclusive limits of a number.
        choices: the values allowed.
        also: values allowed besides ``range`` (16 bits as "off").
        saved: whether the field is part of ``to_dict``.
        per_module: whether ``overrides`` may set it for single modules.
        why: the reason of the limits and what to use instead, for the error message.
    """
    metadata = {"range": range, "choices": choices, "also": tuple(also), "saved": saved, "per_module": per_module,
                "why": why}  # fmt: skip
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata, repr=saved)
    return field(default=default, metadata=metadata, repr=saved)


class QuantMethodName(str):
    """A string with ``.value``: transformers compares the method with ``==``, diffusers reads ``.value``."""

    @property
    def value(self) -> str:
        return str(self)


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
    """What :func:`accepts` and :func:`in_range` let through, and why no more, in words."""
    limits, choices = metadata.get("range"), metadata.get("choices")
    also = "".join(f" or {value!r}" for value in metadata.get("also", ()))
    none = " or None" if type(None) in get_args(hint) else ""
    end = f"{also}{none} is allowed" + (f": {metadata['why']}" if metadata.get("why") else "")
    if choices is not None:
        return f"one of {', '.join(map(repr, choices))}{end}"
    words = _words(hint)
    return (f"{words} from {_number(limits[0])} to {_number(limits[1])}" if limits is not None else words) + end


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` or the list of what there is."""
    known = sorted(set(known))
    near = difflib.get_close_matches(str(name), known, 1)
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


def plain(value: Any) -> Any:
    """Numbers, strings, lists and dicts only."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} cannot be saved as JSON")
    return value
