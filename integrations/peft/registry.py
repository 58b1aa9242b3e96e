"""New tuner types from outside of PEFT: its list of types is an enumeration that is closed after the import."""

from __future__ import annotations

from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

__all__ = ["add", "peft_type"]


def peft_type(name: str) -> PeftType:
    """The member ``name`` (upper case) of PEFT's enumeration, made if it is not there."""
    if name in PeftType._value2member_map_:
        return PeftType(name)
    # What ``enum`` does for a member in the body of a class with a ``str`` mixin; there is no public way afterwards.
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType._member_names_)  # type: ignore[attr-defined]
    type.__setattr__(PeftType, name, member)
    PeftType._member_map_[name] = member
    PeftType._member_names_.append(name)
    PeftType._value2member_map_[name] = member
    return member


def add(name: str, config: type[Any], model: type[Any]) -> None:
    """Register a tuner under ``name`` (lower case); parameters begin with ``<name>_``. Idempotent."""
    if peft_type(name.upper()) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=name, config_cls=config, model_cls=model, prefix=f"{name}_")
