"""Which text encoders a model was quantized with: digests of their tensors, compared when it is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hfq.errors import CheckpointError

__all__ = ["check_conditioning", "digest"]


def digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the tensors of a model in any order: names on disk and in memory may differ."""
    parts = []
    for tensor in tensors:
        one = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        one.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        parts.append(one.digest())
    return hashlib.sha256(b"".join(sorted(parts))).hexdigest()


def check_conditioning(files: Sequence[str], recorded: Any) -> None:
    """Raise :class:`CheckpointError` if the text encoders beside a model are not those that it was quantized with.

    Args:
        files: of the model's weights, in its folder of the pipeline.
        recorded: component → digest, of the model's config. Encoders whose folders are not there are passed over: what
            comes from them is compared when the model runs.
    """
    for name, known in (recorded or {}).items():
        folder = Path(files[0]).parent.parent / name if files else Path(name)
        weights = sorted(folder.glob("*.safetensors")) if files else []
        if not weights:
            continue
        tensors = []
        try:
            for path in weights:
                with safe_open(path, framework="pt") as file:
                    tensors += [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118
        except SafetensorError as error:
            raise CheckpointError(f"{folder} is damaged: {error}") from error
        if digest(tensors) != known:
            raise CheckpointError(
                f"{folder} holds another {name} than the one that this model was quantized with: the keys and values "
                "of its first token are stored in the model. Put the encoder back, in the dtype it had, or quantize "
                "the model again")
