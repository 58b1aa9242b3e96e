"""What was fitted to the calibration data part by part, each in an atomic file: a killed run does not fit it again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hfq.calibration import ranks
from hfq.calibration.files import as_json, read_state, same_run, write_state

__all__ = ["Fits"]


class Fits:
    """Tensors and JSON values by the name of a part.

    Args:
        folder: made if missing; ``None`` keeps nothing.
        fingerprint: what the result depends on (config, data, model); JSON values.
    """

    def __init__(self, folder: str | Path | None, fingerprint: Mapping[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder)
        self.fingerprint = as_json(fingerprint)

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"fit-{re.sub(r'[^A-Za-z0-9_.]', '_', name)[-120:]}.safetensors"

    def read(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """What :meth:`write` kept under ``name``; ``None`` if nothing was kept.

        Raises:
            CheckpointError: the file is damaged, or of another run.
        """
        if self.folder is None or not ranks.broadcast(self._path(name).exists() if ranks.is_main() else None):
            return None
        path = self._path(name)
        tensors, found = read_state(path, f"fit {name} again")
        same_run(str(path), found["fingerprint"], self.fingerprint, "folder")
        return tensors, found["values"]

    def write(self, name: str, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Keep a finished part."""
        if self.folder is None or not ranks.is_main():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
        write_state(self._path(name), kept, {"fingerprint": self.fingerprint, "values": dict(values)})
