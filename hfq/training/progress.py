"""The state of a training run in one atomic file, so that a run killed at any step goes on to the same bits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hfq.calibration import ranks
from hfq.calibration.files import as_json, read_state, same_run, write_state
from hfq.errors import CheckpointError

__all__ = ["Saved"]


class Saved:
    """Parameters, moments and loss curve of a run.

    Args:
        path: of the file; its folder is made if missing.
        fingerprint: what the result depends on; JSON values.
        every: steps between two writes, default :attr:`EVERY`. The last step is always written.
        kept: lists of JSON values that grow while the run goes on; they are written, and filled in when it continues.
    """

    EVERY = 10

    def __init__(
        self, path: str | Path, fingerprint: Mapping[str, Any], every: int | None = None,
        kept: Mapping[str, list[Any]] | None = None,
    ) -> None:
        self.path, self.every, self.kept = Path(path), max(1, every or self.EVERY), kept or {}
        self.fingerprint = as_json(fingerprint)

    def load(self, optimizer: torch.optim.Optimizer) -> list[float]:
        """Put a saved state into the optimiser and its parameters; the losses of the steps done (empty without one).

        Raises:
            CheckpointError: the file is damaged, or belongs to another run.
        """
        found = ranks.broadcast(self.path.exists() if ranks.is_main() else None)
        if not found:
            return []
        tensors, details = read_state(self.path, "train from the start")
        where = f"the training state in {self.path}"
        same_run(where, details["fingerprint"], self.fingerprint, "file")
        parameters = _parameters(optimizer)
        if details["shapes"] != [list(p.shape) for p in parameters]:
            raise CheckpointError(f"{where} belongs to another run (the shapes of what is trained differ): use the "
                                  "same settings to continue it, or delete the file to start over")
        for number, p in enumerate(parameters):
            with torch.no_grad():
                p.copy_(tensors[f"{number}.value"])
            state = {key.partition(".")[2]: t for key, t in tensors.items() if key.startswith(f"{number}.")}
            state.pop("value")
            if state:
                # Counters stay on the CPU, as they were made.
                optimizer.state[p] = {key: t.to(p.device) if t.ndim else t.clone() for key, t in state.items()}
        for name, values in self.kept.items():
            values[:] = details["kept"][name]
        return list(details["curve"])

    def offer(self, optimizer: torch.optim.Optimizer, curve: list[float], *, last: bool = False) -> None:
        """Write the state after a step, if it is due."""
        if not ranks.is_main() or not (last or len(curve) % self.every == 0):
            return
        tensors: dict[str, torch.Tensor] = {}
        parameters = _parameters(optimizer)
        for number, p in enumerate(parameters):
            tensors[f"{number}.value"] = p.detach().to("cpu").contiguous()
            for key, value in optimizer.state.get(p, {}).items():
                tensors[f"{number}.{key}"] = value.detach().to("cpu").contiguous()
        shapes = [list(p.shape) for p in parameters]
        details = {"fingerprint": self.fingerprint, "curve": curve, "shapes": shapes, "kept": dict(self.kept)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_state(self.path, tensors, details)


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
