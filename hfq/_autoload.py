"""Registers hfq with the Hugging Face libraries as soon as they are imported, and never before.

``import torch`` calls :func:`install` through the entry point group ``torch.backends``, so a packed checkpoint opened
without ``import hfq`` is recognised; ``import hfq`` calls it too. Standard library only, and it never raises: an error
here would break ``import torch`` for everybody.
"""

from __future__ import annotations

import importlib
import logging
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

__all__ = ["WATCHED", "install"]

# The packages, not their inner modules: while those run, the package is half initialised.
WATCHED = {
    "transformers.quantizers": "register_transformers",
    "diffusers.quantizers": "register_diffusers",
    "peft": "register_peft",
    "transformers.models.auto.configuration_auto": "register_configs",
    "transformers.models.auto.modeling_auto": "register_models",
}

_log = logging.getLogger("hfq")


def _register(package: str) -> None:
    try:
        registration = importlib.import_module("hfq.integrations.registration")
        getattr(registration, WATCHED[package])()
    except Exception as error:  # noqa: BLE001 - an import of somebody else's package must not fail because of hfq
        _log.warning("hfq could not register with %s: %s: %s", package, type(error).__name__, error)


def _ready(package: str) -> bool:
    module = sys.modules.get(package)
    return module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False)


class _Finder(MetaPathFinder):
    """Lets the other finders find, and adds one call after the package has run."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname not in WATCHED:
            return None
        for finder in [other for other in sys.meta_path if other is not self]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    _call_after(spec.loader, fullname)
                return spec
        return None


class _Begun(ModuleSpec):
    """The spec of a package whose import had begun before :class:`_Finder` existed (it imports torch itself).

    The import system takes a mark off the spec when the package has run, whether or not anything is imported later.
    """

    @property
    def _initializing(self) -> bool:
        return bool(self.__dict__.get("_initializing"))

    @_initializing.setter
    def _initializing(self, value: bool) -> None:
        self.__dict__["_initializing"] = value
        if not value:
            self.__class__ = ModuleSpec  # type: ignore[assignment]
            if self.name in sys.modules:  # else it failed
                _register(self.name)


def _call_after(loader: Any, package: str) -> None:
    original = loader.exec_module

    def exec_module(module: Any) -> None:
        original(module)
        _register(package)

    loader.exec_module = exec_module


def install() -> None:
    """Watch for the packages of :data:`WATCHED`; register at once with those that are imported. Idempotent."""
    try:
        if any(type(finder).__name__ == "_Finder" and type(finder).__module__ == __name__ for finder in sys.meta_path):
            return
        finder = _Finder()
        sys.meta_path.insert(0, finder)
        for package in WATCHED:
            if _ready(package):
                _register(package)
            elif package in sys.modules:
                sys.modules[package].__spec__.__class__ = _Begun  # type: ignore[union-attr]
    except Exception as error:  # noqa: BLE001 - torch turns any exception of an entry point into a failed import
        _log.warning("hfq could not install its import hook: %s", error)
