"""Scores that are measured: one unit at a time at each of its widths, everything else as it was, and what came out.

Measuring takes far longer than the rest of a run, so that scores are written down as they come: a run that was stopped
goes on where it was, and another budget needs no new scores.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hfq.calibration.cache import leaves
from hfq.calibration.capture import device_of, first_tensor, quiet, to_device
from hfq.errors import CheckpointError

__all__ = ["ScoreBook", "measure", "outputs", "replaced"]


class ScoreBook:
    """Numbers by name, kept in a file.

    Args:
        path: of the file; ``None`` keeps them in memory alone.
        fingerprint: what the numbers depend on. A file that says otherwise is refused; entries that only the file has
            stay.

    Raises:
        CheckpointError: the file is damaged, or of another run.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None = None, fingerprint: Mapping[str, Any] | None = None
    ) -> None:
        self.path = None if path is None else Path(path)
        self.fingerprint = json.loads(json.dumps(dict(fingerprint or {}), sort_keys=True, default=str))
        self.numbers: dict[str, float] = {}
        if self.path is None or not self.path.exists():
            return
        try:
            saved = json.loads(self.path.read_text(encoding="utf-8"))
            found, numbers = saved["fingerprint"], {str(k): float(v) for k, v in saved["numbers"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self.path} is damaged: {error}; remove it to measure again") from error
        other = sorted(key for key, value in self.fingerprint.items() if found.get(key) != value)
        if other:
            raise CheckpointError(f"{self.path} holds scores of another run ({', '.join(other)} differ): choose "
                                  "another work_dir, or remove it")
        self.fingerprint, self.numbers = {**found, **self.fingerprint}, numbers

    def get(self, name: str, number: Callable[[], float]) -> float:
        """The number called ``name``, computed if it is not known."""
        if name not in self.numbers:
            self.numbers[name] = float(number())
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
                temporary.write_text(json.dumps({"fingerprint": self.fingerprint, "numbers": self.numbers}))
                temporary.replace(self.path)
        return self.numbers[name]


@contextmanager
def replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, ``model`` has other modules under these names; the model itself is unchanged afterwards."""
    before = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)


@torch.no_grad()
def outputs(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> list[torch.Tensor]:
    """The first tensor that ``model`` returns for each batch, on the CPU."""
    found = []
    with quiet(model):
        for batch in batches:
            output = model(**to_device(dict(batch), device_of(model)))
            path = first_tensor(output)
            found.append(next(t for p, t in leaves(output) if p == path).detach().float().cpu())
    return found


def measure(
    widths: Mapping[str, Sequence[int]], score: Callable[[str, int], float], book: ScoreBook, *,
    prefix: str = "", progress: Callable[[int, str], Any] | None = None,
) -> dict[str, dict[int, float]]:
    """Name → bits → ``score(name, bits)`` of every unit at each of its widths.

    Args:
        book: numbers that are known already, under ``<prefix><name>@<bits>``.
        progress: ``progress(total, description)`` makes a bar with ``update()`` and ``close()``.
    """
    bar = progress(sum(map(len, widths.values())), f"scoring {prefix}".strip()) if progress is not None else None
    found: dict[str, dict[int, float]] = {}
    try:
        for name, row in widths.items():
            found[name] = {}
            for bits in row:
                found[name][bits] = book.get(f"{prefix}{name}@{bits}", lambda n=name, b=bits: score(n, b))
                if bar is not None:
                    bar.update()
    finally:
        if bar is not None:
            bar.close()
    return found
