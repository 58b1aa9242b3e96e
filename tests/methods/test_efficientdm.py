"""EfficientDM: updates before the quantizer, grids a noise level, distillation on the float model's trajectories."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from peft import inject_adapter_in_model
from torch import nn
from torch.nn import functional as F

import hfq
from hfq.errors import CheckpointError, ConfigError, DataError, QuantizationError
from hfq.formats import Codes, QuantSpec, activation, affine
from hfq.graph import read
from hfq.layers import swap, times
from hfq.layers.times import NoiseLevels
from hfq.reconstruction.static import input_grid
from hfq.rounding import nearest
from hfq.rounding.updated import UpdatedWeight
from hfq.training import lowbit
from hfq.training.denoise import Denoising, Trajectories
from hfq.training.loop import fit
from hfq.training.progress import Saved

diffusers = pytest.importorskip("diffusers")

STEPS = [40.0, 30.0, 20.0, 10.0]
QUICK = {"bits": 4, "activation_bits": 4, "steps": 8, "rank": 4, "update_lr": 0.05, "table_lr": 5e-3,
         "progress": False}  # fmt: skip


def unet(levels: int = 1) -> Any:
    """A UNet without attention whose levels are alike."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * levels, "up_block_types": ("UpBlock2D",) * levels}
    return diffusers.UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4,
                                 block_out_channels=(8,) * levels, add_attention=False, **blocks).eval()  # fmt: skip


def calls(count: int = 2, rows: int = 2) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    return [{"sample": torch.randn(rows, 1, 8, 8, generator=generator), "timestep": torch.tensor(t)}
            for _ in range(count) for t in STEPS]  # fmt: skip


def outputs(model: Any, data: list[dict[str, Any]] | None = None) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(**call).sample for call in data or calls(1)])


def layers_of(model: Any, bits: int = 4, inputs: int = 4, rank: int | None = 4, **more: Any) -> lowbit.Layers:
    """All of them learn, on 4 levels."""
    sites = read(model, ask=["conv_out"]).every_site
    starts = lowbit.starts(model, calls(), sites, lambda name: input_grid(inputs))
    spec = QuantSpec(bits, -1, scale_dtype="float32")
    return lowbit.Layers(model, sites, lambda name: spec, starts, NoiseLevels(STEPS), rank=rank,
                         learned=[site.name for site in sites], **more)  # fmt: skip


def naive(model: Any, data: Any, layers: lowbit.Layers) -> Any:
    """Weights rounded to nearest, and hooks that round what enters."""
    model = copy.deepcopy(model)
    for site in layers.sites:
        module, start = model.get_submodule(site.name), layers.starts[site.name]
        spec = layers.weights[site.name].spec
        module.weight.data = affine.dequantize(affine.quantize(module.weight.data.flatten(1), spec)).view_as(
            module.weight)  # fmt: skip
        module.register_forward_pre_hook(
            lambda _, args, start=start: (activation.fake(args[0], start.spec, start.params),))
    return outputs(model, data)


@pytest.mark.must_hold("efficientdm", 1)
@pytest.mark.parametrize("codes", [False, True])
def test_it_starts_as_the_rounded_model(codes: bool) -> None:
    model = unet()
    layers = layers_of(model, codes=codes)
    with layers.student.running():
        found = []
        for call in calls(1):
            with times.at(float(call["timestep"])), torch.no_grad():
                found.append(layers.student(call))
    assert torch.equal(torch.cat(found), naive(model, calls(1), layers))
    report = hfq.quantize(model, hfq.EfficientDMConfig(**{**QUICK, "steps": 0}), calls())
    plain = unet()
    for name, layer in swap.packed_modules(model).items():
        weight = plain.get_submodule(name).weight.detach().flatten(1)
        assert torch.equal(layer.dequantize().flatten(1), affine.dequantize(affine.quantize(weight, layer.spec)))
    assert not report.curves["distillation"]


@pytest.mark.must_hold("efficientdm", 2)
def test_sixteen_bits_are_the_teacher() -> None:
    model = unet()
    hfq.quantize(model, hfq.EfficientDMConfig(**{**QUICK, "bits": 16, "activation_bits": 16}), calls())
    assert torch.equal(outputs(model), outputs(unet()))
    free = layers_of(unet())
    free.starts, free.sites = {}, []
    objective = Denoising(lowbit.Substitutes(unet(), {}, inputs=free._running))
    assert objective.mean(calls()) == 0
    config = hfq.QALoraConfig(r=2, bits=16, target_modules=["conv1", "linear_1"])
    tuned = inject_adapter_in_model(config, unet())
    assert "qalora" in "".join(tuned.state_dict()) and (outputs(tuned) - outputs(unet())).abs().max() < 1e-4


@pytest.fixture(scope="module")
def trained() -> tuple[Any, lowbit.Layers]:
    """A small UNet after a few updates with large rates, and its layers."""
    model = unet()
    layers = layers_of(model)
    optimizer = torch.optim.AdamW(layers.groups(0.1, 1e-4, 1e-2, 0.01))
    fit(Denoising(layers.student), optimizer, Trajectories(calls()), steps=8, micro_batch=8)
    return model, layers


@pytest.mark.must_hold("efficientdm", 3)
def test_student_merged_adapter_and_packed_layers_are_one(trained: Any) -> None:
    model, layers = copy.deepcopy(trained)
    wanted = []
    with layers.student.running():
        for call in calls(1):
            with times.at(float(call["timestep"])), torch.no_grad():
                wanted.append(layers.student(call))
    names = [name for name in layers.weights if name.rpartition(".")[2] in ("conv1", "time_emb_proj")]
    adapted = inject_adapter_in_model(hfq.QALoraConfig(r=4, bits=4, target_modules=names), unet())
    for name in names:
        layer, one = adapted.get_submodule(name), layers.weights[name]
        with torch.no_grad():
            layer.hfq_qalora_A["default"].copy_(one.update[0])
            layer.hfq_qalora_B["default"].copy_(one.update[1])
            layer.hfq_qalora_scale["default"].copy_(one.scale)
    before = outputs(adapted)
    times.install(model, layers.levels)
    layers.pack(hfq.Report())
    for name in names:
        adapted.get_submodule(name).merge()
        merged = adapted.get_submodule(name).get_base_layer().packed("weight")[0]
        assert torch.equal(merged.qweight, model.get_submodule(name).packed("weight")[0].qweight)
    # Equal codes; a kernel for float inputs may multiply in bfloat16.
    assert (outputs(adapted) - before).norm() < 1e-1 * (outputs(unet()) - before).norm() and len(names) == 10
    for name, one in layers.weights.items():
        layer = model.get_submodule(name)
        assert torch.equal(layer.dequantize(dtype=torch.float32).flatten(1), one())
        assert torch.equal(layer.input_scale, layers.inputs.params(name)[0])
    # Sums of integers differ from sums of floats in the last place, which now and then moves an input over an edge.
    assert (outputs(model) - torch.cat(wanted)).norm() < 1e-2 * torch.cat(wanted).norm()
    assert (torch.cat(wanted) - outputs(unet())).norm() > 1e-1 * torch.cat(wanted).norm()


@pytest.mark.must_hold("efficientdm", 4)
def test_updates_below_half_a_step_change_no_code() -> None:
    torch.manual_seed(0)
    spec = QuantSpec(4, -1, scale_dtype="float32")
    weight = torch.randn(6, 20)
    one = UpdatedWeight(weight, spec, nearest.grid_of(weight, spec), 1, codes=True)
    before = one.codes().codes
    inner = (before > 0) & (before < 15)
    with torch.no_grad():
        one.update[0].copy_(torch.where(torch.arange(20) % 3 == 0, 0.51, 0.49))
        one.update[1].copy_(one.scale)  # between the centres of codes, in steps: 0.51 and 0.49
    changed = one.codes().codes != before
    assert not changed[:, torch.arange(20) % 3 != 0].any()
    assert torch.equal(changed[:, ::3] & inner[:, ::3], inner[:, ::3]) and inner[:, ::3].sum() > 20


@pytest.mark.must_hold("efficientdm", 5)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_what_was_rounded_changes_nothing(bits: int) -> None:
    torch.manual_seed(bits)
    spec, weight = QuantSpec(bits, -1), torch.randn(16, 30) * 10 ** torch.linspace(-3, 1, 16)[:, None]
    codes = affine.quantize(weight, spec)
    grid = codes.scale, codes.zero_point
    again = UpdatedWeight(affine.dequantize(codes), spec, grid, 2).codes()
    assert torch.equal(again.codes, codes.codes) and torch.equal(again.scale, codes.scale)
    assert isinstance(again, Codes) and torch.equal(UpdatedWeight(weight, spec, grid, 2, codes=True)(),
                                                    affine.dequantize(codes))  # fmt: skip


@pytest.mark.must_hold("efficientdm", 7)
def test_halves_of_guidance_may_be_called_one_by_one() -> None:
    model = unet()
    hfq.quantize(model, hfq.EfficientDMConfig(**QUICK), calls())
    tables = {tuple(layer.input_scale.tolist()) for layer in swap.packed_modules(model).values() if layer.levels}
    assert all(len(set(table)) == 4 for table in tables)
    one, other = calls(1)[0]["sample"].split(1)
    with torch.no_grad():
        apart = [[model(half, t).sample for half in (one, other)] for t in STEPS]
        model(one, 10)  # a call more than a counter would expect
        both = [model(torch.cat([one, other]), t).sample for t in STEPS]
    assert all(torch.allclose(torch.cat(a), b, atol=1e-5) for a, b in zip(apart, both, strict=True))
    assert not torch.allclose(both[0], both[1], atol=1e-3)


class Scales(nn.Module):
    """Layers whose weights differ by a factor of ten each, with norms between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(4))
        for power, layer in enumerate(self.layers):
            layer.weight.data *= 10.0 ** (power - 2)

    def forward(self, sample: torch.Tensor, timestep: Any) -> tuple[torch.Tensor]:
        for layer in self.layers:
            sample = sample + F.layer_norm(layer(sample), (16,), eps=1e-12)
        return (sample,)


@pytest.mark.must_hold("efficientdm", 8)
def test_layers_learn_in_proportion_to_their_steps() -> None:
    generator = torch.Generator().manual_seed(1)
    data = [{"sample": torch.randn(8, 16, generator=generator), "timestep": torch.tensor(t)} for t in STEPS]

    def moved(constant: bool) -> tuple[list[float], list[float]]:
        model = Scales().requires_grad_(False)
        sites, spec = read(model).every_site, QuantSpec(4, -1)
        layers = lowbit.Layers(model, sites, lambda name: spec, {}, NoiseLevels(STEPS), rank=8,
                               learned=[site.name for site in sites])  # fmt: skip
        before = [one.codes().codes.float() for one in layers.weights.values()]
        groups = layers.groups(0.02, 0.0, 0.0, 0.0)
        rates = [group["lr"] for group in groups[:4]]
        for group in groups[:4]:
            group["lr"] = min(rates) if constant else group["lr"]
        fit(Denoising(layers.student), torch.optim.AdamW(groups), Trajectories(data), steps=24, micro_batch=8)
        after = [one.codes().codes.float() for one in layers.weights.values()]
        return rates, [float((a - b).abs().mean()) for a, b in zip(after, before, strict=True)]

    rates, found = moved(constant=False)
    assert all(b / a == pytest.approx(10, rel=0.2) for a, b in zip(rates, rates[1:], strict=False))
    assert min(found) > 0 and max(found) < 10 * min(found)
    _, flat = moved(constant=True)
    assert flat[0] > 0 and sum(change < 1e-2 * found[0] for change in flat) >= 2


@pytest.mark.must_hold("efficientdm", 9)
def test_the_update_of_a_convolution_is_two_convolutions() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3, padding=1, bias=False)
    spec = QuantSpec(8, -1)
    one = UpdatedWeight(conv.weight.flatten(1), spec, nearest.grid_of(conv.weight.flatten(1), spec), 2)
    with torch.no_grad():
        one.update[1].normal_()
    change = (one.latent() - conv.weight.flatten(1)).view_as(conv.weight)
    impulse = torch.zeros(3, 3, 7, 7)
    impulse[range(3), range(3), 3, 3] = 1
    down = F.conv2d(impulse, one.update[0].view(2, 3, 3, 3), padding=1)
    both = F.conv2d(down, one.update[1].view(5, 2, 1, 1))
    assert torch.allclose(F.conv2d(impulse, change, padding=1), both, atol=1e-6) and both.abs().max() > 0.1


@pytest.mark.must_hold("efficientdm", 10)
def test_the_next_input_comes_from_the_teacher_alone(zoo: Any) -> None:
    pipe = zoo.unconditional()
    full = copy.deepcopy(pipe.unet)
    data = hfq.record_calls(pipe, "unet", samples=2, num_inference_steps=3)
    seen: list[torch.Tensor] = []
    watch = pipe.unet.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["sample"]), with_kwargs=True)
    hfq.quantize_pipeline(pipe, {"unet": hfq.EfficientDMConfig(**{**QUICK, "steps": 6, "update_lr": 1.0})}, data)
    watch.remove()
    own = [s for s in seen if len(s) == 2][-12:]  # teacher and student of each of six steps
    for step in range(6):
        assert torch.equal(own[2 * step], data[step % 3]["sample"])
        assert torch.equal(own[2 * step + 1], data[step % 3]["sample"])
    with torch.no_grad():
        for now, then in zip(data, data[1:], strict=False):
            t, x = now["timestep"], now["sample"]
            teacher, student = (pipe.scheduler.step(m(x, t).sample, t, x).prev_sample for m in (full, pipe.unet))
            assert torch.allclose(teacher, then["sample"], atol=1e-5)
            assert not torch.allclose(student, then["sample"], atol=1e-2)


class Toy(nn.Module):
    """A UNet of five convolutions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.down, self.middle = (nn.Conv2d(*sizes, 3, stride, 1) for *sizes, stride in
                                              ((1, 8, 1), (8, 8, 2), (8, 8, 1)))  # fmt: skip
        self.up, self.last, self.time = nn.Conv2d(16, 8, 3, 1, 1), nn.Conv2d(8, 1, 3, 1, 1), nn.Linear(2, 8)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor]:
        time = self.time(torch.stack([timestep / 10, (timestep / 10).cos()])[None])[..., None, None]
        skip = F.silu(self.first(sample) + time)
        x = F.interpolate(F.silu(self.middle(F.silu(self.down(skip)))), scale_factor=2)
        return (self.last(F.silu(self.up(torch.cat([skip, x], 1)))),)


@pytest.mark.must_hold("efficientdm", 12)
def test_distillation_is_better_than_rounding() -> None:
    def predicted(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([model(**call)[0] for call in calls(4)])

    errors = {}
    for steps in (0, 200):
        model = Toy()
        config = hfq.EfficientDMConfig(**{**QUICK, "steps": steps, "update_lr": 0.02})
        report = hfq.quantize(model, config, calls(4))
        errors[steps] = float((predicted(model) - predicted(Toy())).square().mean())
    assert errors[200] < 0.75 * errors[0]
    curve = report.curves["distillation"]
    assert sum(curve[-10:]) < 0.8 * sum(curve[:10]) and torch.isfinite(predicted(model)).all()
    assert {row.extra["levels"] for row in report.packed} == {4} and len(report.packed) == 6


CHILD = """
import sys, torch
from diffusers import UNet2DModel
model = UNet2DModel.from_pretrained(sys.argv[1])
calls, wanted = torch.load(sys.argv[1] + "/wanted.pt")
with torch.no_grad():
    found = torch.cat([model(**call).sample for call in calls])
print(torch.equal(found, wanted), type(model.conv_in).__name__, "hfq.training.lowbit" in sys.modules)
"""


def test_a_killed_run_goes_on_and_a_new_process_loads_it(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {**QUICK, "steps": 7, "start": "levels", "base": "codes"}
    whole = unet()
    hfq.quantize(whole, hfq.EfficientDMConfig(**config), calls())
    offer = Saved.offer

    def dying(self: Saved, optimizer: Any, curve: list[float], *, last: bool = False) -> None:
        offer(self, optimizer, curve, last=len(curve) == 5)
        if len(curve) == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Saved, "offer", dying)
        with pytest.raises(KeyboardInterrupt):
            hfq.quantize(unet(), hfq.EfficientDMConfig(**config, work_dir=tmp_path / "work"), calls())
    model = unet()
    report = hfq.quantize(model, hfq.EfficientDMConfig(**config, work_dir=tmp_path / "work"), calls())
    assert len(report.curves["distillation"]) == 7
    assert all(torch.equal(a, whole.state_dict()[name]) for name, a in model.state_dict().items())
    with pytest.raises(CheckpointError, match="another run"):
        hfq.quantize(unet(), hfq.EfficientDMConfig(**config, seed=1, work_dir=tmp_path / "work"), calls())
    model.save_pretrained(tmp_path / "model")
    torch.save((calls(1), outputs(model)), tmp_path / "model" / "wanted.pt")
    child = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path / "model")], capture_output=True, text=True,
                           check=False)  # fmt: skip
    assert child.stdout.split() == ["True", "QConv2d", "False"], child.stderr


def test_guided_pipelines(zoo: Any, tmp_path: Any) -> None:
    pipe = zoo.text_to_image(tmp_path)
    options = {"num_inference_steps": 2, "guidance_scale": 3.0}
    hfq.quantize_pipeline(pipe, {"unet": hfq.EfficientDMConfig(**{**QUICK, "steps": 4})}, zoo.PROMPTS[:2], **options)
    assert len(times.of(pipe.unet)) == 2 and torch.isfinite(zoo.draw(pipe)).all()
    assert torch.equal(zoo.draw(pipe), zoo.draw(pipe)) and torch.isfinite(zoo.draw(pipe, num_inference_steps=5)).all()
    dit = zoo.class_conditional()
    config = hfq.EfficientDMConfig(**{**QUICK, "steps": 3}, condition_first=True)
    hfq.quantize_pipeline(dit, {"transformer": config}, [1, 2], **options)
    ends = {name for name, layer in swap.packed_modules(dit.transformer).items() if layer.spec.bits == 8}
    assert {"proj_out_1", "proj_out_2", "pos_embed.proj"} < ends and len(ends) == 7
    assert torch.isfinite(zoo.draw(dit)).all()


def test_ends_shortcuts_and_overrides() -> None:
    model = unet(2)
    wide = {"*.conv2": {"bits": 8, "activation_bits": 8}, "conv_out": {"bits": 3}, "mid_block": {"activation_bits": 16}}
    report = hfq.quantize(model, hfq.EfficientDMConfig(**{**QUICK, "steps": 2}, overrides=wide), calls())
    packed = swap.packed_modules(model)
    assert {packed[name].spec.bits for name in ("conv_in", "time_embedding.linear_1")} == {8}
    assert packed["conv_in"].levels is None and packed["conv_in"].activation.bits == 8
    assert packed["conv_out"].spec.bits == 3 and packed["mid_block.resnets.0.conv1"].activation is None
    assert packed["down_blocks.0.resnets.0.conv2"].spec.bits == 8
    assert packed["down_blocks.0.resnets.0.conv1"].spec.bits == 4
    assert report.rows["down_blocks.0.downsamplers.0.conv"].status == "float"
    assert "shortcuts" in report.rows["up_blocks.0.resnets.0.conv_shortcut"].reason
    every = hfq.quantize(unet(2), hfq.EfficientDMConfig(**{**QUICK, "steps": 0}, keep_shortcuts=False), calls())
    assert every.rows["up_blocks.0.resnets.0.conv_shortcut"].status == "packed"


def test_all_weights_may_learn() -> None:
    model = unet()
    report = hfq.quantize(model, hfq.EfficientDMConfig(**QUICK, learn="weights"), calls())
    plain = unet()
    hfq.quantize(plain, hfq.EfficientDMConfig(**QUICK), calls())
    assert report.rows["mid_block.resnets.0.conv1"].extra["rank"] == 8
    assert not torch.equal(model.mid_block.resnets[0].conv1.qweight, plain.mid_block.resnets[0].conv1.qweight)


def test_what_makes_no_sense_is_refused() -> None:
    for wrong in ({"group_size": 32}, {"rank": 0}, {"learn": "all"}, {"steps": -1}, {"end_bits": 1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            hfq.EfficientDMConfig(**{**QUICK, **wrong})
    with pytest.raises(DataError, match="timestep"):
        hfq.quantize(unet(), hfq.EfficientDMConfig(**QUICK), [{"sample": torch.zeros(2, 1, 8, 8)}])
    with pytest.raises(QuantizationError, match="takes no timestep"):
        model = nn.Sequential(nn.Linear(4, 4))
        lowbit_config = hfq.EfficientDMConfig(**QUICK)
        hfq.quantize(model, lowbit_config, [{"input": torch.zeros(1, 4), "timestep": torch.tensor(1.0)}])
    unused = Toy()
    unused.other = nn.Linear(2, 2)
    with pytest.raises(QuantizationError, match="other: the data does not reach it"):
        hfq.quantize(unused, hfq.EfficientDMConfig(**QUICK), calls(1))
    short = hfq.quantize(unet(), hfq.EfficientDMConfig(**{**QUICK, "steps": 3}), calls())
    assert any("were not used" in note for note in short.notes)
