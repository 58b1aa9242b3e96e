"""Outputs that are kept instead of computed again: the same result, fewer products, nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hfq.calibration import settled
from hfq.calibration.cache import Store
from hfq.calibration.data import normalise
from hfq.calibration.walk import walk
from hfq.formats import QuantSpec
from hfq.graph import read, trace
from hfq.reconstruction.columns import Solver, solve_block


class Mixer(nn.Module):
    """Two projections in a row, as attention has them; counts its calls."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(size, size), nn.Linear(size, size)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.second(torch.tanh(self.first(x)))


class Block(nn.Module):
    def __init__(self, size: int, times: int = 1) -> None:
        super().__init__()
        self.times = times
        self.mixer, self.mlp = Mixer(size), Mixer(size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for _ in range(self.times):
            mixed = self.mixer(hidden_states)
            mixed += hidden_states  # in place: must not reach what is kept
            hidden_states = mixed
        return hidden_states + self.mlp(hidden_states)


class Model(nn.Module):
    def __init__(self, times: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Block(32, times) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def solved(times: int = 1) -> tuple[Model, list[dict[str, torch.Tensor]]]:
    model = Model(times).eval()
    generator = torch.Generator().manual_seed(1)
    batches = normalise([{"x": torch.randn(5, 32, generator=generator)} for _ in range(12)], batch_size=4)
    plan = read(model)
    trace.order_groups(plan, lambda: model(batches[0]["x"]))
    found = []
    for step in walk(plan, batches):
        for mixer in (step.block.module.mixer, step.block.module.mlp):
            mixer.calls = 0
        solve_block(step, lambda _: QuantSpec(4, 8), Solver())
        found.append(step)
    assert all("forward" not in module.__dict__ for module in model.modules())
    return model, found


def weights(model: Model) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_fewer_passes_give_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = solved()
    kept, calls = weights(model), [(b.mixer.calls, b.mlp.calls) for b in model.layers]
    monkeypatch.setattr(settled.Settled, "update", lambda self, done: None)
    model, _ = solved()
    assert all(torch.equal(kept[name], tensor) for name, tensor in weights(model).items())
    # Twelve batches and five passes: two for the mixer's own groups, then one that is kept for the two after it. The
    # first batch of a pass always runs to the end.
    assert calls == [(3 * 12, 3 * 12 + 2)] * 2
    assert [(block.mixer.calls, block.mlp.calls) for block in model.layers] == [(5 * 12, 3 * 12 + 2)] * 2


def test_a_part_that_runs_twice_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = weights(solved(times=2)[0])
    monkeypatch.setattr(settled.Settled, "update", lambda self, done: None)
    assert all(torch.equal(kept[name], tensor) for name, tensor in weights(solved(times=2)[0]).items())


def test_everything_is_given_back() -> None:
    block, store, now = Block(8), Store(), [None]
    plan = type("Plan", (), {})()
    plan.name, plan.module = "b", block
    names = ("b.mixer.first", "b.mixer.second", "b.mlp.first")
    plan.sites = [type("S", (), {"name": name, "executed": True})() for name in names]
    held = settled.Settled(plan, store, lambda: now[0])
    x = torch.ones(2, 8)
    held.update({names[0]})
    assert "forward" not in block.mixer.__dict__
    held.update(set(names[:2]))
    now[0] = (0, 1)
    first = block.mixer(x)
    now[0] = (0, 2)
    assert torch.equal(block.mixer(x + 1), first) and store.bytes == first.nbytes  # an output of the pass before
    now[0] = None
    assert not torch.equal(block.mixer(x + 1), first)  # outside of the data it computes
    held.release()
    assert store.bytes == 0 and "forward" not in block.mixer.__dict__
