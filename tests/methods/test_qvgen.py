"""QVGen: what its specification says must hold, on toys and on a tiny video pipeline, and what every method for
pipelines owes its users."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hfq
from hfq.errors import ConfigError, DataError, QuantizationError
from hfq.formats import ActivationSpec, QuantSpec, activation, affine
from hfq.layers import swap, times
from hfq.rounding.learned_step import weight_grid
from hfq.training.decay import Decay, refactorise
from hfq.training.helped import HelpedWeight
from hfq.training.helped_model import HelpedModel
from hfq.training.progress import Saved

diffusers = pytest.importorskip("diffusers")

W3 = QuantSpec(3, zero_point="float", scale_dtype="float32")


class Toy(nn.Module):
    """A denoiser of tokens ``[B, T, 16]`` with a part that reads the timestep."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.time, self.up, self.mix = nn.Linear(16, 16), nn.Linear(16, 48), nn.Linear(48, 48)
        self.down, self.norm = nn.Linear(48, 16), nn.LayerNorm(16)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():  # rows with outliers, as they are in trained models
            for layer in (self.up, self.mix, self.down):
                layer.weight.mul_(torch.randn(layer.weight.shape, generator=generator).exp())
                layer.weight.mul_(1.5 / layer.weight.norm(dim=1, keepdim=True))

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        angle = timestep.reshape(-1, 1, 1).float() / 1000 * torch.arange(1, 17)
        x = self.norm(hidden_states) + self.time(torch.cos(angle).expand(len(hidden_states), -1, -1))
        return hidden_states + self.down(F.gelu(self.mix(F.gelu(self.up(x)))))


def calls_of(timesteps: tuple[float, ...] = (999.0, 700.0, 400.0, 60.0), rows: int = 4) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    return [{"hidden_states": torch.randn(rows, 12, 16, generator=generator), "timestep": torch.full((rows,), t)}
            for t in timesteps]  # fmt: skip


def config(**more: Any) -> Any:
    small = {"bits": 3, "activation_bits": 3, "rank": 4, "steps": 24, "calls_per_step": 2, "lr": 1e-3,
             "check_calls": 0, "progress": False}  # fmt: skip
    return hfq.QVGenConfig(**{**small, **more})


def quantized(seed: int = 0, **more: Any) -> tuple[Any, Any]:
    model = Toy(seed)
    return model, hfq.quantize(model, config(**more), calls_of())


@torch.no_grad()
def outputs(model: Any, calls: Any = None) -> torch.Tensor:
    return torch.cat([model(**call) for call in calls or calls_of()])


def distance(model: Any, seed: int = 0) -> float:
    return float((outputs(model) - outputs(Toy(seed))).square().mean())


def digest(model: Any) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def matrix(rows: int = 24, columns: int = 40) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(5))


# What must hold


@pytest.mark.must_hold("qvgen", 1)
def test_sixteen_bits_change_nothing():
    model, report = quantized(bits=16, activation_bits=16)
    assert not report.packed and (outputs(model) - outputs(Toy())).abs().max() < 1e-4
    # With a module of rank 0 as well, a step of training starts from the float model but for the rounding.
    free = HelpedModel(Toy(), [], lambda name: W3, {}, times.NoiseLevels([500.0]), lambda rank: None)
    call = calls_of()[0]
    with times.at(999.0), free.student.running():
        assert (free.student(call) - Toy()(**call)).abs().max() < 1e-4


@pytest.mark.must_hold("qvgen", 2)
def test_the_module_starts_as_the_error_of_rounding():
    weight = matrix()
    plain = float((HelpedWeight(weight, W3)().detach() - weight).norm())
    errors = [float((HelpedWeight(weight, W3, Decay(rank, 1))().detach() - weight).norm()) for rank in range(1, 25)]
    assert all(a > b for a, b in zip([plain, *errors], errors, strict=False))
    assert errors[-1] < 1e-5 * float(weight.norm())


@pytest.mark.must_hold("qvgen", 3)
def test_factors_of_a_phase():
    for curve, length in (("cosine", 333), ("cosine", 444), ("linear", 20_000)):
        decay = Decay(32, length, curve=curve)
        for phase, rank in enumerate((32, 16, 8, 4, 2, 1)):
            keep, shares = rank // 2, []
            for tau in (0, 1, length // 3, length // 2, length - 1):
                found = decay.factors(phase * length + tau)
                assert (found[:keep] == 1).all() and not found[rank:].any()
                assert (found[keep:rank] == found[keep]).all()
                shares.append(float(found[keep]))
            assert shares[0] == 1 and shares == sorted(shares, reverse=True) and shares[-1] < 1e-4
    assert Decay(32, 100).factors(50)[-1] == pytest.approx(0.5)


@pytest.mark.must_hold("qvgen", 4)
def test_the_end_of_a_phase():
    left, right = torch.randn(24, 8), torch.randn(8, 40)
    kept = left[:, :4] @ right[:4]
    new_left, new_right = refactorise(left, right, 4)
    assert (new_left @ new_right - kept).norm() < 1e-5 * kept.norm()
    assert not new_left[:, 4:].any() and not new_right[4:].any()
    gram = new_left[:, :4].T @ new_left[:, :4]
    sizes = gram.diagonal().sqrt()
    assert (gram - gram.diagonal().diag()).abs().max() < 1e-4 * gram.max() and (sizes.diff() <= 0).all()
    # The same in a weight that trains: nothing jumps where a phase ends, as what was cut off had faded.
    weight = HelpedWeight(matrix(), W3, Decay(8, 1000))
    weight.advance(999)
    before = weight.helper().detach().clone()
    weight.advance(1000)
    assert weight.rank == 8 // 2 and (weight.helper() - before).norm() < 1e-4 * before.norm()


@pytest.mark.must_hold("qvgen", 5)
def test_the_sequence_of_ranks():
    decay = Decay(32, 7)
    assert [decay.rank_at(7 * phase) for phase in range(7)] == [32, 16, 8, 4, 2, 1, 0] and decay.steps == 42
    assert [decay.rank_at(7 * phase + 6) for phase in range(6)] == [32, 16, 8, 4, 2, 1]
    assert Decay(3, 1).ranks == (3, 1, 0)
    schedule = hfq.QVGenConfig().schedule
    assert schedule(32).phase_steps == 2000 // 6 and schedule(1000).rank == 32 and schedule(5).ranks == (5, 2, 1, 0)
    assert schedule(32).rank_at(1998) == 0 and hfq.QVGenConfig(rank=0).schedule(32) is None
    assert hfq.QVGenConfig(removal="at_once").schedule(32).factors(1999).tolist() == [1.0] * 32
    assert hfq.QVGenConfig(module_warmup=200).schedule(32).factors(199).tolist() == [1.0] * 32


@pytest.mark.must_hold("qvgen", 6)
def test_nothing_is_left_of_the_module():
    weight = HelpedWeight(matrix(), W3, Decay(4, 5))
    for step in range(16):
        weight.advance(step)
        assert weight.rank == (4, 2, 1, 0)[step // 5]
    plain = affine.fake(weight.latent, *weight_grid(weight.scale, weight.zero_point, W3), W3)
    assert torch.equal(weight(), plain) and torch.equal(affine.dequantize(weight.codes()), plain)
    model, _ = quantized()
    leaves = {name.rpartition(".")[2] for name in model.state_dict()}
    assert leaves == {"weight", "bias", "qweight", "scale", "zero_point", "input_factor"}


@pytest.mark.must_hold("qvgen", 7)
def test_the_module_is_never_merged():
    """Of the tuner the same in test_adapter_tuners.py."""
    weight = HelpedWeight(matrix(), W3, Decay(4, 5))
    with pytest.raises(QuantizationError, match="rank 4 has no codes"):
        weight.codes()
    summed = affine.fake(weight.latent + weight.helper(), *weight_grid(weight.scale, weight.zero_point, W3), W3)
    assert (summed - weight()).abs().max() > 0
    helped = HelpedModel(Toy(), hfq.graph.read(Toy()).every_site[:0], lambda name: W3, {}, times.NoiseLevels([1.0]),
                         lambda rank: None)  # fmt: skip
    assert not helped.weights


@pytest.mark.must_hold("qvgen", 8)
@pytest.mark.parametrize("bits", [3, 4])
def test_packed_layers_compute_what_was_trained(bits):
    """With fractional zero points, at every level, and for tokens that are positive throughout."""
    model = Toy()
    made = config(bits=bits, activation_bits=bits)
    helped = _student(model, made)
    with torch.no_grad():
        for weight in helped.weights.values():
            weight.zero_point.add_(0.37)
            weight.latent.add_(0.02 * torch.randn_like(weight.latent))
        for number, raw in enumerate(helped.clips.raw):
            raw.add_(0.05 * number - 1)
        helped.others["up.bias"].add_(1.0)
    helped.advance(made.steps)
    calls = [*calls_of(), {"hidden_states": 1 + torch.rand(2, 5, 16), "timestep": torch.tensor([37.0, 37.0])}]
    wanted = []
    with torch.no_grad():
        for call in calls:
            with times.at(float(call["timestep"][0])), helped.student.running():
                wanted.append(helped.student(call))
    report = hfq.Report()
    helped.pack(report)
    swap.prepare(model)
    assert len(swap.packed_modules(model)) == 4
    for call, one in zip(calls, wanted, strict=True):
        assert (model(**call) - one).abs().max() < 2e-3 * one.abs().max()
    positive = 2 + torch.rand(7, 16)
    layer = model.up
    seen = activation.fake(positive, layer.activation, None, layer.levels and layer._parameters["input_factor"][-1])
    assert (seen.amax(-1) > seen.amin(-1)).all()  # a range that did not reach to zero would give one number
    assert all(0 < row.bits < bits + 40 for row in report.packed)


def _student(model: Any, made: Any) -> HelpedModel:
    from hfq.methods.qvgen import _student as student

    return student(model, made.plan(model), calls_of(), made)


@pytest.mark.must_hold("qvgen", 9)
def test_gradients_of_a_weight_and_its_grid():
    """The formulas of LSQ+, elementwise."""
    weight = HelpedWeight(matrix(), W3)
    with torch.no_grad():
        weight.scale.mul_(0.6)  # some weights are clipped
    seed = torch.randn(24, 40)
    (weight() * seed).sum().backward()
    w, s, z, top = weight.latent.detach(), weight.scale.detach(), weight.zero_point.detach(), W3.max_code
    u = w / s + z
    code, damping = u.round(), 1 / math.sqrt(40 * top)
    inside = (code >= 0) & (code <= top)
    assert 0 < (~inside).sum() < inside.sum()
    steps = torch.where(inside, code - z - w / s, code.clamp(0, top) - z)
    torch.testing.assert_close(weight.latent.grad, torch.where(inside, seed, 0.0))
    torch.testing.assert_close(weight.scale.grad, damping * (seed * steps).sum(1, keepdim=True), rtol=1e-4, atol=1e-5)
    wanted = damping * (seed * torch.where(inside, 0.0, -s.expand_as(seed))).sum(1, keepdim=True)
    torch.testing.assert_close(weight.zero_point.grad, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.must_hold("qvgen", 10)
def test_smaller_gradients_and_losses_with_the_module():
    """In the first 50 steps, against the same training without a module."""
    ours, plain = (quantized(steps=120, lr_clips=3e-2, lr_warmup=0.0, rank=rank)[1].curves for rank in (16, 0))
    for name, share in (("loss", 0.95), ("gradient norm", 0.7)):
        found, without = (torch.tensor(curves[name][:50]) for curves in (ours, plain))
        assert found.mean() < 0.85 * without.mean() and (found < without).float().mean() > share


@pytest.fixture(scope="module")
def trained():
    """Distance to the float model, and the checks: with a module in phases, taken away at once, and without one."""
    options = {"steps": 400, "lr": 3e-3, "lr_clips": 3e-2, "lr_warmup": 0.0, "check_calls": 4}
    found = {}
    for name, more in (("phases", {"rank": 4}), ("at_once", {"rank": 4, "removal": "at_once"}), ("plain", {"rank": 0})):
        model, report = quantized(**options, **more)
        found[name] = distance(model), report.totals["module"]
    return found


@pytest.mark.must_hold("qvgen", 10)
def test_the_end_without_the_module(trained):
    """A toy this small ends where plain training ends; the table of the video pipeline has what it is good for."""
    nearest = distance(quantized(steps=1, rank=0, lr=0.0, lr_clips=0.0)[0])
    assert trained["phases"][0] < 1.05 * trained["plain"][0] < 0.5 * nearest


@pytest.mark.must_hold("qvgen", 11)
@pytest.mark.parametrize(("every", "stop"), [(5, 13), (8, 16), (8, 9)])
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(every, stop, tmp_path, monkeypatch):
    """Inside a phase, before its end, and behind it (phases of eight steps); report included."""
    whole, report = quantized(check_calls=2)
    advance = HelpedModel.advance

    def die(self: HelpedModel, step: int, frozen: int = 0) -> None:
        if step == stop:
            raise KeyboardInterrupt
        advance(self, step, frozen)

    monkeypatch.setattr(Saved, "EVERY", every)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(HelpedModel, "advance", die)
        quantized(check_calls=2, work_dir=tmp_path)
    seen = []
    monkeypatch.setattr(HelpedModel, "advance", lambda self, step, frozen=0: (
        advance(self, step, frozen), seen.append((step, self.rank))))
    again, other = quantized(check_calls=2, work_dir=tmp_path)
    assert seen[0][0] == stop - stop % every and all(rank == (4, 2, 1, 0)[step // 8] for step, rank in seen)
    assert digest(again) == digest(whole) and other.curves == report.curves
    assert other.totals["module"] == report.totals["module"] and len(report.totals["module"]) == 3


@pytest.mark.must_hold("qvgen", 12)
def test_the_group_is_a_function_of_the_timestep(zoo, tmp_path):
    levels = times.NoiseLevels.even(50)
    for t in range(1000):
        assert levels.levels[levels.nearest(t)] == 20 * (t * 50 // 1000) + 10
    assert levels.nearest(1000.0) == 0
    pipe = zoo.text_to_video(tmp_path)
    made = config(steps=3, calls_per_step=1, clip_groups=4)
    hfq.quantize_pipeline(pipe, {"transformer": made}, zoo.PROMPTS[:1], num_inference_steps=2, **zoo.VIDEO)
    layer, seen = pipe.transformer.blocks[0].attn1.to_q, []
    layer.register_forward_pre_hook(lambda module, args: seen.append(module.levels.index()))
    pipe(["a seven"], num_inference_steps=5, output_type="latent", **zoo.VIDEO)
    # Guidance is called for apart: the two calls of a step use the same group, and the next step moves on.
    assert len(seen) == 10 and seen[::2] == seen[1::2] and seen == sorted(seen) and len(set(seen)) > 2
    times_of = [float(t) for t in pipe.scheduler.timesteps]
    assert seen[::2] == [3 - min(int(t * 4 // 1000), 3) for t in times_of]


# What every method owes


def test_a_pipeline_reloads_to_the_same_clips(zoo, tmp_path, child):
    pipe = zoo.text_to_video(tmp_path)
    given = {"num_inference_steps": 3, **zoo.VIDEO}
    made = config(bits=4, activation_bits=4, steps=6, calls_per_step=1, rank=2)
    hfq.quantize_pipeline(pipe, {"transformer": made}, zoo.PROMPTS[:2], **given)
    report = pipe.transformer.hfq_report
    assert len(report.packed) == 26 and all(0 < row.error < 1 and row.kernel for row in report.packed)
    assert report.rows["patch_embedding"].status == "float"

    def clip(made: Any) -> torch.Tensor:
        random = torch.Generator().manual_seed(3)
        return torch.as_tensor(made("a two", generator=random, output_type="np", **given).frames)

    wanted = clip(pipe)
    pipe.save_pretrained(tmp_path / "packed")
    torch.save(wanted, tmp_path / "wanted.pt")
    found = child(
        """
import torch
from diffusers import WanPipeline
pipe = WanPipeline.from_pretrained(sys.argv[1])
random = torch.Generator().manual_seed(3)
given = dict(num_inference_steps=3, height=16, width=16, num_frames=3, max_sequence_length=8, guidance_scale=3.0)
clip = torch.as_tensor(pipe("a two", generator=random, output_type="np", **given).frames)
out["same"] = torch.equal(clip, torch.load(sys.argv[2], weights_only=False))
out["layers"] = sum(type(m).__name__ == "QLinear" for m in pipe.transformer.modules())
out["solved"] = "hfq.rounding.nearest" in sys.modules
""",
        tmp_path / "packed", tmp_path / "wanted.pt")  # fmt: skip
    assert found["same"] and found["layers"] == 26 and not found["solved"]


def test_the_same_bytes_again_and_other_seeds():
    assert digest(quantized()[0]) == digest(quantized()[0]) != digest(quantized(bits=4)[0])


def test_the_ablations(trained):
    """Both losses of the module are reported where a phase ends; removed at once, the end is where the loss jumps."""
    phases, at_once = trained["phases"][1], trained["at_once"][1]
    assert [(check["step"], check["rank"]) for check in phases] == [(133, 4), (266, 2), (399, 1), (400, 0)]
    assert phases[-1]["without"] < 1.05 * phases[-2]["with"]
    assert len(at_once) == 1 and at_once[0]["without"] > 1.3 * at_once[0]["with"]
    assert trained["at_once"][0] > 1.3 * trained["phases"][0]


def test_symmetric_grids_and_single_widths():
    model, report = quantized(symmetric=True, bits=4, activation_bits=4,
                              overrides={"mix": {"activation_bits": 16}, "down": {"bits": 8}})  # fmt: skip
    assert model.up._parameters["input_factor"].shape == (50,) and model.up.activation.factor is True
    assert model.mix.activation is None and model.down.spec.bits == 8 and model.up.zero_point is None
    assert torch.isfinite(outputs(model)).all()


def test_biases_and_norms_are_trained():
    model, _ = quantized(lr=3e-3)
    assert not torch.equal(model.norm.weight, Toy().norm.weight) and not torch.equal(model.up.bias, Toy().up.bias)
    frozen, _ = quantized(module_warmup=20, rank=1, steps=21, lr=1e-3)
    assert not torch.equal(frozen.norm.weight, Toy().norm.weight)


@pytest.mark.parametrize(("more", "message"), [
    ({"rank": -1}, "rank=-1"), ({"steps": 5, "rank": 32}, "rank 32 takes 6 phases"), ({"shrink": 0.0}, "shrink=0.0"),
    ({"decay": "square"}, "decay='square'"), ({"group_size": 32}, "one grid an output channel"),
    ({"removal": "later"}, "removal='later'"), ({"clip_start": 1.0}, "clip_start=1.0"),
])  # fmt: skip
def test_bad_configs(more, message):
    with pytest.raises(ConfigError, match=message):
        config(**more)


def test_bad_data():
    with pytest.raises(DataError, match="needs calibration data"):
        hfq.quantize(Toy(), config())
    mixed = [{"hidden_states": torch.randn(2, 3, 16), "timestep": torch.tensor([5.0, 6.0])}]
    with pytest.raises(QuantizationError, match="at different timesteps"):
        hfq.quantize(Toy(), config(), mixed)
    with pytest.raises(ConfigError, match="factor=2"):
        ActivationSpec(4, symmetric=True, factor=2)


def test_the_state_of_another_run(tmp_path: Path):
    from hfq.errors import CheckpointError

    quantized(work_dir=tmp_path)
    with pytest.raises(CheckpointError, match="another run"):
        quantized(work_dir=tmp_path, steps=30)
