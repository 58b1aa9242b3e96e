"""Configs of methods whose runs choose a width for every layer: the widths are saved, and can be given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from hfq.config import HfqConfig
from hfq.errors import ConfigError
from hfq.fields import did_you_mean, type_hints

__all__ = ["WidthsConfig", "check_known"]

_FIELDS = ("bits", "activation_bits")


def check_known(field: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raise :class:`ConfigError` if a config's ``field`` names a layer that is not among ``known``."""
    for name in given:
        if name not in known:
            hint = did_you_mean(name, known)  # a model has too many layers to list them
            raise ConfigError(f"{field}[{name!r}]: nothing of that name is quantized in this model"
                              f"{hint if hint.endswith('?') else ''}")


@dataclass(kw_only=True, eq=False, repr=False)
class WidthsConfig(HfqConfig):
    """Base of configs with a width for every layer, chosen by the run or by the user.

    Args:
        bit_map: layer → ``{"bits": ..., "activation_bits": ...}``. Filled in by the run; when given, used as it is.
            ``overrides`` win.
        average_bits: filled in by the run.
    """

    bit_map: Mapping[str, Any] | None = None
    average_bits: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        self._chosen = False  # whether a run, not the user, filled in bit_map
        super().__post_init__()

    def check(self) -> None:
        known, hints = {f.name: f for f in fields(self)}, type_hints(type(self))
        for name, entry in (self.bit_map or {}).items():
            where = f"bit_map[{name!r}]"
            if not isinstance(entry, Mapping) or not entry:
                raise ConfigError(f"{where}={entry!r}: a dict with some of {', '.join(_FIELDS)} is needed")
            for field, value in entry.items():
                if field not in _FIELDS:
                    raise ConfigError(f"{where}: unknown field {field!r}{did_you_mean(field, _FIELDS)}")
                self._check_value(known[field], value, hints[field], f"{where}[{field!r}]")

    @property
    def fixed(self) -> bool:
        """Whether the user gave the widths."""
        return self.bit_map is not None and not self._chosen

    def choose(self, bit_map: Mapping[str, Any] | None) -> None:
        """Set what a run chose; ``None`` before it chooses again."""
        self.bit_map, self._chosen = bit_map, bit_map is not None

    def check_layers(self, names: Iterable[str]) -> None:
        """Raise :class:`ConfigError` if ``bit_map`` has a layer that is not among ``names``."""
        check_known("bit_map", self.bit_map or {}, list(names))

    def override_for(self, name: str) -> dict[str, Any]:
        """The width of a layer, under the user's own overrides."""
        return {**(self.bit_map or {}).get(name, {}), **super().override_for(name)}

    def inputs_for(self, name: str) -> int:
        """Width of the inputs of a layer, 16 for floats."""
        return self.value_for(name, "activation_bits")
