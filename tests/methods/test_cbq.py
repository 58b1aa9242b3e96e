"""CBQ: the numbered properties of the specification."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)  # fmt: skip

import hfq
from hfq import graph, kernels
from hfq.calibration import windows
from hfq.calibration.capture import forward as run_model
from hfq.calibration.data import normalise
from hfq.calibration.outliers import RULES, channel_scales, detect, truncate
from hfq.calibration.step import Step
from hfq.calibration.walk import generator, walk
from hfq.errors import ConfigError
from hfq.formats import ActivationSpec, QuantSpec, affine
from hfq.graph import pairs as graph_pairs
from hfq.layers import attention
from hfq.methods.cbq import CBQConfig
from hfq.methods.rtn import RTNConfig
from hfq.reconstruction import balance, learners
from hfq.reconstruction import block as reconstruct
from hfq.reconstruction import window as several
from hfq.rounding.lowrank import GatedRounding, sharpness

COMMON: dict[str, Any] = {
    "group_size": 32, "calibration_samples": 8, "calibration_seqlen": 24, "calibration_batch_size": 4,
    "progress": False, "batch_size": 4, "lr": 1e-2, "scale_lr": 3e-3,
}  # fmt: skip
PLAIN: dict[str, Any] = {key: value for key, value in COMMON.items() if key not in ("batch_size", "lr", "scale_lr")}


def tiny(seed: int = 0, layers: int = 3) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def with_outliers(model: Any) -> Any:
    """The same function with large channels behind norms, values and up projections."""
    with torch.no_grad():
        for layer in model.model.layers:
            for norm, readers in (
                (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
                (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
            ):
                norm.weight[[3, 20]] *= 40
                for reader in readers:
                    reader.weight[:, [3, 20]] /= 40
            layer.self_attn.v_proj.weight[[5, 21]] *= 50  # (each of them is read by two query heads)
            layer.self_attn.o_proj.weight[:, [5, 21, 37, 53]] /= 50
            layer.mlp.up_proj.weight[[7, 50]] *= 50
            layer.mlp.down_proj.weight[:, [7, 50]] /= 50
    return model


def ids(samples: int = 8, length: int = 24) -> torch.Tensor:
    return torch.randint(0, 128, (samples, length), generator=torch.Generator().manual_seed(1))


def batches(samples: int = 8) -> Any:
    return normalise([{"input_ids": row} for row in ids(samples)], samples=None, seqlen=None, batch_size=4)


def packed(model: Any) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items() if n.endswith(("qweight", "scale", "zero_point"))}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids()).logits


def fitted(model: Any, spec: QuantSpec, **options: Any) -> Any:
    """Windows of two blocks whose learners have been fitted."""
    for window in windows.walk(graph.read(model), batches()):
        for step in window.entering:
            options_for = {"rank": 4, "generator": generator(0, step.index)}
            window.keep(step, learners.learner_of(step, lambda _: spec, lambda _, made=options_for: made))
        several.fit(window, **{"steps": 8, "lr": 1e-2, "batch_size": 4, "penalty": sharpness, **options})
        yield window


@pytest.mark.must_hold("cbq", 1)
@pytest.mark.parametrize("rule", RULES)
def test_scaled_channels_leave_the_model_as_it_is(rule: str) -> None:
    model = with_outliers(tiny())
    before, plan = logits(model), graph.read(model)
    pairs = graph_pairs.discover(plan, lambda: run_model(model, {"input_ids": ids()[:1]}))
    changed: dict[str, int] = {}
    for window in windows.walk(plan, batches(), observe=lambda block: balance.measurable(pairs, block.name)):
        for step in window.entering:
            ranges = window.ranges[step.block.name]
            changed |= balance.balance(pairs, step.block.name, ranges, RULES[rule])
        list(window.leaving())
    wanted = {"input_layernorm", "post_attention_layernorm", "v_proj", "up_proj"}
    assert {name.rpartition(".")[2] for name in changed} >= wanted
    after = logits(model)
    assert (after - before).norm() <= 1e-4 * before.norm() and not torch.equal(after, before)
    fresh = with_outliers(tiny()).model.layers[0]
    ratio = (fresh.input_layernorm.weight / model.model.layers[0].input_layernorm.weight).detach()
    assert (ratio[[3, 20]] > 2).all() and (ratio == 1).sum() >= 60
    ratio = (model.model.layers[0].self_attn.o_proj.weight / fresh.self_attn.o_proj.weight).detach()[0]
    torch.testing.assert_close(ratio[[5, 37]], ratio[[21, 53]])  # one scale for a value channel and all its readers
    assert (ratio[[5, 21, 37, 53]] > 2).all()


@pytest.mark.must_hold("cbq", 2)
def test_without_outliers_nothing_is_scaled_or_cut() -> None:
    for values in (torch.rand(500), torch.full((64,), 0.3)):
        found = detect(values)
        assert not found.coarse.any()
        assert torch.equal(channel_scales(-values, values), torch.ones(len(values), dtype=torch.float64))
        assert torch.equal(truncate(values[None])[0][0], values)
    flat = detect(torch.full((64,), 0.3))
    assert float(flat.threshold) == float(torch.tensor(0.3)) and not flat.outlier.any()


@pytest.mark.must_hold("cbq", 3)
@pytest.mark.parametrize("rule", RULES)
def test_the_fine_step_keeps_five(rule: str) -> None:
    values = torch.cat([torch.rand(256) + 0.5, torch.tensor([60.0, 5.0, 32.0, 30.0])])
    found = detect(values, RULES[rule])
    assert sorted(values[found.coarse[0]].tolist()) == [5, 30, 32, 60]
    assert sorted(values[found.outlier[0]].tolist()) == [30, 32, 60]


class LearnedStep(nn.Module):
    """Round to nearest with a learned step, in plain recorded operations."""

    def __init__(self, weight: torch.Tensor, spec: QuantSpec) -> None:
        super().__init__()
        self.matrix, self.spec = weight.detach().float(), spec
        self.start, self.zero = affine.fit(weight, spec)
        self.step = nn.Parameter(torch.ones(self.start.shape))

    def forward(self) -> torch.Tensor:
        s = self.start.float() * self.step
        s = s + (s.half().float() - s).detach()
        s, z = (affine.expand(t, self.matrix.shape[1], self.spec) for t in (s, self.zero.float()))
        x = self.matrix / s
        q = x + (x.round() - x).detach()
        inside = (x.round() + z >= 0) & (x.round() + z <= self.spec.max_code)
        return torch.where(inside, q, (x.round() + z).clamp(0, self.spec.max_code).detach() - z) * s


@pytest.mark.must_hold("cbq", 4)
def test_single_blocks_without_gates_learn_steps_only() -> None:
    model, other = tiny(), tiny()
    options = {**COMMON, "steps": 30, "rounding": "nearest", "kl": 0.0, "same_input": False, "truncate": False}
    hfq.quantize(model, CBQConfig(bits=3, window=1, overlap=0, **options), ids())
    spec, moved = QuantSpec(3, 32), 0.0
    for step in walk(graph.read(other), batches(), streams=("quantized", "float")):
        made = {site.name: LearnedStep(site.weight, spec) for site in step.block.sites}
        reconstruct.fit(
            step, made, steps=30, lr=3e-3, batch_size=4, generator=generator(0, step.index),
            optimizer=lambda groups: torch.optim.AdamW(groups, weight_decay=0.0),
        )  # fmt: skip
        for site in list(step.block.sites):
            learned = made[site.name]
            scale = (learned.start.float() * learned.step).detach().half()
            codes = affine.encode(learned.matrix, scale, learned.zero, spec)
            layer = model.get_submodule(site.name)
            torch.testing.assert_close(layer.scale.detach(), scale, rtol=3e-3, atol=0)
            assert (affine.dequantize(layer_codes(layer)) - affine.decode(codes, scale, learned.zero, spec)).norm() < (
                0.02 * learned.matrix.norm()
            )
            moved = max(moved, float((learned.step - 1).abs().max().detach()))
            step.swap(site, layer_codes(layer))
    assert moved > 0.02


def layer_codes(layer: Any) -> Any:
    from hfq.formats import Codes, bitpack

    (one,) = layer.packed()
    return Codes(bitpack.unpack(one.qweight, one.spec.bits, one.in_features), one.scale, one.zero_point, one.spec)


@pytest.mark.must_hold("cbq", 5)
@pytest.mark.parametrize("rounding", ["lowrank", "full", "nearest"])
@pytest.mark.parametrize("group", [32, -1])
def test_hardened_at_the_start_it_is_round_to_nearest(rounding: str, group: int) -> None:
    learned, plain = tiny(), tiny()
    options = {**COMMON, "group_size": group}
    hfq.quantize(learned, CBQConfig(bits=3, steps=0, rounding=rounding, truncate=False, **options), ids())
    hfq.quantize(plain, RTNConfig(bits=3, **{**PLAIN, "group_size": group}))
    assert same(packed(learned), packed(plain))
    cut = tiny()
    hfq.quantize(cut, CBQConfig(bits=3, steps=0, rounding=rounding, **options), ids())
    assert not same(packed(cut), packed(plain))


@pytest.mark.must_hold("cbq", 6)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_packed_layers_are_what_was_trained(dtype: torch.dtype) -> None:
    model = tiny(layers=2).to(dtype)
    spec, moved = QuantSpec(3, 32), 0
    for window in fitted(model, spec):
        roundings = {name: q for step in window.steps for name, q in learner(window, step).weights.items()}
        for rounding in roundings.values():
            rounding.harden()
        made = {name: q().detach() for name, q in roundings.items()}
        forward = several.forward_with(window, list(made))
        with torch.no_grad():
            faked = [forward(made, *call) for call in window.inputs]
        for step in window.leaving():
            for site in step.block.sites:
                codes = roundings[site.name].codes()
                assert int(codes.codes.max()) <= spec.max_code and codes.codes.dtype == torch.uint8
                moved += int((codes.codes != affine.quantize(roundings[site.name].matrix, spec).codes).sum())
            learners.pack(step, learner(window, step))
        for name, weight in made.items():
            x = torch.randn(5, weight.shape[1], dtype=dtype)
            want = x.float() @ weight.T
            assert (model.get_submodule(name)(x).float() - want).norm() <= 1e-3 * want.norm()
        if dtype == torch.float32:
            for want, have in zip(faked, last_hidden(model), strict=True):
                assert (want - have).norm() <= 1e-3 * want.norm()
    assert moved > 20


def learner(window: Any, step: Any) -> Any:
    return window.learners[step.block.name]


def last_hidden(model: Any) -> list[torch.Tensor]:
    """The hidden output of the last block in plain passes, with exact products."""
    found = []
    handle = model.model.layers[-1].register_forward_hook(
        lambda _, args, out: found.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad(), kernels.use(wna16="reference"):
        for batch in batches():
            model(**batch)
    handle.remove()
    return found


@pytest.mark.must_hold("cbq", 7)
@pytest.mark.slow
def test_windows_of_two_are_no_worse_than_single_blocks(small_lm: Any) -> None:
    """At two bits, with as many steps a window, on hidden states of text that was not trained on."""
    data, held = (torch.tensor(small_lm.windows(16, 64, part=part, seed=0)) for part in ("train", "test"))

    def hidden(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model.model(held).last_hidden_state

    target = hidden(small_lm.make())
    options = {"bits": 2, "group_size": 64, "steps": 16, "batch_size": 4, "rounding": "full", "straight": True,
               "lr": 3e-2, "scale_lr": 1e-3, "calibration_samples": 16, "calibration_seqlen": 64,
               "progress": False}  # fmt: skip
    errors = {}
    for size in (2, 1):
        found = []
        for seed in (0, 1):
            model = small_lm.make()
            hfq.quantize(model, CBQConfig(window=size, overlap=size - 1, seed=seed, **options), data)
            found.append(float((hidden(model) - target).square().mean() / target.square().mean()))
        errors[size] = sum(found) / len(found)
    nearest = small_lm.make()
    hfq.quantize(nearest, RTNConfig(bits=2, group_size=64, progress=False))
    base = float((hidden(nearest) - target).square().mean() / target.square().mean())
    assert errors[2] < errors[1] < 0.7 * base, (errors, base)


@pytest.mark.must_hold("cbq", 8)
@pytest.mark.parametrize("rank", [1, 5])
def test_trainable_parameters_and_frozen_weights(rank: int) -> None:
    model = tiny()
    for window in windows.walk(graph.read(model), batches()):
        for step in window.entering:
            window.keep(step, learners.learner_of(step, lambda _: QuantSpec(3), lambda _: {"rank": rank}))
            for name, rounding in learner(window, step).weights.items():
                layer = model.get_submodule(name)
                gates = [p for n, p in rounding.named_parameters() if n != "step"]
                assert sum(p.numel() for p in gates) == rank * (layer.out_features + layer.in_features)
        wanted = [p.requires_grad for p in model.parameters()]
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        several.fit(window, steps=2, lr=1e-2, batch_size=4, penalty=sharpness)
        assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert [p.requires_grad for p in model.parameters()] == wanted
        for step in window.leaving():
            learners.pack(step, learner(window, step))


@pytest.mark.must_hold("cbq", 9)
@pytest.mark.parametrize("stop", [1, 2])
def test_blocks_that_left_stay_and_an_interrupted_run_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    config = {"bits": 2, "steps": 6, "smooth": True, **COMMON}
    whole = tiny(layers=4)
    report = hfq.quantize(whole, CBQConfig(**config), ids())
    fit, swapped, left = several.fit, Step.swap, dict[str, dict[str, torch.Tensor]]()

    def watched(window: Any, **options: Any) -> Any:
        for name, state in left.items():
            assert name not in {step.block.name for step in window.steps}
            now = broken.get_submodule(name).state_dict()
            assert all(torch.equal(now[key], tensor) for key, tensor in state.items())
        for i in range(window.index):
            name = f"model.layers.{i}"
            left.setdefault(name, copy.deepcopy(broken.get_submodule(name).state_dict()))
        if window.index == stop:
            raise KeyboardInterrupt
        return fit(window, **options)

    broken = tiny(layers=4)
    with monkeypatch.context() as patch:
        patch.setattr(several, "fit", watched)
        with pytest.raises(KeyboardInterrupt):
            hfq.quantize(broken, CBQConfig(work_dir=tmp_path, **config), ids())
    done: list[str] = []
    counted = lambda self, site, *a, **k: done.append(site.name) or swapped(self, site, *a, **k)  # noqa: E731
    monkeypatch.setattr(Step, "swap", counted)
    resumed = tiny(layers=4)
    again = hfq.quantize(resumed, CBQConfig(work_dir=tmp_path, **config), ids())
    assert len(done) == 7 * (4 - stop) and not any(f"layers.{i}." in name for name in done for i in range(stop))
    assert same(packed(resumed), packed(whole)) and again.curves == report.curves
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))


@pytest.mark.must_hold("cbq", 10)
def test_without_quantization_both_distances_are_zero() -> None:
    model = tiny()
    loss, parts = several.distance(1.0, True), []
    for window in windows.walk(graph.read(model), batches()):
        forward = several.forward_with(window, [])
        reference = list(windows.outputs_of(window))
        with torch.no_grad():
            outputs = [forward({}, *call) for call in window.inputs]
        parts += [float(loss(out, torch.cat([t, r], -1), None))
                  for out, t, r in zip(outputs, window.targets, reference, strict=True)]  # fmt: skip
        assert float(loss(outputs[0], torch.cat([window.targets[0] * 1.01, reference[0]], -1), None)) > 0
        list(window.leaving())
    assert parts == [0.0] * 4
    before = logits(model)
    report = hfq.quantize(model, CBQConfig(bits=16, **COMMON), ids())
    assert not report.packed and torch.equal(logits(model), before)


def test_both_branches_and_the_divergence_count() -> None:
    pred, first, second = torch.randn(3, 4, 5, 8)
    target = torch.cat([first, second], -1)
    mse = nn.functional.mse_loss
    kl = lambda a, b: nn.functional.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none").sum(-1).mean()  # noqa: E731
    expected = mse(pred, first) + mse(pred, second) + 0.5 * (kl(pred, first) + kl(pred, second))
    torch.testing.assert_close(several.distance(0.5, True)(pred, target, None), expected)
    torch.testing.assert_close(several.distance(0.0, False)(pred, first, None), mse(pred, first))


@pytest.mark.parametrize("activation_bits", [8, 6, 4])
def test_activations_and_attention(activation_bits: int, tmp_path: Path) -> None:
    """Quantized inputs and, below eight bits, queries, keys and values; the learned factor is stored and reloaded."""
    model = with_outliers(tiny())
    before = logits(model)
    config = {**COMMON, "group_size": -1, "factor_lr": 1e-2}
    report = hfq.quantize(model, CBQConfig(bits=4, activation_bits=activation_bits, steps=12, **config), ids())
    row = report.rows["model.layers.1.mlp.up_proj"]
    assert row.extra["range_factor"] != 1 and row.asked["activation_bits"] == activation_bits
    layer = model.model.layers[1].mlp.up_proj
    assert layer.activation == ActivationSpec(activation_bits, factor=True)
    assert bool(attention.parts(model)) == (activation_bits <= 6)
    loss = (logits(model) - before).norm() / before.norm()
    assert 0.01 < loss < {8: 0.55, 6: 0.55, 4: 0.9}[activation_bits]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_what_is_trained_is_what_runs_with_quantized_activations() -> None:
    model = tiny(layers=2)
    grid = ActivationSpec(6, factor=True)
    for window in windows.walk(graph.read(model), batches()):
        for step in window.entering:
            window.keep(step, learners.learner_of(
                step, lambda _: QuantSpec(4), lambda _: {"rank": 3}, inputs_for=lambda _: grid))
        several.fit(window, steps=6, lr=1e-2, batch_size=4, penalty=sharpness)
        for step in window.steps:
            for rounding in learner(window, step).weights.values():
                rounding.harden()
        names = [n for s in window.steps for n in learner(window, s).weights]
        made = {n: q().detach() for s in window.steps for n, q in learner(window, s).weights.items()}
        forward = several.forward_with(window, names)
        with torch.no_grad(), several._fake_inputs(window):
            faked = [forward(made, *call) for call in window.inputs]
        for step in window.leaving():
            learners.pack(step, learner(window, step))
        for want, have in zip(faked, last_hidden(model), strict=True):
            assert (want - have).norm() <= 2e-3 * want.norm()


@pytest.mark.parametrize(
    "options",
    [
        {"rounding": "full"}, {"rounding": "nearest"}, {"anchored": False}, {"straight": True}, {"kl": 0.0},
        {"same_input": False}, {"penalty": 0.0}, {"truncate": False}, {"smooth": True},
        {"smooth": True, "detector": "vendor"}, {"window": 1, "overlap": 0}, {"window": 3, "overlap": 2},
        {"mixed_precision": True}, {"seed": 1},
    ],
    ids=str,
)  # fmt: skip
def test_options_run_and_change_the_result(options: dict[str, Any]) -> None:
    plain, other = with_outliers(tiny()), with_outliers(tiny())
    config = {"bits": 3, "steps": 5, "penalty": 1.0, **COMMON}
    hfq.quantize(plain, CBQConfig(**config), ids())
    hfq.quantize(other, CBQConfig(**{**config, **options}), ids())
    assert not same(packed(plain), packed(other))


def test_other_models() -> None:
    """Transposed linears, experts, images: whatever is a chain of blocks."""
    torch.manual_seed(0)
    gpt = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=128, n_positions=64)).eval()
    assert len(hfq.quantize(gpt, CBQConfig(bits=4, steps=3, **COMMON), ids()).packed) == 8
    moe = MixtralForCausalLM(
        MixtralConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                      num_key_value_heads=1, vocab_size=128, num_local_experts=3, num_experts_per_tok=2)
    ).eval()  # fmt: skip
    with torch.no_grad():
        before = moe(ids()).logits
    report = hfq.quantize(moe, CBQConfig(bits=8, steps=3, **COMMON), ids())
    assert sum(row.kind == "experts" for row in report.packed) == 2
    with torch.no_grad():
        assert (moe(ids()).logits - before).norm() < 0.05 * before.norm()
    vit = ViTForImageClassification(ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=4,
    )).eval()  # fmt: skip
    images = [{"pixel_values": torch.randn(3, 16, 16)} for _ in range(8)]
    report = hfq.quantize(vit, CBQConfig(bits=4, steps=6, **COMMON), images)
    assert len(report.packed) >= 18 and len(report.curves) == 2


def test_impossible_configs() -> None:
    for options, match in (
        ({"overlap": 2}, "overlap"),
        ({"window": 0}, "window"),
        ({"rounding": "half"}, "rounding"),
        ({"detector": "mine"}, "detector"),
        ({"attention_bits": 1}, "attention_bits"),
        ({"kv_bits": 4}, "kv_bits"),
        ({"zero_point": "float"}, "zero_point"),
    ):
        with pytest.raises(ConfigError, match=match):
            CBQConfig(**options)


@pytest.mark.must_hold("cbq", 6)
def test_the_gates_close() -> None:
    """At the end of a window the penalty has driven the gates of the full matrix to 0 and 1."""
    model = tiny()
    options = {**COMMON, "steps": 60, "rounding": "full", "lr": 0.3, "penalty": 1e4}
    report = hfq.quantize(model, CBQConfig(bits=3, **options), ids())
    shares = [row.extra["soft_share"] for row in report.packed]
    assert max(shares) < 0.4 and GatedRounding(torch.randn(8, 64), QuantSpec(3)).statistics()["soft_share"] > 0.5
