"""Methods that carry another method: a Config that holds a backend's Config, and runs its recipe."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from hfq.config import HfqConfig, option
from hfq.errors import ConfigError
from hfq.report import Report

__all__ = ["ComposedConfig", "carried"]

# What the backend does not take from the config around it.
_OWN = ("quant_method", "method", "overrides", "allow_partial", "dequantize", "kv_cache", "kv_bits")
# What a carried cache takes from the config around it.
_SHARED = frozenset({"seed", "progress", "work_dir"})


@dataclass(kw_only=True, eq=False, repr=False)
class ComposedConfig(HfqConfig):
    """Base of the Configs of methods that decide something and leave the rounding to another method.

    Common fields (group size, skipped modules, calibration, seed, ...) may be given here or in the backend, not
    differently in both; what neither gives has the backend's default. All of them are kept here, so that ``spec_for``,
    ``plan`` and what is saved speak for the whole run; ``backend`` keeps the fields that only the backend has.

    Args:
        backend: the method that rounds: its Config, or a dict of its fields with ``method``; ``None`` where a method
            can round by itself.
    """

    backend: Any = option({"method": "gptq"})

    def __post_init__(self) -> None:
        if self.backend is not None or _default(type(self).__dataclass_fields__["backend"]) is not None:
            self._adopt(self.backend)
        super().__post_init__()

    @property
    def backend_class(self) -> type[HfqConfig]:
        return importlib.import_module("hfq.methods").config_class(self.backend["method"])

    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]
        return self.backend_class.needs_calibration

    @property
    def supports_activation_bits(self) -> bool:  # type: ignore[override]
        # Ranges that a backend measures and stores are those of a model that it quantizes alone.
        return self.backend_class.supports_activation_bits and not getattr(self.backend_class, "stored_inputs", False)

    @property
    def supports_kv_bits(self) -> bool:  # type: ignore[override]
        return self.backend_class.supports_kv_bits

    def _adopt(self, backend: Any) -> None:
        """Make ``backend`` a dict of the fields that only it has; its common fields become this config's."""
        said = _said(backend) if isinstance(backend, HfqConfig) else backend
        if not isinstance(said, Mapping) or not isinstance(said.get("method"), str):
            raise ConfigError(f"backend={backend!r}: a Config, or a dict with 'method' and its fields, is needed")
        if said["method"] == type(self).method:
            raise ConfigError(f"backend: {said['method']} cannot be its own backend")
        common = {f.name for f in fields(HfqConfig)} - {"quant_method", "method"}
        self.backend = {name: value for name, value in said.items() if name not in common}
        base = {f.name: _default(f) for f in fields(HfqConfig)}
        defaults = {f.name: _default(f) for f in fields(self.backend_class) if f.name in common - set(_OWN)}
        for name, value in defaults.items():
            if name not in said and name not in self._given and value != base[name]:
                setattr(self, name, value)
        for name in [name for name in said if name in common]:
            if name in self._given and not _same(getattr(self, name), said[name]):
                raise ConfigError(f"{name}={getattr(self, name)!r} here and {said[name]!r} in the backend: say it once")
            setattr(self, name, said[name])

    def backend_config(self, overrides: Mapping[str, Any] | None = None, **changes: Any) -> HfqConfig:
        """The Config of the method that rounds; ``overrides`` hold unless this config's own say otherwise."""
        common = {f.name: getattr(self, f.name) for f in fields(HfqConfig) if f.init and f.name not in _OWN}
        values = {**common, **self.backend, "overrides": {**(overrides or {}), **self.overrides}, **changes}
        config = self.backend_class(**values)
        widths = [config.activation_bits, *(entry.get("activation_bits", 16) for entry in config.overrides.values())]
        if getattr(config, "stored_inputs", False) and any(bits != 16 for bits in widths):
            raise ConfigError(f"activation_bits={min(widths)}: as a backend {config.method} does not quantize "
                              "activations (16 is off)")
        for name in ("_environment", "_data", "_processor"):
            setattr(config, name, getattr(self, name, None))
        return config

    def run_backend(self, model: Any, data: Any, backend: HfqConfig, report: Report) -> None:
        """The backend's recipe, on ``model`` in place."""
        importlib.import_module("hfq.methods").recipe(backend.method)(model, data, backend, report)


def carried(config: HfqConfig) -> HfqConfig | None:
    """The Config that ``config.kv_cache`` stands for; the field becomes the dict of what was said, to be saved.

    What both have in common (data, seed, placement) is that of ``config``.

    Raises:
        ConfigError: the field is no Config of a cache, or ``kv_bits`` are given besides it.
    """
    said = config.kv_cache
    if said is None:
        return None
    said = _said(said) if isinstance(said, HfqConfig) else said
    if not isinstance(said, Mapping):
        raise ConfigError(f"kv_cache={said!r}: the Config of a method of caches, or a dict of its fields, is needed")
    methods = importlib.import_module("hfq.methods")
    said = {"method": said.get("method") or _of_caches(methods), **said}
    cls = methods.config_class(said["method"])
    if not cls.is_cache or config.is_cache:
        raise ConfigError(f"kv_cache: {config.method} cannot carry {said['method']}: a config carries that of a method "
                          "of caches, which carries none itself")
    if config.kv_bits != 16:
        raise ConfigError(f"kv_bits={config.kv_bits} and kv_cache: say it once, in kv_cache")
    data = [name for name in ("calibration", "processor", "overrides", "kv_cache") if said.get(name)]
    if data:
        raise ConfigError(f"kv_cache: {data[0]!r} is said by the config around it")
    made = cls(**said)
    for name in _SHARED - set(said):
        setattr(made, name, getattr(config, name))
    config.kv_cache = {name: value for name, value in said.items() if value is not None}
    return made


def _of_caches(methods: Any) -> str:
    """The method that a dict without one means: the first of the table that quantizes nothing but caches."""
    names = (slug for slug, method in methods.METHODS.items() if method.available)
    slug = next((slug for slug in names if methods.config_class(slug).is_cache), None)
    if slug is None:
        raise ConfigError("kv_cache: this version of hfq has no method of caches")
    return slug


def _said(backend: HfqConfig) -> dict[str, Any]:
    """The fields of a Config that somebody set."""
    said = {f.name: getattr(backend, f.name) for f in fields(backend)
            if f.init and (f.name in backend._given or getattr(backend, f.name) != _default(f))}  # fmt: skip
    # The config keeps objects out of its fields.
    said |= {name: value for name, value in (("calibration", backend._data), ("processor", backend._processor))
             if value is not None}  # fmt: skip
    if "overrides" in said and not said["overrides"]:
        del said["overrides"]
    return {**said, "method": backend.method}


def _default(field: Any) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _same(a: Any, b: Any) -> bool:
    """Equal, for fields; data and processors are the same only if they are one object."""
    if a is b:
        return True
    plain = (str, int, float, bool, type(None), Mapping, list, tuple)
    return isinstance(a, plain) and isinstance(b, plain) and a == b
