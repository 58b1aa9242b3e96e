"""Q-Diffusion: gates, halves of shortcuts, stored ranges of inputs and attention, the trajectory's calls."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hfq
from hfq.errors import ConfigError
from hfq.formats import ActivationSpec, Codes, QuantSpec, activation, bitpack
from hfq.graph import read
from hfq.layers import attention, swap
from hfq.layers.conv import SecondHalf
from hfq.reconstruction import phases
from hfq.rounding.halves import HalvedRounding
from hfq.rounding.lowrank import gate

STATIC = ActivationSpec(8, False, "tensor", dynamic=False)
QUICK = {"steps": 6, "activation_steps": 4, "batch_size": 4, "progress": False}


class Joint(nn.Module):
    """A shortcut that reads what comes from below beside what was kept for it."""

    def __init__(self, deep: int = 8, skip: int = 8, kernel: int = 1) -> None:
        super().__init__()
        self.deep = deep
        self.conv_shortcut = nn.Conv2d(deep + skip, 6, kernel, padding=kernel // 2)

    def forward(self, deep: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return self.conv_shortcut(torch.cat([deep, skip], 1))


class Plain(nn.Module):
    """One convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 8, 3, padding=1)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return self.conv(sample)


def joint(scales: tuple[float, float] = (1.0, 1.0), columns: tuple[float, float] = (1.0, 1.0), **sizes: int):
    """A model and calls whose halves, and the weights that read them, are of different size."""
    torch.manual_seed(0)
    model = Joint(**sizes).eval()
    with torch.no_grad():
        model.conv_shortcut.weight.normal_()
        model.conv_shortcut.weight[:, : model.deep] *= columns[0]
        model.conv_shortcut.weight[:, model.deep :] *= columns[1]
    calls = [{"deep": scales[0] * torch.randn(4, 8, 6, 6), "skip": scales[1] * torch.randn(4, 8, 6, 6)}
             for _ in range(2)]  # fmt: skip
    return model, calls


def correlated(calls: int = 4, spread: float = 0.1):
    """Pictures whose channels follow three of them."""
    torch.manual_seed(1)
    mix = torch.randn(12, 3)
    return [{"sample": torch.einsum("cr,brhw->bchw", mix, torch.randn(8, 3, 6, 6)) + spread * torch.randn(8, 12, 6, 6)}
            for _ in range(calls)]  # fmt: skip


def run(model: nn.Module, calls) -> torch.Tensor:
    with torch.no_grad():
        found = [model(**call) for call in calls]
    return torch.cat([getattr(y, "sample", y) for y in found])


def quantized(model: nn.Module, calls, **fields):
    packed = copy.deepcopy(model)
    return packed, hfq.quantize(packed, hfq.QDiffusionConfig(**{"progress": False, **fields}), calls)


def error(model: nn.Module, calls, **fields) -> float:
    packed, _ = quantized(model, calls, **fields)
    return float((run(packed, calls) - run(model, calls)).square().mean())


def gates_of(model: nn.Module, cuts=None, bits: int = 4):
    plan = read(model)
    step = SimpleNamespace(block=SimpleNamespace(sites=plan.sites), report=None)
    how = phases.Ranges(lambda name: QuantSpec(bits, -1), lambda name: 8, cuts=cuts or {})
    return phases.roundings(step, how), plan.sites


@pytest.fixture(scope="module")
def pipe(zoo):
    """A quantized text-to-image UNet with what it was calibrated on."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        made = zoo.text_to_image(Path(folder))
    floats = copy.deepcopy(made.unet)
    calls = hfq.record_calls(made, prompts=zoo.PROMPTS, steps=2, num_inference_steps=4)
    hfq.quantize_pipeline(made, {"unet": hfq.QDiffusionConfig(bits=4, **QUICK)}, calls)
    return SimpleNamespace(pipe=made, floats=floats, calls=calls)


@pytest.mark.must_hold("q_diffusion", 1)
def test_sixteen_bits_change_nothing(pipe):
    model, report = quantized(pipe.floats, pipe.calls, bits=16, activation_bits=16)
    assert not report.packed and not attention.parts(model)
    assert (run(model, pipe.calls) - run(pipe.floats, pipe.calls)).abs().max() < 1e-4


@pytest.mark.must_hold("q_diffusion", 2)
@pytest.mark.parametrize("cuts", [{}, {"conv_shortcut": 8}])
def test_gates_start_at_the_fractional_part(cuts):
    """So that the soft weight is the weight wherever the grid reaches; both halves of a shortcut are soft."""
    model, _ = joint()
    gates, sites = gates_of(model, cuts)
    whole = gates["conv_shortcut"]
    weight = sites[0].module.weight.detach().flatten(1)
    halves = whole.halves if isinstance(whole, HalvedRounding) else (whole,)
    for half, own in zip(halves, weight.split([half.columns for half in halves], 1), strict=True):
        quotient = own / half.scale().detach()
        torch.testing.assert_close(gate(half.logits().detach().clone()), quotient - quotient.floor(), rtol=0, atol=1e-6)
        inside = (quotient > half.low) & (quotient < half.low + half.spec.max_code)
        soft = half().detach().flatten(1)
        torch.testing.assert_close(soft[inside], own[inside], rtol=0, atol=1e-5)


@pytest.mark.must_hold("q_diffusion", 3)
def test_hard_codes_are_a_neighbour(monkeypatch):
    seen = {}
    inner = phases.harden

    def harden(step, gates):
        before = {site.name: site.module.weight.detach().clone() for site in step.block.sites}
        inner(step, gates)
        seen.update({name: (before[name].flatten(1), one) for name, one in gates.items()})

    monkeypatch.setattr(phases, "harden", harden)
    torch.manual_seed(0)
    packed, _ = quantized(Plain(), correlated(), bits=3, activation_bits=16, steps=60, lr=1e-1, batch_size=8)
    (weight, rounding), = seen.values()
    codes = rounding.codes()
    lower = (weight / codes.scale.float()).floor() + codes.zero_point.float()
    found = codes.codes.float()
    assert int(codes.codes.max()) <= 7 and ((found == lower.clamp(0, 7)) | (found == (lower + 1).clamp(0, 7))).all()
    moved = found != ((weight / codes.scale.float()).round() + codes.zero_point.float()).clamp(0, 7)
    assert moved.float().mean() > 0.02
    assert torch.equal(packed.conv.packed()[0].qweight, swap_codes(codes))


def swap_codes(codes: Codes) -> torch.Tensor:
    return bitpack.pack(codes.codes, codes.spec.bits)


@pytest.mark.must_hold("q_diffusion", 4)
@pytest.mark.parametrize("bits", [3, 4])
def test_learned_rounding_beats_the_nearest_on_the_same_grid(bits):
    torch.manual_seed(0)
    model, calls = Plain().eval(), correlated()
    options = {"bits": bits, "activation_bits": 16, "lr": 1e-2, "batch_size": 16}
    nearest = error(model, calls, steps=0, **options)
    assert error(model, calls, steps=300, **options) < 0.8 * nearest


@pytest.mark.must_hold("q_diffusion", 5)
def test_halves_of_different_size_need_grids_of_their_own():
    model, calls = joint((50.0, 0.25), (0.002, 0.4))
    options = {"bits": 4, "activation_bits": 8, "steps": 0, "activation_steps": 0}
    packed, report = quantized(model, calls, **options)
    assert packed.conv_shortcut.cut == 8 and report.rows["conv_shortcut"].extra["cut"] == 8
    whole, _ = quantized(model, calls, split_shortcut=False, **options)
    assert whole.conv_shortcut.cut is None
    assert error(model, calls, **options) < 0.1 * error(model, calls, split_shortcut=False, **options)


@pytest.mark.must_hold("q_diffusion", 6)
@pytest.mark.parametrize("kernel", [1, 3])
def test_halves_on_one_grid_are_the_whole(kernel):
    """Steps that are powers of two, so that floats add up without rounding."""
    model, calls = joint(kernel=kernel)
    spec = QuantSpec(4, -1)
    codes = Codes(torch.randint(0, 16, (6, 16 * kernel**2), dtype=torch.uint8), torch.full((6, 1), 2.0**-4).half(),
                  torch.randint(0, 16, (6, 1), dtype=torch.uint8), spec)  # fmt: skip
    halves = [Codes(part.contiguous(), codes.scale, codes.zero_point, spec) for part in codes.codes.chunk(2, 1)]
    params = (torch.tensor([2.0**-5]), torch.tensor([117], dtype=torch.uint8))
    whole, cut = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for one in (whole, cut):
            one.conv_shortcut.bias.copy_(torch.arange(6) / 8)
    options = {"activation": STATIC, "activation_params": params}
    swap.swap(whole, "conv_shortcut", codes, **options)
    swap.swap(cut, "conv_shortcut", halves[0], second=SecondHalf(8, halves[1], params), **options)
    assert torch.equal(cut.conv_shortcut.dequantize(), whole.conv_shortcut.dequantize())
    assert torch.equal(run(cut, calls), run(whole, calls))


@pytest.mark.must_hold("q_diffusion", 7)
def test_sums_of_integers_are_the_fake_quantized_output():
    """Zero-padded, with zero points that are not 0: the border is that of zeros, not of code 0."""
    torch.manual_seed(0)
    calls = [{"sample": call["sample"] + 1.0} for call in correlated(2)]
    packed, _ = quantized(Plain(), calls, bits=4, **QUICK)
    layer = packed.conv
    params = layer.input_of("weight")[0]
    assert int(params[1]) not in (0, 255) and int(layer.zero_point.min()) > 0
    for call in calls:
        x, bias = call["sample"].double(), layer.bias.double()
        fake = activation.fake(x, STATIC, tuple(t.double() for t in params))
        expected = F.conv2d(fake, layer.dequantize(dtype=torch.float64), bias, padding=1)
        torch.testing.assert_close(run(packed, [call]).double(), expected, rtol=1e-4, atol=1e-4)
        # The formula: Dw Da (acc - zw sum(qx) - za sum(qw) + K zw za) + bias, the border filled with code za.
        qx = F.pad(activation.quantize(x, STATIC, params).codes.double(), (1, 1, 1, 1), value=float(params[1]))
        kept = layer.packed()[0]
        qw = bitpack.unpack(kept.qweight, 4, 108).double().reshape(8, 12, 3, 3)
        zw, za = layer.zero_point.double().reshape(1, -1, 1, 1), float(params[1])
        ones = torch.ones(1, 12, 3, 3, dtype=torch.float64)
        acc = F.conv2d(qx, qw) - zw * F.conv2d(qx, ones) - za * qw.sum((1, 2, 3)).reshape(1, -1, 1, 1) + 108 * zw * za
        scale = layer.scale.double().reshape(1, -1, 1, 1) * params[0].double()
        torch.testing.assert_close(acc * scale + bias.reshape(1, -1, 1, 1), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.must_hold("q_diffusion", 8)
@pytest.mark.parametrize("guided", [True, False])
def test_the_trajectory_is_sampled_uniformly(guided, zoo, pipe):
    """As many timesteps as asked for, as many rows at each, both halves of guidance; from the first step on."""
    if guided:
        calls = hfq.record_calls(pipe.pipe, prompts=zoo.PROMPTS, steps=3, samples=3, num_inference_steps=9)
    else:
        calls = hfq.record_calls(zoo.unconditional(), steps=3, samples=3, num_inference_steps=10)
    times = calls.timesteps.unique(sorted=True).flip(0)
    assert len(times) == 3 and all(calls.at(t).samples == (6 if guided else 3) for t in times)
    gaps = times.diff().abs()
    assert gaps.max() - gaps.min() <= 1


@pytest.mark.must_hold("q_diffusion", 9)
def test_dead_channels_and_positive_inputs():
    model, calls = joint()
    with torch.no_grad():
        model.conv_shortcut.weight[2] = 0
        model.conv_shortcut.bias.zero_()
    calls = [{name: x.abs() + 3 for name, x in call.items()} for call in calls]
    packed, _ = quantized(model, calls, bits=4, **QUICK)
    found = run(packed, calls)
    assert torch.isfinite(found).all() and not found[:, 2].any()
    layer = packed.conv_shortcut
    for half in ("weight", "second"):
        scale, zero = layer.input_of(half)[0]
        assert int(zero) == 0 and float(activation.fake(torch.zeros(1), STATIC, (scale, zero))) == 0
        assert float(scale) * 255 > 3


@pytest.mark.must_hold("q_diffusion", 10)
def test_probabilities_keep_their_zeros(pipe):
    parts = attention.parts(pipe.pipe.unet)
    assert len(parts) == 8
    for part in parts.values():
        spec, params = part.formats["probabilities"], part.range_of("probabilities")
        assert int(params[1]) == 0 and not spec.symmetric
        p = torch.tensor([0.0, 1e-9, 0.3])
        assert float(activation.fake(p, spec, params)[0]) == 0


@pytest.mark.must_hold("q_diffusion", 11)
def test_reloading_needs_no_data(pipe, zoo, tmp_path):
    picture = zoo.draw(pipe.pipe)
    pipe.pipe.save_pretrained(tmp_path)
    again = type(pipe.pipe).from_pretrained(tmp_path, safety_checker=None)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(zoo.draw(again), picture)
    assert run(again.unet, pipe.calls).equal(run(pipe.pipe.unet, pipe.calls))


def test_every_layer_is_packed_and_every_shortcut_cut(pipe):
    model, report = pipe.pipe.unet, pipe.pipe.unet.hfq_report
    left = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert not left and report.rows["conv_out"].status == report.rows["conv_in"].status == "packed"
    cuts = {name: module.cut for name, module in model.named_modules() if getattr(module, "cut", None)}
    # The up blocks join what comes from below with what was kept: channels of the first resnet, then of this level.
    assert cuts == {"up_blocks.0.resnets.0.conv_shortcut": 32, "up_blocks.0.resnets.1.conv_shortcut": 32,
                    "up_blocks.1.resnets.0.conv_shortcut": 32, "up_blocks.1.resnets.1.conv_shortcut": 16}  # fmt: skip
    assert {row.extra["activation"]["bits"] for row in report.packed} == {8}
    assert any(name.endswith(" inputs") for name in report.curves) and "conv_in" in report.curves


def test_learned_steps_of_inputs_help():
    """At 3 bits the step with the least error of the input is not that of the output."""
    torch.manual_seed(0)
    model, calls = Plain().eval(), correlated()
    options = {"bits": 8, "activation_bits": 3, "steps": 0, "activation_range": "max", "batch_size": 16}
    assert error(model, calls, activation_steps=150, lr_activation=1e-2, **options) < 0.9 * error(
        model, calls, activation_steps=0, **options)


def test_options_reach_the_layers(pipe):
    model, report = quantized(pipe.floats, pipe.calls[:1], bits=4, softmax_bits=16, running_ranges=True,
                              activation_symmetric=True, keep_time_embedding=True, loss_axis="mean",
                              weight_range="max", **{**QUICK, "steps": 1, "activation_steps": 1})  # fmt: skip
    parts = attention.parts(model).values()
    assert parts and all(p.formats["probabilities"] is None and p.formats["query"].symmetric for p in parts)
    assert report.rows["time_embedding.linear_1"].status == "float"
    assert model.conv_in.activation.symmetric and torch.isfinite(run(model, pipe.calls[:1])).all()


def test_running_ranges_follow_the_calls():
    """Means of the ends of the calls with weights that fade, not the ends of all."""
    torch.manual_seed(0)
    model = Plain().eval()
    calls = [{"sample": torch.full((1, 12, 4, 4), float(i)) - 1} for i in (2, 5)]
    packed, _ = quantized(model, calls, running_ranges=True, steps=0, activation_steps=0)
    scale, zero = packed.conv.input_of("weight")[0]
    torch.testing.assert_close(float(scale) * 255, 0.95 * 1 + 0.05 * 4, rtol=1e-5, atol=0)


def test_an_interrupted_run_goes_on_to_the_same_bytes(zoo, tmp_path, monkeypatch):
    torch.manual_seed(5)
    model = zoo.unet()
    calls = [{"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor(t)} for t in (3, 30)]
    options = {"bits": 4, **QUICK, "steps": 2, "activation_steps": 2}
    whole, _ = quantized(model, calls, **options)
    for stop, phase in ((5, "fit_weights"), (7, "fit_inputs")):
        inner, done = getattr(phases, phase), []

        def stopping(step, *args, inner=inner, done=done, stop=stop):
            if len(done) == stop:
                raise KeyboardInterrupt
            done.append(step.block.name)
            return inner(step, *args)

        monkeypatch.setattr(phases, phase, stopping)
        with pytest.raises(KeyboardInterrupt):
            quantized(model, calls, work_dir=tmp_path, **options)
        monkeypatch.setattr(phases, phase, inner)
    again, _ = quantized(model, calls, work_dir=tmp_path, **options)
    one, other = again.state_dict(), whole.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_groups_are_refused():
    with pytest.raises(ConfigError, match="one grid an output channel"):
        hfq.QDiffusionConfig(group_size=64)
    assert hfq.QDiffusionConfig.fast().steps == 2000
