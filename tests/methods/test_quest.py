"""QuEST: frozen rounding, grids by channel and timestep, two stages that train layers of their own."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import hfq
from hfq.calibration import level_grids
from hfq.errors import ConfigError, DataError
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



@pytest.mark.must_hold("quest", 6)
def test_both_stages_beat_the_start_and_scales_alone(net: Any) -> None:
    """At four bits of weights and of activations, by the error of the prediction."""
    options = {"rounding_steps": 0, "batch_size": 8, "time_steps": 3, "critical_steps": 10, "local_loss": False,
               "lr": 5e-3, "lr_scales": 1e-3, "lr_time_scales": 1e-3}  # fmt: skip
    curves = [quantized(net, calls_of(net, rows=8), tune_weights=tuned, **options)[1].curves["prediction"]
              for tuned in (True, False)]  # fmt: skip
    assert len(curves[0]) == 3 and curves[0][0] == curves[1][0]
    assert curves[0][-1] < 0.9 * curves[0][0] and curves[0][-1] < 0.98 * curves[1][-1]


@pytest.mark.must_hold("quest", 9)
def test_a_range_a_channel(net: Any, monkeypatch: Any) -> None:
    """On the axis that the product sums over; what is packed multiplies whole numbers and gives what was trained."""
    calls, seen = calls_of(net), {}

    def look(watch: Watch) -> None:
        linear, conv = "mid_block.attentions.0.to_q", "mid_block.resnets.0.conv1"
        for name, shape in ((linear, (8,)), (conv, (1, 8, 1, 1))):
            scale, zero = watch.inputs.given(name)
            assert scale.shape == zero.shape == shape and len(scale.unique()) > 4
        with torch.no_grad(), watch.student.running():
            seen["student"] = torch.cat([watch.student(call) for call in calls])

    Watch(monkeypatch, after=look)
    packed, _ = quantized(net, calls)
    torch.testing.assert_close(run(packed, calls), seen["student"], rtol=0, atol=2e-3)
    assert (run(packed, calls) - seen["student"]).abs().mean() < 1e-5
    with hfq.kernels.use(grouped="reference", attention_groups="reference"):
        torch.testing.assert_close(run(packed, calls), seen["student"], rtol=0, atol=2e-3)


CHILD = """
import sys, torch
from diffusers import UNet2DModel
folder = sys.argv[1]
model, kept = UNet2DModel.from_pretrained(folder), torch.load(folder + "/kept.pt")
with torch.no_grad():
    found = torch.cat([model(**call).sample for call in kept["calls"]])
assert torch.equal(found, kept["output"]), float((found - kept["output"]).abs().max())
state = model.state_dict()
assert all(torch.equal(state[name], t) and state[name].dtype == t.dtype for name, t in kept["state"].items())
"""


def test_a_new_process_draws_the_same(done: tuple[Any, Any], tmp_path: Any) -> None:
    model, report = done
    calls = [*calls_of(model), *calls_of(model, (999, 35, 1))]
    model.save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save({"calls": calls, "output": run(model, calls), "state": state}, tmp_path / "kept.pt")
    child = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr[-2000:]
    manifest = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["manifest"]
    assert manifest["noise_levels"] == {"levels": [47.0, 27.0, 7.0], "rule": "above"}
    assert len(report.attached) == len(attention.parts(model)) == 4
    assert report.bits_per_weight() > 4 and all(row.bits > 4 for row in report.packed)


def test_a_killed_run_goes_on_to_the_same_bytes(net: Any, tmp_path: Any, monkeypatch: Any) -> None:
    """Killed in the second stage: neither rounding nor the first stage is done again."""
    calls = calls_of(net)[:2]
    fields = {"time_steps": 1, "critical_steps": 2}
    whole, _ = quantized(net, calls, **fields)
    from hfq.training import denoise
    from hfq.training.progress import Saved

    monkeypatch.setattr(Saved, "EVERY", 1)
    add, steps = denoise.Denoising.add, []

    def stopping(own: Any, batch: Any) -> Any:
        if len(steps) == 4:
            raise KeyboardInterrupt
        steps.append(batch)
        return add(own, batch)

    with monkeypatch.context() as patch:
        patch.setattr(denoise.Denoising, "add", stopping)
        with pytest.raises(KeyboardInterrupt):
            quantized(net, calls, work_dir=tmp_path, **fields)
        patch.setattr(denoise.Denoising, "add", lambda own, batch: (steps.append(batch), add(own, batch))[1])
        again, report = quantized(net, calls, work_dir=tmp_path, **fields)
    assert len(steps) == 4 + 2 and (len(report.curves["time"]), len(report.curves["critical"])) == (2, 4)
    one, other = whole.state_dict(), again.state_dict()
    assert list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_ranges_a_tensor_follow_the_timestep_too(net: Any) -> None:
    """Eight bits, with the halves of shortcuts on grids of their own: integer products of static layers."""
    calls = calls_of(net)
    model, report = quantized(net, calls, activation_bits=8, timewise=True, split_shortcut=True)
    cut = [layer for layer in swap.packed_modules(model).values() if getattr(layer, "cut", None)]
    assert len(cut) >= 2 and all(layer.levels is times.of(model) for layer in swap.packed_modules(model).values())
    assert all(len(layer._parameters["second_input_scale"]) == 3 for layer in cut)
    assert all(row.extra["levels"] == 3 for row in report.packed)
    assert (run(model, calls) - run(net, calls)).abs().mean() < 0.5 * run(net, calls).abs().mean()


def test_many_channels_share_ranges(net: Any) -> None:
    model, _ = quantized(net, channel_groups=3, time_steps=0, critical_steps=0, attention=False)
    banks = [layer.banks for layer in swap.packed_modules(model).values() if layer.banks is not None]
    assert banks and all(bank.spec.groups <= 3 for bank in banks) and not attention.parts(model)
    assert any(bank.spec.groups == 3 for bank in banks)


@pytest.mark.parametrize("kind", ["text", "class"])
def test_pipelines_with_guidance(kind: str, zoo: Any, tmp_path: Any) -> None:
    """Both halves are rows like any other; what is saved draws the same picture."""
    pipe = zoo.text_to_image(tmp_path) if kind == "text" else zoo.class_conditional()
    name, asked = ("unet", zoo.PROMPTS[:2]) if kind == "text" else ("transformer", [0, 1])
    calls = hfq.record_calls(pipe, name, prompts=asked, steps=2, num_inference_steps=4)
    config = hfq.QuESTConfig(bits=4, timewise=True, **{**QUICK, "rounding_steps": 0})
    hfq.quantize_pipeline(pipe, {name: config}, calls)
    model = getattr(pipe, name)
    assert calls.guidance and len(attention.parts(model)) == (8 if kind == "text" else 2)
    assert all(layer.banks is not None or layer.levels is not None for layer in swap.packed_modules(model).values())
    wanted = zoo.draw(pipe)
    pipe.save_pretrained(tmp_path / "pipe")
    again = type(pipe).from_pretrained(tmp_path / "pipe")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(zoo.draw(again), wanted)


def test_layers_are_found_by_their_names() -> None:
    unet = [f"down_blocks.0.{name}" for name in ("resnets.0.time_emb_proj", "resnets.0.conv1")]
    attend = [f"mid_block.attentions.0.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
    text = [f"mid_block.attentions.0.transformer_blocks.0.{name}" for name in
            ("attn1.to_q", "attn2.to_k", "ff.net.0.proj", "ff.net.2")]  # fmt: skip
    dit = [f"transformer_blocks.0.{name}" for name in
           ("norm1.linear", "norm1.emb.timestep_embedder.linear_1", "attn1.to_q", "attn2.to_q", "attn1.to_v",
            "ff.net.0.proj", "ff.net.2")]  # fmt: skip
    config = hfq.QuESTConfig()
    assert config.tuned([*unet, *attend]) == (unet[:1], attend[:3])
    assert config.tuned([*unet, *text]) == (unet[:1], text[2:])
    assert config.tuned(dit) == (dit[:2], [dit[2], dit[4], dit[6]])
    both = hfq.QuESTConfig(time_embedding=True).tuned(["time_embedding.linear_1", *unet, *attend])
    assert both[0] == ["time_embedding.linear_1", unet[0]]
    own = hfq.QuESTConfig(critical_layers=["*.to_out.0", "time_emb_proj"]).tuned([*unet, *attend])
    assert own == (unet[:1], attend[3:])


@pytest.mark.parametrize(("fields", "text"), [
    ({"group_size": 32}, "group_size=32"), ({"split_shortcut": True}, "channels='never'"),
    ({"start": "zero"}, "start"), ({"channels": "some"}, "channels"), ({"time_layers": ["nothing"]}, "nothing"),
    ({"critical_layers": ["to_p"]}, "to_p"), ({"modules_to_not_convert": ["time_emb_proj"]}, "time_layers"),
])  # fmt: skip
def test_bad_options(net: Any, fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        quantized(net, **fields)


def test_bad_data(net: Any) -> None:
    calls = [{"sample": call["sample"]} for call in calls_of(net)]
    with pytest.raises((DataError, TypeError), match="timestep"):
        quantized(net, calls)
