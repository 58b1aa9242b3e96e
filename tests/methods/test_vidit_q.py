"""ViDiT-Q: what its specification says must hold, on toys and on tiny diffusion transformers, and what every method
for pipelines owes its users."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hfq
from hfq import kernels
from hfq.errors import ConfigError, DataError, QuantizationError
from hfq.formats import ActivationSpec, QuantSpec, activation, affine
from hfq.kernels import producers
from hfq.layers import Hadamard, swap
from hfq.layers.online import ChannelScale
from hfq.layers.switched import Switched
from hfq.rounding import nearest
from hfq.transforms.balance import balance_scale, balanced

diffusers = pytest.importorskip("diffusers")

PLAN = {"target_bits": 6.0, "widths": [4, 8], "intervals": 2, "score_calls": 1}
ATTENTION = "transformer_blocks.0.attn1"


def calls_of(timesteps: tuple[int, ...] = (40, 30, 20, 10), rows: int = 4) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    return [{"hidden_states": torch.randn(rows, 4, 8, 8, generator=generator), "timestep": torch.full((rows,), t),
             "class_labels": torch.arange(rows)} for t in timesteps]  # fmt: skip


def spread(model: Any) -> Any:
    """Channels as they are in trained models: three of 32 are thirty times as large, by the modulation's own part."""
    width = model.transformer_blocks[0].attn1.to_q.in_features
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.norm1.linear.bias[width : width + 3] += 30  # scales in front of the attention
            block.norm1.linear.bias[4 * width : 4 * width + 3] += 30  # and of the perceptron
            block.attn1.to_q.weight *= 0.03
            block.ff.net[0].proj.weight *= 0.1
            block.ff.net[0].proj.weight[:3] *= 30
    return model


def outputs(model: Any, calls: Any = None) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(**call).sample for call in calls or calls_of()])


def quantized(zoo: Any, **more: Any) -> tuple[Any, Any]:
    model = spread(zoo.transformer())
    return model, hfq.quantize(model, hfq.ViDiTQConfig(**{"progress": False, **more}), calls_of())


def signal(zoo: Any, **more: Any) -> float:
    model = spread(zoo.transformer(attention_head_dim=64))
    wanted = outputs(model)
    hfq.quantize(model, hfq.ViDiTQConfig(**{"progress": False, **more}), calls_of())
    found = outputs(model)
    return float(10 * torch.log10(wanted.square().sum() / (found - wanted).square().sum()))


def digest(model: Any) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def gaussian(rows: int = 400, outs: int = 96, size: int = 1152) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs with three channels 40 times larger than the rest, and a weight."""
    x, weight = torch.randn(rows, size), torch.randn(outs, size)
    x[:, [5, 300, 900]] *= 40
    return x, weight


def error(x: torch.Tensor, weight: torch.Tensor, bits: int, inputs: int, parts: list[Any], *, twice: bool = False
          ) -> float:
    wanted, grid = x @ weight.t(), QuantSpec(bits)
    for part in parts:
        x, weight = part(x), part.fold(weight)
        if twice:
            weight = affine.dequantize(nearest.solve(weight, grid))
    weight = affine.dequantize(nearest.solve(weight, grid))
    found = activation.fake(x, ActivationSpec(inputs, symmetric=True)) @ weight.t()
    return float((found - wanted).norm() / wanted.norm())


# -- the numbered properties


@pytest.mark.must_hold("vidit_q", 1)
def test_balance_changes_nothing(zoo: Any) -> None:
    x, weight = gaussian(64)
    wanted = x @ weight.t()
    for options in ({"rotate": False}, {"scale": False}, {}):
        part = swap.join(balanced([weight], x.abs().amax(0), **options)[0])
        assert ((part(x) @ part.fold(weight).t()) - wanted).norm() < 1e-5 * wanted.norm()
    model = spread(zoo.transformer())
    layers = [model.transformer_blocks[0].attn1.to_q, model.transformer_blocks[1].ff.net[2]]
    before = outputs(model)
    for layer in layers:  # the float layer behind the parts: quantizers off
        (parts,) = balanced([layer.weight], torch.rand(layer.in_features) + 0.1)
        part = swap.join(parts)
        layer.register_forward_pre_hook(lambda _, args, part=part: (part(args[0]),))
        layer.weight.data = part.fold(layer.weight.data)
    assert (outputs(model) - before).abs().max() < 1e-4


@pytest.mark.must_hold("vidit_q", 2)
def test_rotations_are_orthogonal_and_stored(zoo: Any, tmp_path: Path) -> None:
    for size in (32, 1152, 13824):
        part = balanced([torch.randn(2, size)], torch.ones(size), scale=False)[0][0]
        some = torch.eye(size)[:: size // 16]
        turned = part(some).double()
        assert (turned @ turned.t() - torch.eye(len(some))).abs().max() < 1e-6
        assert part.signs.abs().min() == 1 and part.signs.unique().numel() == 2
    model, _ = quantized(zoo, bits=4)
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)  # nothing is drawn again
    again = type(model).from_pretrained(tmp_path)
    for name, part in model.named_modules():
        if isinstance(part, (Hadamard, ChannelScale)):
            other = again.get_submodule(name)
            assert all(torch.equal(a, b) for a, b in zip(part.parameters(), other.parameters(), strict=True))
            assert torch.equal(part(torch.eye(part.n)), other(torch.eye(part.n)))


@pytest.mark.must_hold("vidit_q", 3)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_product_is_exact(bits: int) -> None:
    weight, bias = torch.randn(24, 64), torch.randn(24)
    weight[0] = 0
    weight[1], weight[2] = weight[1].abs() + 0.1, -weight[2].abs() - 0.1  # zero points at both ends
    holder = nn.Module()
    holder.layer = nn.Linear(64, 24)
    holder.layer.weight.data, holder.layer.bias.data = weight, bias
    codes = nearest.solve(weight, QuantSpec(bits))
    assert codes.zero_point[1] == 0 and codes.zero_point[2] == 2**bits - 1
    spec = ActivationSpec(8, symmetric=True)
    swap.swap(holder, "layer", codes, activation=spec)
    x = torch.randn(7, 64) * torch.rand(7, 1) * 30
    found = activation.quantize(x, spec)
    exact = activation.dequantize(found).double() @ affine.dequantize(codes).double().t() + bias.double()
    for backend in ("reference", None):
        with kernels.use(**({"wnan": backend} if backend else {})):
            y = holder.layer(x)
        assert ((y - exact).norm() / exact.norm()) < 1e-5
        assert torch.equal(y[:, 0], bias[0].expand(7))


@pytest.mark.must_hold("vidit_q", 4)
def test_rows_do_not_depend_on_each_other(zoo: Any) -> None:
    model, _ = quantized(zoo, bits=4)
    layer = model.get_submodule(f"{ATTENTION}.to_q")
    with kernels.use(wnan="reference"):
        x = torch.randn(6, 5, 32) * torch.tensor([1.0, 50.0, 1e-3, 1.0, 7.0, 1.0]).reshape(6, 1, 1)
        whole = layer(x)
        for i in range(6):
            assert torch.equal(layer(x[i : i + 1].clone())[0], whole[i])
    for i in range(6):  # and whatever kernel serves
        assert torch.allclose(layer(x[i : i + 1].clone())[0], whole[i], rtol=0, atol=2e-3 * float(whole[i].abs().max()))


@pytest.mark.must_hold("vidit_q", 5)
def test_norm_modulation_and_quantization_at_once() -> None:
    images, tokens, size = 3, 700, 96
    x, gain, shift = torch.randn(images * tokens, size), torch.randn(images, size), torch.randn(images, size)
    spec = ActivationSpec(8, symmetric=True)
    fused = producers.norm_quant(x, None, None, 1e-6, spec, mean=True, scale=gain, shift=shift, fused=True)
    norm = nn.functional.layer_norm(x, (size,), eps=1e-6).reshape(images, tokens, size)
    apart = activation.quantize((norm * (1 + gain[:, None]) + shift[:, None]).reshape(-1, size), spec)
    difference = (fused.codes.int() - apart.codes.int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3
    # What a zero point of a weight is multiplied with: the sum of the row as it was quantized.
    ones = affine.Codes(torch.ones(1, size, dtype=torch.uint8), torch.ones(1, 1).half(),
                        torch.zeros(1, 1, dtype=torch.uint8), QuantSpec(8))  # fmt: skip
    holder = nn.Module()
    holder.layer = nn.Linear(size, 1, bias=False)
    layer = swap.swap(holder, "layer", ones, activation=spec)
    with kernels.use(wnan="reference"):
        sums = kernels.linear_int(fused, layer.operand("weight"))
    assert torch.equal(sums[:, 0], fused.codes.int().sum(1) * fused.scale[:, 0])


@pytest.mark.must_hold("vidit_q", 6)
def test_scale_and_rotation_each_help() -> None:
    x, weight = gaussian()
    top = x.abs().amax(0)
    for bits, inputs, want in ((4, 8, (0.135, 0.119, 0.060)), (4, 4, (0.42, 0.21, 0.09))):
        plain = error(x, weight, bits, inputs, [])
        scaled = error(x, weight, bits, inputs, balanced([weight], top, rotate=False)[0])
        both = error(x, weight, bits, inputs, balanced([weight], top)[0])
        assert plain > scaled > both, (plain, scaled, both)
        # The specification's own numbers, of its own draw.
        assert all(abs(found / wanted - 1) < 0.35 for found, wanted in zip((plain, scaled, both), want, strict=True))


@pytest.mark.must_hold("vidit_q", 7)
def test_the_weight_is_rounded_once(zoo: Any) -> None:
    x, weight = gaussian()
    parts = balanced([weight], x.abs().amax(0))[0]
    assert error(x, weight, 4, 8, parts, twice=True) > 1.5 * error(x, weight, 4, 8, parts)
    model = spread(zoo.transformer())
    float_weight = model.get_submodule(f"{ATTENTION}.to_q").weight.detach().clone()
    hfq.quantize(model, hfq.ViDiTQConfig(bits=4, progress=False), calls_of())
    layer = model.get_submodule(f"{ATTENTION}.to_q")
    assert torch.equal(affine.encode(layer.online.fold(float_weight), *_grid(layer), layer.spec),
                       nearest.solve(layer.online.fold(float_weight), layer.spec).codes)  # fmt: skip


def _grid(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    state = layer.state_dict()
    return state["scale"], state["zero_point"]


@pytest.mark.must_hold("vidit_q", 8)
def test_eight_bits_need_no_balance_and_four_gain_by_it(zoo: Any) -> None:
    assert signal(zoo, bits=8, scale=False, rotate=False) > 25
    assert signal(zoo, bits=4) > signal(zoo, bits=4, scale=False, rotate=False)


@pytest.mark.must_hold("vidit_q", 9)
def test_one_quantized_tensor_for_query_key_and_value(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = quantized(zoo, bits=4)
    made: list[Any] = []
    for name in ("quantize_rows", "hadamard_quant"):
        own = getattr(producers, name)
        monkeypatch.setattr(producers, name, lambda *a, own=own, **k: made.append(1) or own(*a, **k))
    outputs(model, calls_of((10,)))
    # In each block: one for query, key and value, one each for the projection and the two of the perceptron.
    assert len(made) == 2 * 4
    layers = [model.get_submodule(f"{ATTENTION}.{name}") for name in ("to_q", "to_k", "to_v")]
    assert len({layer.online.signature() for layer in layers}) == 1
    layers[1].online.parts[0].vector.data.mul_(1)  # not seen
    with torch.no_grad():
        layers[1].online.parts[0].vector.mul_(2)  # seen: it computes something else now
    made.clear()
    outputs(model, calls_of((10,)))
    assert len(made) == 2 * 4 + 2


@pytest.mark.must_hold("vidit_q", 10)
def test_widths_follow_the_schedule(zoo: Any) -> None:
    names = [f"{ATTENTION}.{name}" for name in ("to_q", "to_k", "to_v")]
    model, report = quantized(zoo, bits=8, schedule=dict.fromkeys(names, [8, 2]), edges=[25.0])
    noisy, late = calls_of((40,)), [{**calls_of((40,))[0], "timestep": torch.full((4,), 10)}]
    first, second = outputs(model, noisy), outputs(model, late)
    layer = model.get_submodule(names[0])
    assert isinstance(layer, Switched) and layer.active.spec.bits == 2
    assert torch.equal(outputs(model, noisy), first) and layer.active.spec.bits == 8
    assert torch.equal(outputs(model, late), second)
    wide, _ = quantized(zoo, bits=8)
    narrow, _ = quantized(zoo, bits=8, overrides=dict.fromkeys(names, {"bits": 2}))
    assert torch.equal(outputs(wide, noisy), first) and torch.equal(outputs(narrow, late), second)
    assert report.rows[names[0]].extra["schedule"] == [8, 2] and report.rows[names[0]].bits > 10
    with pytest.raises(QuantizationError, match="different timesteps"):
        model(**{**noisy[0], "timestep": torch.tensor([40, 40, 10, 10])})
    with pytest.raises(QuantizationError, match="none was seen"):
        quantized(zoo, bits=8, schedule=dict.fromkeys(names, [8, 2]), edges=[25.0])[0].get_submodule(names[0])(
            torch.randn(1, 32))


@pytest.mark.must_hold("vidit_q", 11)
def test_dead_channels_and_constant_rows() -> None:
    act = torch.tensor([0.0, 1.0, 5.0, 0.0])
    weight = torch.tensor([[1.0, 2.0, 3.0, 0.0], [1.0, 0.5, -3.0, 0.0]])
    found = balance_scale(act, weight.abs().amax(0))
    assert torch.isfinite(found).all() and (found > 0).all()
    x = torch.tensor([[0.0, 1.0, 5.0, 0.0], [0.0, 0.0, 0.0, 0.0], [3.0, 3.0, 3.0, 3.0]])
    part = swap.join(balanced([weight], act, rotate=False)[0])
    assert torch.isfinite(activation.fake(part(x), ActivationSpec(4, symmetric=True))).all()
    constant = torch.full((2, 64), 0.7)
    for bits in (4, 8):
        assert (activation.fake(constant, ActivationSpec(bits, symmetric=True)) / constant - 1).abs().max() < 1e-6


@pytest.mark.must_hold("vidit_q", 12)
def test_shapes_of_any_size(zoo: Any) -> None:
    model, _ = quantized(zoo, bits=4)
    layer = model.get_submodule(f"{ATTENTION}.to_q")
    for shape in ((1, 1, 32), (3, 5, 32), (7, 129, 32), (1, 32), (0, 4, 32)):
        assert layer(torch.randn(shape)).shape == shape
    assert torch.isfinite(outputs(model, calls_of((13,), rows=3))).all()


# -- widths by part and interval


def test_widths_are_chosen_by_damage(zoo: Any, tmp_path: Path) -> None:
    model, report = quantized(zoo, **PLAN, work_dir=tmp_path)
    config = model.config["quantization_config"]
    assert set(config.schedule) == {row.module for row in report.packed} and config.edges == [25.0]
    assert 5.9 < config.average_bits["nominal"] <= 6.0 < config.average_bits["stored"]
    rows = list(config.schedule.values())
    assert {bits for row in rows for bits in row} == {4, 8} and all(len(row) == 2 for row in rows)
    for part in ("attn1.to_q", "attn1.to_k", "attn1.to_v"):  # parts of a block share widths
        assert config.schedule[f"transformer_blocks.0.{part}"] == config.schedule[f"{ATTENTION}.to_out.0"]
    scores = json.loads((tmp_path / "scores.json").read_text())["numbers"]
    assert len(scores) == 2 * 4 * 2
    mean = {bits: sum(v for k, v in scores.items() if k.endswith(f"@{bits}")) / 8 for bits in (4, 8)}
    assert mean[8] > mean[4] + 6
    # The same scores serve another budget; a run of other calls is told apart.
    (tmp_path / "scores.json").write_text((tmp_path / "scores.json").read_text())
    other, _ = quantized(zoo, **{**PLAN, "target_bits": 4.0}, work_dir=tmp_path)
    assert {b for row in other.config["quantization_config"].schedule.values() for b in row} == {4}
    with pytest.raises(hfq.CheckpointError, match="alpha"):
        quantized(zoo, **PLAN, alpha=0.3, work_dir=tmp_path)


def test_a_chosen_schedule_can_be_given(zoo: Any) -> None:
    model, _ = quantized(zoo, **PLAN)
    chosen = model.config["quantization_config"]
    again, _ = quantized(zoo, schedule=chosen.schedule, edges=chosen.edges)
    assert digest(again) == digest(model)
    assert digest(quantized(zoo, **PLAN)[0]) == digest(model)
    # A config that was filled in by a run chooses anew for another model.
    fresh = hfq.ViDiTQConfig(**PLAN, progress=False)
    for _ in range(2):
        hfq.quantize(spread(zoo.transformer()), fresh, calls_of())
    assert fresh.schedule == chosen.schedule


def test_metrics_of_both_halves(zoo: Any) -> None:
    pipe = zoo.class_conditional()
    calls = hfq.record_calls(pipe, "transformer", [1, 2], steps=2, num_inference_steps=4)
    config = hfq.ViDiTQConfig(**PLAN, metrics={"attn1": "guidance", "*": "output"}, progress=False)
    hfq.quantize_pipeline(pipe, {"transformer": config}, calls)
    for part in ("attn1", "ff"):  # a budget each
        rows = [row for name, row in config.schedule.items() if f".{part}." in name]
        assert {b for row in rows for b in row} == {4, 8}
    model = spread(zoo.transformer())
    report = hfq.quantize(model, config, calls_of())
    assert any("one half of guidance" in note for note in report.notes)


# -- what every method owes


@pytest.fixture(scope="module")
def pipe(zoo: Any) -> Any:
    made = zoo.class_conditional()
    spread(made.transformer)
    config = hfq.ViDiTQConfig(schedule={f"{ATTENTION}.to_q": [8, 4]}, edges=[25.0], progress=False)
    return hfq.quantize_pipeline(made, {"transformer": config}, [1, 2], steps=2, num_inference_steps=4)


def test_saved_pipelines_draw_the_same_in_a_new_process(pipe: Any, zoo: Any, child: Any, tmp_path: Path) -> None:
    picture = zoo.draw(pipe)
    pipe.save_pretrained(tmp_path / "whole")
    pipe.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    code = """
import torch
from diffusers import DiffusionPipeline
sys.path.insert(0, sys.argv[2])
import pipeline_zoo as zoo
for name in ("whole", "sharded"):
    pipe = DiffusionPipeline.from_pretrained(sys.argv[1] + "/" + name)
    pipe.set_progress_bar_config(disable=True)
    out[name] = zoo.draw(pipe).double().flatten().tolist()
engine = {"hfq.calibration.walk", "hfq.rounding.nearest", "hfq.methods.vidit_q"}
out["engine"] = sorted(engine & set(sys.modules) - {"hfq.methods.vidit_q"})
"""
    found = child(code, tmp_path, Path(zoo.__file__).parent)
    assert found["engine"] == []
    for name in ("whole", "sharded"):
        assert torch.equal(torch.tensor(found[name], dtype=torch.float64), picture.double().flatten())


def test_steps_scheduler_and_batch_may_change(pipe: Any, zoo: Any) -> None:
    before = pipe.scheduler
    try:
        pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(before.config)
        for steps in (1, 5, 9):
            images = zoo.draw(pipe, num_inference_steps=steps, class_labels=[1, 2, 3], generator=None)
            assert images.shape[0] == 3 and torch.isfinite(images).all()
    finally:
        pipe.scheduler = before


def test_the_report_and_what_stays_float(zoo: Any) -> None:
    model, report = quantized(zoo, bits=4)
    packed = swap.packed_modules(model)
    assert {row.module for row in report.packed} == set(packed) and len(packed) == 12
    for row in report.packed:
        stored = sum(t.nbytes for name, t in packed[row.module].state_dict().items() if name != "bias")
        assert row.bits == pytest.approx(8 * stored / row.numel) and 0 < row.error < 1
        assert row.tokens == 4 * 4 * 16 and row.kernel and row.extra["activation"]["bits"] == 8
    assert "frozen" in report.rows["transformer_blocks.0.norm1.linear"].reason
    assert report.from_dict(json.loads(report.to_json())).to_dict() == report.to_dict()
    assert digest(quantized(zoo, bits=4)[0]) == digest(model)
    hfq.dequantize(model)
    assert (outputs(model) - outputs(spread(zoo.transformer()))).norm() < 0.3 * outputs(model).norm()


def test_text_keys_and_convolutions_stay_float(zoo: Any) -> None:
    torch.manual_seed(0)
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, cross_attention_dim=32, caption_channels=24, use_additional_conditions=False)  # fmt: skip
    calls = [{"hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 5, 24),
              "timestep": torch.tensor([t, t])} for t in (30, 10)]  # fmt: skip
    report = hfq.quantize(model, hfq.ViDiTQConfig(progress=False), calls)
    names = {row.module.partition(".")[2].partition(".")[2] for row in report.packed}
    assert names == {"attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0",
                     "ff.net.0.proj", "ff.net.2"}  # fmt: skip
    unet = zoo.text_unet()
    calls = [{"sample": torch.randn(1, 4, 8, 8), "timestep": torch.tensor(7),
              "encoder_hidden_states": torch.randn(1, 4, 16)}]  # fmt: skip
    report = hfq.quantize(unet, hfq.ViDiTQConfig(progress=False), calls)
    assert "linears" in report.rows["down_blocks.0.resnets.0.conv1"].reason and report.packed


def test_sixteen_bits_and_overrides(zoo: Any) -> None:
    model, report = quantized(zoo, bits=16, activation_bits=16)
    assert not report.packed and torch.equal(outputs(model), outputs(spread(zoo.transformer())))
    model, _ = quantized(zoo, bits=4, modules_to_not_convert=["*.ff.net.2"], overrides={
        "*.to_q": {"bits": 8, "activation_bits": 6}, "*.to_k": {"activation_bits": 16}, "*.to_v": {"rotate": False},
        "*.norm1.linear": {"bits": 8}})  # fmt: skip
    block = model.transformer_blocks[0]
    assert type(block.ff.net[2]) is nn.Linear and block.norm1.linear.spec.bits == 8
    assert block.attn1.to_q.spec.bits == 8 and block.attn1.to_q.activation.bits == 6
    assert block.attn1.to_k.activation is None and block.attn1.to_k.online is None
    assert isinstance(block.attn1.to_v.online, ChannelScale) and torch.isfinite(outputs(model)).all()


def test_without_data(zoo: Any) -> None:
    with pytest.raises(DataError, match="needs calibration data"):
        hfq.quantize(zoo.transformer(), hfq.ViDiTQConfig())
    model = spread(zoo.transformer())
    hfq.quantize(model, hfq.ViDiTQConfig(scale=False, progress=False))  # rotations need none
    layers = [model.get_submodule(f"{ATTENTION}.{name}").online for name in ("to_q", "to_k")]
    assert layers[0].signature() == layers[1].signature()


@pytest.mark.parametrize("wrong", [
    {"bitz": 4}, {"bits": 9}, {"activation_bits": 1}, {"alpha": 1.5}, {"widths": [9]}, {"target_bits": 3.0},
    {"metrics": {"*": "beauty"}}, {"schedule": {"a": [4]}}, {"schedule": {"a": [4, 4]}, "edges": []},
    {"schedule": {"a": [4, 9]}, "edges": [1.0]}, {"kv_bits": 4},
])  # fmt: skip
def test_wrong_options_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        hfq.ViDiTQConfig(**wrong)


def test_data_that_does_not_fit(zoo: Any) -> None:
    with pytest.raises(DataError, match="4 timesteps for 5 intervals"):
        quantized(zoo, **{**PLAN, "intervals": 5})
    with pytest.raises(ConfigError, match="schedule"):
        quantized(zoo, schedule={"transformer_blocks.0.attn1.to_x": [4, 8]}, edges=[3.0])
