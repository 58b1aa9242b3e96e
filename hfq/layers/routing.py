"""Which attention function a model's modules call: switched by name in their configs, watched, and switched back.

Modules that follow transformers' attention interface hand queries, keys and values (after the rotary embedding) to a
function that their config names. The integration registers functions of that kind which end in
:func:`hfq.layers.attention.attend`.
"""

from __future__ import annotations

import importlib
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hfq.errors import QuantizationError
from hfq.layers import processors

__all__ = [
    "DEFAULT_ROUTE", "ROUTES", "adopt", "asked_causal", "back", "check_registered", "config_of", "eager_function",
    "find", "keep_route", "observing", "routable", "route", "set_route", "watch",
]  # fmt: skip

# Attention functions of the host library by name, and the names under which they are routed through `attend`.
ROUTES = {"eager": "hfq_eager"}
DEFAULT_ROUTE = "hfq"

_OBSERVERS: list[Callable[..., Any]] = []
_CAUSAL: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # modules that asked for it in a call that was observed
_ROUTABLE: set[str] = set()
_ADOPT: list[Callable[..., None]] = []


def routable(*names: str, adopt: Callable[[Any, nn.Module, Any], None]) -> None:
    """Said by the integration once attention functions of these names are registered.

    Args:
        adopt: ``adopt(cache, module, part)`` makes the cache of a call store what ``module`` computes by ``part``.
    """
    _ROUTABLE.update(names)
    _ADOPT[:] = [adopt]


@contextmanager
def observing(model: nn.Module, observer: Callable[..., Any]) -> Iterator[None]:
    """Inside, ``observer(module, query, key, value, mask)`` is called for each attention that ``model`` computes.

    It may return another query, key and value to compute with.

    Raises:
        QuantizationError: nothing registered an attention function that could be observed.
    """
    from hfq.layers.attention import attend

    check_registered()
    before = [(config, config._attn_implementation) for config in _configs(model)]
    _OBSERVERS.append(observer)
    try:
        for config, name in before:
            set_route(config, route(name))
        with processors.catching(model, attend):
            yield
    finally:
        _OBSERVERS.remove(observer)
        for config, name in before:
            set_route(config, name)


def find(model: nn.Module, call: Callable[[], Any]) -> list[str]:
    """Names of the modules whose attention goes through the attention interface, in the order in which they run.

    Args:
        call: runs one forward pass of the whole model.

    Raises:
        QuantizationError: nothing registered an attention function that could be observed.
    """
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, None] = {}

    def observer(module: nn.Module, *tensors: Any) -> None:
        if module in names:
            found[names[module]] = None

    with observing(model, observer), torch.no_grad():
        call()
    return list(found)


def eager_function(module: nn.Module) -> Callable[..., Any]:
    """The function that a module calls where its config says "eager": by convention in the file of its class."""
    for cls in type(module).__mro__:
        found = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    raise QuantizationError(
        f"{type(module).__name__} has no eager attention function: load the model with attn_implementation='sdpa'"
    )


def route(name: Any) -> Any:
    """The routed name that stands for an attention function; flash and flex attention become scaled dot products."""
    if name is None or name in (DEFAULT_ROUTE, *ROUTES.values()):
        return name
    return ROUTES.get(name, DEFAULT_ROUTE)


def keep_route(module: nn.Module, label: str) -> None:
    """Send ``module`` through ``attend`` again if somebody has chosen another attention function since.

    Called before the module runs, but after its masks were made: only functions with masks of the same form can be
    replaced.

    Raises:
        QuantizationError: the function takes other masks. Without the route it would see the newest tokens alone.
    """
    config = getattr(module, "config", None)
    name = getattr(config, "_attn_implementation", None)
    if config is None or name in (DEFAULT_ROUTE, *ROUTES.values()):
        return
    if name not in (None, "sdpa", *ROUTES):
        raise QuantizationError(f"{label}: its attention was set to {name!r}; quantized attention computes with 'sdpa' "
                                "or 'eager': model.set_attn_implementation('sdpa')")
    set_route(config, route(name) or DEFAULT_ROUTE)


def check_registered() -> None:
    if not _ROUTABLE and "transformers" in sys.modules:
        importlib.import_module("hfq.integrations.attention").register()
    if not _ROUTABLE:
        raise QuantizationError("no attention interface is known: quantized attention needs a transformers model")


def set_route(config: Any, name: Any) -> None:
    # The public attribute would also set the configs inside this one.
    config._attn_implementation_internal = name


def _configs(model: nn.Module) -> list[Any]:
    found = [getattr(module, "config", None) for module in model.modules()]
    return list({id(config): config for config in found if hasattr(config, "_attn_implementation")}.values())


def config_of(model: nn.Module, name: str) -> Any:
    """The config that names the attention function of module ``name``: its own, or that of a module around it."""
    while True:
        config = getattr(model.get_submodule(name), "config", None)
        if hasattr(config, "_attn_implementation"):
            return config
        if not name:
            return None
        name = name.rpartition(".")[0]


def back(name: Any) -> Any:
    """The function that a routed name stands for."""
    return ({new: old for old, new in ROUTES.items()} | {DEFAULT_ROUTE: "sdpa"}).get(name, name)


def watch(module: nn.Module, *tensors: Any, causal: bool = False) -> tuple[Any, Any, Any]:
    """Show an observer query, key, value and mask of an attention; the query, key and value to compute with.

    Args:
        causal: the call asks for causal attention, whatever the module says of itself.
    """
    query, key, value, mask = tensors
    if causal and _OBSERVERS:
        _CAUSAL.add(module)
    for observer in _OBSERVERS:
        seen = observer(module, query, key, value, mask)
        query, key, value = (query, key, value) if seen is None else seen
    return query, key, value


def asked_causal(module: nn.Module) -> bool:
    """Whether an observed call of an attention module asked for causal attention."""
    return module in _CAUSAL


def adopt(cache: Any, module: nn.Module, part: Any) -> None:
    """Make ``cache`` store what ``module`` computes by ``part``."""
    _ADOPT[0](cache, module, part)
