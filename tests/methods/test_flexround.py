"""FlexRound and LRQ: the numbered properties of the specification."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)  # fmt: skip

import hfq
from hfq import graph
from hfq.calibration import hessian
from hfq.calibration.data import normalise
from hfq.calibration.walk import generator, walk
from hfq.errors import ConfigError
from hfq.formats import QuantSpec, affine
from hfq.methods.flexround import FlexRoundConfig
from hfq.methods.rtn import RTNConfig
from hfq.reconstruction import block as reconstruct
from hfq.rounding import gptq, nearest
from hfq.rounding.flexround import DivisorRounding, initial_grid

COMMON: dict[str, Any] = {
    "group_size": 32, "calibration_samples": 8, "calibration_seqlen": 24, "calibration_batch_size": 4,
    "progress": False,
}  # fmt: skip


def tiny(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def ids(samples: int = 8, length: int = 24) -> torch.Tensor:
    return torch.randint(0, 128, (samples, length), generator=torch.Generator().manual_seed(1))


def packed(model: Any) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items() if n.endswith(("qweight", "scale", "zero_point"))}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def step_of(model: Any, data: torch.Tensor) -> Any:
    batches = normalise([{"input_ids": row} for row in data], samples=None, seqlen=None, batch_size=4)
    return next(iter(walk(graph.read(model), batches, streams=("quantized", "float"))))


def quantizers(step: Any, spec: QuantSpec, **options: Any) -> dict[str, DivisorRounding]:
    return {site.name: DivisorRounding(site.weight, spec, **options) for site in step.block.sites}


def error(step: Any, made: dict[str, DivisorRounding]) -> float:
    return reconstruct.output_error(step, {name: affine.dequantize(q.codes()) for name, q in made.items()})


class AdditiveRounding(nn.Module):
    """Learned rounding up or down (what division is compared with): never leaves the two nearest grid points."""

    def __init__(self, weight: torch.Tensor, spec: QuantSpec) -> None:
        super().__init__()
        self.scale, zero = initial_grid(weight, spec)
        assert zero is not None
        self.scale, self.zero = self.scale.float(), zero.float()
        self.w, self.top = weight.detach() / affine.expand(self.scale, weight.shape[1], spec), spec.max_code
        part = self.w - self.w.floor()
        self.gate = nn.Parameter(torch.logit(((part + 0.1) / 1.2).clamp(0.01, 0.99)))
        self.spread = lambda x: affine.expand(x, weight.shape[1], spec)

    def integers(self, hard: bool) -> torch.Tensor:
        up = (torch.sigmoid(self.gate) * 1.2 - 0.1).clamp(0, 1)
        q = self.w.floor() + ((up > 0.5).float() if hard else up)
        return torch.maximum(torch.minimum(q, self.top - self.spread(self.zero)), -self.spread(self.zero))

    def forward(self) -> torch.Tensor:
        return self.integers(False) * self.spread(self.scale)


@pytest.mark.must_hold("flexround", 1)
@pytest.mark.parametrize("mode", ["full", "lrq"])
@pytest.mark.parametrize("group", [32, -1, 0])
def test_without_steps_it_is_round_to_nearest(mode: str, group: int) -> None:
    options = {**COMMON, "group_size": group}
    learned, plain = tiny(), tiny()
    hfq.quantize(learned, FlexRoundConfig(bits=3, steps=0, mode=mode, rank=4, **options), ids())
    hfq.quantize(plain, RTNConfig(bits=3, **options))
    assert same(packed(learned), packed(plain))


@pytest.mark.must_hold("flexround", 2)
def test_gradient_of_the_divisors() -> None:
    w = torch.randn(12, 64)
    w[:, 3] = 0
    spec = QuantSpec(3, scale_dtype="float32")
    q = DivisorRounding(w, spec, grid=nearest.grid_of(w / 2, spec))  # half the range: many codes are clamped
    with torch.no_grad():
        q.log_divisor += 0.2 * torch.randn(12, 64)
    q().sum().backward()
    with torch.no_grad():
        divisor = q.scale() * q.log_divisor.exp()
        rounded, low = (w / divisor).round(), q.low
        inside = (rounded >= low) & (rounded <= low + 7)
        expected = torch.where(inside, -q.scale() * w / divisor, torch.zeros(()))
    assert 0.05 < float((~inside).float().mean()) < 0.9
    torch.testing.assert_close(q.log_divisor.grad, expected)
    assert not q.log_divisor.grad[:, 3].any() and not q.log_divisor.grad[~inside].any()


@pytest.mark.must_hold("flexround", 3)
@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize(("group", "rank"), [(64, None), (0, None), (-1, 16)])
def test_block_error_below_round_to_nearest(small_lm: Any, bits: int, group: int, rank: int | None) -> None:
    step = step_of(small_lm.make(), torch.tensor(small_lm.windows(8, 64, part="train", seed=0)))
    made = quantizers(step, QuantSpec(bits, group), rank=rank)
    start = error(step, made)
    curve = reconstruct.fit(step, made, steps=30, lr=3e-3, batch_size=4, loss="sum", generator=generator(0, 0))
    assert error(step, made) < 0.95 * start
    assert sum(curve[-5:]) < sum(curve[:5])


@pytest.mark.must_hold("flexround", 4)
def test_weights_move_further_than_rounding_up_or_down() -> None:
    step = step_of(tiny(), ids())
    spec = QuantSpec(4, 32)
    made = quantizers(step, spec)
    reconstruct.fit(step, made, steps=60, lr=3e-2, batch_size=4)
    assert max(int(q.shifts().abs().max()) for q in made.values()) > 1
    added = {site.name: AdditiveRounding(site.weight, spec) for site in step.block.sites}
    reconstruct.fit(step, added, steps=60, lr=3e-2, batch_size=4)
    moved = False
    for site in step.block.sites:
        start = affine.encode(site.weight.detach(), *affine.fit(site.weight, spec), spec)
        difference = added[site.name].integers(True) + added[site.name].spread(added[site.name].zero) - start
        assert difference.abs().max() <= 1
        moved |= bool(difference.any())
    assert moved


@pytest.mark.must_hold("flexround", 5, 6)
@pytest.mark.parametrize("mode", ["full", "lrq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_packed_layer_is_what_was_trained(mode: str, symmetric: bool) -> None:
    model = tiny()
    step = step_of(model, ids())
    spec = QuantSpec(3, 32, symmetric)
    made = quantizers(step, spec, rank=4 if mode == "lrq" else None)
    reconstruct.fit(step, made, steps=20, lr=2e-2, batch_size=4)
    for site in list(step.block.sites):
        q = made[site.name]
        codes = q.codes()
        integers, _ = q._integers()
        low = affine.expand(q.low, integers.shape[1], spec)
        assert (integers >= low).all() and (integers <= low + spec.max_code).all()
        assert int(codes.codes.max()) <= spec.max_code
        assert torch.equal(affine.dequantize(codes), q())
        layer = step.swap(site, codes)
        assert torch.equal(layer.weight.float(), q().detach())
    assert any(int(q.shifts().abs().max()) > 0 for q in made.values())


@pytest.mark.must_hold("flexround", 7)
@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_and_constant_channels(symmetric: bool) -> None:
    model = tiny()
    up = model.model.layers[0].mlp.up_proj.weight.data
    up[3], up[5] = 0, 0.25
    hfq.quantize(model, FlexRoundConfig(bits=4, steps=10, lr=1e-2, symmetric=symmetric, **COMMON), ids())
    layer = model.model.layers[0].mlp.up_proj
    assert torch.isfinite(layer.scale).all() and float(layer.scale.min()) >= 1e-8
    assert not layer.weight[3].any()
    fresh = DivisorRounding(up, QuantSpec(4, 32, symmetric))
    torch.testing.assert_close(fresh()[5], up[5], rtol=2e-3 if not symmetric else 0.1, atol=0)


@pytest.mark.must_hold("flexround", 8)
@pytest.mark.slow
def test_ablations() -> None:
    """A fixed grid loses to a learned one; without the factors of rows little changes."""
    batches = normalise([{"input_ids": row} for row in ids(16)], samples=None, seqlen=None, batch_size=8)
    errors: list[list[float]] = []
    for step in walk(graph.read(tiny()), batches, streams=("quantized", "float")):
        row = []
        for options in ({}, {"learn_scale": False}, {"row_factor": False}):
            made = quantizers(step, QuantSpec(3, 0), **options)
            reconstruct.fit(
                step, made, steps=180, lr=5e-3, batch_size=8, loss="sum", generator=generator(0, step.index)
            )
            row.append(error(step, made))
        errors.append(row)
    learned, fixed, without = torch.tensor(errors).log().mean(0).exp().tolist()
    assert learned < 0.98 * fixed
    assert 0.95 * learned < without < 1.1 * learned


@pytest.mark.must_hold("flexround", 9)
def test_convolution_shapes() -> None:
    q = DivisorRounding(torch.randn(6, 4, 3, 3), QuantSpec(4))
    assert q.log_row.shape == (6, 1, 1, 1) and q.log_input.shape == (1, 4, 1, 1)
    before = q()
    with torch.no_grad():
        q.log_input += 0.4
    assert not torch.equal(q(), before)
    depthwise = DivisorRounding(torch.randn(6, 1, 3, 3), QuantSpec(4))
    assert depthwise.log_input is None  # one input channel: the factor would be a scalar, so there is none


@pytest.mark.must_hold("flexround", 10)
def test_low_rank_reaches_every_divisor() -> None:
    target, w = torch.randn(10, 14) * 0.3, torch.randn(10, 14)
    low, full = DivisorRounding(w, QuantSpec(4), rank=10), DivisorRounding(w, QuantSpec(4))
    u, s, vh = torch.linalg.svd(target, full_matrices=False)
    with torch.no_grad():
        low.log_left.copy_(u * s)
        low.log_right.copy_(vh)
        full.log_divisor.copy_(target)
    torch.testing.assert_close(low.log_divisors(), full.log_divisors(), rtol=1e-4, atol=1e-5)
    assert (low() == full()).float().mean() > 0.99


def test_report_and_determinism() -> None:
    config = {"bits": 3, "steps": 20, "lr": 1e-2, "batch_size": 3, **COMMON}
    results = []
    for seed in (0, 0, 1):
        model = tiny()
        report = hfq.quantize(model, FlexRoundConfig(seed=seed, **config), ids())
        results.append(packed(model))
    assert same(results[0], results[1]) and not same(results[0], results[2])
    assert set(report.curves) == {"model.layers.0", "model.layers.1"}
    assert all(len(curve) == 20 for curve in report.curves.values())
    row = report.rows["model.layers.0.mlp.up_proj"]
    assert 0 <= row.extra["clamped_share"] < 0.5 and row.extra["moved_share"] > 0
    assert row.tokens == 8 * 24
    names = {name for name, _ in model.named_parameters()}
    assert not any("divisor" in name or "log_" in name for name in names)


@pytest.mark.parametrize(
    "options",
    [
        {"clip": "mse"},
        {"clipping": True},
        {"mixed_precision": True},
        {"input_mix": 0.5},
        {"scale_lr": 1e-4},
        {"start": "gptq"},
    ],
)
def test_options_run_and_change_the_result(options: dict[str, Any]) -> None:
    plain, other = tiny(), tiny()
    config = {"bits": 3, "steps": 5, **COMMON}
    hfq.quantize(plain, FlexRoundConfig(**config), ids())
    hfq.quantize(other, FlexRoundConfig(**config, **options), ids())
    assert not same(packed(plain), packed(other))


def test_longer_curves_are_thinned() -> None:
    model = tiny()
    report = hfq.quantize(model, FlexRoundConfig(bits=4, steps=130, batch_size=1, **COMMON), ids())
    assert all(len(curve) == 65 for curve in report.curves.values())


def test_a_start_from_solved_codes() -> None:
    """Without steps the solver's codes are exported as they are; with some, the block's error falls further."""
    model = tiny()
    hfq.quantize(model, FlexRoundConfig(bits=3, steps=0, start="gptq", **COMMON), ids())
    step = step_of(tiny(), ids())
    spec = QuantSpec(3, 32)
    moments = hessian.collect(step)
    solved = {
        site.name: gptq.solve(
            site.weight, moments[site.name].matrix, spec, clip="mse", weigh_clip=True, act_order=True,
            static_groups=True, refine=4,
        )[0]
        for site in step.block.sites
    }  # fmt: skip
    for name, codes in solved.items():
        assert torch.equal(model.get_submodule(name).weight, affine.dequantize(codes))
    made = {site.name: DivisorRounding(site.weight, spec, codes=solved[site.name]) for site in step.block.sites}
    assert all(torch.equal(made[name].codes().codes, codes.codes) for name, codes in solved.items())
    before = error(step, made)
    assert before < error(step, quantizers(step, spec))
    reconstruct.fit(step, made, steps=60, lr=2e-3, batch_size=8)
    assert error(step, made) < 0.95 * before


def test_transposed_linears_and_experts() -> None:
    torch.manual_seed(0)
    gpt = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=128, n_positions=64)).eval()
    report = hfq.quantize(gpt, FlexRoundConfig(bits=4, steps=3, **COMMON), ids())
    assert len(report.packed) == 4
    moe = MixtralForCausalLM(
        MixtralConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=128, num_local_experts=3, num_experts_per_tok=2,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        before = moe(ids()).logits
    report = hfq.quantize(moe, FlexRoundConfig(bits=8, steps=3, **COMMON), ids())
    assert any(row.kind == "experts" for row in report.packed)
    with torch.no_grad():
        assert (moe(ids()).logits - before).norm() < 0.05 * before.norm()


def test_impossible_configs() -> None:
    for options, match in (
        ({"clipping": True, "clip": "mse"}, "two dimensions"),
        ({"start": "gptq", "clip": "mse"}, "solver"),
        ({"mode": "half"}, "mode"),
        ({"rank": 0}, "rank"),
        ({"steps": -1}, "steps"),
        ({"activation_bits": 8}, "activation_bits"),
        ({"zero_point": "float"}, "zero_point"),
    ):
        with pytest.raises(ConfigError, match=match):
            FlexRoundConfig(**options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mixed", [False, True])
def test_models_in_half_precision(dtype: torch.dtype, mixed: bool) -> None:
    model = tiny().to(dtype)
    with torch.no_grad():
        before = model(ids()).logits.float()
    report = hfq.quantize(model, FlexRoundConfig(bits=4, steps=20, mixed_precision=mixed, **COMMON), ids())
    with torch.no_grad():
        assert (model(ids()).logits.float() - before).norm() < 0.3 * before.norm()
    for curve in report.curves.values():
        assert sum(curve[-5:]) < 0.9 * sum(curve[:5])
    assert model.model.layers[0].mlp.up_proj.scale.dtype == torch.float16


def test_experts_stored_the_other_way_round() -> None:
    """Banks ``[E, in, out]``: the grid still lies along the inputs, and the block still learns."""
    config = GptOssConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, vocab_size=128, num_local_experts=3, num_experts_per_tok=2, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip

    def made() -> Any:
        torch.manual_seed(0)
        return GptOssForCausalLM(config).eval()

    plain, start, learned = made(), made(), made()
    hfq.quantize(plain, RTNConfig(bits=3, **COMMON))
    hfq.quantize(start, FlexRoundConfig(bits=3, steps=0, **COMMON), ids())
    assert same(packed(start), packed(plain))
    assert packed(start)["model.layers.0.mlp.experts.gate_up_proj_scale"].shape == (3, 128, 1)
    report = hfq.quantize(learned, FlexRoundConfig(bits=3, steps=40, lr=1e-2, **COMMON), ids())
    (curve,) = report.curves.values()
    assert sum(curve[-5:]) < 0.9 * sum(curve[:5])
    assert not same(packed(learned), packed(plain))
