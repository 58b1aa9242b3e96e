"""Blocks of models that accelerate keeps on the CPU or on disk: brought in for a step, put back packed."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset, named_module_tensors, set_module_tensor_to_device
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

__all__ = ["is_offloaded", "placement"]


def _align_hooks(module: nn.Module) -> list[AlignDevicesHook]:
    """The alignment hooks of one module, also those chained with others."""
    hook: ModelHook | None = getattr(module, "_hf_hook", None)
    found = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return [one for one in found if isinstance(one, AlignDevicesHook)]


def _offloading(module: nn.Module) -> AlignDevicesHook | None:
    return next((hook for hook in _align_hooks(module) if hook.offload), None)


def is_offloaded(model: nn.Module) -> bool:
    """Whether any module of ``model`` keeps its weights elsewhere between calls."""
    return any(_offloading(module) is not None for module in model.modules())


def placement(
    model: nn.Module, folder: str | os.PathLike[str] | None = None
) -> Callable[[nn.Module], AbstractContextManager[None]] | None:
    """What ``calibration.walk`` needs for an offloaded model; ``None`` if nothing of it is offloaded.

    ``with place(block):`` puts the weights of the block on its execution device as ordinary parameters without hooks.
    Afterwards whatever the block then consists of goes back where its weights came from: to the CPU, or into one
    safetensors file a block, from which further forward passes and ``save_pretrained`` read.

    Args:
        model: an accelerate-dispatched model.
        folder: parent of the folder for packed blocks; default the model's own offload folder, else the system's
            temporary folder. The folder lives as long as the model.
    """
    if not is_offloaded(model):
        return None
    store = _Folder(model, folder)

    @contextmanager
    def place(block: nn.Module) -> Iterator[None]:
        name = next((n for n, module in model.named_modules() if module is block), None)
        taken = _take(block)
        try:
            yield
        finally:
            if taken.execution_device is not None:
                # A layer that is placed by itself may have been replaced meanwhile.
                _give_back(block if name is None else model.get_submodule(name), taken, store)

    return place


class _Folder:
    """A folder for packed blocks that is removed with the model."""

    def __init__(self, model: nn.Module, parent: str | os.PathLike[str] | None) -> None:
        self.parent = parent
        self.path: Path | None = None
        self.count = 0
        self._model = weakref.ref(model)

    def next_file(self, near: str | None) -> Path:
        if self.path is None:
            self.path = Path(tempfile.mkdtemp(prefix="hfq-packed-", dir=self.parent or near))
            model = self._model()
            if model is not None:
                weakref.finalize(model, shutil.rmtree, self.path, ignore_errors=True)
        self.count += 1
        return self.path / f"{self.count:05d}.safetensors"


@dataclass
class _Taken:
    """Where the weights of a block came from."""

    execution_device: Any = None
    to_disk: bool = False
    near: str | None = None
    offload_buffers: bool = False
    skip_keys: Any = None
    whole: set[str] = field(default_factory=set)
    others: dict[str, tuple[nn.Module, ModelHook]] = field(default_factory=dict)
    resident: set[str] = field(default_factory=set)


def _take(block: nn.Module) -> _Taken:
    """Materialise everything offloaded in ``block`` and take its hooks off."""
    taken = _Taken()
    for name, module in list(block.named_modules()):
        hook = _offloading(module)
        if hook is None:
            if _align_hooks(module) and any(True for _ in named_module_tensors(module)):
                taken.resident.add(name)
            continue
        others = [h for h in getattr(module._hf_hook, "hooks", ()) if h is not hook]
        taken.execution_device = hook.execution_device
        taken.offload_buffers |= hook.offload_buffers
        taken.skip_keys = hook.skip_keys
        if hook.place_submodules:
            taken.whole.add(name)
        if others:
            taken.others[name] = (module, others[0] if len(others) == 1 else SequentialHook(*others))
        names = [
            n
            for n, _ in named_module_tensors(
                module, include_buffers=hook.offload_buffers, recurse=hook.place_submodules, remove_non_persistent=True
            )
        ]
        remove_hook_from_module(module)
        if getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
            # accelerate leaves the bound method on the module itself: a cycle that would keep replaced layers alive.
            del module.__dict__["forward"]
        for n in names:
            value = hook.weights_map[n]
            on_disk, near = _source(hook.weights_map, n)
            taken.to_disk |= on_disk
            taken.near = taken.near or near
            set_module_tensor_to_device(module, n, hook.execution_device, value=value)
            _forget(hook.weights_map, n)
    return taken


def _source(weights: Mapping[str, torch.Tensor], name: str) -> tuple[bool, str | None]:
    """Whether a weight lies on disk, and the folder that accelerate offloads to."""
    if isinstance(weights, PrefixedDataset):
        return _source(weights.dataset, weights.prefix + name)
    if isinstance(weights, OffloadedWeightsLoader):
        folder = weights.save_folder
        return name not in weights.state_dict, folder if folder and os.path.isdir(folder) else None
    return isinstance(weights, _File), None


def _forget(weights: Any, name: str) -> None:
    """Drop the float copy that the offload map holds in memory: the module has it now, and will be packed."""
    if isinstance(weights, PrefixedDataset):
        _forget(weights.dataset, weights.prefix + name)
    elif isinstance(weights, OffloadedWeightsLoader):
        weights.state_dict.pop(name, None)
    elif type(weights) is dict:
        weights.pop(name, None)


class _Owned:
    """A file that is removed when the last map that reads it is gone: placing a block again writes a new one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        weakref.finalize(self, path.unlink, missing_ok=True)


class _File(Mapping[str, torch.Tensor]):
    """Tensors of one safetensors file below a prefix, read when asked for."""

    def __init__(self, file: _Owned, prefix: str, names: list[str]) -> None:
        self.file, self.prefix, self.names = file, prefix, names

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.names:
            raise KeyError(name)
        with safe_open(self.file.path, framework="pt", device="cpu") as file:
            return file.get_tensor(self.prefix + name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _give_back(block: nn.Module, taken: _Taken, store: _Folder) -> None:
    """Attach offload hooks to every module of ``block`` that has tensors of its own now."""
    owners: dict[str, tuple[nn.Module, list[str]]] = {}
    covered: tuple[str, ...] = ()
    for name, module in block.named_modules():
        if name in taken.resident or any(name.startswith(f"{whole}." if whole else "") for whole in covered):
            continue
        recurse = name in taken.whole
        names = [
            n
            for n, _ in named_module_tensors(
                module, include_buffers=taken.offload_buffers, recurse=recurse, remove_non_persistent=True
            )
        ]
        covered = (*covered, name) if recurse else covered
        if names and not hasattr(module, "_hf_hook"):
            owners[name] = (module, names)
    file = _write(owners, store.next_file(taken.near)) if taken.to_disk and owners else None
    for name, (module, names) in owners.items():
        prefix = f"{name}." if name else ""
        values: Mapping[str, torch.Tensor]
        if file is None:
            values = {n: _tensor(module, n).detach().to("cpu") for n in names}
        else:
            values = _File(file, prefix, names)
        hook = AlignDevicesHook(
            execution_device=taken.execution_device,
            offload=True,
            weights_map=values,
            offload_buffers=taken.offload_buffers,
            place_submodules=name in taken.whole,
            skip_keys=taken.skip_keys,
        )
        before = taken.others.get(name)
        if before is not None and before[0] is module:
            add_hook_to_module(module, before[1])
        add_hook_to_module(module, hook, append=True)


def _tensor(module: nn.Module, name: str) -> torch.Tensor:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    found = owner._parameters.get(leaf)
    return owner._buffers[leaf] if found is None else found  # type: ignore[return-value]


def _write(owners: dict[str, tuple[nn.Module, list[str]]], path: Path) -> _Owned:
    """One file with all tensors of the block, complete before anything points at it."""
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, (module, names) in owners.items():
        for n in names:
            flat = _tensor(module, n).detach().to("cpu").contiguous()
            tensors[f"{name}.{n}" if name else n] = flat.clone() if flat.data_ptr() in seen else flat
            seen.add(flat.data_ptr())
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary)
    os.replace(temporary, path)
    return _Owned(path)
