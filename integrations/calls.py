"""Calls of one component of a pipeline, as they were recorded: calibration data that is read when it is used.

A folder of calls holds ``calls.json`` and one safetensors file a tensor; a tensor that several calls share (the
embedding of a prompt, at every timestep) is there once. Nothing in it is unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hfq.calibration.cache import Store, Stored, leaves, rebuild
from hfq.calibration.data import Batches
from hfq.errors import CheckpointError, DataError

__all__ = ["Call", "Record", "RecordedCalls"]

INDEX = "calls.json"
VERSION = 1


@dataclass(frozen=True)
class Call:
    """One call of the component.

    Attributes:
        tree: keywords of the forward, with ``Stored`` leaves.
        rows: size of the batch axis.
        timestep: of the denoising loop; NaN for a component outside it.
        part: rows of the recorded call that this one has; ``None`` for all of them.
    """

    tree: Mapping[str, Any]
    rows: int
    timestep: float
    part: tuple[int, int] | None = None

    @property
    def size(self) -> int:
        return self.rows if self.part is None else self.part[1] - self.part[0]


@dataclass(frozen=True)
class Record:
    """What is known of a whole recording.

    Attributes:
        component: name in the pipeline.
        guidance: every image is there twice: both halves of classifier-free guidance.
        steps: length of the loop that was run (``num_inference_steps``); ``None`` outside of one.
        train_steps: how many timesteps the scheduler was trained for, if it says so.
        seed: of the noise.
        pipeline, scheduler: names of the classes.
        meant: what was said about guidance: ``False`` if its missing half is meant.
        prompts: of the pictures, in their order; ``None`` without any.
        sampling: options that the pipeline was run with; ``None`` if they are not known, or no plain values.
    """

    component: str
    guidance: bool = False
    steps: int | None = None
    train_steps: int | None = None
    seed: int = 0
    pipeline: str = ""
    scheduler: str = ""
    meant: bool | None = None
    prompts: list[Any] | None = None
    sampling: dict[str, Any] | None = None


class RecordedCalls(Batches):
    """A sequence of forward keywords, read from memory or disk when they are asked for.

    ``calls[i]`` is a dictionary of keywords (tensors on the CPU, batch axis first); a slice is again a
    ``RecordedCalls``. Made by :func:`hfq.record_calls` or :meth:`load`; accepted wherever calibration data is.

    Attributes:
        record: what is known of the recording; its fields are attributes too (``component``, ``guidance``, ``steps``).
    """

    def __init__(self, calls: Sequence[Call], record: Record, store: Store) -> None:
        self.calls, self.record, self._store = list(calls), record, store
        self._sha256: str | None = None

    def __len__(self) -> int:
        return len(self.calls)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self._of(self.calls[index])
        call = self.calls[index]

        def load(_: Any, stored: Stored) -> torch.Tensor:
            tensor = _read(self._store, stored)
            batched = call.part is not None and tensor.ndim > 0 and tensor.shape[0] == call.rows
            return tensor[slice(*call.part)] if batched else tensor  # type: ignore[misc]

        return rebuild(dict(call.tree), load, Stored)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        loop = f", {len(self.timesteps.unique())} timesteps of {self.steps} steps" if self.steps else ""
        return f"RecordedCalls({self.component}: {len(self)} calls, {self.samples} rows{loop})"

    component = property(lambda self: self.record.component, doc="Name of the component in its pipeline.")
    guidance = property(lambda self: self.record.guidance, doc="Whether both halves of guidance are there.")
    steps = property(lambda self: self.record.steps, doc="Length of the loop that was run.")

    @property
    def timesteps(self) -> torch.Tensor:
        """Timestep of every call, float64 ``[calls]``; NaN for a component outside the loop."""
        return torch.tensor([call.timestep for call in self.calls], dtype=torch.float64)

    @property
    def samples(self) -> int:
        return sum(call.size for call in self.calls)

    @property
    def sha256(self) -> str:
        if self._sha256 is None:
            self._sha256 = super().sha256
        return self._sha256

    @property
    def descriptor(self) -> dict[str, Any]:  # type: ignore[override]
        """What is saved with a model; JSON only."""
        record = self.record
        known = [t for t in self.timesteps.unique().tolist() if t == t]
        return {"source": f"recorded calls of {self.component}", "sha256": self.sha256, "count": self.samples,
                "calls": len(self), "pipeline": record.pipeline, "scheduler": record.scheduler, "steps": record.steps,
                "timesteps": len(known), "guidance": record.guidance, "seed": record.seed}  # fmt: skip

    def at(self, timestep: float) -> RecordedCalls:
        """The calls at one timestep.

        Raises:
            DataError: there is none.
        """
        found = [call for call in self.calls if call.timestep == float(timestep)]
        if not found:
            known = sorted(set(self.timesteps.tolist()), reverse=True)
            raise DataError(f"no call was recorded at timestep {float(timestep):g}; there are {known}")
        return self._of(found)

    def cut(self, rows: int) -> RecordedCalls:
        """The same rows in calls of at most ``rows`` rows each (both halves of guidance count)."""
        if rows < 1:
            raise DataError(f"rows={rows}: at least one is needed")
        found = []
        for call in self.calls:
            start, stop = call.part or (0, call.rows)
            found += [replace(call, part=(i, min(i + rows, stop))) for i in range(start, stop, rows)]
        return self._of(found)

    def _of(self, calls: Sequence[Call]) -> RecordedCalls:
        return RecordedCalls(calls, self.record, self._store)

    # -- disk

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the calls into ``folder``; calls recorded into it already only get their index.

        Raises:
            DataError: the folder holds other calls.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        if (path / INDEX).exists():
            raise DataError(f"{path} holds recorded calls already: choose another folder, or remove it")
        kept = Store(0, path, keep=True)
        files: dict[int, str] = {}

        def write(_: Any, stored: Stored) -> dict[str, str]:
            if id(stored) not in files:
                own = stored.file is not None and stored.file.parent == path
                file = stored.file if own else kept.put(_read(self._store, stored)).file
                files[id(stored)] = file.name  # type: ignore[union-attr]
            return {"tensor": files[id(stored)]}

        entries = [{"rows": call.rows, "timestep": None if call.timestep != call.timestep else call.timestep,
                    "part": call.part, "keywords": _plain(rebuild(dict(call.tree), write, Stored))}
                   for call in self.calls]  # fmt: skip
        index = {"version": VERSION, "record": vars(self.record), "calls": entries}
        temporary = path / f".{INDEX}.{os.getpid()}"
        temporary.write_text(json.dumps(index), encoding="utf-8")
        temporary.replace(path / INDEX)
        return path

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> RecordedCalls:
        """Calls of a folder, whose tensors are read when they are used.

        Raises:
            CheckpointError: it holds no finished recording, or a damaged one.
        """
        path = Path(folder)
        try:
            index = json.loads((path / INDEX).read_text(encoding="utf-8"))
            version = index["version"]
            if version != VERSION:
                raise CheckpointError(f"{path}: recorded calls of version {version!r}, this hfq reads {VERSION}")
            stored: dict[str, Stored] = {}
            calls = [
                Call(_tree(entry["keywords"], path, stored), int(entry["rows"]),
                     float("nan") if entry["timestep"] is None else float(entry["timestep"]),
                     None if entry["part"] is None else tuple(entry["part"]))
                for entry in index["calls"]
            ]  # fmt: skip
            return cls(calls, Record(**index["record"]), Store())
        except FileNotFoundError:
            raise CheckpointError(f"{path} has no {INDEX}: no recording was finished there") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path / INDEX} is damaged: {error}") from error


def _read(store: Store, stored: Stored) -> torch.Tensor:
    try:
        return store.get(stored)
    except (FileNotFoundError, SafetensorError) as error:
        raise CheckpointError(f"{stored.file} of the recorded calls is missing or damaged: {error}") from None


def _plain(tree: Any) -> Any:
    """A tree as JSON that says what was a tuple, and what a tensor.

    Raises:
        DataError: a keyword is an object.
    """
    if isinstance(tree, dict):
        is_leaf = set(tree) == {"tensor"}
        return tree if is_leaf else {"dict": {str(key): _plain(item) for key, item in tree.items()}}
    if isinstance(tree, (list, tuple)):
        return {"tuple" if isinstance(tree, tuple) else "list": [_plain(item) for item in tree]}
    return {"value": tree}


def _tree(entry: Mapping[str, Any], path: Path, known: dict[str, Stored]) -> Any:
    """Inverse of :func:`_plain`, with ``Stored`` leaves of files below ``path``."""
    (kind, item), = entry.items()
    if kind == "tensor":
        if Path(item).name != item or not item.endswith(".safetensors"):
            raise CheckpointError(f"{path / INDEX} names a file {item!r} outside its folder")
        if item not in known:
            known[item] = _on_disk(path / item)
        return known[item]
    if kind == "dict":
        return {key: _tree(value, path, known) for key, value in item.items()}
    if kind in ("list", "tuple"):
        return (tuple if kind == "tuple" else list)(_tree(value, path, known) for value in item)
    if kind != "value":
        raise CheckpointError(f"{path / INDEX} has an entry of kind {kind!r}: it was written by a newer hfq")
    return item


def _on_disk(file: Path) -> Stored:
    """A tensor that stays in its file."""
    try:
        with safe_open(file, framework="pt") as handle:
            handle.get_slice("x")
    except (FileNotFoundError, SafetensorError) as error:
        raise CheckpointError(f"{file} of the recorded calls is missing or damaged: {error}") from None
    stored = Stored(torch.empty(0))
    stored.tensor, stored.file = None, file
    return stored


def check_tree(tree: Mapping[str, Any], where: str) -> None:
    """Raise :class:`DataError` unless a call can be kept: plain values and finite tensors."""
    for path, tensor in leaves(dict(tree)):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DataError(f"{where}: {'.'.join(map(str, path))} has NaN or infinite elements")

    def visit(item: Any, name: str) -> None:
        if isinstance(item, Mapping):
            for key, value in item.items():
                visit(value, f"{name}.{key}")
        elif isinstance(item, (list, tuple)):
            for number, value in enumerate(item):
                visit(value, f"{name}.{number}")
        elif not isinstance(item, (torch.Tensor, str, int, float, bool, type(None))):
            raise DataError(f"{where}: {name} is a {type(item).__name__}: only tensors and plain values are recorded")

    for key, value in tree.items():
        visit(value, key)
