"""Which sites stay float unless asked: output heads, tied embeddings, routers, weights that are no plain tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn

if TYPE_CHECKING:
    from hfq.graph.read import Block, Site

__all__ = ["default_reasons", "shared_weights"]


def default_reasons(model: nn.Module, sites: Mapping[str, Site], owner: Mapping[str, Block]) -> dict[str, str]:
    """Name → reason for every site that the default rule leaves float.

    Args:
        model: the model.
        sites: all its sites, in definition order.
        owner: the block of every site that lies in one.
    """
    reasons: dict[str, str] = {}
    _after_the_blocks(sites, owner, reasons)
    head = _output_embeddings(model)
    for name, site in sites.items():
        if site.module is head and site.kind != "embedding":
            reasons[name] = "output head"
    for names in shared_weights(sites):
        for name in names:
            others = [other for other in names if other != name]
            reasons[name] = f"weight tied to {', '.join(others)}"
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            below = f"{name}." if name else ""
            reasons.update({s: "nn.MultiheadAttention reads this weight without calling the module"
                            for s in sites if s.startswith(below)})
        reasons.update({s: "router of the experts beside it" for s in _routers(name, module, sites)})
    for name, site in sites.items():
        if _is_computed(site):
            reasons[name] = "weight is computed from other tensors (parametrized): remove the parametrization first"
    return reasons


def _after_the_blocks(sites: Mapping[str, Site], owner: Mapping[str, Block], reasons: dict[str, str]) -> None:
    """Sites defined after the last block turn hidden states into outputs: heads of any task."""
    if not owner:
        return
    names = list(sites)
    last = max(names.index(name) for name in owner)
    for name in names[last + 1:]:
        if sites[name].kind != "embedding":
            reasons[name] = "head: follows the last block"


def _output_embeddings(model: nn.Module) -> Any:
    """What the model itself calls its output embeddings, if it says so."""
    ask = getattr(model, "get_output_embeddings", None)
    if not callable(ask):
        return None
    try:
        return ask()
    except (NotImplementedError, AttributeError):
        return None


def shared_weights(sites: Mapping[str, Site]) -> list[list[str]]:
    """Groups of sites that share a weight tensor (by identity of the parameter)."""
    seen: dict[int, list[str]] = {}
    for name, site in sites.items():
        for key in site.tensors:
            tensor = site.module._parameters.get(key)
            if tensor is not None:
                seen.setdefault(id(tensor), []).append(name)
    return [names for names in seen.values() if len(names) > 1]


def _routers(name: str, module: nn.Module, sites: Mapping[str, Site]) -> list[str]:
    """Linear children that score the experts of the same module: they have one output an expert."""
    prefix = f"{name}." if name else ""
    count = None
    for key, child in module.named_children():
        site = sites.get(prefix + key)
        if site is not None and site.kind == "experts":
            count = getattr(child, site.tensors[0]).shape[0]
        elif _is_expert_list(prefix + key, child, sites):
            count = len(child)
    if count is None:
        return []
    direct = [prefix + key for key, _ in module.named_children()]
    return [s for s in direct if s in sites and sites[s].kind == "linear" and sites[s].out_features == count]


def _is_expert_list(name: str, module: nn.Module, sites: Mapping[str, Site]) -> TypeGuard[nn.ModuleList]:
    """Two or more equal composite modules in a list."""
    if not isinstance(module, nn.ModuleList) or len(module) < 2 or len({type(child) for child in module}) != 1:
        return False
    return f"{name}.0" not in sites and any(site.startswith(f"{name}.0.") for site in sites)


def _is_computed(site: Site) -> bool:
    """Parametrized weights (``torch.nn.utils.parametrize``, old weight norm) are no parameters of their module."""
    return any(not isinstance(site.module._parameters.get(key), torch.Tensor) for key in site.tensors)
