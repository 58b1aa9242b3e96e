"""The timesteps of calibration data, and intervals of them from noise to image."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hfq.calibration.rows import batch_rows
from hfq.errors import DataError

__all__ = ["drawn", "edges_of", "evenly", "timesteps_of"]


def timesteps_of(batches: Sequence[Mapping[str, Any]]) -> list[float]:
    """The timestep of every batch.

    Raises:
        DataError: a batch has none, or its rows have different ones.
    """
    known = getattr(batches, "timesteps", None)
    found = known.tolist() if isinstance(known, torch.Tensor) else [_one(batch) for batch in batches]
    if any(math.isnan(t) for t in found):
        raise DataError("the calibration data has batches without a timestep: record the calls of the denoising loop")
    return found


def _one(batch: Mapping[str, Any]) -> float:
    value = batch.get("timestep")
    if value is None:
        return math.nan
    times = torch.as_tensor(value).double().reshape(-1)
    if bool((times != times[0]).any()):
        raise DataError("rows of one batch have different timesteps: give calls as a pipeline makes them")
    return float(times[0])


def edges_of(timesteps: Sequence[float], parts: int) -> list[float]:
    """Falling timesteps between ``parts`` intervals that hold equally many of the steps that were seen.

    A timestep is in the interval whose number is that of the edges that it is not above; an edge lies in the middle of
    the two steps beside it.

    Raises:
        DataError: there are fewer steps than intervals.
    """
    steps = sorted(set(timesteps), reverse=True)
    if len(steps) < parts:
        raise DataError(f"{len(steps)} timesteps for {parts} intervals: record more of the loop")
    places = [round(i * len(steps) / parts) for i in range(1, parts)]
    return [(steps[place - 1] + steps[place]) / 2 for place in places]


def evenly(batches: Sequence[Mapping[str, Any]], rows: int) -> list[Mapping[str, Any]]:
    """Calls spread evenly over the data, of about ``rows`` rows together; at least one."""
    count = min(len(batches), max(1, rows // max(1, batch_rows(batches[0]))))
    return [batches[i * len(batches) // count] for i in range(count)]


def drawn(batches: Sequence[Mapping[str, Any]], rows: int, seed: int) -> list[Mapping[str, Any]]:
    """Calls drawn at random, of about ``rows`` rows together, in the order of the data; at least one."""
    count = min(len(batches), max(1, rows // max(1, batch_rows(batches[0]))))
    return [batches[i] for i in sorted(random.Random(seed).sample(range(len(batches)), count))]


def one_each(batches: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The first call at every timestep, from noise to picture."""
    first: dict[float, int] = {}
    for i, timestep in enumerate(timesteps_of(batches)):
        first.setdefault(timestep, i)
    return [batches[first[timestep]] for timestep in sorted(first, reverse=True)]
