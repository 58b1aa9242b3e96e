"""Attention whose operands are in groups: stored steps of its probabilities."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hfq import kernels
from hfq.errors import CheckpointError, QuantizationError
from hfq.formats import ActivationSpec
from hfq.formats.log import LogSpec
from hfq.kernels.grouped_products import Probabilities
from hfq.layers import times
from hfq.layers.banks import InputBanks
from hfq.layers.grouped_attention import GroupedAttention, empty_grouped
from hfq.layers.times import NoiseLevels

HEAD = 6
LEVELS = NoiseLevels([9.0, 1.0])


def banks(axis: str = "columns", steps: tuple[float, float] = (1 / 40, 1 / 20), zero: int = 0) -> dict[str, InputBanks]:
    torch.manual_seed(0)
    labels = torch.arange(HEAD)
    made = {}
    for name in ("query", "key", "value"):
        grid = ("columns", labels, 0.2 + torch.rand(HEAD), torch.randint(0, 16, (HEAD,)).float())
        made[name] = InputBanks.of([grid, grid], 4, LEVELS)
    count = 1 if axis == "tensor" else HEAD
    given = [(axis, labels if count > 1 else labels[:0], torch.full((count,), step), torch.full((count,), float(zero)))
             for step in steps]  # fmt: skip
    return {**made, "probabilities": InputBanks.of(given, 8, LEVELS)}


def part(**more) -> GroupedAttention:
    return GroupedAttention(HEAD, banks("tensor", **more), Probabilities(None))


def attended(one: GroupedAttention, timestep: float, grad: bool = False) -> torch.Tensor:
    torch.manual_seed(1)
    q, k, v = (2 * torch.randn(2, 3, tokens, HEAD) for tokens in (5, 7, 7))
    with times.at(timestep), torch.set_grad_enabled(grad):
        return one(q.requires_grad_(grad), k, v, None, None)[0].detach()


def test_stored_steps_are_those_of_the_level():
    one = part()
    with kernels.use(attention_groups="reference"):
        wanted = [attended(one, t) for t in (9.0, 1.0)]
    for t, want in zip((9.0, 1.0), wanted, strict=True):
        torch.testing.assert_close(attended(one, t), want, rtol=0, atol=1e-5)
        torch.testing.assert_close(attended(one, t, grad=True), want, rtol=0, atol=1e-5)
    assert (wanted[0] - wanted[1]).abs().max() > 1e-3
    same = part(steps=(1 / 40, 1 / 40))
    assert torch.equal(attended(same, 9.0), attended(same, 1.0))


def test_manifest_and_tensors_come_back():
    one, module = part(), nn.Linear(2, 2)
    entry = {"module": "x", **one.describe()}
    again = empty_grouped(module, entry, "x", LEVELS)
    again.load_state_dict(one.state_dict())
    again.check("x")
    assert torch.equal(attended(again, 1.0), attended(one, 1.0)) and again.describe() == one.describe()
    assert torch.equal(attended(copy.deepcopy(one).half(), 9.0), attended(one, 9.0))


def test_what_cannot_be():
    with pytest.raises(QuantizationError, match="one uniform grid"):
        GroupedAttention(HEAD, banks(), Probabilities(None))
    with pytest.raises(QuantizationError, match="one uniform grid"):
        GroupedAttention(HEAD, banks("tensor"), Probabilities(LogSpec(4, "2", "none")))
    with pytest.raises(CheckpointError, match="from zero"):
        part(zero=3).check("x")
    entry = {"module": "x", **part().describe()}
    entry["probabilities"] = banks()["probabilities"].describe()
    with pytest.raises(CheckpointError, match="one uniform grid"):
        empty_grouped(nn.Linear(2, 2), entry, "x", LEVELS)
    assert part().how.spec == ActivationSpec(8, granularity="tensor", dynamic=False)
