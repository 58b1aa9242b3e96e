"""Running a model up to a point and recording what its blocks are called with."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hfq.calibration.cache import leaves, rebuild
from hfq.errors import DataError

__all__ = [
    "Stop",
    "arguments",
    "calls_of",
    "device_of",
    "first_tensor",
    "forward",
    "quiet",
    "recording",
    "row_of",
    "to_device",
    "without_caches",
]

Tree = tuple[tuple[Any, ...], dict[str, Any]]


class Stop(Exception):
    """Ends a forward pass whose remaining part is not needed."""


def device_of(module: nn.Module, default: torch.device | str = "cpu") -> torch.device:
    """Where ``module`` computes: the device of its first tensor that is not on meta."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type != "meta":
            return tensor.device
    return torch.device(default)


def to_device(tree: Any, device: torch.device) -> Any:
    return rebuild(tree, lambda _, t: t.to(device))


def without_caches(tree: Any) -> Any:
    """The call without key-value or state caches: a cache that grows with every pass would change the results."""
    if type(tree).__name__.endswith("Cache"):
        return None
    if isinstance(tree, (list, tuple)) and not hasattr(tree, "_fields"):
        return type(tree)(without_caches(item) for item in tree)
    if type(tree) is dict:
        return {key: without_caches(item) for key, item in tree.items()}
    return tree


def first_tensor(tree: Any) -> tuple[Any, ...]:
    """Path of the hidden state: the tensor itself, ``hidden_states``, or the first floating tensor."""
    paths = [path for path, tensor in leaves(tree) if tensor.is_floating_point()]
    if not paths:
        raise DataError("a block is called with, or returns, no floating-point tensor")
    return next(
        (path for path in paths if path and path[-1] == "hidden_states" and path[0] == 1 and (0, 0) not in paths),
        paths[0],
    )


def row_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The first row of a batch, or the batch itself if its rows cannot be told apart."""
    sizes = {t.shape[0] if t.ndim else -1 for t in batch.values() if isinstance(t, torch.Tensor)}
    plain = all(isinstance(value, torch.Tensor) for value in batch.values())
    if plain and len(sizes) == 1 and sizes != {-1}:
        return {key: tensor[:1] for key, tensor in batch.items()}
    return dict(batch)


def _configs(model: nn.Module) -> Iterator[Any]:
    """Configurations of the model and of its parts that have a switch for the cache."""
    seen: set[int] = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and id(config) not in seen and isinstance(getattr(config, "use_cache", None), bool):
            seen.add(id(config))
            yield config


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no caches; both restored afterwards."""
    # Weak references: a float layer that was replaced meanwhile must be freed.
    training = [weakref.ref(module) for module in model.modules() if module.training]
    configs = [config for config in _configs(model) if config.use_cache]
    try:
        model.eval()
        for config in configs:
            config.use_cache = False
        yield
    finally:
        for reference in training:
            module = reference()
            if module is not None:
                module.training = True
        for config in configs:
            config.use_cache = True


def arguments(model: nn.Module, batch: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How ``model`` is called with ``batch``, on its device: a single entry that its forward does not know by name is
    given by position.

    Raises:
        DataError: forward does not take an entry.
    """
    kwargs = to_device(dict(batch), device_of(model))
    parameters = inspect.signature(model.forward).parameters
    if "use_cache" in parameters:
        kwargs["use_cache"] = False
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    unknown = [key for key in kwargs if key not in parameters]
    if not unknown or open_ended:
        return (), kwargs
    if len(kwargs) > 1:
        raise DataError(f"the model's forward does not take {sorted(unknown)}; it takes {sorted(parameters)}")
    return tuple(kwargs.values()), {}


def forward(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """One forward pass without gradients; returns whether it was ended by ``Stop``."""
    args, kwargs = arguments(model, batch)
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Stop:
        return True
    return False


@contextlib.contextmanager
def recording(
    blocks: Sequence[Any],
    before: Callable[[Any, Tree], None] | None = None,
    after: Callable[[Any, Any], None] | None = None,
) -> Iterator[None]:
    """Call ``before(block, (args, kwargs))`` and ``after(block, output)`` whenever a block runs.

    ``before`` sees what the caller passed, ahead of any other hook: calling the block with it does the same again.
    """
    handles = []
    try:
        for block in blocks:
            if before is not None:

                def pre(_: nn.Module, args: Any, kwargs: Any, block: Any = block) -> None:
                    before(block, without_caches((args, kwargs)))

                handles.append(block.module.register_forward_pre_hook(pre, with_kwargs=True, prepend=True))
            if after is not None:

                def post(_: nn.Module, args: Any, output: Any, block: Any = block) -> None:
                    after(block, output)

                handles.append(block.module.register_forward_hook(post))
        yield
    finally:
        for handle in handles:
            handle.remove()


def calls_of(
    model: nn.Module, blocks: Sequence[Any], batch: Mapping[str, Any], expected: Mapping[str, int]
) -> list[tuple[str, Tree]]:
    """The calls of ``blocks`` in one forward pass, ended as soon as all expected calls were seen."""
    found: list[tuple[str, Tree]] = []
    total = sum(expected[block.name] for block in blocks)

    def before(block: Any, tree: Tree) -> None:
        # A block that writes into its input in place must not change what was recorded.
        found.append((block.name, rebuild(tree, lambda _, t: t.clone() if len(found) < total - 1 else t)))
        if len(found) == total:
            raise Stop

    with recording(blocks, before):
        forward(model, batch)
    return found
