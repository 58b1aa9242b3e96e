"""What attention modules are given besides their weights: quantized queries, keys and values, and a quantized cache.

Modules that follow transformers' attention interface hand queries, keys and values (after the rotary embedding) to a
function that their config names. The integration registers functions of that kind which end in :func:`attend`; a module
with a child ``hfq_attention`` is then served by that part, every other one by the function it used before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hfq.errors import CheckpointError, ConfigError, QuantizationError
from hfq.formats import ActivationSpec, activation
from hfq.formats.kv import KVFormat, SideSpec
from hfq.kernels import hadamard
from hfq.layers import processors, rotary, routing
from hfq.layers.hooks import unhook
from hfq.layers.kv_cache import CacheQuant, empty_cache
from hfq.layers.kv_store import KVStore
from hfq.layers.manifest import present
from hfq.layers.routing import find, observing

__all__ = ["AttentionQuant", "attend", "describe", "empty_part", "find", "install", "installed", "observing", "parts"]

CHILD = "hfq_attention"
# What an attention module was called with, between its call and that of the attention function.
_CALL = threading.local()
# Options of attention functions that change the result and that reading a quantized cache does not know.
_CHANGING = {"position_bias", "s_aux", "sinks", "attention_sinks", "alibi", "block_mask", "score_mod"}


class AttentionQuant(nn.Module):
    """Quantizes what an attention module computes with, after the rotary embedding.

    Args:
        query, key, value: grids with one scale a token and head (the last axis is the head's), or ``None``. Dynamic
            grids without a factor only.
        hadamard: multiply queries and keys by a Hadamard matrix (their products stay the same) before quantizing.
        head_dim: width of a head.
        kv: how the module's cache stores keys and values, and how they are rounded where there is no cache. Without
            it, grids of keys and values are also those of the cache.
    """

    # transformers must not look for weights to initialise in here.
    _is_hf_initialized = True

    def __init__(
        self, head_dim: int, *, query: ActivationSpec | None = None, key: ActivationSpec | None = None,
        value: ActivationSpec | None = None, hadamard: bool = False, kv: CacheQuant | None = None,
    ) -> None:
        super().__init__()
        if kv is not None and (key is not None or value is not None):
            raise QuantizationError("keys and values have one format: that of the cache, or grids of their own")
        if kv is not None and hadamard and kv.form.pre_rope:
            raise QuantizationError("keys without their positions cannot be multiplied by a Hadamard matrix")
        for name, spec in (("query", query), ("key", key), ("value", value)):
            if spec is not None and (spec.granularity != "token" or not spec.dynamic or spec.factor):
                raise QuantizationError(f"{name}={spec}: attention takes dynamic grids with a scale a token")
        self.head_dim, self.hadamard = head_dim, hadamard
        self.query, self.key, self.value = query, key, value
        self._label = ""
        self.kv = kv
        self._own = None if key is None and value is None else [_own_cache(head_dim, key, value)]
        if hadamard:
            _order(head_dim)

    @property
    def label(self) -> str:
        """Qualified name of the attention module, for messages only."""
        return self._label

    @label.setter
    def label(self, name: str) -> None:
        self._label = name
        if self.cache is not None:
            self.cache.label = name

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
        attend: Callable[..., Any], options: Mapping[str, Any] | None = None,
    ) -> Any:
        """``attend(query, key, value, mask)`` on quantized tensors ``[batch, heads, tokens, head_dim]``.

        Where the module has just handed its keys to a cache of this part, they are stored, and attention is over
        everything stored; the first tokens attend to each other exactly if the format says so.
        """
        call, pair = _CALL.__dict__.pop("stored", None), _CALL.__dict__.pop("pair", None)
        if self.hadamard:
            query, key = (hadamard.transform(x, self.head_dim) for x in (query, key))
        cache = self.cache
        if self.query is not None and not (cache is not None and cache.exact):
            query = activation.fake(query, self.query)
        if call is not None:
            return self._cached(call, query, key, value, mask, attend, dict(options or {}), pair)
        return self._uncached(query, key, value, mask, attend, pair)

    def _uncached(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
        attend: Callable[..., Any], pair: Any,
    ) -> Any:
        """Attention over these keys and values alone, all of them rounded as they would be stored."""
        cache = self.cache
        if cache is not None and (self.kv is not None or not (key.requires_grad or value.requires_grad)):
            key, value = cache.fake(*self._unpacked(key, value), pair, mask)
        elif cache is not None:  # gradients reach the scales
            key = key if self.key is None else activation.fake(key, self.key)
            value = value if self.value is None else activation.fake(value, self.value)
        return attend(query, key, value, mask)

    def _unpacked(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Symmetric grids have no packed cache: their numbers are rounded and stored as floats."""
        new = [activation.fake(x, spec) if spec is not None and spec.symmetric else x
               for x, spec in ((key, self.key), (value, self.value))]
        return new[0], new[1]

    def _cached(
        self, call: tuple[KVStore, torch.Tensor], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        mask: torch.Tensor | None, attend: Callable[..., Any], options: dict[str, Any], pair: Any,
    ) -> Any:
        store, handed = call
        if handed.shape != key.shape:
            raise QuantizationError(f"{self.label}: the module attends to other keys than those it gave to its cache")
        first, given = not store.length, (key, value)
        with torch.no_grad():
            store.append(*given if store.quant.exact else self._unpacked(*given), pair, mask)
        if first:  # with nothing before them, the new tokens are all there is
            mask = None if mask is None else mask[..., : key.shape[2]]
            if store.form.prefill == "quantized" and not store.quant.exact:
                return self._uncached(query, key, value, mask, attend, pair)
            return attend(query, key, value, mask)
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
            raise QuantizationError(f"{self.label}: gradients do not pass through a quantized cache: compute under "
                                    "torch.no_grad(), or without a cache (use_cache=False)")
        unknown = sorted(name for name in set(options) & _CHANGING if options[name] is not None)
        if unknown or (self.training and options.get("dropout")):
            raise QuantizationError(f"{self.label}: attention over a quantized cache has no {unknown or 'dropout'}")
        scaling = options.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return store.attend(query, mask, scaling=scaling, softcap=options.get("softcap")), None

    @property
    def cache(self) -> CacheQuant | None:
        """How the module's cache stores its tokens; ``None`` if it stays as it is."""
        return self.kv if self._own is None else self._own[0]

    def describe(self) -> dict[str, Any]:
        """The manifest entry, JSON only, without the module's name."""
        specs = {name: getattr(self, name) for name in ("query", "key", "value")}
        entry = {name: None if spec is None else spec.to_dict() for name, spec in specs.items()}
        cache = None if self.kv is None else self.kv.describe()
        return {"head_dim": self.head_dim, "hadamard": self.hadamard, **entry, "kv": cache}

    def extra_repr(self) -> str:
        bits = [f"{name} {spec.bits} bits" for name in ("query", "key", "value")
                if (spec := getattr(self, name)) is not None]
        return ", ".join([str(self.head_dim), *bits, *(["hadamard"] if self.hadamard else [])])


def _own_cache(head_dim: int, key: ActivationSpec | None, value: ActivationSpec | None) -> CacheQuant:
    """The cache of a part that has grids of its own; it learns the number of heads from the first token."""
    sides = [SideSpec(16) if spec is None or spec.symmetric
             else SideSpec(spec.bits, "token", spec.group_size, zero_point="int") for spec in (key, value)]
    return CacheQuant(KVFormat(sides[0], sides[1], prefill="quantized"), 0, head_dim)


def _order(head_dim: int) -> None:
    if not hadamard.is_order(head_dim):
        raise QuantizationError(f"no Hadamard matrix of order {head_dim} (the width of a head) is known")


def attend(
    inner: Callable[..., Any], module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, **kwargs: Any,
) -> Any:
    """The attention function of every routed module: ``inner`` is the one that the module would call otherwise."""
    query, key, value = routing.watch(module, query, key, value, attention_mask, causal=bool(kwargs.get("is_causal")))
    part = module._modules.get(CHILD)
    if part is None:
        return inner(module, query, key, value, attention_mask, **kwargs)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> Any:
        return inner(module, q, k, v, mask, **kwargs)

    return part(query, key, value, attention_mask, call, kwargs)


def _before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Note the positions that the module is called with, and make the cache that it is given one of its part."""
    _CALL.__dict__.clear()
    part = installed(module)
    if part is None:
        return
    routing.keep_route(module, part.label)
    if part.cache is None:
        return
    _CALL.reads, _CALL.pair = True, rotary.pair_of(args, kwargs)
    for value in (*kwargs.values(), *args):
        if hasattr(value, "layers") and hasattr(value, "update"):
            routing.adopt(value, module, part)


def stored(store: KVStore, key: torch.Tensor) -> None:
    """Said by a cache when an attention module has handed ``key`` to it: what attends next is that module.

    Raises:
        QuantizationError: the module does not read quantized caches, and would attend to the new tokens alone.
    """
    if not _CALL.__dict__.pop("reads", False):
        raise QuantizationError(f"{store.quant.label}: a quantized cache was given to a model whose attention is not "
                                "quantized: start a new cache with that model")
    _CALL.stored = (store, key)


def install(model: nn.Module, name: str, part: AttentionQuant) -> AttentionQuant:
    """Make the attention module ``name`` compute with ``part``, on the device of the module.

    Raises:
        QuantizationError: there is no such module, it has a part already, or no config says how it attends.
    """
    routing.check_registered()
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise QuantizationError(f"{type(model).__name__} has no module {name!r}") from error
    if CHILD in module._modules:
        raise QuantizationError(f"{name} has quantized attention already")
    config = routing.config_of(model, name)
    processed = processors.has_processor(module)
    if config is None and not processed:
        raise QuantizationError(f"{name}: no config says which attention function {type(module).__name__} uses")
    device = next((p.device for p in module.parameters() if p.device.type != "meta"), None)
    part.label = name
    module.register_forward_pre_hook(_before, with_kwargs=True)
    module.add_module(CHILD, part if device is None else part.to(device))
    if processed:
        processors.catch(module, attend)
    else:
        routing.set_route(config, routing.route(config._attn_implementation))
    return part


def route(model: nn.Module) -> None:
    """Send every module that has a part through :func:`attend` (again, if somebody chose another function)."""
    for name in parts(model):
        routing.check_registered()
        config = routing.config_of(model, name)
        if config is not None:
            routing.set_route(config, routing.route(config._attn_implementation))


def uninstall(model: nn.Module) -> list[str]:
    """Take the parts out again, and let the modules attend as they did before; names of the modules."""
    names = list(parts(model))
    for name in names:
        config = routing.config_of(model, name)
        module = model.get_submodule(name)
        del module._modules[CHILD]
        unhook(module, _before)
        processors.release(module)
        if config is not None:
            routing.set_route(config, routing.back(config._attn_implementation))
    return names


@contextmanager
def without(model: nn.Module) -> Iterator[None]:
    """Inside, attention modules compute as if they had no parts."""
    taken = [(model.get_submodule(name), part) for name, part in parts(model).items()]
    try:
        for module, _ in taken:
            del module._modules[CHILD]
        yield
    finally:
        for module, part in taken:
            module._modules[CHILD] = part


@contextmanager
def exact(model: nn.Module) -> Iterator[None]:
    """Inside, caches of the parts are read and written as ever, but hold floats; nothing is rounded."""
    caches = [part.cache for part in parts(model).values() if part.cache is not None]
    try:
        for cache in caches:
            cache.exact = True
        yield
    finally:
        for cache in caches:
            cache.exact = False


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
    known = {"module", "head_dim", "hadamard", "query", "key", "value", "kv"}
    if set(entry) != known or not isinstance(entry["hadamard"], bool) or not _is_size(entry["head_dim"]):
        raise CheckpointError(f"the attention of {name!r} in the manifest is damaged: {dict(entry)}")
    if present(installed(module), entry, f"the quantized attention of {name!r}"):
        return None
    try:
        specs = {side: None if entry[side] is None else ActivationSpec.from_dict(entry[side])
                 for side in ("query", "key", "value")}
        device = next((p.device for p in module.parameters()), None)
        cache = None if entry["kv"] is None else empty_cache(entry["kv"], name, device)
        return AttentionQuant(entry["head_dim"], hadamard=entry["hadamard"], kv=cache, **specs)
    except (ConfigError, QuantizationError, TypeError) as error:
        raise CheckpointError(f"the attention of {name!r} in the manifest cannot be built: {error}") from error


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 16
