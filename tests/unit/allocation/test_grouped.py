"""Two groups with a metric each: shares of a mean, the scan, who is protected, what is computed and what is not."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from hfq.allocation import grouped, ratios
from hfq.allocation.grouped import Judge, Scan
from hfq.allocation.measured import ScoreBook
from hfq.allocation.ratios import Group
from hfq.errors import ConfigError, DataError

SCORES = {"c1": {2: 3.0, 4: 1.0, 8: 0.0}, "c2": {2: 9.0, 4: 2.0, 8: 0.0},
          "q1": {4: 5.0, 8: 0.0}, "q2": {4: 1.0, 8: 0.0}}
SIZES = dict.fromkeys(SCORES, 100.0)


def content(name):
    return name.startswith("c")


def test_the_scan_takes_what_the_loss_says():
    seen = []

    def loss(bits):
        seen.append(dict(bits))
        return bits["c1"]  # whatever the scores say

    how = Scan(5.0, (0.5, 1.5), points=5, slack=1.0, means=3, tolerance=0.5)
    chosen = grouped.scan(SCORES, SIZES, content, how, loss, "target")
    assert chosen["c1"] == min(bits["c1"] for bits in seen) and len(seen) == len({tuple(b.items()) for b in seen}) > 1
    for bits in seen:
        assert abs(sum(bits.values()) / 4 - 4.5) <= 1.0 and bits["q1"] >= bits["q2"]
    with pytest.raises(ConfigError, match="target: no widths have a mean of 2.5"):
        grouped.scan(SCORES, SIZES, content, Scan(2.5, (1.0, 1.0), 1, 0.0, 1), loss, "target")


def test_a_group_alone():
    only = {name: row for name, row in SCORES.items() if content(name)}
    chosen = grouped.scan(only, SIZES, content, Scan(6.0, (0.5, 1.0), 2, 0.0, 1, 0.1), lambda bits: 0.0, "target")
    assert sorted(chosen.values()) == [4, 8] and chosen["c2"] == 8


def test_plans_keep_within_the_bounds():
    group = Group({"a": {4: 1.0, 8: 0.0}}, {"a": 1.0}, 4, 8)
    other = Group({"b": {2: 1.0, 8: 0.0}}, {"b": 1.0}, 2, 8)
    assert [dict(plan.bits) for plan in ratios.plans(group, other, [6.0, 8.0], [1.0, 2.0], 0.0)] == [
        {"a": 8, "b": 8}]  # (6, 6), (8, 4) and (10.7, 5.3) are no plans
    assert ratios.line(1.0, 2.0, 3) == [1.0, 1.5, 2.0] and ratios.line(1.0, 2.0, 1) == [2.0]


def test_the_worst_of_each_group_are_protected():
    losses = {"c1": 1.0, "c2": 5.0, "c3": 3.0, "q1": 100.0, "q2": 200.0}
    assert grouped.protect(losses, content, 0.01) == ["c2", "q2"]
    assert grouped.protect(losses, content, 0.5) == ["c2", "c3", "q2"] and grouped.protect(losses, content, 0.0) == []


def test_nothing_is_computed_that_is_not_asked_for():
    model, drawn = nn.Linear(2, 2), []

    @contextmanager
    def simulated(weights=None, inputs=None):
        kept = model.weight.data
        model.weight.data = kept + sum((weights or {}).values()) / 10
        yield
        model.weight.data = kept

    def draw(count):
        drawn.append(count)
        return model.weight.detach().reshape(1, 1, 2, 2).expand(count, -1, -1, -1).clone()

    options = {"content": content, "similarity": lambda a, b: -(a - b).abs().mean((1, 2, 3)),
               "quality": lambda a, b: -float((a[0] - b[0]).abs().mean()), "images": 3, "plan_images": 2}
    batches = [{"input": torch.ones(1, 2)}]
    judge = Judge(model, simulated, batches, draw, book=ScoreBook(), **options)
    quality = judge.scores("weights", {"q1": [4, 8]})
    assert not drawn and quality["q1"][8] > quality["q1"][4] > 0  # losses: more was added
    found = judge.scores("weights", {"c1": [4]})
    assert drawn == [3, 3] and found["c1"][4] == pytest.approx(0.4)
    assert judge.loss({"c1": 4}, {}) == pytest.approx(0.16) and drawn == [3, 3, 2]
    without = Judge(model, simulated, batches, None, book=ScoreBook(), **options)
    assert without.scores("weights", {"c1": [4]}) and without.loss({"c1": 4}, {}) > 0 and len(drawn) == 3
    with pytest.raises(DataError, match="recorded calls"):
        Judge(model, simulated, None, None, book=ScoreBook(), **options).scores("weights", {"q1": [4]})
