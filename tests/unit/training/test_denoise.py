"""Distillation of a denoiser: substitutes of parameters, one call a step, guidance, levels, rates, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hfq.errors import ConfigError, DataError, QuantizationError
from hfq.formats import ActivationSpec, Codes, QuantSpec, affine
from hfq.layers import times
from hfq.layers.fake import fake_inputs
from hfq.layers.times import NoiseLevels
from hfq.rounding import nearest
from hfq.rounding.level_steps import LearnedLevels
from hfq.rounding.updated import UpdatedWeight
from hfq.training import rates
from hfq.training.denoise import Denoising, Trajectories, combined
from hfq.training.loop import fit
from hfq.training.progress import Saved
from hfq.training.substitutes import Substitutes

STEPS = [30.0, 20.0, 10.0]
SPEC = ActivationSpec(4, granularity="tensor", dynamic=False)
LAYERS = {"one": "linear", "two": "linear"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, sample: torch.Tensor, timestep: Any) -> tuple[torch.Tensor]:
        return (self.two(torch.tanh(self.one(sample)) * (1 + float(torch.as_tensor(timestep)) / 30)),)


def calls(guided: bool = False) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    rows = 4 if guided else 2
    return [{"sample": torch.randn(rows, 5, 6, generator=generator), "timestep": torch.tensor(t)}
            for _ in range(2) for t in STEPS]  # fmt: skip


class Setting:
    """A model, updates of its weights, and grids of its inputs."""

    def __init__(self, bits: int = 3, r: int | None = 2) -> None:
        torch.manual_seed(0)
        self.model = Net().eval().requires_grad_(False)
        with torch.no_grad():
            self.model.two.weight.mul_(10)
        spec = QuantSpec(bits, -1, scale_dtype="float32")
        self.weights: dict[str, UpdatedWeight] = {}
        for name in LAYERS:
            weight = self.model.get_submodule(name).weight
            generator = torch.Generator().manual_seed(2)
            self.weights[name] = UpdatedWeight(weight, spec, nearest.grid_of(weight, spec), r, generator=generator)
        start = (torch.tensor([0.1]), torch.tensor([7.0]))
        self.levels = LearnedLevels(dict.fromkeys(LAYERS, SPEC), dict.fromkeys(LAYERS, start), NoiseLevels(STEPS))
        self.student = Substitutes(self.model, {f"{name}.weight": one for name, one in self.weights.items()},
                                   inputs=self.inputs)  # fmt: skip

    def inputs(self) -> Any:
        modules = {self.model.get_submodule(name): name for name in LAYERS}
        return fake_inputs(dict.fromkeys(modules, SPEC), params={m: self.levels.of(n) for m, n in modules.items()})

    def groups(self, factor: float = 0.02) -> list[dict[str, Any]]:
        found = rates.by_scale(((n, one.update, one.scale) for n, one in self.weights.items()), factor, 0.01)
        tables = [*self.levels.scale, *self.levels.zero_point]
        return [*found, {"params": tables, "lr": 1e-2, "weight_decay": 0.0}]

    def state(self) -> torch.Tensor:
        every = [p for group in self.groups() for p in group["params"]]
        return torch.cat([p.detach().flatten() for p in every])


def test_the_student_computes_with_what_is_made_and_the_model_stays() -> None:
    own = Setting()
    before = {name: p.clone() for name, p in own.model.named_parameters()}
    batch = calls()[0]
    with times.at(30):
        with own.student.running():
            found = own.student(batch)
        by_hand = Net()
        for name, one in own.weights.items():
            by_hand.get_submodule(name).weight = nn.Parameter(affine.dequantize(one.codes()))
            by_hand.get_submodule(name).bias = own.model.get_submodule(name).bias
        own.model, model = by_hand, own.model
        with own.inputs():
            wanted = by_hand(**batch)[0]
        own.model = model
    assert torch.equal(found, wanted) and not torch.equal(found, own.student.teacher(batch))
    assert torch.equal(own.student.teacher(batch), own.model(**batch)[0])
    assert all(p is dict(own.model.named_parameters())[n] and torch.equal(p, before[n])
               for n, p in own.model.named_parameters())  # fmt: skip
    with pytest.raises(QuantizationError, match="no parameter"):
        Substitutes(own.model, {"one.wait": own.weights["one"]})


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    own = Setting()
    weight, broken = own.model.one.weight, {"sample": torch.zeros(1, 2, 3), "timestep": 1.0}
    with pytest.raises(RuntimeError), times.at(1), own.student.running():
        own.student(broken)
    assert own.model.one.weight is weight and not own.model.one._forward_pre_hooks


def test_one_call_a_step_in_the_order_of_the_data() -> None:
    data = calls()
    rows = Trajectories(data)
    for step in range(8):
        (part,) = rows.parts(step, 8)
        assert torch.equal(part["sample"], data[step % 6]["sample"])
    assert [len(part["sample"]) for part in rows.parts(0, 1)] == [1, 1]
    both = next(iter(Trajectories(calls(guided=True), guided=True).parts(0, 1)))
    assert torch.equal(both["sample"], calls(guided=True)[0]["sample"][[0, 2]])
    with pytest.raises(DataError, match="no calls"):
        Trajectories([])
    with pytest.raises(DataError, match="two halves"):
        list(Trajectories([{"sample": torch.zeros(3, 1), "timestep": 1.0}], guided=True).parts(0, 1))


@pytest.mark.must_hold("efficientdm", 6)
def test_a_step_moves_the_tables_of_its_level_alone() -> None:
    own = Setting()
    optimizer = torch.optim.AdamW(own.groups(), lr=1e-2)
    for step, call in enumerate(calls()):  # twice round: moments of other levels are there by then
        before = [[t.clone() for t in table] for table in (own.levels.scale, own.levels.zero_point)]
        fit(Denoising(own.student), optimizer, Trajectories([call]), steps=1, micro_batch=2)
        for table, old in zip((own.levels.scale, own.levels.zero_point), before, strict=True):
            moved = [not torch.equal(a, b) for a, b in zip(table, old, strict=True)]
            assert moved == [level == step % 3 for level in range(3)], (step, moved)
    scale, zero = own.levels.params("one")
    assert len(set(scale.tolist())) == 3 and torch.equal(zero, zero.round())


def test_tables_give_what_is_stored_and_pass_gradients_straight() -> None:
    start = torch.tensor([0.1, 0.2, -1.0]), torch.tensor([3.4, -2.0, 19.0])
    table = LearnedLevels({"x": SPEC}, {"x": start}, NoiseLevels(STEPS))
    scale, zero = table.params("x")
    assert zero.tolist() == [3, 0, 15] and torch.equal(scale, torch.tensor([0.1, 0.2, 1e-6]))
    with times.at(12):
        one, other = table.at("x")
        (one * 2 + other * 3).sum().backward()
    assert table.scale[2].grad.item() == 2 and table.zero_point[2].grad.item() == 3 and table.scale[0].grad is None
    assert torch.equal(table.zero_point[2], torch.tensor([19.0]))  # not clamped while it learns
    with pytest.raises(QuantizationError, match="outside of its model"):
        table.at("x")
    with pytest.raises(QuantizationError, match="2 ranges for 3"):
        LearnedLevels({"x": SPEC}, {"x": (torch.ones(2), torch.ones(2))}, NoiseLevels(STEPS))
    with pytest.raises(QuantizationError, match="y: a stored range"):
        LearnedLevels({"y": SPEC}, {}, NoiseLevels(STEPS))


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_gradients_are_those_of_the_loss_by_hand(guided: bool, reduction: str) -> None:
    own = Setting()
    data, guidance = calls(guided)[:1], 1.5 if guided else None
    objective = Denoising(own.student, guidance=guidance, reduction=reduction, layers=["one"], weight=lambda t: t / 15)
    found = []
    for micro in (8, 1):
        optimizer = torch.optim.SGD([p for group in own.groups() for p in group["params"]], lr=0.0)
        curve = fit(objective, optimizer, Trajectories(data, guided), steps=1, micro_batch=micro)
        found.append((curve[0], torch.cat([p.grad.flatten() for one in own.weights.values() for p in one.update])))
        optimizer.zero_grad()
    batch, kept = data[0], []
    hook = own.model.one.register_forward_hook(lambda m, a, o: kept.append(o))
    wanted = own.student.teacher(batch)
    with times.at(30), own.student.running():
        got = own.student(batch)
    hook.remove()
    if guided:
        got, wanted = combined(got, 1.5), combined(wanted, 1.5)
    losses = [(got - wanted).square(), (kept[1] - kept[0]).square()]
    loss = 2 * sum(one.sum() if reduction == "sum" else one.mean() for one in losses)
    parameters = [p for one in own.weights.values() for p in one.update]
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    for value, got_gradient in found:
        assert value == pytest.approx(float(loss.detach()), rel=1e-5)
        assert torch.allclose(got_gradient, gradient, rtol=1e-4, atol=1e-6)
    if reduction == "mean":
        assert objective.mean(data) == pytest.approx(float(loss.detach()), rel=1e-5)


def test_guidance_knows_which_half_has_the_condition() -> None:
    halves = torch.tensor([[1.0], [5.0]])
    assert combined(halves, 2.0).item() == 9 and combined(halves, 2.0, condition_first=True).item() == -3
    assert combined(halves, 1.0).item() == 5 and combined(halves, 0.0).item() == 1


def test_training_lowers_the_loss_and_goes_on_from_a_file(tmp_path: Path) -> None:
    def run(steps: int, name: str | None, stop: int | None = None) -> Setting:
        own = Setting()
        saved = None if name is None else Saved(tmp_path / name, {"a": 1}, every=1)
        optimizer = torch.optim.AdamW(own.groups())
        run.before = Denoising(own.student).mean(calls())
        if stop is not None:
            seen = iter(range(stop))
            with pytest.raises(StopIteration):
                fit(Denoising(own.student), optimizer, Trajectories(calls()), steps=steps, micro_batch=2,
                    schedule="linear", saved=saved, after=lambda: next(seen) and None)  # fmt: skip
            return own
        fit(Denoising(own.student), optimizer, Trajectories(calls()), steps=steps, micro_batch=2, schedule="linear",
            saved=saved)  # fmt: skip
        return own

    whole = run(60, None)
    assert Denoising(whole.student).mean(calls()) < 0.7 * run.before
    run(60, "state", stop=17)
    assert (tmp_path / "state").exists()
    assert torch.equal(run(60, "state").state(), whole.state())


def test_codes_of_an_update() -> None:
    torch.manual_seed(0)
    weight, spec = torch.randn(6, 20), QuantSpec(4, -1, scale_dtype="float32")
    grid = nearest.grid_of(weight, spec)
    for codes in (False, True):
        one = UpdatedWeight(weight, spec, grid, 3, codes=codes)
        plain = Codes(affine.encode(weight, *grid, spec), *grid, spec)
        assert torch.equal(one.codes().codes, plain.codes) and torch.equal(one(), affine.dequantize(plain))
        one.scale.data *= 1.1  # the base stays what it was
        assert torch.equal(one.matrix, affine.dequantize(plain) if codes else weight)
        one.update[1].data.normal_(std=0.3)
        assert torch.equal(affine.dequantize(one.codes()), one())
        assert torch.allclose(one.latent() - one.matrix, one.update[1] @ one.update[0], atol=1e-6)
    full = UpdatedWeight(weight, spec, grid, None)
    full.update[0].data += 0.5
    assert torch.equal(full.latent(), weight + 0.5) and not len(UpdatedWeight(weight, spec, grid, 0).update)


def test_options_that_make_no_sense() -> None:
    own = Setting()
    with pytest.raises(ConfigError, match="reduction"):
        Denoising(own.student, reduction="most")
    own.model.register_module("unused", nn.Linear(1, 1))
    with pytest.raises(QuantizationError, match="unused: the data does not reach it"):
        Denoising(own.student, layers=["unused"]).mean(calls())
