"""What was fitted to the calibration data part by part, each in an atomic file: a killed run does not fit it again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hfq.calibration import ranks
from hfq.calibration.progress import atomic_file
from hfq.errors import CheckpointError

__all__ = ["Fits"]


class Fits:
    """Tensors and JSON values by the name of a part.

    Args:
        folder: made if missing; ``None`` keeps nothing.
        fingerprint: what the result depends on (config, data, model); JSON values.
    """

    def __init__(self, folder: str | Path | None, fingerprint: Mapping[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder)
        self.fingerprint = json.loads(json.dumps(fingerprint, sort_keys=True, default=str))

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
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                found = json.loads((file.metadata() or {})["hfq"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{path} is damaged ({error}): delete it to fit {name} again") from error
        old = found["fingerprint"]
        different = [key for key in sorted({*old, *self.fingerprint}) if old.get(key) != self.fingerprint.get(key)]
        if different:
            raise CheckpointError(f"{path} belongs to another run ({', '.join(different)} differ): use the same "
                                  "settings to continue it, or delete the folder to start over")
        return tensors, found["values"]

    def write(self, name: str, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        """Keep a finished part."""
        if self.folder is None or not ranks.is_main():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        details = json.dumps({"fingerprint": self.fingerprint, "values": dict(values)})
        kept = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
        with atomic_file(self._path(name)) as temporary:
            save_file(kept, temporary, metadata={"hfq": details})
