"""DGQ: groups along the wider axis, banks by noise level, and probabilities whose grid follows the prompt."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hfq
from hfq import kernels
from hfq.calibration import clusters
from hfq.calibration.extremes import Extremes
from hfq.errors import ConfigError, DataError, QuantizationError
from hfq.formats import ActivationSpec, QuantSpec, activation, bitpack, groups, log
from hfq.formats.log import LogSpec
from hfq.kernels import PackedWeight, grouped, grouped_products
from hfq.kernels.geometry import Geometry
from hfq.kernels.grouped import Bank
from hfq.kernels.grouped_products import Probabilities
from hfq.layers import attention, swap, times
from hfq.layers.grouped_attention import GroupedAttention
from hfq.layers.packed import PackedModule
from hfq.reconstruction import grouping
from hfq.reconstruction.grouping import Groups
from hfq.rounding import nearest

pytest.importorskip("diffusers")
QUICK: dict[str, Any] = {"steps": 0, "groups": 4, "progress": False}


def ends_of(x: torch.Tensor) -> Extremes:
    ends = Extremes()
    ends.update(x)
    return ends


def bank_of(x: torch.Tensor, bits: int, count: int = 8, **more: Any) -> Bank:
    """What the method makes of the input ``x`` ``[B, rows, columns]`` of a linear."""
    one = grouping.grouping_of(ends_of(x), bits, Groups(count, **more), x.shape[-1])
    return Bank.of(one.axis, one.scale, one.zero, one.labels, bits)


def error(x: torch.Tensor, bits: int, count: int, **more: Any) -> float:
    return float((grouped.decoded(x, bank_of(x, bits, count, **more)) - x).square().mean())


def wide(channels: bool) -> torch.Tensor:
    """Normal numbers with two channels, or four tokens, far beyond the others."""
    x = torch.randn(2, 256, 320, generator=torch.Generator().manual_seed(1))
    if channels:
        x[..., [7, 200]] *= 15
    else:
        x[:, [3, 90, 91, 250]] *= 20
    return x


def small(kind: str = "text_unet") -> Any:
    """A UNet of one resolution, to be fast."""
    import diffusers

    torch.manual_seed(0)
    sizes = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "norm_num_groups": 8,
             "block_out_channels": (16,), "attention_head_dim": 8}  # fmt: skip
    if kind == "unet":
        return diffusers.UNet2DModel(down_block_types=("AttnDownBlock2D",), up_block_types=("UpBlock2D",), **sizes,
                                     add_attention=False).eval()  # fmt: skip
    return diffusers.UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), mid_block_type=None,
        cross_attention_dim=16, **sizes).eval()  # fmt: skip


def calls_of(kind: str = "text_unet", timesteps: tuple[int, ...] = (87, 47, 7), rows: int = 2) -> list[dict[str, Any]]:
    generator, channels = torch.Generator().manual_seed(3), 4
    found = []
    for t in timesteps:
        call = {"sample": torch.randn(rows, channels, 8, 8, generator=generator), "timestep": torch.tensor(t)}
        if kind == "text_unet":
            call["encoder_hidden_states"] = torch.randn(rows, 16, 16, generator=generator)
        found.append(call)
    return found


def quantized(kind: str = "text_unet", calls: Any = None, **more: Any) -> tuple[Any, Any]:
    model = small(kind)
    options = {"bits": 8, "activation_bits": 8, **QUICK, **more}
    return model, hfq.quantize(model, hfq.DGQConfig(**options), calls or calls_of(kind))


def output(model: Any, calls: Any = None) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(**call).sample for call in calls or calls_of()])


@pytest.fixture(scope="module")
def done() -> tuple[Any, Any]:
    """A text-conditional UNet of eight bits."""
    return quantized()


# -- groups


@pytest.mark.must_hold("dgq", 1)
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_one_group_is_one_grid(bits: int) -> None:
    x = wide(channels=True)
    low, high = x.min(), x.max()
    delta = (high - low) / ((1 << bits) - 1)
    want = (((x * (1 / delta)).round() + (-low * (1 / delta)).round()).clamp(0, (1 << bits) - 1)
            - (-low * (1 / delta)).round()) * delta  # fmt: skip
    assert torch.equal(grouped.decoded(x, bank_of(x, bits, 1)), want)
    spec = ActivationSpec(bits, False, "tensor", dynamic=False)
    params = activation.range_parameters(low.reshape(1), high.reshape(1), spec)
    assert torch.equal(activation.fake(x, spec, params), want)


@pytest.mark.must_hold("dgq", 2)
def test_groups_keep_outliers_from_the_others() -> None:
    for seed in range(12):
        torch.manual_seed(seed)
        x = torch.randn(2, 24, 40) * torch.exp(torch.randn(40)) + torch.randn(24, 1) + 3 * torch.randn(1)
        for bits in (3, 6):
            for count in (2, 8):
                for axis in ("spread", "rows", "columns", "step"):
                    assert error(x, bits, count, axis=axis) <= 1.05 * error(x, bits, 1)
    for channels in (True, False):
        x = wide(channels)
        assert error(x, 6, 8) <= 0.03 * error(x, 6, 1)
        other = "rows" if channels else "columns"
        assert error(x, 6, 8, axis=other) > 4 * error(x, 6, 8)


@pytest.mark.must_hold("dgq", 3)
def test_the_wider_axis_is_grouped() -> None:
    assert bank_of(wide(channels=True), 6).axis == "columns"
    assert bank_of(wide(channels=False), 6).axis == "rows"
    # A tie: of a linear the rows win, of a convolution the (channel, tap) pairs.
    flat = Extremes(rows=(torch.zeros(6), torch.ones(6)), columns=(torch.zeros(5), torch.ones(5)))
    axes = [grouping.grouping_of(flat, 8, Groups(2), 5, unfolded=unfolded).axis for unfolded in (False, True)]
    assert axes == ["rows", "columns"]


@pytest.mark.must_hold("dgq", 4)
@pytest.mark.parametrize("channels", [True, False])
def test_nothing_in_the_calibrated_range_is_clipped(channels: bool) -> None:
    x = wide(channels)
    bank = bank_of(x, 6)
    scale, _ = grouped.parameters(x, bank)
    assert ((grouped.decoded(x, bank, torch.float64) - x).abs() <= scale * 0.5 * (1 + 1e-4)).all()
    largest = x.abs().max()
    assert (grouped.decoded(x, bank).abs().max() - largest).abs() <= 0.5 * scale.max()


@pytest.mark.must_hold("dgq", 5)
@pytest.mark.parametrize("bits", [4, 8])
def test_partial_sums_of_permuted_columns(bits: int) -> None:
    torch.manual_seed(0)
    spec, rows, columns = QuantSpec(bits, -1), 48, 77
    codes = nearest.solve(torch.randn(rows, columns), spec)
    weight = PackedWeight(bitpack.pack(codes.codes, bits), codes.scale, codes.zero_point, spec, columns, rows)
    labels = torch.tensor([6] * 40 + [1] * 33 + [4] * 3 + [2])[torch.randperm(columns)]  # four of eight are empty
    bank = Bank.of("columns", torch.rand(8) + 0.05, torch.randint(-40, 300, (8,)).float(), labels, 8)
    x = 3 * torch.randn(2, 29, columns)
    want = grouped.decoded(x, bank, torch.float64) @ kernels.dequantize(weight, torch.float64).t()
    runtime = kernels.prepare(weight, dtype=torch.float32, activation=grouped.row_spec(8))
    with kernels.use(grouped="partial_sums"):
        found = grouped.linear(x, bank, runtime)
    assert (found - want).norm() <= 1e-5 * want.norm()
    assert (grouped.linear(x, bank_of(x, 8), runtime) - want).norm() > 1e-3 * want.norm()


@pytest.mark.must_hold("dgq", 6)
@pytest.mark.parametrize("geometry", [
    Geometry(5, 7, (3, 3), pads=(1, 1, 1, 1)), Geometry(5, 7, (3, 3), stride=(2, 2), pads=(0, 1, 0, 1)),
    Geometry(5, 7, (1, 1)), Geometry(5, 7, (3, 3), pads=(2, 2, 2, 2), dilation=(2, 2)),
])  # fmt: skip
def test_the_unfolded_convolution_is_the_convolution(geometry: Geometry) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 9, 8), torch.randn(geometry.weight_shape)
    top, bottom, left, right = geometry.pads
    want = F.conv2d(F.pad(x, (left, right, top, bottom)), weight, None, geometry.stride, 0, geometry.dilation)
    parts = torch.cat([part for _, _, part in grouped.unfolded(x, geometry)])
    found = (parts @ weight.flatten(1).t()).transpose(1, 2).reshape(want.shape)
    assert (found - want).abs().max() < 1e-4
    if geometry.taps == 1:  # channels last: nothing is copied
        last = x.contiguous(memory_format=torch.channels_last)
        assert next(grouped.unfolded(last, geometry))[2].data_ptr() == last.data_ptr()


# -- attention


@pytest.mark.must_hold("dgq", 7)
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_powers_of_two_below_the_maximum(bits: int) -> None:
    how = Probabilities(LogSpec(bits, "2", "none"))
    p = torch.softmax(4 * torch.randn(2, 3, 5, 40, generator=torch.Generator().manual_seed(bits)), -1)
    p[1, :, :, 30:] = 0
    numbers, top = grouped_products.rounded(p, how)
    assert top.shape == (2, 1, 1, 1) and torch.equal(top[:, 0, 0, 0], p.amax((1, 2, 3)))
    codes = log.encode(p, top, how.spec)
    assert (codes[p == top] == 0).all() and codes.max() == (1 << bits) - 1
    inside = (p / top >= 2.0 ** -((1 << bits) - 1.5)) & (p > 0)
    assert (((numbers * top - p) / p).abs()[inside] <= 0.4143).all() and inside.sum() > 100
    assert torch.allclose(numbers[p == 0], torch.tensor(2.0 ** -((1 << bits) - 1)))
    assert torch.equal(log.encode(p * 0.0371, top * 0.0371, how.spec), codes)
    nothing, least = grouped_products.rounded(torch.zeros(1, 1, 2, 3), how)
    assert torch.isfinite(nothing).all() and float((nothing * least).max()) < 1e-30


def banks_for(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bits: int = 8) -> Any:
    return tuple(bank_of(x.flatten(0, 1), bits, 4) for x in (q, k, v))


@pytest.mark.must_hold("dgq", 8)
def test_the_first_column_is_exact() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 16, 8), 0.5 * torch.randn(1, 2, 77, 8), torch.randn(1, 2, 77, 8)
    q[..., 0] = 4.0
    k[:, :, 0, 0], k[:, :, 1:, 0] = 4.8, 0.0  # the start token has nine tenths of the attention
    v[:, :, 0] *= 0.05  # and little to say
    p = torch.softmax(q @ k.transpose(-1, -2) * 8**-0.5, -1)
    assert 0.85 < float(p[..., 0].mean()) < 0.97
    want = p @ v
    log8 = LogSpec(8, "2", "none")
    banks = banks_for(q, k[:, :, 1:], v)
    # Bit-exact: with values that single out the first key, what comes out is its probability.
    only = torch.zeros_like(v)
    only[:, :, 0] = 1.0
    unit = Bank.of("tensor", torch.ones(1), torch.zeros(1), torch.zeros(0, dtype=torch.int64), 8)
    scores = torch.cat([grouped.decoded(q, banks[0]) @ k[:, :, :1].transpose(-1, -2),
                        grouped.decoded(q, banks[0]) @ grouped.decoded(k[:, :, 1:], banks[1]).transpose(-1, -2)], -1)
    exact = torch.softmax(scores * 8**-0.5, -1)[..., :1]
    found = grouped_products.attend(q, k, only, None, 8**-0.5, (*banks[:2], unit), Probabilities(log8, start=True))
    assert torch.allclose(found, exact.expand_as(found), rtol=1e-5, atol=0)
    uniform = ActivationSpec(8, False, "tensor", dynamic=False)
    errors = {}
    for name, how in (("split", Probabilities(log8, start=True)), ("uniform", Probabilities(uniform)),
                      ("log", Probabilities(log8))):  # fmt: skip
        own = banks if how.start else banks_for(q, k, v)
        errors[name] = float((grouped_products.attend(q, k, v, None, 8**-0.5, own, how) - want).norm())
    assert errors["split"] < errors["uniform"] and errors["split"] < errors["log"]


@pytest.mark.must_hold("dgq", 9)
def test_a_picture_does_not_depend_on_what_is_drawn_beside_it(done: tuple[Any, Any]) -> None:
    q, k, v = torch.randn(3, 2, 16, 8), torch.randn(3, 2, 9, 8), torch.randn(3, 2, 9, 8)
    k[2] *= 9  # the largest probability of all is one of the last sample's
    banks = banks_for(q, k[:, :, 1:], v)
    for whole in (False, True):
        how = Probabilities(LogSpec(4, "2", "none"), whole, start=True)
        every = grouped_products.attend(q, k, v, None, 0.3, banks, how)
        single = torch.cat([grouped_products.attend(q[i : i + 1], k[i : i + 1], v[i : i + 1], None, 0.3, banks, how)
                            for i in range(3)])  # fmt: skip
        assert torch.allclose(every, single, atol=1e-6) != whole
    call = calls_of(rows=3)[1]
    alone = {**call, "sample": call["sample"][1:2], "encoder_hidden_states": call["encoder_hidden_states"][1:2]}
    call["encoder_hidden_states"] = call["encoder_hidden_states"] * torch.tensor([1.0, 1.0, 30.0]).view(3, 1, 1)
    # In a whole model the last bits of float layers, which depend on the batch, may move a code.
    assert (output(done[0], [call])[1:2] - output(done[0], [alone])).norm() < 0.05 * output(done[0], [alone]).norm()


def test_which_attentions_are_split(done: tuple[Any, Any]) -> None:
    parts = attention.parts(done[0])
    assert len(parts) > 2 and all(isinstance(part, GroupedAttention) for part in parts.values())
    for name, part in parts.items():
        assert part.how.start == name.endswith("attn2") and part.how.spec == LogSpec(8, "2", "none")
        keys = part.key.spec
        assert "rows" not in keys.axes or keys.rows == (15 if part.how.start else keys.rows)
    auto, report = quantized(start_token="auto")
    rows = [row for row in report.attached if row.kind == "attention"]
    assert rows and all(row.extra["first_share"] < 0.5 and row.extra["first_key"] == "coded" for row in rows)
    assert not any(part.how.start for part in attention.parts(auto).values())


# -- noise levels


@pytest.mark.must_hold("dgq", 10)
def test_any_timestep_has_a_bank(done: tuple[Any, Any]) -> None:
    model, _ = done
    assert times.of(model).levels == (87.0, 47.0, 7.0)
    base = calls_of()[1]
    for t in (0, 1, 30, 46.6, 60, 99, 999, torch.tensor(5), torch.tensor([8, 8])):
        assert torch.isfinite(output(model, [{**base, "timestep": t}])).all()
    seen: list[int] = []
    layer = next(m for m in model.modules() if isinstance(m, PackedModule) and m.banks is not None)
    old = layer.banks.at
    layer.banks.at = lambda index: (seen.append(index), old(index))[1]  # type: ignore[method-assign]
    for t in (999, 68, 66, 28, 26, 0):
        output(model, [{**base, "timestep": t}])
    del layer.banks.at
    assert seen == [0, 0, 1, 1, 2, 2]


def test_another_scheduler_number_of_steps_and_batch(zoo: Any, tmp_path: Any) -> None:
    diffusers = pytest.importorskip("diffusers")
    pipe = zoo.text_to_image(tmp_path)
    hfq.quantize_pipeline(pipe, {"unet": hfq.DGQConfig(bits=4, activation_bits=8, **QUICK)}, zoo.PROMPTS[:2], steps=2,
                          num_inference_steps=4)  # fmt: skip
    first = zoo.draw(pipe)
    assert torch.equal(zoo.draw(pipe), first)
    assert torch.isfinite(zoo.draw(pipe, num_inference_steps=7)).all()
    pipe.scheduler = diffusers.EulerDiscreteScheduler(num_train_timesteps=100)
    assert torch.isfinite(zoo.draw(pipe, prompt=["a two", "a five", "a six"])).all()


def test_banks_of_levels_beat_one_for_all() -> None:
    calls = calls_of("unet", (90, 10))
    calls[0]["sample"] *= 12
    want = output(small("unet"), calls)
    errors = [float((output(quantized("unet", calls, activation_bits=4, time_aware=aware)[0], calls) - want).norm())
              for aware in (True, False)]  # fmt: skip
    assert errors[0] < 0.9 * errors[1]


# -- the whole model


@pytest.mark.must_hold("dgq", 11)
def test_the_first_and_the_last_convolution_stay(done: tuple[Any, Any]) -> None:
    model, report = done
    plain = small()
    for name in ("conv_in", "conv_out"):
        one = model.get_submodule(name)
        assert type(one) is nn.Conv2d and torch.equal(one.weight, plain.get_submodule(name).weight)
        assert "first and the last" in report.rows[name].reason
    left = [name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert left == ["conv_in", "conv_out"]
    for layer in swap.packed_modules(model).values():
        assert layer.banks is not None and layer.banks.spec.groups == 4 and len(layer.banks.spec.axes) == 3
    assert set(model.time_embedding.linear_1.banks.spec.axes) == {"tensor"}  # vectors have one grid
    asked, _ = quantized(overrides={"conv_out": {"bits": 8}})
    assert swap.packed_modules(asked)["conv_out"].banks is not None


CHILD = """
import sys, torch, hfq
from diffusers import UNet2DConditionModel
folder = sys.argv[1]
model = UNet2DConditionModel.from_pretrained(folder)
kept = torch.load(folder + "/kept.pt")
with torch.no_grad():
    found = torch.cat([model(**call).sample for call in kept["calls"]])
state = model.state_dict()
assert torch.equal(found, kept["output"]), float((found - kept["output"]).abs().max())
for name, tensor in kept["state"].items():
    assert torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype, name
print(sum("labels" in name for name in kept["state"]))
"""


@pytest.mark.must_hold("dgq", 12)
def test_a_new_process_draws_the_same(done: tuple[Any, Any], tmp_path: Any) -> None:
    model, _ = done
    model.save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save({"calls": calls_of(), "output": output(model), "state": state}, tmp_path / "kept.pt")
    child = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr[-2000:]
    assert int(child.stdout) == sum("labels" in name for name in state) > 20
    manifest = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["manifest"]
    assert manifest["noise_levels"] == [87.0, 47.0, 7.0]


def test_close_to_the_float_model_and_better_than_one_group(done: tuple[Any, Any]) -> None:
    want = output(small())
    errors = {"W8A8": float((output(done[0]) - want).norm() / want.norm())}
    assert 0 < errors["W8A8"] < 0.05
    for count in (1, 8):
        model, _ = quantized(activation_bits=4, groups=count)
        errors[str(count)] = float((output(model) - want).norm() / want.norm())
    assert errors["8"] < 0.7 * errors["1"]


def test_learned_weights_beat_the_nearest_ones_and_resume(tmp_path: Any, monkeypatch: Any) -> None:
    calls, errors = calls_of("unet"), {}
    want = output(small("unet"), calls)
    learn = {"bits": 3, "activation_bits": 16, "batch_size": 4, "lr": 2e-2, "penalty": 1e-3}
    for steps in (0, 40):
        model, _ = quantized("unet", **{**learn, "steps": steps})
        errors[steps] = float((output(model, calls) - want).norm())
        assert not any(m.banks is not None for m in swap.packed_modules(model).values()) and not attention.parts(model)
    assert errors[40] < 0.95 * errors[0]
    from hfq.reconstruction import phases

    options = {"bits": 4, "activation_bits": 8, "steps": 1, "batch_size": 4, "progress": False}
    whole, again, stopped = small("unet"), small("unet"), small("unet")
    hfq.quantize(whole, hfq.DGQConfig(**options), calls)
    done, pack = [], phases.pack

    def stopping(step: Any, *given: Any) -> None:
        if len(done) == 6:
            raise KeyboardInterrupt
        done.append(step.block.name)
        pack(step, *given)

    with monkeypatch.context() as patch:
        patch.setattr(phases, "pack", stopping)
        with pytest.raises(KeyboardInterrupt):
            hfq.quantize(stopped, hfq.DGQConfig(**options, work_dir=tmp_path), calls)
    hfq.quantize(again, hfq.DGQConfig(**options, work_dir=tmp_path), calls)
    assert all(torch.equal(one, other) for one, other in zip(whole.state_dict().values(), again.state_dict().values(),
                                                             strict=True))  # fmt: skip


def test_options() -> None:
    model, report = quantized(softmax="uniform", softmax_bits=6, renormalise=True, group_range="mean", axis="step",
                              attention=True, weight_range="max", activation_bits=6)  # fmt: skip
    how = next(iter(attention.parts(model).values())).how
    assert how.spec == ActivationSpec(6, False, "tensor", dynamic=False) and how.renormalise
    assert torch.isfinite(output(model)).all()
    assert report.rows["down_blocks.0.resnets.0.conv1"].asked["activation_bits"] == 6
    model, _ = quantized(attention=False, axis="columns")
    assert not attention.parts(model)
    axes = {axis for m in swap.packed_modules(model).values() for axis in m.banks.spec.axes}
    assert axes == {"columns", "tensor"}
    other = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(output(other), output(model))


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="group_size=32"):
        hfq.DGQConfig(group_size=32)
    call = calls_of()[0]
    with pytest.raises(DataError, match="timestep"):
        quantized(calls=[{key: value for key, value in call.items() if key != "timestep"}])
    with pytest.raises(DataError, match="different timesteps"):
        quantized(calls=[{**call, "timestep": torch.tensor([3, 4])}])
    with pytest.raises(QuantizationError, match="takes no timestep"):
        hfq.quantize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 3, 3)),
                     hfq.DGQConfig(**QUICK), [torch.randn(2, 3, 8, 8)])  # fmt: skip
    assert groups.largest_zero(1, 8) == groups.LARGEST_ZERO and clusters.spread((torch.zeros(2), torch.ones(2))) == 0
