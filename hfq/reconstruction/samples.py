"""Single samples out of recorded calls: a call holds several, and a mini-batch draws from many calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hfq.calibration import ranks
from hfq.calibration.cache import leaves, rebuild
from hfq.calibration.capture import first_tensor, to_device

__all__ = ["Calls", "Part", "Samples", "SideBySide"]

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Part:
    """Some samples that run in one forward pass.

    Attributes:
        call: ``(args, kwargs)``.
        target: ``[rows, ...]``.
        mask: bool ``[rows, T]`` or ``None``.
        rows: number of samples.
    """

    def __init__(self, call: Call, target: torch.Tensor, mask: torch.Tensor | None, rows: int) -> None:
        self.call, self.target, self.mask, self.rows = call, target, mask, rows


class Calls(Sequence[Call]):
    """Calls with one tensor each; the tensors are read when they are asked for."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return (self.tensors[index],), {}


class SideBySide(Sequence[torch.Tensor]):
    """Two lists of tensors, joined in their last axis when one is asked for."""

    def __init__(self, first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> None:
        self.pair = first, second

    def __len__(self) -> int:
        return len(self.pair[0])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        first, second = (tensors[index] for tensors in self.pair)
        return torch.cat([first, second.to(first.device)], -1)


class Samples:
    """The samples of all calls, numbered over all processes.

    Args:
        inputs: one ``(args, kwargs)`` a call.
        targets: one tensor a call, samples along axis 0.
        float_inputs: the calls of another stream, element by element mixed in with probability ``mix``.
        mask: gives the padding mask of call ``i``, bool ``[B, T]``, or ``None``.
        whole: never take a call apart (its samples depend on each other); a call is then one sample.
        distributed: count the samples of all processes; otherwise only those of this one.
    """

    def __init__(
        self,
        inputs: Sequence[Call],
        targets: Sequence[torch.Tensor],
        *,
        float_inputs: Sequence[Call] | None = None,
        mix: float = 0.0,
        mask: Callable[[int], torch.Tensor | None] | None = None,
        whole: bool = False,
        device: torch.device | str = "cpu",
        distributed: bool = True,
    ) -> None:
        self.inputs, self.targets, self.float_inputs, self.mix = inputs, targets, float_inputs, mix
        self.device = torch.device(device)
        self._mask = mask or (lambda i: None)
        self.whole = whole
        sizes = [1 if whole else targets[i].shape[0] for i in range(len(targets))]
        self._where = [(i, row) for i, size in enumerate(sizes) for row in range(size)]
        counts = ranks.gather(len(self._where)) if distributed else [len(self._where)]
        self.first = sum(counts[: ranks.rank()]) if distributed else 0  # number of the first sample of this process
        self.total = sum(counts)

    def own(self, numbers: Sequence[int]) -> list[int]:
        """Those of ``numbers`` that this process holds, as local positions."""
        stop = self.first + len(self._where)
        return [n - self.first for n in numbers if self.first <= n < stop]

    def parts(self, positions: Sequence[int], seed: int, limit: int | None = None) -> list[Part]:
        """The samples at local ``positions``, merged into as few forward passes as their shapes allow.

        ``seed`` decides the mix of streams, sample by sample; ``limit`` bounds the samples of a pass.
        """
        pieces: dict[Any, list[tuple[Call, list[bool], torch.Tensor, torch.Tensor | None]]] = {}
        by_call: dict[int, list[int]] = {}
        for position in positions:
            i, row = self._where[position]
            by_call.setdefault(i, []).append(row)
        for i, rows in sorted(by_call.items()):
            piece = self._take(i, rows, seed)
            shapes = [
                (path, tuple(t.shape[1:]) if batched else t, t.dtype)
                for (path, t), batched in zip(leaves(piece[0]), piece[1], strict=True)
            ]
            key = next((k for k in pieces if _same(k, shapes)), None)
            pieces.setdefault(_Key(shapes) if key is None else key, []).append(piece)
        found = []
        for group in pieces.values():
            step = len(group) if limit is None else max(1, limit // max(len(p[2]) for p in group))
            found += [self._merge(group[start : start + step]) for start in range(0, len(group), step)]
        return found

    def _take(self, i: int, rows: list[int], seed: int) -> tuple[Call, list[bool], torch.Tensor, torch.Tensor | None]:
        call, target, mask = self.inputs[i], self.targets[i], self._mask(i)
        size = target.shape[0]
        batched = [_batched(t, size) for _, t in leaves(call)]
        if not self.whole:
            index = torch.tensor(rows)
            call = rebuild(call, lambda _, t: t[index.to(t.device)] if _batched(t, size) else t)
            target, mask = target[index.to(target.device)], None if mask is None else mask[index.to(mask.device)]
        if self.mix and self.float_inputs is not None:
            call = self._mixed(call, i, rows, size, seed)
        return call, batched, target, mask

    def _mixed(self, call: Call, i: int, rows: list[int], size: int, seed: int) -> Call:
        other = self.float_inputs[i]  # type: ignore[index]
        path = first_tensor(call)
        replacement = next(t for p, t in leaves(other) if p == path)
        if not self.whole and _batched(replacement, size):
            replacement = replacement[torch.tensor(rows).to(replacement.device)]

        def mixed(p: Any, t: torch.Tensor) -> torch.Tensor:
            if p != path:
                return t
            start = self._where.index((i, 0)) + self.first
            draws = []
            for row in rows:
                generator = torch.Generator().manual_seed(seed + start + row)
                shape = t.shape if self.whole else t.shape[1:]
                draws.append(torch.rand(shape, generator=generator))
            draw = draws[0] if self.whole else torch.stack(draws)
            return torch.where((draw < self.mix).to(t.device), replacement.to(t), t)

        return rebuild(call, mixed)

    def _merge(self, group: list[tuple[Call, list[bool], torch.Tensor, torch.Tensor | None]]) -> Part:
        call, batched, target, mask = group[0]
        if len(group) > 1:
            columns = [[t for _, t in leaves(other)] for other, _, _, _ in group]
            flags = dict(zip([path for path, _ in leaves(call)], enumerate(batched), strict=True))

            def joined(path: Any, t: torch.Tensor) -> torch.Tensor:
                number, along = flags[path]
                return torch.cat([column[number] for column in columns]) if along else t

            call = rebuild(call, joined)
            target = torch.cat([piece[2] for piece in group])
            mask = None if all(piece[3] is None for piece in group) else torch.cat([_full(p[3], p[2]) for p in group])
        args, kwargs = to_device(call, self.device)
        mask = None if mask is None else mask.to(self.device)
        return Part((args, kwargs), target.to(self.device), mask, 1 if self.whole else len(target))


class _Key:
    """Shapes of a call as a dictionary key; compared by :func:`_same`."""

    def __init__(self, shapes: list[Any]) -> None:
        self.shapes = shapes


def _same(key: _Key, shapes: list[Any]) -> bool:
    """Whether two calls can be joined: batched tensors of the same shape behind axis 0, all others equal."""
    if len(key.shapes) != len(shapes):
        return False
    for (path, a, dtype), (other, b, other_dtype) in zip(key.shapes, shapes, strict=True):
        if path != other or dtype != other_dtype or isinstance(a, tuple) != isinstance(b, tuple):
            return False
        if isinstance(a, tuple):
            if a != b:
                return False
        elif a is not b and (a.shape != b.shape or not torch.equal(a, b)):
            return False
    return True


def _batched(tensor: torch.Tensor, size: int) -> bool:
    """Whether axis 0 counts samples. One-dimensional tensors (positions) do not, nor does an axis that broadcasts."""
    return tensor.ndim >= 2 and tensor.shape[0] == size


def _full(mask: torch.Tensor | None, target: torch.Tensor) -> torch.Tensor:
    return torch.ones(target.shape[:2], dtype=torch.bool, device=target.device) if mask is None else mask
