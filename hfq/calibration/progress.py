"""One atomic file a finished block, so that a run killed at any point continues to the same bytes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hfq.calibration import ranks
from hfq.calibration.cache import digest
from hfq.calibration.files import as_json, atomic_file, read_state, same_run, write_state
from hfq.errors import CheckpointError
from hfq.layers import swap
from hfq.layers.processors import has_processor
from hfq.report import Report, Row

__all__ = ["Progress", "put_back", "state_digest", "whole"]

_FINGERPRINT = "fingerprint.json"
# Names of tensors beside the block's own: no module's tensor has a colon in its name.
_STATE = "state:"


def state_digest(module: nn.Module) -> str:
    """SHA-256 over names and values of all parameters and buffers."""
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
            total.update(name.encode() + digest(tensor))
    return total.hexdigest()


def whole(block: Any) -> nn.Module:
    """What is saved of a block: its module; around a layer or an attention one more, in which it has a name."""
    named = getattr(block, "alone", False) or has_processor(block.module)
    return nn.ModuleDict({"layer": block.module}) if named else block.module


def put_back(model: nn.Module, block: Any, held: nn.Module) -> None:
    """Let a block know its new layers after they were installed in ``held`` (of :func:`whole`)."""
    if held is not block.module and held.get_submodule("layer") is not block.module:
        block.module = held.get_submodule("layer")
        block.module.label = block.name
        model.set_submodule(block.name, block.module)
    for site in block.sites:
        site.module = model.get_submodule(site.name)


class Progress:
    """The finished blocks of one run.

    Args:
        folder: made if missing.
        fingerprint: what the result depends on (config, data hash, versions); JSON values.
        names: the blocks in the order of the run.

    Raises:
        CheckpointError: the folder belongs to a run with another fingerprint.
    """

    def __init__(self, folder: str | Path, fingerprint: Mapping[str, Any], names: list[str]) -> None:
        self.folder = Path(folder)
        self.names = names
        self.fingerprint = as_json({**fingerprint, "blocks": names})
        if ranks.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob("*.tmp*"):
                leftover.unlink(missing_ok=True)
            self._check()
        # Every process takes rank 0's view: it may already write while others still look.
        self.finished: int = ranks.broadcast(self._count() if ranks.is_main() else None)

    def _check(self) -> None:
        path = self.folder / _FINGERPRINT
        if not path.exists():
            if any(self.folder.glob("block-*.safetensors")):
                raise CheckpointError(
                    f"{self.folder} holds finished blocks but no {_FINGERPRINT}: delete the folder to start over"
                )
            with atomic_file(path) as temporary:
                temporary.write_text(json.dumps(self.fingerprint, indent=1, sort_keys=True))
            return
        try:
            saved = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{path} is damaged ({error}): delete the folder to start over") from error
        same_run(f"the progress in {self.folder}", saved, self.fingerprint, "folder")

    def _path(self, name: str) -> Path:
        return (
            self.folder / f"block-{self.names.index(name):05d}-{re.sub(r'[^A-Za-z0-9_.]', '_', name)[-80:]}.safetensors"
        )

    def _count(self) -> int:
        for number, name in enumerate(self.names):
            if not self._path(name).exists():
                return number
        return len(self.names)

    def has(self, name: str) -> bool:
        return self.names.index(name) < self.finished

    def write(
        self, name: str, module: nn.Module, before: str, report: Report | None,
        state: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Save the finished block ``module``; ``before`` is the ``state_digest`` that it had as a float block.

        ``state`` is what else the blocks after it start from: :meth:`install` gives it back.
        """
        if not ranks.is_main():
            return
        tensors: dict[str, torch.Tensor] = {}
        seen: set[int] = set()
        kept = {f"{_STATE}{key}": tensor for key, tensor in (state or {}).items()}
        for key, tensor in [*module.state_dict().items(), *kept.items()]:
            flat = tensor.detach().to("cpu").contiguous()
            # safetensors refuses tensors that share memory.
            tensors[key] = flat.clone() if flat.untyped_storage().data_ptr() in seen else flat
            seen.add(flat.untyped_storage().data_ptr())
        inside = [] if report is None else [asdict(row) for row in report if _belongs(row.module, name)]
        curves = {} if report is None else {key: curve for key, curve in report.curves.items() if _belongs(key, name)}
        notes = [] if report is None else report.notes
        # Rotations of the stream belong to the stack: the recipe put them there before the walk.
        manifest = {**swap.describe(module), "rotations": []}
        details = {"before": before, "manifest": manifest, "rows": inside, "curves": curves, "notes": notes}
        write_state(self._path(name), tensors, details)

    def install(self, name: str, module: nn.Module, report: Report | None) -> dict[str, torch.Tensor]:
        """Turn the float block ``module`` into the finished one.

        Returns:
            The state that was saved with it.

        Raises:
            CheckpointError: the float block is not the one that was quantized, or the file is damaged.
        """
        tensors, details = read_state(self._path(name), "do this block and the following ones again")
        if details["before"] != state_digest(module):
            raise CheckpointError(
                f"the progress in {self.folder} was made from other weights: {name} differs. "
                "Delete the folder to start over"
            )
        device = next((p.device for p in module.parameters() if p.device.type != "meta"), torch.device("cpu"))
        for built in swap.build_empty(module, details["manifest"]):
            module.get_submodule(built).label = f"{name}.{built}"  # type: ignore[assignment]
        own = {key: tensor.to(device) for key, tensor in tensors.items() if not key.startswith(_STATE)}
        assign(module, own)
        if report is not None:
            for row in details["rows"]:
                report.add(Row(**row))
            report.curves.update(details["curves"])
            for note in details["notes"]:
                report.note(note)
        return {key.removeprefix(_STATE): tensor for key, tensor in tensors.items() if key not in own}


def assign(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put ``tensors`` into ``module``: in place where a tensor of the same form exists, as a new one elsewhere."""
    left = set(module.state_dict())
    for key, tensor in tensors.items():
        left.discard(key)
        path, _, leaf = key.rpartition(".")
        owner = module.get_submodule(path)
        old = owner._parameters.get(leaf, owner._buffers.get(leaf))
        if old is not None and old.device.type != "meta" and old.shape == tensor.shape and old.dtype == tensor.dtype:
            with torch.no_grad():
                old.copy_(tensor)
        elif leaf in owner._buffers:
            owner._buffers[leaf] = tensor
        else:
            trains = old is not None and old.requires_grad and tensor.is_floating_point()
            owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=trains)
    for key in left:
        path, _, leaf = key.rpartition(".")
        owner = module.get_submodule(path)
        if leaf in owner._parameters:
            owner._parameters[leaf] = None


def _belongs(name: str, block: str) -> bool:
    return name == block or name.startswith(block + ".")
