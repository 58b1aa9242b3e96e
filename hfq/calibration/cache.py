"""What flows into blocks, kept between passes: trees of tensors, a bounded store that spills to disk, and the cache.

A block is called with ``(args, kwargs)``: tuples, lists and dicts with tensors at the leaves. A *path* names one leaf,
for example ``(0, 0)`` for ``args[0]`` and ``(1, "attention_mask")`` for a keyword.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hfq.errors import QuantizationError

__all__ = ["ActivationCache", "Slot", "Store", "Stored", "TensorList", "digest", "leaves", "rebuild", "structure"]

TreePath = tuple[Any, ...]
# Content is compared only up to this size: larger shared tensors are recognised by identity within one forward.
_CONTENT_LIMIT = 64 << 20


def leaves(
    tree: Any, kinds: type | tuple[type, ...] = torch.Tensor, path: TreePath = ()
) -> Iterator[tuple[TreePath, Any]]:
    """Every leaf of one of ``kinds`` with its path, in a fixed order."""
    if isinstance(tree, kinds):
        yield path, tree
    elif isinstance(tree, (list, tuple)):
        for i, item in enumerate(tree):
            yield from leaves(item, kinds, (*path, i))
    elif isinstance(tree, dict):
        for key, item in tree.items():
            yield from leaves(item, kinds, (*path, key))


def rebuild(
    tree: Any,
    change: Callable[[TreePath, Any], Any],
    kinds: type | tuple[type, ...] = torch.Tensor,
    path: TreePath = (),
) -> Any:
    """The same tree with ``change(path, leaf)`` in place of every leaf of one of ``kinds``."""
    if isinstance(tree, kinds):
        return change(path, tree)
    if isinstance(tree, (list, tuple)):
        items = [rebuild(item, change, kinds, (*path, i)) for i, item in enumerate(tree)]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if isinstance(tree, dict):
        mapped = {key: rebuild(item, change, kinds, (*path, key)) for key, item in tree.items()}
        return mapped if type(tree) is dict else type(tree)(**mapped)
    return tree


def structure(tree: Any) -> Any:
    """The tree without its tensors' values: equal for two calls of the same form."""
    if isinstance(tree, (torch.Tensor, Slot)):
        return "T"
    if isinstance(tree, (list, tuple)):
        return [structure(item) for item in tree]
    if isinstance(tree, dict):
        return {str(key): structure(item) for key, item in tree.items()}
    return tree if isinstance(tree, (int, float, str, bool, type(None))) else type(tree).__name__


def digest(tensor: torch.Tensor) -> bytes:
    """SHA-256 of dtype, shape and content."""
    flat = tensor.detach().to("cpu").contiguous()
    head = f"{flat.dtype}{tuple(flat.shape)}".encode()
    return hashlib.sha256(head + flat.reshape(-1).view(torch.uint8).numpy().tobytes()).digest()


@dataclass(frozen=True)
class Slot:
    """Marks a leaf whose tensor changes from block to block: the ``index``-th tensor of the stream."""

    index: int


class Stored:
    """A tensor in a store: in memory, or in a file."""

    __slots__ = ("device", "dtype", "file", "key", "nbytes", "references", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor: torch.Tensor | None = tensor
        self.file: Path | None = None
        self.device = tensor.device
        self.dtype = tensor.dtype
        self.nbytes = tensor.numel() * tensor.element_size()
        self.key: bytes | None = None
        self.references = 1


class Store:
    """Tensors up to ``limit`` bytes in memory, the rest in safetensors files of ``folder``.

    Args:
        limit: bytes kept in memory; ``None`` for no limit.
        folder: where files go; a fresh temporary folder inside it is made on the first spill and removed at the end.
        keep: the files are a result: they go into ``folder`` itself, and stay.
    """

    def __init__(self, limit: int | None = None, folder: str | Path | None = None, *, keep: bool = False) -> None:
        self.limit = limit
        self.bytes = 0
        self.spilled = 0
        self._parent = folder
        self._folder: Path | None = Path(folder) if keep and folder is not None else None
        self._keep = self._folder is not None
        self._count = 0
        self._by_content: dict[bytes, Stored] = {}

    def put(self, tensor: torch.Tensor, *, shared: bool = False) -> Stored:
        """Keep ``tensor``; with ``shared`` a tensor of the same content is kept only once."""
        tensor = tensor.detach()
        key = digest(tensor) if shared and tensor.numel() * tensor.element_size() <= _CONTENT_LIMIT else None
        if key is not None and key in self._by_content:
            stored = self._by_content[key]
            stored.references += 1
            return stored
        # A view would keep the whole base alive, and expanded tensors cannot be written as they are.
        size = tensor.numel() * tensor.element_size()
        if tensor.untyped_storage().nbytes() > 2 * size:
            tensor = tensor.clone()
        stored = Stored(tensor)
        if key is not None:
            stored.key = key
            self._by_content[key] = stored
        if self.limit is not None and self.bytes + stored.nbytes > self.limit:
            self._spill(stored)
        else:
            self.bytes += stored.nbytes
        return stored

    def get(self, stored: Stored) -> torch.Tensor:
        if stored.tensor is not None:
            return stored.tensor
        if stored.file is None:
            raise QuantizationError("an activation was used after its block was finished: read it inside the loop body")
        return load_file(stored.file)["x"].to(stored.device)

    def drop(self, stored: Stored) -> None:
        """Give up one reference; the last one frees memory and file."""
        stored.references -= 1
        if stored.references > 0:
            return
        if stored.key is not None:
            self._by_content.pop(stored.key, None)
        if stored.tensor is not None:
            self.bytes -= stored.nbytes
            stored.tensor = None
        if stored.file is not None:
            self.spilled -= stored.nbytes
            stored.file.unlink(missing_ok=True)
            stored.file = None

    def close(self) -> None:
        self._by_content.clear()
        if self._folder is not None and not self._keep:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _spill(self, stored: Stored) -> None:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="hfq-activations-", dir=self._parent))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        assert stored.tensor is not None
        stored.file = self._folder / f"{self._count:06d}.safetensors"
        self._count += 1
        save_file({"x": stored.tensor.to("cpu").contiguous()}, stored.file)
        stored.tensor = None
        self.spilled += stored.nbytes


class TensorList(Sequence[torch.Tensor]):
    """A list of stored tensors, one a batch, loaded when read."""

    def __init__(self, store: Store, stored: Sequence[Stored]) -> None:
        self._store, self._stored = store, list(stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._store.get(s) for s in self._stored[index]]
        return self._store.get(self._stored[index])


class ActivationCache(Sequence[tuple[tuple[Any, ...], dict[str, Any]]]):
    """The inputs of one block, ``cache[i] == (args, kwargs)`` of batch ``i``, tensors loaded when read.

    Args:
        store: holds the tensors.
        calls: one ``(args, kwargs)`` a batch with ``Stored`` and ``Slot`` leaves.
        stream: the tensors that fill the slots of each batch.
        main: path of the hidden state.
        copy: hand out copies, for blocks that write into their inputs.
    """

    def __init__(
        self,
        store: Store,
        calls: Sequence[Any],
        stream: Sequence[Sequence[Stored | None]] | None = None,
        main: TreePath | None = None,
        copy: bool = False,
    ) -> None:
        self.store, self.calls, self.main, self.copy = store, list(calls), main, copy
        self.stream: list[Sequence[Stored | None]] = [()] * len(self.calls) if stream is None else list(stream)

    def __len__(self) -> int:
        return len(self.calls)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]

        def load(path: TreePath, leaf: Any) -> torch.Tensor:
            tensor = self._read(index, leaf)
            return tensor.clone() if self.copy else tensor

        args, kwargs = rebuild(self.calls[index], load, (Stored, Slot))
        return args, kwargs

    def _read(self, index: int, leaf: Stored | Slot) -> torch.Tensor:
        stored = self.stream[index][leaf.index] if isinstance(leaf, Slot) else leaf
        if stored is None:
            raise QuantizationError(f"the block before did not give tensor {leaf} of call {index}")
        return self.store.get(stored)

    def hidden(self, index: int) -> torch.Tensor:
        """The hidden state that enters the block, ``[B, T, hidden]`` for a language model."""
        for path, leaf in leaves(self.calls[index], (Stored, Slot)):
            if path == self.main:
                return self._read(index, leaf)
        raise QuantizationError(f"call {index} of the block has no tensor at {self.main}")

    def release(self) -> None:
        """Free what the calls hold (not the stream)."""
        for call in self.calls:
            for _, leaf in leaves(call, Stored):
                self.store.drop(leaf)
        self.calls = []
