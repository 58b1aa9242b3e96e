"""Measured scores: the book that keeps them, modules put in and out, means within a band, intervals of timesteps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hfq.allocation import measured, program
from hfq.allocation.measured import ScoreBook
from hfq.calibration.trajectories import edges_of, timesteps_of
from hfq.errors import CheckpointError, ConfigError, DataError


def test_the_book_keeps_what_it_knows(tmp_path):
    path, asked = tmp_path / "deep" / "scores.json", []

    def score(name, bits):
        asked.append(name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return 10.0 * bits

    with pytest.raises(KeyboardInterrupt):
        measured.measure({"a": [4, 8], "b": [4]}, score, ScoreBook(path, {"seed": 1}))
    found = measured.measure({"a": [4, 8], "b": [4]}, score, ScoreBook(path, {"seed": 1}))
    assert found == {"a": {4: 40.0, 8: 80.0}, "b": {4: 40.0}} and asked == ["a", "a", "b", "b"]
    with pytest.raises(CheckpointError, match="seed"):
        ScoreBook(path, {"seed": 2})
    path.write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        ScoreBook(path)


def test_modules_are_put_back():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    first = model[0]
    with pytest.raises(KeyError), measured.replaced(model, {"0": nn.Identity()}):
        assert isinstance(model[0], nn.Identity)
        raise KeyError
    assert model[0] is first


def test_means_within_a_band():
    scores = {name: {2: 9.0, 4: 3.0, 8: 1.0} for name in "abcdef"}
    scores["c"] = {2: 90.0, 4: 30.0, 8: 1.0}
    sizes = dict(zip("abcdef", (100, 150, 200, 120, 90, 340), strict=True))
    chosen = program.allocate_within(scores, sizes, 4.0, 0.1)
    mean = sum(sizes[n] * b for n, b in chosen.items()) / sum(sizes.values())
    assert abs(mean - 4) <= 0.1 and chosen["c"] == 8 and chosen == program.allocate_within(scores, sizes, 4.0, 0.1)
    uniform = sum(row[4] for row in scores.values())
    assert sum(scores[n][b] for n, b in chosen.items()) <= uniform
    # More bits than the least loss asks for: the lower end of the band holds too.
    flat = {name: {4: 0.0, 8: 1.0} for name in "ab"}
    assert sorted(program.allocate_within(flat, {"a": 1, "b": 1}, 6.0).values()) == [4, 8]
    for target, match in ((1.0, "means from"), (8.5, "means from"), (5.0, "too few")):
        with pytest.raises(ConfigError, match=match):
            program.allocate_within(flat, {"a": 1, "b": 1}, target)


def test_intervals_of_timesteps():
    assert edges_of([40, 30, 20, 10, 10], 2) == [25.0] and edges_of([5], 1) == []
    assert edges_of(range(20), 4) == [14.5, 9.5, 4.5]
    with pytest.raises(DataError, match="2 timesteps for 3"):
        edges_of([1, 2], 3)
    batches = [{"timestep": torch.tensor([3, 3])}, {"timestep": 7}]
    assert timesteps_of(batches) == [3.0, 7.0]
    for wrong in ({"x": 1}, {"timestep": torch.tensor([1, 2])}):
        with pytest.raises(DataError):
            timesteps_of([wrong])
