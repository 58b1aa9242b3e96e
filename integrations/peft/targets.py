"""Which modules of a model an adapter goes to: PEFT's own rules, and packed layers among the linear ones."""

from __future__ import annotations

import difflib
import functools
from typing import Any

from peft.tuners import tuners_utils
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from hfq.errors import ConfigError
from hfq.layers.linear import PackedMatrix

__all__ = ["check_names", "linears", "register"]


def _asks_for_all(config: Any) -> bool:
    wanted = getattr(config, "target_modules", None)
    return isinstance(wanted, str) and wanted.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND


def linears(model: nn.Module) -> set[str]:
    """Names of the packed linear layers (or of the adapters around them), output heads left out."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    found: set[str] = set()
    inside = ""
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        tuned = isinstance(module, tuners_utils.BaseTunerLayer)
        layer = module.get_base_layer() if tuned else module
        inside = f"{name}." if tuned else ""
        if isinstance(layer, PackedMatrix) and module is not head and layer is not head:
            found.add(name)
    return found


def check_names(config: Any, model: nn.Module) -> None:
    """Raise ConfigError for a name of ``target_modules`` that no module of the model has.

    PEFT raises if nothing at all matches; a misspelt name among others leaves layers out without a word.
    """
    wanted = config.target_modules
    if wanted is None or isinstance(wanted, str):
        return
    names = [name.replace(".base_layer", "") for name, _ in model.named_modules()]
    for target in sorted(wanted):
        if not any(name == target or name.endswith(f".{target}") for name in names):
            near = difflib.get_close_matches(target, {name.rpartition(".")[2] for name in names}, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"target_modules: the model has no module {target!r}{hint}")


def register() -> None:
    """Let ``target_modules="all-linear"`` mean packed linear layers too. Idempotent."""
    before = tuners_utils._maybe_include_all_linear_layers
    if hasattr(before, "_hfq"):
        return

    @functools.wraps(before)
    def after(peft_config: Any, model: nn.Module) -> Any:
        packed = linears(model) if _asks_for_all(peft_config) else set()
        config = before(peft_config, model)
        if packed:
            config.target_modules = set(config.target_modules) | packed
        return config

    after._hfq = True  # type: ignore[attr-defined]
    tuners_utils._maybe_include_all_linear_layers = after
