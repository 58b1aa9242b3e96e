"""Give a model a quantized cache: which attention modules have one, of what shape, and by what part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hfq.errors import ConfigError, QuantizationError
from hfq.formats.kv import KVFormat, SideSpec
from hfq.kernels import Choice
from hfq.layers import attention, rotary
from hfq.layers.attention import AttentionQuant
from hfq.layers.kv_cache import CacheQuant
from hfq.layers.kv_store import KVStore
from hfq.layers.rotary import RotarySpec
from hfq.report import Report, Row

__all__ = ["Place", "add", "explain", "places", "uniform"]


@dataclass(frozen=True)
class Place:
    """An attention module that can have a cache: key-value heads, width of a head of keys and of values."""

    name: str
    heads: int
    head_dim: int
    value_dim: int
    rotary: RotarySpec | None = None


def places(model: nn.Module, call: Callable[[], Any], *, pre_rope: bool = False) -> list[Place]:
    """The self-attention modules of ``model`` in the order in which they run.

    Args:
        call: runs one forward pass of the whole model, with several tokens.
        pre_rope: also find, and prove, how they rotate their keys.

    Raises:
        ConfigError: no attention of the model can have a quantized cache.
        QuantizationError: ``pre_rope``, and positions enter the keys in a way that is not understood.
    """
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, Place] = {}

    def observer(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any) -> None:
        own = query.shape[2] == key.shape[2] and getattr(module, "layer_idx", None) is not None
        if own and module in names and names[module] not in found:
            found[names[module]] = Place(names[module], key.shape[1], key.shape[3], value.shape[3])

    with attention.observing(model, observer), torch.no_grad():
        call()
    if not found:
        raise ConfigError(f"{type(model).__name__} has no attention that a quantized key-value cache could serve: none "
                          "goes through transformers' attention interface with a layer of a cache (kv_bits=16 is off)")
    if not pre_rope:
        return list(found.values())
    turned = rotary.prove(model, list(found), call)
    return [Place(p.name, p.heads, p.head_dim, p.value_dim, turned[p.name]) for p in found.values()]


def add(
    model: nn.Module, place: Place, form: KVFormat, report: Report | None = None, *,
    tables: dict[str, torch.Tensor] | None = None, tokens: int | None = None, error: float | None = None,
    extra: dict[str, Any] | None = None,
) -> AttentionQuant:
    """Give one attention module a cache of format ``form``, and the report a row of it.

    A part that the module has already (quantized queries, a Hadamard transform) gets the cache.
    """
    cache = CacheQuant(form, place.heads, place.head_dim, place.value_dim, rotary=place.rotary, tables=tables)
    present = attention.installed(model.get_submodule(place.name))
    if present is not None:
        if present.cache is not None:
            raise QuantizationError(f"{place.name} has a quantized cache already")
        del model.get_submodule(place.name)._modules[attention.CHILD]
    part = AttentionQuant(
        place.head_dim, query=None if present is None else present.query,
        hadamard=present is not None and present.hadamard, kv=cache,
    )
    attention.install(model, place.name, part)
    if report is not None:
        report.add(Row(
            f"{place.name}.{attention.CHILD}", kind="cache", asked=form.to_dict(), bits=cache.bits_per_element(),
            error=error, tokens=tokens, extra=dict(extra or {}),
        ))  # fmt: skip
    return part


def uniform(model: nn.Module, call: Callable[[], Any], bits: int, report: Report | None = None) -> None:
    """A cache of ``bits`` wide uniform codes, one scale a token and head, keys with their positions."""
    form = KVFormat(SideSpec(bits), SideSpec(bits))
    for place in places(model, call):
        add(model, place, form, report)


def explain(model: nn.Module, M: int = 1, device: str | None = None) -> dict[str, list[Choice]]:
    """Which kernel reads the keys, and the values, of each quantized cache of ``model``, and why no other does.

    Args:
        M: queries of one key head: query heads that share it, times the tokens computed at once.
        device: device type; default that of the attention module. "cuda" means an NVIDIA GPU with Triton, whether there
            is one here or not.
    """
    found = {}
    for name, part in attention.parts(model).items():
        if part.cache is None:
            continue
        here = next((p.device.type for p in model.get_submodule(name).parameters()), "cpu")
        for side, choices in KVStore(part.cache).explain(M, device=device or here).items():
            found[f"{name}.{attention.CHILD}.{side}"] = choices
    return found
