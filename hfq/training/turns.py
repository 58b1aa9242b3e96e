"""Mini-batches of a denoiser's calls: every step at one timestep, and the timesteps in turn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from hfq.calibration import ranks, trajectories
from hfq.calibration.cache import leaves, rebuild
from hfq.calibration.rows import batch_rows
from hfq.errors import DataError
from hfq.training.loop import gathered

__all__ = ["Turns"]


class Turns:
    """Rows of :func:`hfq.training.loop.fit`: step ``i`` takes rows of the calls at timestep ``i`` of those there are,
    from noise to picture and again. Of a timestep every row is used before one is used again.

    Training one timestep to its end before the next would fit the weights to the last one.

    Args:
        calls: batches of forward keywords, each at one timestep.
        batch_size: rows a step, over all processes.
        seed: of the order of the rows of a timestep.

    Raises:
        DataError: there are no calls, or a call has no timestep.
    """

    def __init__(self, calls: Sequence[Mapping[str, Any]], batch_size: int, seed: int = 0) -> None:
        if not len(calls):
            raise DataError("training needs data: no calls were given")
        found: dict[float, list[tuple[int, int]]] = {}
        for i, timestep in enumerate(trajectories.timesteps_of(calls)):
            found.setdefault(timestep, []).extend((i, row) for row in range(batch_rows(calls[i])))
        self.calls, self.size, self.seed = calls, batch_size, seed
        self.timesteps = sorted(found, reverse=True)
        self._places = [found[timestep] for timestep in self.timesteps]
        self._orders: dict[int, tuple[int, list[int]]] = {}

    def __len__(self) -> int:
        """How many timesteps there are."""
        return len(self.timesteps)

    def parts(self, step: int, micro_batch: int) -> Iterator[dict[str, Any]]:
        """This process' share of the rows of a step, ``micro_batch`` of them in a pass; rows of calls whose tensors
        differ in form are passes of their own."""
        turn, which = divmod(step, len(self))
        places = self._places[which]
        numbers = range(turn * self.size, (turn + 1) * self.size)
        chosen = [places[self._order(which, n // len(places))[n % len(places)]] for n in numbers]
        mine = chosen[ranks.rank() :: ranks.count()]
        for start in range(0, len(mine), micro_batch):
            yield from _joined(list(gathered(self.calls, mine[start : start + micro_batch], micro_batch)))

    def _order(self, which: int, epoch: int) -> list[int]:
        known = self._orders.get(which)
        if known is None or known[0] != epoch:
            seed = (self.seed * 1_000_003 + epoch) * 10_007 + which
            generator = torch.Generator().manual_seed(seed)
            self._orders[which] = epoch, torch.randperm(len(self._places[which]), generator=generator).tolist()
        return self._orders[which][1]


def _joined(parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parts of several calls as one, where their tensors have one form."""
    alike: dict[Any, list[dict[tuple[Any, ...], torch.Tensor]]] = {}
    whole: dict[Any, dict[str, Any]] = {}
    for part in parts:
        tensors = dict(leaves(part))
        form = tuple((path, t.shape[1:] if t.ndim else ()) for path, t in tensors.items())
        alike.setdefault(form, []).append(tensors)
        whole.setdefault(form, part)

    def join(trees: Sequence[dict[tuple[Any, ...], torch.Tensor]], first: dict[str, Any]) -> dict[str, Any]:
        rows = batch_rows(first)
        return rebuild(first, lambda path, t: torch.cat([tree[path] for tree in trees])
                       if t.ndim and t.shape[0] == rows else t)  # fmt: skip

    return [join(trees, whole[form]) if len(trees) > 1 else whole[form] for form, trees in alike.items()]
