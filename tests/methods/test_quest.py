"""QuEST: frozen rounding, grids by channel and timestep, two stages that train layers of their own."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import hfq
from hfq.calibration import level_grids
from hfq.formats import affine
from hfq.layers import attention, swap, times
from hfq.layers.banks import InputBanks
from hfq.layers.times import NoiseLevels
from hfq.reconstruction import learned_units
from hfq.training import level_inputs, selective

diffusers = pytest.importorskip("diffusers")
STEPS = (47, 27, 7)
QUICK = {"rounding_steps": 2, "rounding_batch_size": 4, "time_steps": 1, "critical_steps": 1, "batch_size": 4,
         "lr": 1e-4, "lr_scales": 1e-3, "progress": False}  # fmt: skip


def model_of(**more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "in_channels": 3, "out_channels": 3, "layers_per_block": 1, "norm_num_groups": 4,
             "block_out_channels": (8,), "attention_head_dim": 4, "down_block_types": ("AttnDownBlock2D",),
             "up_block_types": ("AttnUpBlock2D",)}  # fmt: skip
    return diffusers.UNet2DModel(**{**sizes, **more}).eval()


def calls_of(model: Any, timesteps: tuple[int, ...] = STEPS, rows: int = 4, seed: int = 3) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"sample": torch.randn(rows, model.config.in_channels, 8, 8, generator=generator),
             "timestep": torch.tensor(t)} for t in timesteps]  # fmt: skip


def run(model: nn.Module, calls: list[dict[str, Any]]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(**call).sample for call in calls])


def quantized(model: Any, calls: Any = None, **fields: Any) -> tuple[Any, Any]:
    packed = copy.deepcopy(model)
    config = hfq.QuESTConfig(**{"bits": 4, **QUICK, **fields})
    return packed, hfq.quantize(packed, config, calls_of(model) if calls is None else calls)


class Watch:
    """What passes between the steps of a run."""

    def __init__(self, monkeypatch: Any, before: Any = None, after: Any = None) -> None:
        self.rounded: Any = None
        self.inputs: Any = None
        self.stages: list[SimpleNamespace] = []
        learn, fit, tune, made = learned_units.learn, selective.fit, selective.tune, level_inputs.LevelInputs.__init__

        def learned(*args: Any, **kwargs: Any) -> Any:
            self.rounded = learn(*args, **kwargs)
            return self.rounded

        def inputs(own: Any, *args: Any, **kwargs: Any) -> None:
            self.inputs = own
            made(own, *args, **kwargs)

        def fitted(objective: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            found = SimpleNamespace(trained=[p for group in optimizer.param_groups for p in group["params"]],
                                    before=self.state())  # fmt: skip
            curve = fit(objective, optimizer, *args, **kwargs)
            found.after, found.grads = self.state(), {id(p) for p in self.everything() if p.grad is not None}
            self.stages.append(found)
            return curve

        def tuned(student: Any, stages: Any, *args: Any, **kwargs: Any) -> None:
            self.student, self.plan = student, stages
            if before is not None:
                before(self)
            tune(student, stages, *args, **kwargs)
            if after is not None:
                after(self)

        monkeypatch.setattr(learned_units, "learn", learned)
        monkeypatch.setattr(level_inputs.LevelInputs, "__init__", inputs)
        monkeypatch.setattr(selective, "fit", fitted)
        monkeypatch.setattr(selective, "tune", tuned)

    def everything(self) -> list[nn.Parameter]:
        tables = (self.inputs.apart, self.inputs.others)
        return [*self.student.model.parameters(), *(p for stage in self.plan for p in stage.weights),
                *(p for table in tables for p in table.parameters())]  # fmt: skip

    def state(self) -> dict[int, torch.Tensor]:
        return {id(p): p.detach().clone() for p in self.everything()}


@pytest.fixture(scope="module")
def net() -> Any:
    return model_of()


@pytest.fixture(scope="module")
def done(net: Any) -> tuple[Any, Any]:
    """Once, with everything that is stored by timestep and by channel."""
    return quantized(net, timewise=True)


@pytest.mark.must_hold("quest", 1)
def test_the_float_model_teaches_before_and_after(net: Any, monkeypatch: Any) -> None:
    calls, seen = calls_of(net), []

    def look(watch: Watch) -> None:
        seen.append(torch.cat([watch.student.teacher(call) for call in calls]))

    Watch(monkeypatch, look, look)
    quantized(net, calls)
    assert len(seen) == 2 and all(torch.equal(one, run(net, calls)) for one in seen)
    model, report = quantized(net, bits=16, activation_bits=16)
    assert not report.packed and not attention.parts(model) and torch.equal(run(model, calls), run(net, calls))


@pytest.mark.must_hold("quest", 2)
@pytest.mark.parametrize("start", ["weight", "grid"])
def test_stages_start_at_the_hard_rounding(net: Any, monkeypatch: Any, start: str) -> None:
    calls, seen = calls_of(net)[:1], []

    def look(watch: Watch) -> None:
        hard = copy.deepcopy(net)
        for name, one in watch.rounded.items():
            weight = hard.get_submodule(name).weight
            weight.data.copy_(affine.dequantize(one.codes[0]).reshape(weight.shape))
        with torch.no_grad(), watch.student.running():
            seen.append((torch.cat([watch.student(call) for call in calls]), run(hard, calls)))

    Watch(monkeypatch, look)
    quantized(net, calls, activation_bits=16, start=start, rounding_lr=0.5, rounding_steps=4)
    assert torch.equal(*seen[0]) and not torch.equal(seen[0][1], run(net, calls))


@pytest.mark.must_hold("quest", 3)
@pytest.mark.must_hold("quest", 4)
def test_each_stage_trains_its_own(net: Any, monkeypatch: Any) -> None:
    watch = Watch(monkeypatch)
    _, report = quantized(net, timewise=True)
    time, critical = watch.stages
    tables = [list(table.scale) for table in (watch.inputs.apart, watch.inputs.others)]
    for number, (stage, plan) in enumerate(zip(watch.stages, watch.plan, strict=True)):
        own = {id(p) for p in (*plan.weights, *tables[number])}
        assert {id(p) for p in stage.trained} == own >= stage.grads
        moved = {key for key, tensor in stage.after.items() if not torch.equal(tensor, stage.before[key])}
        assert moved == own
    first = {id(p) for p in time.trained}
    assert first and not first & {id(p) for p in critical.trained}
    assert all(torch.equal(critical.after[key], time.after[key]) for key in first)
    layers = {name for name, _ in net.named_modules() if name.endswith("time_emb_proj")}
    critical_layers = {name for name, _ in net.named_modules() if name.split(".")[-1] in ("to_q", "to_k", "to_v")}
    sizes = [sum(p.numel() for name in names for p in net.get_submodule(name).parameters())
             for names in (layers, critical_layers)]  # fmt: skip
    assert [sum(p.numel() for p in stage.weights) for stage in watch.plan] == sizes
    assert set(watch.plan[0].compared) == layers and set(watch.plan[1].compared) == critical_layers
    whole = sum(p.numel() for p in net.parameters())
    assert report.totals["tuned_share"] == pytest.approx(sum(sizes) / whole, abs=1e-6)


@pytest.mark.must_hold("quest", 5)
def test_a_small_step_away_from_the_lines_changes_no_code(net: Any, monkeypatch: Any) -> None:
    watch = Watch(monkeypatch)
    packed, _ = quantized(net, calls_of(net)[:1], lr=1e-5, time_steps=0)
    (stage,) = watch.stages
    checked = 0
    for name, one in watch.rounded.items():
        codes, weight = one.codes[0], net.get_submodule(name).weight.detach().flatten(1)
        part = (weight / codes.scale.float()) % 1 * codes.scale.float()
        safe = torch.minimum(part, codes.scale.float() - part) > 1e-4
        now = packed.get_submodule(name).packed()[0]
        found = affine.encode(packed.get_submodule(name).dequantize(dtype=torch.float32).flatten(1), now.scale,
                              now.zero_point, now.spec)  # fmt: skip
        assert torch.equal(found[safe], codes.codes[safe]), name
        checked += int(safe.sum()) if name.endswith("to_q") else 0
    assert checked
    moved = [p for p in stage.trained if not torch.equal(stage.after[id(p)], stage.before[id(p)])]
    assert {id(p) for p in watch.inputs.others.scale} <= {id(p) for p in moved}


@pytest.mark.must_hold("quest", 8)
def test_grids_start_finite() -> None:
    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spiked, self.flat = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
            return self.spiked(sample) + self.flat(torch.full_like(sample, 5.0))

    net = Ends()
    sample = torch.zeros(2, 500, 4)
    sample[0, 3] = 100.0
    calls = [{"sample": sample, "timestep": torch.tensor(3)}]
    sites = hfq.graph.read(net).every_site
    for grouped in (False, True):
        how = level_grids.How(lambda name: 4, lambda bits, yes=grouped: yes)
        found = level_grids.measure(net, calls, sites, NoiseLevels([3.0]), how).inputs
        for grid in found.values():
            assert torch.isfinite(grid.scale).all() and (grid.scale >= 1e-8).all() and torch.isfinite(grid.zero).all()
            assert grid.scale.shape == ((1, 4) if grouped else (1,))
        inputs = level_inputs.LevelInputs(net, level_grids.Grids(found, {}, {}), NoiseLevels([3.0]))
        with inputs.simulated(), torch.no_grad():
            assert torch.isfinite(net(**calls[0])).all()


@pytest.mark.must_hold("quest", 10)
def test_a_timestep_between_two_takes_the_noisier_one(done: tuple[Any, Any]) -> None:
    model, _ = done
    layer = model.mid_block.resnets[0].conv1
    assert isinstance(layer.banks, InputBanks) and times.of(model).rule == "above"
    scales = layer.banks.scale.detach()
    assert not torch.equal(scales[0], scales[1])
    for timestep, entry in ((999, 0), (47, 0), (46, 0), (28, 0), (27, 1), (8, 1), (7, 2), (3, 2), (0, 2)):
        with times.at(timestep):
            assert torch.equal(layer.banks.bank().scale, scales[entry]), timestep
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(model(x, 46).sample - model(x, 46).sample, torch.zeros(2, 3, 8, 8))
        for timestep in range(49, -1, -7):
            assert torch.isfinite(model(x, timestep).sample).all()


@pytest.mark.must_hold("quest", 11)
def test_the_ends_have_inputs_of_eight_bits(done: tuple[Any, Any]) -> None:
    model, report = done
    for name in ("conv_in", "conv_out"):
        assert model.get_submodule(name).activation.bits == 8 and model.get_submodule(name).spec.bits == 4
        assert report.rows[name].extra["activation"]["bits"] == 8
    inner = [layer for name, layer in swap.packed_modules(model).items() if name not in ("conv_in", "conv_out")]
    assert inner and all(layer.banks.spec.bits == 4 for layer in inner)
    narrow, _ = quantized(model_of(), time_steps=0, critical_steps=0, activation_bits=8)
    assert all(layer.activation.bits == 8 for layer in swap.packed_modules(narrow).values())

