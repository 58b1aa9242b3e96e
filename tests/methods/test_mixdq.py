"""MixDQ: what its specification says must hold, on toys and on a tiny text-to-image pipeline."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hfq
from hfq import kernels
from hfq.allocation import program, ratios
from hfq.errors import CheckpointError, ConfigError, DataError, QuantizationError
from hfq.evaluation.similarity import signal_to_noise
from hfq.formats import ActivationSpec, QuantSpec, activation, affine
from hfq.layers import swap

diffusers = pytest.importorskip("diffusers")

KEY = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
FEW = ["down_blocks", "mid_block.resnets", "*.attentions.1.*", "*.attn1.*", "time_embedding", "*.time_emb_proj"]
PLAIN = {"progress": False, "protected": 0.0}
QUICK = {"progress": False, "score_images": 2, "ratio_points": 3, "activation_ratio_points": 2, "mean_points": 2,
         "tolerance": 0.1, "modules_to_not_convert": FEW}  # fmt: skip


@pytest.fixture(scope="module")
def folder(zoo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose text begins with a token that is much larger than the others."""
    path = tmp_path_factory.mktemp("few_steps")
    pipe = zoo.text_to_image(path)
    pipe.unet = zoo.text_unet(block_out_channels=(16,), down_block_types=("CrossAttnDownBlock2D",),
                              up_block_types=("CrossAttnUpBlock2D",))  # fmt: skip
    parts = {name.rpartition(".")[2]: module for name, module in pipe.text_encoder.named_modules()}
    with torch.no_grad():
        for name in ("token_embedding", "position_embedding"):
            parts[name].weight[:, 0] = 0
        parts["token_embedding"].weight[pipe.tokenizer.bos_token_id, 0] = 1000
        parts["final_layer_norm"].weight[0] *= 60
        for name, module in pipe.unet.named_modules():
            if name.endswith("attn2"):  # what the text says counts
                module.to_q.weight *= 0.1
                module.to_out[0].weight *= 8
    pipe.save_pretrained(path / "float")
    return path / "float"


@pytest.fixture
def pipe(folder: Path) -> Any:
    return load(folder)


def load(folder: Path) -> Any:
    made = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def calls(folder: Path, zoo: Any) -> Any:
    return hfq.record_calls(load(folder), prompts=zoo.PROMPTS, num_inference_steps=1)


def quantized(pipe: Any, calls: Any, **options: Any) -> Any:
    config = hfq.MixDQConfig(**{**PLAIN, **options})
    hfq.quantize_pipeline(pipe, {"unet": config}, calls)
    return config


def outputs(model: Any, calls: Any) -> list[torch.Tensor]:
    with torch.no_grad(), kernels.use(wna16="reference"):
        return [model(**call).sample for call in calls]


def digest(model: Any) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def layer_of(module: nn.Module, bits: int, low: float, high: float) -> Any:
    """A packed layer with stored inputs of 8 bits."""
    holder, spec = nn.Module(), ActivationSpec(8, False, "tensor", dynamic=False)
    holder.layer = module
    codes = affine.quantize(module.weight.detach().flatten(1), QuantSpec(bits, symmetric=True))
    params = activation.range_parameters(torch.tensor([low]), torch.tensor([high]), spec)
    swap.swap(holder, "layer", codes, activation=spec, activation_params=params)
    weight = affine.dequantize(codes).reshape(module.weight.shape)
    return holder.layer, weight, lambda x: activation.fake(x, spec, params)


# -- the numbered properties


@pytest.mark.must_hold("mixdq", 1)
def test_the_integer_product_is_exact() -> None:
    for number in range(6):  # zero points over all of [0, 255], that is [-128, 127] of signed codes
        low, high = -number / 5 * 3 - 1e-3, (5 - number) / 5 * 3 + 1e-3
        linear = nn.Linear(64, 24)
        layer, weight, fake = layer_of(linear, 8 if number % 2 else 4, low, high)
        x = low + (high - low) * torch.rand(9, 64)
        exact = F.linear(fake(x).double(), weight.double(), linear.bias.double())
        for backend in ("reference", None):
            with kernels.use(**({"wnan": backend} if backend else {})):
                assert (layer(x) - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.must_hold("mixdq", 2)
@pytest.mark.parametrize("stride", [1, 2])
def test_padding_is_that_of_zeros_of_the_numbers(stride: int) -> None:
    conv = nn.Conv2d(8, 12, 3, stride, 1)
    layer, weight, fake = layer_of(conv, 8, -0.5, 3.0)  # the zero point is far from the code zero
    x = 3.5 * torch.rand(2, 8, 9, 9) - 0.5
    coded = fake(x)
    exact = F.conv2d(coded.double(), weight.double(), conv.bias.double(), stride, 1)
    with torch.no_grad():
        assert (layer(x) - exact).norm() < 1e-5 * exact.norm()
        with kernels.use(qconv2d="reference"):
            assert (layer(x) - exact).norm() < 1e-5 * exact.norm()
    # The published form: codes padded with the integer zero, and a map of what that leaves out at every position.
    scale, zero = layer.state_dict()["input_scale"].double(), layer.state_dict()["input_zero_point"].double()
    codes = (coded.double() / scale).round() + zero
    inside = F.conv2d(torch.ones_like(codes) * zero, weight.double(), None, stride, 1)  # taps in bounds only
    shifted = (F.conv2d(codes, weight.double(), None, stride, 1) - inside) * scale + conv.bias.double()[:, None, None]
    padded = F.conv2d(F.pad(codes, (1, 1, 1, 1), value=float(zero)) - zero, weight.double(), None, stride)
    assert (shifted - exact).norm() < 1e-5 * exact.norm()
    assert (padded * scale + conv.bias.double()[:, None, None] - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.must_hold("mixdq", 3)
def test_the_first_token_apart(pipe: Any, calls: Any) -> None:
    before = outputs(pipe.unet, calls)
    layers = _layers(pipe.unet, calls)
    reads = {name for name in layers.sites if name.endswith(("attn2.to_k", "attn2.to_v"))}
    assert set(layers.tokens) == reads and len(reads) == 8
    with layers.simulated(inputs={name: 16 for name in reads}):
        assert all(torch.equal(a, b) for a, b in zip(outputs(pipe.unet, calls), before, strict=True))
    # Split, and everything else float: the stored rows are those of the float layers.
    from hfq.layers.leading import LeadingToken

    for name in reads:
        site, part = layers.sites[name], layers.leading(name)
        assert isinstance(part, LeadingToken)
        x = calls[0]["encoder_hidden_states"]
        assert (part(x, site.module) - site.module(x)).abs().max() < 1e-4 * site.module(x).abs().max()
    # Eight bits for a tensor whose first token is 50 times as large.
    linear = nn.Linear(16, 16)
    x = torch.randn(2, 9, 16)
    x[:, 0] = 50 * torch.randn(16)
    whole, _, _ = layer_of(linear, 8, float(x.min()), float(x.max()))
    rest, _, _ = layer_of(linear, 8, float(x[:, 1:].min()), float(x[:, 1:].max()))
    split = LeadingToken(x[0, 0], linear(x[:1, 0])[0])
    wanted = [linear(x)[:, 1:]]
    with torch.no_grad():
        assert signal_to_noise([split(x, rest)[:, 1:]], wanted) > 15 + signal_to_noise([whole(x)[:, 1:]], wanted)
        assert torch.equal(split(x, rest)[:, 0], linear(x[:1, 0]).expand(2, -1))


def _layers(model: Any, calls: Any, **options: Any) -> Any:
    from hfq.reconstruction import ranged

    config = hfq.MixDQConfig()
    return ranged.calibrate(model, calls, config.plan(model).sites, config.spec_for, cuts={}, **options)


@pytest.mark.must_hold("mixdq", 4)
def test_stored_rows_belong_to_one_encoder(pipe: Any, calls: Any, folder: Path, zoo: Any, tmp_path: Path) -> None:
    for prompts in (["a one", "a two"], ["a thin bold zero", "x"]):
        other = hfq.record_calls(load(folder), prompts=prompts, num_inference_steps=1)
        token = other[0]["encoder_hidden_states"][:, 0]
        known = calls[0]["encoder_hidden_states"][0, 0]
        assert (token - known).norm(dim=-1).max() < 1e-5 * known.norm()
    config = quantized(pipe, calls)
    assert set(config.conditioning) == {"text_encoder"}
    picture = zoo.draw(pipe)
    pipe.save_pretrained(tmp_path / "packed")
    assert torch.equal(zoo.draw(load(tmp_path / "packed")), picture)
    # Another encoder in memory, and what clip_skip would give: refused in the first call.
    hidden = pipe.text_encoder(torch.tensor([[52, 3, 53]]), output_hidden_states=True).hidden_states[-2].detach()
    with pytest.raises(QuantizationError, match="clip_skip"):
        pipe(prompt_embeds=hidden, negative_prompt_embeds=hidden, num_inference_steps=1)
    with torch.no_grad():
        pipe.text_encoder.get_parameter([n for n, _ in pipe.text_encoder.named_parameters()
                                         if n.endswith("final_layer_norm.bias")][0]).add_(5)  # fmt: skip
    with pytest.raises(QuantizationError, match="another one"):
        zoo.draw(pipe)
    # Another encoder on disk: refused by the loader.
    shutil.rmtree(tmp_path / "packed" / "text_encoder")
    pipe.text_encoder.save_pretrained(tmp_path / "packed" / "text_encoder")
    with pytest.raises(CheckpointError, match="another text_encoder"):
        load(tmp_path / "packed")


@pytest.mark.must_hold("mixdq", 5)
def test_shortcuts_behind_skips_are_cut(pipe: Any, calls: Any) -> None:
    before = outputs(pipe.unet, calls)
    quantized(pipe, calls, bits=8, activation_bits=16, first_token=False,
              overrides={"*": {"bits": 16}, "*.conv_shortcut": {"bits": 8}})  # fmt: skip
    report = pipe.unet.hfq_report
    cut = [row.module for row in report.packed if "cut" in row.extra]
    assert cut == [f"up_blocks.0.resnets.{i}.conv_shortcut" for i in range(2)] and len(report.packed) == 2
    assert signal_to_noise(outputs(pipe.unet, calls), before) > 35
    layer = pipe.unet.get_submodule(cut[0])
    assert layer.cut == 16 and layer.bias is not None
    zeros = torch.zeros(1, 32, 4, 4)
    assert torch.equal(layer(zeros)[0, :, 0, 0], layer.bias)  # once
    x = torch.randn(2, 32, 4, 4)
    with kernels.use(qconv2d="reference"):
        torch.testing.assert_close(layer(x), F.conv2d(x, layer.dequantize(), layer.bias), rtol=1e-4, atol=1e-5)


@pytest.mark.must_hold("mixdq", 6)
def test_the_program_meets_its_mean() -> None:
    generator = torch.Generator().manual_seed(1)
    sizes = {f"l{i}": float(s) for i, s in enumerate(torch.randint(50, 400, (40,), generator=generator))}
    scores = {name: {2: -48 * f, 4: -62 * f, 8: -81 * f} for name, f in
              zip(sizes, (0.7 + 0.6 * torch.rand(40, generator=generator)).tolist(), strict=True)}  # fmt: skip
    for target in (2.5, 4.0, 5.3):
        chosen = program.allocate_within(scores, sizes, target, 0.02)
        mean = sum(sizes[n] * b for n, b in chosen.items()) / sum(sizes.values())
        assert set(chosen) == set(sizes) and abs(mean - target) <= 0.02 + 1e-9
        assert chosen == program.allocate_within(scores, sizes, target, 0.02)
        if target == 4.0:
            best = sum(scores[n][b] for n, b in chosen.items())
            assert best <= sum(row[4] for row in scores.values())
    with pytest.raises(ConfigError, match="means from 2 to 8"):
        program.allocate_within(scores, sizes, 9.0)


@pytest.mark.must_hold("mixdq", 7)
def test_group_means_recombine() -> None:
    for share in (2.24, 1.21, 0.3):
        for ratio in (0.46, 1.0, 1.36):
            content, quality = ratios.split(4.1, ratio, share)
            assert (quality + share * content) / (1 + share) == pytest.approx(4.1)
            assert content / quality == pytest.approx(ratio)
    with pytest.raises(ConfigError, match="target_bits"):
        ratios.best([], lambda plan: 0.0, "target_bits", 4.0)


@pytest.fixture(scope="module")
def mixed(folder: Path, calls: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """A run with both programs, and where it keeps what it measured."""
    work, made = tmp_path_factory.mktemp("mixed"), load(folder)
    config = hfq.MixDQConfig(**QUICK, target_bits=5.0, target_activation_bits=7.0, work_dir=work)
    hfq.quantize_pipeline(made, {"unet": config}, calls)
    return made, config, work


@pytest.mark.must_hold("mixdq", 8)
def test_scores_rise_with_the_width(mixed: tuple[Any, Any, Path]) -> None:
    numbers = json.loads((mixed[2] / "scores.json").read_text())["numbers"]

    def mean(start: str, bits: int) -> float:
        found = [value for key, value in numbers.items() if key.startswith(start) and key.endswith(f"@{bits}")]
        return sum(found) / len(found)

    for metric in ("pictures", "outputs"):
        assert mean(f"weights/{metric}", 8) > mean(f"weights/{metric}", 4)
        assert mean(f"inputs/{metric}", 8) > mean(f"inputs/{metric}", 4)
    assert mean("weights/pictures", 4) > mean("weights/pictures", 2)


@pytest.mark.must_hold("mixdq", 9)
def test_eight_bits_and_the_first_token(folder: Path, calls: Any) -> None:
    wanted, found = outputs(load(folder).unet, calls), {}
    for label, options in (("weights", {"activation_bits": 16}), ("exact", {}), ("plain", {"first_token": False})):
        made = load(folder)
        quantized(made, calls, **options)
        found[label] = signal_to_noise(outputs(made.unet, calls), wanted)
    assert found["weights"] > 30 and found["exact"] > found["plain"], found


@pytest.mark.must_hold("mixdq", 10)
def test_a_row_of_zeros_gives_the_bias() -> None:
    linear = nn.Linear(16, 4)
    linear.weight.data[1] = 0
    other = affine.quantize(linear.weight.detach()[[0, 2, 3]], QuantSpec(8, symmetric=True)).scale
    layer, _, _ = layer_of(linear, 8, -3.0, 3.0)
    assert torch.equal(layer.state_dict()["scale"][[0, 2, 3]], other)  # that row only
    assert torch.equal(layer(torch.randn(5, 16))[:, 1], linear.bias[1].expand(5))


@pytest.mark.must_hold("mixdq", 11)
def test_another_plan_needs_no_data(mixed: tuple[Any, Any, Path], folder: Path, zoo: Any, child: Any,
                                    tmp_path: Path) -> None:
    pipe, config, work = mixed
    picture = zoo.draw(pipe)
    pipe.save_pretrained(tmp_path)
    code = """
import torch
from diffusers import DiffusionPipeline
sys.path.insert(0, sys.argv[2])
import pipeline_zoo as zoo
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], safety_checker=None)
pipe.set_progress_bar_config(disable=True)
out["picture"] = zoo.draw(pipe).double().flatten().tolist()
"""
    found = child(code, tmp_path, Path(zoo.__file__).parent)
    assert torch.equal(torch.tensor(found["picture"], dtype=torch.float64), picture.double().flatten())
    # The same plan and another one, from the ranges that were kept.
    again = load(folder).unet
    same = {"progress": False, "modules_to_not_convert": FEW, "work_dir": work}
    hfq.quantize(again, hfq.MixDQConfig(**same, bit_map=config.bit_map))
    assert digest(again) == digest(pipe.unet)
    other = load(folder).unet
    narrow = {name: {"bits": 4, "activation_bits": 8} for name in config.bit_map}
    hfq.quantize(other, hfq.MixDQConfig(**same, bit_map=narrow))
    assert {layer.spec.bits for layer in swap.packed_modules(other).values()} == {4}
    with pytest.raises(CheckpointError, match="ema"):
        hfq.quantize(load(folder).unet, hfq.MixDQConfig(**same, bit_map=narrow, ema=0.5))


@pytest.mark.must_hold("mixdq", 12)
def test_other_dtypes_run(pipe: Any, calls: Any, tmp_path: Path) -> None:
    quantized(pipe, calls)
    wanted = outputs(pipe.unet, calls[:1])[0]
    pipe.unet.save_pretrained(tmp_path)
    narrow = type(pipe.unet).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    call = {k: v.bfloat16() if isinstance(v, torch.Tensor) and v.is_floating_point() and v.ndim else v
            for k, v in calls[0].items()}  # fmt: skip
    found = outputs(narrow, [call])[0]
    assert found.dtype == torch.bfloat16 and signal_to_noise([found.float()], [wanted]) > 15


# -- widths


def test_widths_obey_the_plan(mixed: tuple[Any, Any, Path]) -> None:
    pipe, config, _ = mixed
    report = pipe.unet.hfq_report
    assert set(config.bit_map) == {row.module for row in report.packed}
    floats = [name for name, entry in config.bit_map.items() if entry["activation_bits"] == 16]
    assert sorted(config.is_content(name) for name in floats) == [False, True]  # one per cent, rounded up, of each
    sizes = {row.module: row.numel for row in report.packed}
    mean = sum(sizes[n] * e["bits"] for n, e in config.bit_map.items()) / sum(sizes.values())
    assert 4.6 < mean <= 5.1 and config.average_bits["nominal"] == pytest.approx(mean)
    for name, entry in config.bit_map.items():
        assert entry["bits"] in ((2, 4, 8) if config.is_content(name) else (4, 8))
        layer = pipe.unet.get_submodule(name)
        assert layer.spec.bits == entry["bits"]
        assert (layer.activation.bits if layer.activation is not None else 16) == entry["activation_bits"]
    assert {row.extra["group"] for row in report.packed} == {"content", "quality"}


def test_a_stopped_run_goes_on(mixed: tuple[Any, Any, Path], folder: Path, calls: Any, tmp_path: Path) -> None:
    shutil.copy(mixed[2] / "ranges.safetensors", tmp_path)
    book = json.loads((mixed[2] / "scores.json").read_text())
    book["numbers"] = dict(list(book["numbers"].items())[:-7])
    (tmp_path / "scores.json").write_text(json.dumps(book))
    made = load(folder)
    hfq.quantize_pipeline(made, {"unet": hfq.MixDQConfig(
        **QUICK, target_bits=5.0, target_activation_bits=7.0, work_dir=tmp_path)}, calls)  # fmt: skip
    assert digest(made.unet) == digest(mixed[0].unet)


def test_the_report_and_reload_in_parts(pipe: Any, calls: Any, zoo: Any, tmp_path: Path) -> None:
    quantized(pipe, calls, bits=4)
    report, packed = pipe.unet.hfq_report, swap.packed_modules(pipe.unet)
    assert {row.module for row in report.packed} == set(packed) and "conv_in" in packed and "conv_out" in packed
    for row in report.packed:
        stored = sum(t.nbytes for name, t in packed[row.module].state_dict().items() if name != "bias")
        assert row.bits == pytest.approx(8 * stored / row.numel) and row.kernel and 0 < row.error < 1
    assert report.from_dict(json.loads(report.to_json())).to_dict() == report.to_dict()
    picture = zoo.draw(pipe)
    pipe.save_pretrained(tmp_path, max_shard_size="20KB")
    again = load(tmp_path)
    assert torch.equal(zoo.draw(again), picture)
    again.scheduler = diffusers.EulerDiscreteScheduler.from_config(again.scheduler.config)
    images = zoo.draw(again, num_inference_steps=5, prompt=zoo.PROMPTS[:3], generator=None)
    assert images.shape[0] == 3 and torch.isfinite(images).all()
    hfq.dequantize(again.unet)
    assert torch.isfinite(zoo.draw(again)).all()


def test_what_does_not_fit(pipe: Any, calls: Any, folder: Path) -> None:
    with pytest.raises(DataError, match="images=False"):
        hfq.quantize(pipe.unet, hfq.MixDQConfig(progress=False), calls)
    with pytest.raises(DataError, match="needs calibration data"):
        hfq.quantize(pipe.unet, hfq.MixDQConfig(progress=False))
    with pytest.raises(ConfigError, match="bit_map"):
        quantized(pipe, calls, bit_map={"conv_inn": {"bits": 4}})
    made = load(folder)
    made.unet.to(torch.float32)
    one = [{**call, "encoder_hidden_states": torch.randn_like(call["encoder_hidden_states"])} for call in calls]
    report = hfq.quantize(made.unet, hfq.MixDQConfig(**PLAIN), one)
    assert any("no first token" in note for note in report.notes)


@pytest.mark.parametrize("wrong", [
    {"bitz": 4}, {"bits": 9}, {"activation_bits": 1}, {"group_size": 64}, {"ratios": [1.0]}, {"ema": 2.0},
    {"content_widths": []}, {"quality_widths": [9]}, {"activation_widths": [1]}, {"kv_bits": 4},
    {"target_activation_bits": 7.0, "activation_bits": 16}, {"protected": 1.5},
])  # fmt: skip
def test_wrong_options_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        hfq.MixDQConfig(**wrong)
