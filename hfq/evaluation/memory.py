"""Bytes: on disk, in live tensors, stored per weight. The peak of a run is :class:`hfq.memory.PeakMemory`."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from hfq.errors import CheckpointError
from hfq.memory import PeakMemory, anonymous_bytes

__all__ = ["PeakMemory", "anonymous_bytes", "disk_bytes", "stored_bits", "tensor_bytes"]

_WEIGHTS = (".safetensors", ".bin", ".gguf")


def disk_bytes(folder: str | Path) -> int:
    """Bytes of the weight files under ``folder`` (tokenizer, configs and cards left out).

    Raises:
        CheckpointError: there is no weight file.
    """
    files = [path for path in Path(folder).rglob("*") if path.suffix in _WEIGHTS and path.is_file()]
    if not files:
        raise CheckpointError(f"{folder} holds no weight file ({', '.join(_WEIGHTS)})")
    return sum(path.stat().st_size for path in files)


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; a storage that several share counts once."""
    seen: dict[tuple[str, int], int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta:
            storage = tensor.untyped_storage()
            seen[str(tensor.device), storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def stored_bits(folder: str | Path) -> float | None:
    """Bits per packed weight with all metadata, as the report in ``folder`` has it; ``None`` without a report."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        return None
    summary = (json.loads(path.read_text()).get("quantization_config") or {}).get("summary") or {}
    return summary.get("bits_per_weight")
