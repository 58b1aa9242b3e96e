"""Files of a run that can be continued: written at once or not at all, and refused by a run with other settings."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hfq.errors import CheckpointError

__all__ = ["as_json", "atomic_file", "read_state", "same_run", "write_state"]


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name; the finished file appears under ``path`` at once or not at all."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def write_state(path: Path, tensors: Mapping[str, torch.Tensor], details: Mapping[str, Any]) -> None:
    """Write ``tensors`` (contiguous, on the CPU, none sharing memory) and JSON values beside them, atomically."""
    with atomic_file(path) as temporary:
        save_file(dict(tensors), temporary, metadata={"hfq": json.dumps(details)})


def read_state(path: Path, again: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What :func:`write_state` wrote: tensors on the CPU, and the JSON values.

    Args:
        again: what happens if the file is deleted, for the message.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            details = json.loads((file.metadata() or {})["hfq"])
            return {key: file.get_tensor(key) for key in file.keys()}, details  # noqa: SIM118
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): delete it to {again}") from error


def as_json(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """``fingerprint`` as it comes back from a file."""
    return json.loads(json.dumps(fingerprint, sort_keys=True, default=str))


def same_run(what: str, saved: Mapping[str, Any], present: Mapping[str, Any], delete: str) -> None:
    """Raise unless two fingerprints agree.

    Args:
        what: the thing that was saved, and where.
        delete: what to delete to start over.

    Raises:
        CheckpointError: it names what differs.
    """
    different = [key for key in sorted({*saved, *present}) if saved.get(key) != present.get(key)]
    if different:
        shown = "; ".join(f"{key} was {_short(saved.get(key))}, is {_short(present.get(key))}" for key in different)
        raise CheckpointError(f"{what} belongs to another run: {shown}. Use the same settings to continue it, or "
                              f"delete the {delete} to start over")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
