"""Several processes: who holds which batches, and sums over all of them. Everything is the identity in one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Share", "broadcast", "count", "gather", "is_main", "max_", "rank", "share", "sum_"]


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if _active() else 0


def count() -> int:
    return dist.get_world_size() if _active() else 1


def is_main() -> bool:
    return rank() == 0


def share(items: int) -> range:
    """The contiguous part of ``range(items)`` that belongs to this process.

    Earlier ranks take one item more when the division leaves a rest; nothing is repeated to fill up, because a repeated
    sample changes every statistic. A rank may get nothing at all.
    """
    each, rest = divmod(items, count())
    start = rank() * each + min(rank(), rest)
    return range(start, start + each + (rank() < rest))


class Share(Sequence[Any]):
    """The part of ``items`` that belongs to this process, each read when it is used; the last one is kept."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items, self.numbers = items, share(len(items))
        self._last: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = self.numbers[index]
        if self._last[0] != number:
            self._last = (number, self.items[number])
        return self._last[1]


def sum_(tensor: torch.Tensor) -> torch.Tensor:
    """Sum ``tensor`` over all processes in place; every rank ends with the same bits."""
    if _active():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def max_(tensor: torch.Tensor) -> torch.Tensor:
    """Elementwise maximum over all processes, in place."""
    if _active():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def broadcast(value: Any) -> Any:
    """The value that rank 0 passed in (any small picklable object)."""
    if not _active():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Any) -> list[Any]:
    """The values of all processes, in rank order (small picklable objects)."""
    if not _active():
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values
