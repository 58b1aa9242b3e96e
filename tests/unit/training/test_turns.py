"""Mini-batches of calls of a denoiser: timesteps in turn, rows of all calls at a timestep."""

from __future__ import annotations

import pytest
import torch

from hfq.calibration import trajectories
from hfq.errors import DataError
from hfq.training.turns import Turns


def calls(*sizes: tuple[float, int], form: int = 2) -> list[dict[str, torch.Tensor]]:
    """Calls ``(timestep, rows)``; every row has a number of its own."""
    start, found = 0, []
    for timestep, rows in sizes:
        numbers = torch.arange(start, start + rows, dtype=torch.float32)
        found.append({"sample": numbers[:, None].expand(rows, form).clone(), "timestep": torch.tensor(timestep)})
        start += rows
    return found


def test_timesteps_take_turns_and_every_row_is_used_before_one_is_again() -> None:
    turns = Turns(calls((9, 2), (1, 3), (9, 4), (1, 3)), batch_size=3)
    assert len(turns) == 2 and turns.timesteps == [9.0, 1.0]
    seen: dict[float, list[float]] = {9.0: [], 1.0: []}
    for step in range(16):
        (part,) = list(turns.parts(step, 8))
        assert float(part["timestep"]) == (9.0, 1.0)[step % 2] and part["sample"].shape == (3, 2)
        seen[float(part["timestep"])] += part["sample"][:, 0].tolist()
    for timestep, rows in {9.0: [0, 1, 5, 6, 7, 8], 1.0: [2, 3, 4, 9, 10, 11]}.items():
        rounds = [seen[timestep][6 * i : 6 * i + 6] for i in range(4)]
        assert all(sorted(one) == rows for one in rounds) and len({tuple(one) for one in rounds}) > 1


def test_steps_do_not_depend_on_those_before() -> None:
    data = calls((9, 5), (1, 5))
    one, other = Turns(data, 4, seed=3), Turns(data, 4, seed=3)
    for step in (7, 0, 3):
        list(other.parts(step, 2))
    parts = [torch.cat([part["sample"] for part in turns.parts(5, 2)]) for turns in (one, other)]
    assert torch.equal(*parts) and len(parts[0]) == 4
    assert not torch.equal(torch.cat([part["sample"] for part in Turns(data, 4, seed=4).parts(5, 2)]), parts[0])


def test_calls_of_another_form_are_passes_of_their_own() -> None:
    data = [*calls((9, 3)), *calls((9, 3), form=5)]
    parts = list(Turns(data, 6).parts(0, 6))
    assert sorted(tuple(part["sample"].shape) for part in parts) == [(3, 2), (3, 5)]


def test_no_calls_and_no_timesteps() -> None:
    with pytest.raises(DataError, match="no calls"):
        Turns([], 4)
    with pytest.raises(DataError, match="without a timestep"):
        Turns([{"sample": torch.zeros(2, 2)}], 4)


def test_one_call_of_every_timestep() -> None:
    data = calls((1, 2), (9, 1), (5, 1), (9, 3), (1, 1))
    assert [batch is data[i] for batch, i in zip(trajectories.one_each(data), (1, 2, 0), strict=True)] == [True] * 3
