"""Outputs of the parts of a block that will not change any more, kept instead of computed again.

A solver that rounds a block group by group runs the block once a group. What lies before the groups that are still to
come gives the same tensors in every one of these passes: attention, once its projections are packed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from hfq.calibration.cache import Store, Stored, rebuild

__all__ = ["Settled"]

_MISSING = object()


class Settled:
    """Direct children of a block whose outputs are remembered, one tree a call of the block.

    Args:
        block: the block (``module``, ``name``, ``sites`` in execution order).
        store: where outputs are kept; it spills to disk.
        position: number of the block's call that is running and of the pass through the block, ``None`` outside of
            the calibration data.
    """

    def __init__(self, block: Any, store: Store, position: Callable[[], tuple[int, int] | None]) -> None:
        self.block, self.store, self.position = block, store, position
        self._parts: dict[str, _Part] = {}

    def update(self, done: set[str]) -> None:
        """Remember, from now on, every child whose sites and all sites before them are in ``done``."""
        sites = self.block.sites
        if not all(site.executed for site in sites):
            return  # the order is not known
        open_from = next((i for i, site in enumerate(sites) if site.name not in done), len(sites))
        if open_from == len(sites):
            return  # one more pass at most
        for name, child in self.block.module.named_children():
            prefix = f"{self.block.name}.{name}"
            own = [i for i, site in enumerate(sites) if site.name == prefix or site.name.startswith(f"{prefix}.")]
            if name not in self._parts and own and max(own) < open_from:
                self._parts[name] = _Part(child, self.store, self.position)

    def release(self) -> None:
        """Give the children their own forward back and free what was kept."""
        for part in self._parts.values():
            part.release()
        self._parts = {}


class _Part:
    def __init__(self, module: nn.Module, store: Store, position: Callable[[], tuple[int, int] | None]) -> None:
        self.module, self.store, self.position = module, store, position
        self.kept: dict[int, Any] = {}
        self.last: tuple[int, int] | None = None
        self.usable = True
        self.own = module.__dict__.get("forward", _MISSING)
        self.forward = module.forward
        module.__dict__["forward"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        where = self.position()
        if where is None or not self.usable:
            return self.forward(*args, **kwargs)
        if where == self.last:  # twice in one pass: which output is meant would be a guess
            self.usable = False
            self._drop()
            return self.forward(*args, **kwargs)
        self.last, call = where, where[0]
        if call in self.kept:
            # Copies: a block may add to what its children return, in place.
            return rebuild(self.kept[call], lambda _, stored: self.store.get(stored).clone(), Stored)
        output = self.forward(*args, **kwargs)
        if not all(isinstance(leaf, (torch.Tensor, int, float, str, type(None))) for leaf in _every_leaf(output)):
            self.usable = False  # a cache or another object with a state
            self._drop()
            return output
        self.kept[call] = rebuild(output, lambda _, tensor: self.store.put(tensor.clone()))
        return output

    def _drop(self) -> None:
        for tree in self.kept.values():
            for leaf in _every_leaf(tree):
                if isinstance(leaf, Stored):
                    self.store.drop(leaf)
        self.kept = {}

    def release(self) -> None:
        self._drop()
        if self.own is _MISSING:
            self.module.__dict__.pop("forward", None)
        else:
            self.module.__dict__["forward"] = self.own


def _every_leaf(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _every_leaf(item)
    else:
        yield tree
