"""RSQ: the numbered properties of its specification, and what makes it more than GPTQ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import hfq
from hfq.calibration import hessian, importance
from hfq.calibration.data import normalise
from hfq.calibration.walk import walk
from hfq.errors import ConfigError
from hfq.formats import QuantSpec, affine
from hfq.layers.packed import PackedModule
from hfq.report import Report
from hfq.rounding import gptq, nearest

COMMON = {"bits": 4, "group_size": 32, "calibration_samples": 12, "calibration_seqlen": 24, "progress": False}


def tiny(attention: str = "sdpa", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=128, attn_implementation=attention,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 2.0)
    return model


def ids(samples: int = 12, length: int = 24, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 128, (samples, length), generator=torch.Generator().manual_seed(seed))


def packed(model: Any) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items() if n.endswith(("qweight", "scale", "zero_point"))}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def quantized(model: Any, config: Any) -> dict[str, torch.Tensor]:
    hfq.quantize(model, config, ids())
    found = packed(model)
    assert found
    return found


def first_step(model: Any, data: torch.Tensor, **batch: Any) -> Any:
    batches = normalise([{"input_ids": data, **batch}] if batch else data, samples=None, seqlen=None, batch_size=4)
    from hfq import graph

    return next(iter(walk(graph.read(model), batches)))


@pytest.mark.must_hold("rsq", 1)
def test_uniform_weights_are_plain_gptq() -> None:
    plain = quantized(tiny(), hfq.GPTQConfig(**COMMON, clip="mse", clip_norm=2.4))
    common = {**COMMON, "symmetric": False}
    assert same(plain, quantized(tiny(), hfq.RSQConfig(**common, rotate=False, r_min=1.0, r_max=1.0)))
    assert not same(plain, quantized(tiny(), hfq.RSQConfig(**common, rotate=False)))
    rotated = quantized(tiny(), hfq.RSQConfig(**common, strategy="uniform"))
    assert same(rotated, quantized(tiny(), hfq.RSQConfig(**common, r_min=1.0, r_max=1.0)))
    assert not same(rotated, quantized(tiny(), hfq.RSQConfig(**common)))


@pytest.mark.must_hold("rsq", 1)
def test_constant_scores_are_uniform_weights() -> None:
    assert torch.equal(importance.normalise(torch.full((3, 7), 5.0), 0.005, 1.0), torch.ones(3, 7))


@pytest.mark.must_hold("rsq", 2)
def test_weighted_hessian_is_the_formula() -> None:
    model, data = tiny(), ids()
    step = first_step(model, data)
    weights = importance.weights(step, "attncon", 0.005, 1.0)
    name = "model.layers.0.self_attn.q_proj"
    found = hessian.collect(step, [name], weights)[name]
    x = torch.cat([model.model.layers[0].input_layernorm(step.hidden(i)).flatten(0, 1) for i in range(len(step))])
    w = torch.cat([one.flatten() for one in weights])
    rows = x.double() * w.double().sqrt()[:, None]
    expected = 2 / x.shape[0] * rows.t() @ rows
    assert found.tokens == x.shape[0] == data.numel()
    assert (found.matrix - expected).norm() <= 1e-5 * expected.norm()
    assert torch.equal(found.matrix, found.matrix.t())
    assert torch.linalg.eigvalsh(found.matrix.double()).min() > -1e-6 * found.matrix.norm()


@pytest.mark.must_hold("rsq", 3)
def test_normalised_weights() -> None:
    scores = torch.rand(5, 40) * 7
    w = importance.normalise(scores, 0.01, 1.0)
    torch.testing.assert_close(w.mean(1), torch.ones(5))
    spread = (scores - scores.amin(1, keepdim=True)) / (scores.amax(1) - scores.amin(1))[:, None]
    mean = (0.01 + 0.99 * spread).mean(1, keepdim=True)
    assert (w >= 0.01 / mean - 1e-5).all() and (w <= 1.0 / mean + 1e-5).all()
    for changed in (scores * 3.5, scores + 11.0):
        torch.testing.assert_close(importance.normalise(changed, 0.01, 1.0), w, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(importance.normalise(scores**2, 0.01, 1.0), w, rtol=1e-2)


@pytest.mark.must_hold("rsq", 4)
def test_attention_concentration_counts_every_query_once() -> None:
    model, data = tiny(), ids(4)
    for score in importance.attention(first_step(model, data)):
        torch.testing.assert_close(score.sum(1), torch.full((4,), 4.0 * 24), rtol=1e-4, atol=1e-3)
    mask = torch.ones_like(data)
    mask[1:, 15:] = 0
    (score,) = importance.attention(first_step(model, data, attention_mask=mask))
    assert (score[1:, 15:] == 0).all()
    torch.testing.assert_close(score.sum(1), torch.tensor([4 * 24.0, *[4 * 15.0] * 3]), rtol=1e-4, atol=1e-3)


@pytest.mark.must_hold("rsq", 5)
@pytest.mark.parametrize("online", [True, False])
def test_rotation_keeps_the_logits(online: bool) -> None:
    from hfq.methods import rsq

    model, data = tiny(), ids()
    before = model(data).logits
    weight = model.model.layers[0].mlp.down_proj.weight.clone()
    config = hfq.RSQConfig(**COMMON, online=online)
    batches = normalise(data, samples=None, seqlen=None)
    parts = rsq.rotate(model, config.traced_plan(model, batches), batches, config, Report())
    after = model(data).logits
    assert (after - before).norm() <= 1e-4 * before.norm()
    assert (model.model.layers[0].mlp.down_proj.weight - weight).norm() > 0.1 * weight.norm()
    assert bool(parts) == online


@pytest.mark.must_hold("rsq", 6)
def test_weighted_objective_is_lower_than_for_uniform_weights() -> None:
    spec, better = QuantSpec(3, 32), []
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        weight = torch.randn(24, 64, generator=g)
        x = torch.randn(300, 64, generator=g) @ torch.randn(64, 64, generator=g)
        w = torch.rand(300, generator=g) ** 4
        weighted, uniform = (2 / 300 * (x * v[:, None]).t() @ x for v in (w / w.mean(), torch.ones(300)))

        def objective(codes: Any, h: torch.Tensor = weighted, weight: torch.Tensor = weight) -> float:
            d = (weight - affine.dequantize(codes)).double()
            return float(((d @ h.double()) * d).sum())

        ours = objective(gptq.solve(weight, weighted, spec)[0])
        assert ours < objective(nearest.solve(weight, spec))
        better.append(ours / objective(gptq.solve(weight, uniform, spec)[0]))
    assert sum(better) / len(better) < 1


@pytest.mark.must_hold("rsq", 7)
def test_unimportant_tokens_hardly_matter() -> None:
    model, data = tiny(), ids(8)
    step = first_step(model, data)
    name = "model.layers.0.mlp.down_proj"
    score = (torch.arange(24) >= 12).float().expand(4, 24)
    weights = [importance.normalise(score, 1e-4, 1.0) for _ in range(len(step))]
    base = hessian.collect(step, [name], weights)[name].matrix

    def doubled(part: slice) -> float:
        more = [one.clone() for one in weights]
        for one in more:
            one[:, part] *= 2  # the same as seeing those tokens twice
        h = hessian.collect(step, [name], more)[name].matrix
        weight = model.get_submodule(name).weight.detach()
        spec = QuantSpec(3, 32)
        first, second = (affine.dequantize(gptq.solve(weight, m, spec)[0]) for m in (base, h))
        return float((first - second).norm())

    assert doubled(slice(0, 6)) < 0.3 * doubled(slice(18, 24))


@pytest.mark.must_hold("rsq", 8)
def test_expansion() -> None:
    batches = normalise(ids(), samples=None, seqlen=None, batch_size=5)
    assert importance.expand(batches, 1) is batches
    wide = importance.expand(batches, 8)
    assert wide.samples == 8 * batches.samples and wide.tokens == 8 * batches.tokens
    rows = torch.cat([b["input_ids"] for b in wide])
    counts = torch.bincount(torch.cat([b["input_ids"] for b in batches]).flatten(), minlength=128)
    assert torch.equal(torch.bincount(rows.flatten(), minlength=128), 8 * counts)
    assert torch.equal(rows[12], rows[0].roll(3))


@pytest.mark.must_hold("rsq", 9)
def test_singular_hessian_and_dead_columns() -> None:
    x = torch.randn(10, 64)
    x[:, 5] = 0
    codes, stats = gptq.solve(torch.randn(8, 64), x.t() @ x, QuantSpec(4, 32), percdamp=1e-8)
    assert stats["damping_tries"] > 1 and stats["dead_columns"] == 1
    assert (affine.dequantize(codes)[:, 5] == 0).all()
    hfq.quantize(tiny(), hfq.RSQConfig(**{**COMMON, "calibration_samples": 1}), ids(1))


@pytest.mark.must_hold("rsq", 10)
def test_attention_is_seen_under_every_implementation() -> None:
    data = ids(4)
    reference = importance.attention(first_step(tiny("eager"), data))[0]
    model = tiny("sdpa")
    torch.testing.assert_close(importance.attention(first_step(model, data))[0], reference, rtol=1e-4, atol=1e-4)
    model.config._attn_implementation = "flex_attention"
    step = first_step(tiny("sdpa"), data)
    step.block.module.self_attn.config._attn_implementation = "flex_attention"
    torch.testing.assert_close(importance.attention(step)[0], reference, rtol=1e-4, atol=1e-4)
    assert step.block.module.self_attn.config._attn_implementation == "flex_attention"


@pytest.mark.must_hold("rsq", 11)
def test_same_seed_same_bytes() -> None:
    config = {**COMMON, "bits": 3}
    first = quantized(tiny(), hfq.RSQConfig(**config))
    assert same(first, quantized(tiny(), hfq.RSQConfig(**config)))
    assert not same(first, quantized(tiny(), hfq.RSQConfig(**config, seed=1)))


def test_bidirectional_encoders_are_weighted_too() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertModel(BertConfig(**sizes, vocab_size=128)).eval()
    report = hfq.quantize(model, hfq.RSQConfig(**COMMON), ids())
    assert {row.module for row in report.packed} == {n for n, m in model.named_modules() if isinstance(m, PackedModule)}
    assert any(not pair["proven"] for pair in report.pairs)  # post-norm: no stream rotation, and the report says why


@pytest.mark.parametrize("wrong", [{"r_min": 2.0}, {"strategy": "attention"}, {"expansion": 0}, {"activation_bits": 8}])
def test_impossible_options(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        hfq.RSQConfig(**wrong)


def test_each_step_helps_on_a_trained_model(small_lm: Any, tmp_path: Any) -> None:
    from hfq.evaluation.perplexity import perplexity

    windows = small_lm.windows(12)
    data = torch.tensor(small_lm.windows(24, part="train", seed=0))
    common = {"bits": 3, "group_size": 64, "symmetric": False, "progress": False, "calibration_samples": 24,
              "calibration_seqlen": 128}
    results = {}
    for name, config in {
        "nearest": hfq.RTNConfig(bits=3, group_size=64, progress=False),
        "gptq": hfq.RSQConfig(**common, rotate=False, strategy="uniform"),
        "rotated": hfq.RSQConfig(**common, strategy="uniform"),
        "rsq": hfq.RSQConfig(**common, r_min=0.1),
    }.items():
        model = small_lm.make()
        hfq.quantize(model, config, data if config.needs_calibration else None)
        results[name] = perplexity(model, windows)
    assert results["rotated"] < results["gptq"] < results["nearest"], results
    assert results["rsq"] < results["gptq"], results
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    sample = torch.tensor(windows[:1])
    assert torch.equal(again(sample).logits, model(sample).logits)
