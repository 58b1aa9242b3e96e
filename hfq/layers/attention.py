"""What attention modules are given besides their weights: quantized queries, keys and values, and a quantized cache.

Modules that follow transformers' attention interface hand queries, keys and values (after the rotary embedding) to a
function that their config names. The integration registers functions of that kind which end in :func:`attend`; a module
with a child ``hfq_attention`` is then served by that part, every other one by the function it used before.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hfq.errors import CheckpointError, ConfigError, QuantizationError
from hfq.formats import ActivationSpec, activation
from hfq.kernels import hadamard

__all__ = ["AttentionQuant", "attend", "describe", "empty_part", "find", "install", "installed", "observing", "parts"]

CHILD = "hfq_attention"
# Attention functions of the host library by name, and the names under which they are routed through `attend`.
ROUTES = {"eager": "hfq_eager"}
DEFAULT_ROUTE = "hfq"

_OBSERVERS: list[Callable[..., None]] = []
_ROUTABLE: set[str] = set()


def routable(*names: str) -> None:
    """Said by the integration once attention functions of these names are registered."""
    _ROUTABLE.update(names)


class AttentionQuant(nn.Module):
    """Quantizes what an attention module computes with, after the rotary embedding.

    Args:
        query, key, value: grids with one scale a token and head (the last axis is the head's), or ``None``. Dynamic
            grids without a factor only.
        hadamard: multiply queries and keys by a Hadamard matrix (their products stay the same) before quantizing.
        head_dim: width of a head.
    """

    # transformers must not look for weights to initialise in here.
    _is_hf_initialized = True

    def __init__(
        self, head_dim: int, *, query: ActivationSpec | None = None, key: ActivationSpec | None = None,
        value: ActivationSpec | None = None, hadamard: bool = False,
    ) -> None:
        super().__init__()
        for name, spec in (("query", query), ("key", key), ("value", value)):
            if spec is not None and (spec.granularity != "token" or not spec.dynamic or spec.factor):
                raise QuantizationError(f"{name}={spec}: attention takes dynamic grids with a scale a token")
        self.head_dim, self.hadamard = head_dim, hadamard
        self.query, self.key, self.value = query, key, value
        self.label = ""
        if hadamard:
            _order(head_dim)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
        attend: Callable[..., Any],
    ) -> Any:
        """``attend(query, key, value, mask)`` on quantized tensors ``[batch, heads, tokens, head_dim]``."""
        return attend(self._fake(query, self.query, True), self._fake(key, self.key, True),
                      self._fake(value, self.value, False), mask)

    def _fake(self, x: torch.Tensor, spec: ActivationSpec | None, turned: bool) -> torch.Tensor:
        if turned and self.hadamard:
            x = hadamard.transform(x, self.head_dim)
        return x if spec is None else activation.fake(x, spec)

    def describe(self) -> dict[str, Any]:
        """The manifest entry, JSON only, without the module's name."""
        specs = {name: getattr(self, name) for name in ("query", "key", "value")}
        entry = {name: None if spec is None else spec.to_dict() for name, spec in specs.items()}
        return {"head_dim": self.head_dim, "hadamard": self.hadamard, **entry}

    def extra_repr(self) -> str:
        bits = [f"{name} {spec.bits} bits" for name in ("query", "key", "value")
                if (spec := getattr(self, name)) is not None]
        return ", ".join([str(self.head_dim), *bits, *(["hadamard"] if self.hadamard else [])])


def _order(head_dim: int) -> None:
    if not hadamard.is_order(head_dim):
        raise QuantizationError(f"no Hadamard matrix of order {head_dim} (the width of a head) is known")


def attend(
    inner: Callable[..., Any], module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, **kwargs: Any,
) -> Any:
    """The attention function of every routed module: ``inner`` is the one that the module would call otherwise."""
    for observer in _OBSERVERS:
        observer(module, query, key, value, attention_mask)
    part = module._modules.get(CHILD)
    if part is None:
        return inner(module, query, key, value, attention_mask, **kwargs)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> Any:
        return inner(module, q, k, v, mask, **kwargs)

    return part(query, key, value, attention_mask, call)


@contextmanager
def observing(model: nn.Module, observer: Callable[..., None]) -> Iterator[None]:
    """Inside, ``observer(module, query, key, value, mask)`` is called for each attention that ``model`` computes.

    Raises:
        QuantizationError: nothing registered an attention function that could be observed.
    """
    _check_registered()
    before = [(config, config._attn_implementation) for config in _configs(model)]
    _OBSERVERS.append(observer)
    try:
        for config, name in before:
            _set_route(config, _route(name))
        yield
    finally:
        _OBSERVERS.remove(observer)
        for config, name in before:
            _set_route(config, name)


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


def install(model: nn.Module, name: str, part: AttentionQuant) -> AttentionQuant:
    """Make the attention module ``name`` compute with ``part``, on the device of the module.

    Raises:
        QuantizationError: there is no such module, it has a part already, or no config says how it attends.
    """
    _check_registered()
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise QuantizationError(f"{type(model).__name__} has no module {name!r}") from error
    if CHILD in module._modules:
        raise QuantizationError(f"{name} has quantized attention already")
    config = _config_of(model, name)
    if config is None:
        raise QuantizationError(f"{name}: no config says which attention function {type(module).__name__} uses")
    device = next((p.device for p in module.parameters() if p.device.type != "meta"), None)
    part.label = name
    module.add_module(CHILD, part if device is None else part.to(device))
    _set_route(config, _route(config._attn_implementation))
    return part


def route(model: nn.Module) -> None:
    """Send every module that has a part through :func:`attend` (again, if somebody chose another function)."""
    for name in parts(model):
        _check_registered()
        config = _config_of(model, name)
        if config is not None:
            _set_route(config, _route(config._attn_implementation))


def uninstall(model: nn.Module) -> list[str]:
    """Take the parts out again, and let the modules attend as they did before; names of the modules."""
    names = list(parts(model))
    for name in names:
        config = _config_of(model, name)
        del model.get_submodule(name)._modules[CHILD]
        if config is not None:
            back = {new: old for old, new in ROUTES.items()} | {DEFAULT_ROUTE: "sdpa"}
            _set_route(config, back.get(config._attn_implementation, config._attn_implementation))
    return names


def parts(model: nn.Module) -> dict[str, AttentionQuant]:
    """The parts by the name of their attention module."""
    found = ((name, module._modules.get(CHILD)) for name, module in model.named_modules())
    return {name: part for name, part in found if isinstance(part, AttentionQuant)}


def installed(module: nn.Module) -> AttentionQuant | None:
    """The part of an attention module."""
    return module._modules.get(CHILD)  # type: ignore[return-value]


def describe(model: nn.Module) -> list[dict[str, Any]]:
    """Manifest entries of all parts."""
    return [{"module": name, **part.describe()} for name, part in parts(model).items()]


def empty_part(module: nn.Module, entry: Mapping[str, Any], name: str) -> AttentionQuant | None:
    """The empty part that a manifest entry describes; ``None`` if ``module`` has it already.

    Raises:
        CheckpointError: the entry makes no sense.
    """
    known = {"module", "head_dim", "hadamard", "query", "key", "value"}
    if set(entry) != known or not isinstance(entry["hadamard"], bool) or not _is_size(entry["head_dim"]):
        raise CheckpointError(f"the attention of {name!r} in the manifest is damaged: {dict(entry)}")
    present = installed(module)
    if present is not None:
        if {"module": entry["module"], **present.describe()} == dict(entry):
            return None
        raise CheckpointError(f"{name} has quantized attention already, and otherwise than the manifest says")
    try:
        specs = {side: None if entry[side] is None else ActivationSpec.from_dict(entry[side])
                 for side in ("query", "key", "value")}
        return AttentionQuant(entry["head_dim"], hadamard=entry["hadamard"], **specs)
    except (ConfigError, QuantizationError, TypeError) as error:
        raise CheckpointError(f"the attention of {name!r} in the manifest cannot be built: {error}") from error


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 16


def eager_function(module: nn.Module) -> Callable[..., Any]:
    """The function that a module calls where its config says "eager": by convention in the file of its class."""
    for cls in type(module).__mro__:
        found = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    raise QuantizationError(
        f"{type(module).__name__} has no eager attention function: load the model with attn_implementation='sdpa'"
    )


def _route(name: Any) -> Any:
    """The routed name that stands for an attention function; flash and flex attention become scaled dot products."""
    if name is None or name in (DEFAULT_ROUTE, *ROUTES.values()):
        return name
    return ROUTES.get(name, DEFAULT_ROUTE)


def _check_registered() -> None:
    if not _ROUTABLE and "transformers" in sys.modules:
        importlib.import_module("hfq.integrations.attention").register()
    if not _ROUTABLE:
        raise QuantizationError("no attention interface is known: quantized attention needs a transformers model")


def _set_route(config: Any, name: Any) -> None:
    # The public attribute would also set the configs inside this one.
    config._attn_implementation_internal = name


def _configs(model: nn.Module) -> list[Any]:
    found = [getattr(module, "config", None) for module in model.modules()]
    return list({id(config): config for config in found if hasattr(config, "_attn_implementation")}.values())


def _config_of(model: nn.Module, name: str) -> Any:
    """The config that names the attention function of module ``name``: its own, or that of a module around it."""
    while True:
        config = getattr(model.get_submodule(name), "config", None)
        if hasattr(config, "_attn_implementation"):
            return config
        if not name:
            return None
        name = name.rpartition(".")[0]
