"""CrossQuant: its specification's "Must hold" items, folding, statistics, modes, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import hfq
from hfq import kernels
from hfq.calibration.columns import ColumnMaxima, Rounding
from hfq.calibration.data import normalise
from hfq.calibration.walk import walk
from hfq.errors import CheckpointError, ConfigError, DataError, QuantizationError
from hfq.evaluation.rescale import widen_channels
from hfq.formats import ActivationSpec, QuantSpec, activation, affine, bitpack
from hfq.graph import pairs
from hfq.kernels import PackedWeight, producers
from hfq.layers import ChannelScale, swap
from hfq.layers.joint import JointRange, only_rows
from hfq.layers.packed import PackedModule
from hfq.reconstruction import divided

COMMON = {"calibration_samples": 8, "calibration_seqlen": 24, "progress": False}


def tiny(seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 64,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **more})).eval()


def outliers(model: Any) -> Any:
    return widen_channels(model, [3, 20], 40.0)


def ids(samples: int = 8, length: int = 24, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 128, (samples, length), generator=torch.Generator().manual_seed(seed))


def run(model: Any, data: Any = None, **options: Any) -> Any:
    config = hfq.CrossQuantConfig(**{**COMMON, **options})
    if data is None and config.needs_calibration:
        data = ids()
    return hfq.quantize(model, config, data)


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor | None = None) -> torch.Tensor:
    return model(ids(3, seed=5) if tokens is None else tokens).logits


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def gaussian(seed: int = 0) -> torch.Tensor:
    x = torch.randn(512, 1024, generator=torch.Generator().manual_seed(seed))
    x[:, [10, 200, 900]] *= 60
    return x


@pytest.mark.must_hold("crossquant", 1)
@pytest.mark.parametrize("exponent", [0.0, 0.15, 0.5, 0.85, 1.0])
@pytest.mark.parametrize("bits", [4, 8])
def test_no_code_leaves_the_grid_when_both_maxima_are_of_the_same_tensor(bits: int, exponent: float) -> None:
    part = JointRange(33, bits, exponent)
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(17, 33, generator=g) * torch.exp(3 * torch.randn(1, 33, generator=g))
        x = x * torch.exp(2 * torch.randn(17, 1, generator=g))
        codes, step = part.codes(x)
        top = 2 ** (bits - 1) - 1
        assert part.max_code == top and codes.abs().max() <= top
        i, j = divmod(int(x.abs().argmax()), 33)  # the largest of all is the largest of its row and of its column
        assert abs(float(codes[i, j])) == top
        assert ((part(x) - x).abs() <= step * 0.5001).all()


@pytest.mark.must_hold("crossquant", 2)
@pytest.mark.parametrize("bits", [3, 8])
def test_the_ends_are_per_token_and_per_channel(bits: int) -> None:
    x = gaussian()[:50]
    token = activation.quantize(x, ActivationSpec(bits, True)).codes
    channel = activation.quantize(x.t().contiguous(), ActivationSpec(bits, True)).codes.t()
    assert torch.equal(JointRange(1024, bits, 1.0).codes(x)[0], token.float())
    assert torch.equal(JointRange(1024, bits, 0.0).codes(x)[0], channel.float())
    assert not torch.equal(JointRange(1024, bits, 0.5).codes(x)[0], token.float())


@pytest.mark.must_hold("crossquant", 3)
def test_small_channels_get_smaller_steps_and_fewer_zeros() -> None:
    x = torch.randn(64, 40)
    per_token = x.abs().amax(1, keepdim=True) / 127
    for exponent in (0.0, 0.15, 0.7):
        smaller = x.abs().amax(0) < x.abs().amax(1, keepdim=True)
        step = JointRange(40, 8, exponent).codes(x)[1]
        assert smaller.any() and not smaller.all()
        assert (step[smaller] < per_token.expand_as(step)[smaller]).all()
    x[:, 0] = 9.0 + torch.rand(64)  # now every channel is at most as large as every token
    x[:, 0] = x[:, 0].min()
    x.clamp_(-float(x[0, 0]), float(x[0, 0]))
    shares = [float((JointRange(40, 4, e).codes(x)[0] == 0).float().mean()) for e in (1.0, 0.8, 0.5, 0.2, 0.0)]
    assert shares == sorted(shares, reverse=True) and shares[0] > shares[-1] + 0.1


@pytest.mark.must_hold("crossquant", 4)
def test_gaussian_inputs_with_three_large_channels() -> None:
    x = gaussian()
    share, error = {}, {}
    for bits in (8, 4):
        for exponent in (1.0, 0.15):
            part = JointRange(1024, bits, exponent)
            share[bits, exponent] = float((part.codes(x)[0] == 0).float().mean())
            error[bits, exponent] = float((part(x) - x)[:, :9].square().mean())
    assert share[8, 1.0] == pytest.approx(0.25, abs=0.05) and share[8, 0.15] < 0.02
    assert share[4, 1.0] > 0.97 and share[4, 0.15] == pytest.approx(0.27, abs=0.04)
    assert error[8, 1.0] > 50 * error[8, 0.15]


@pytest.mark.must_hold("crossquant", 5)
@pytest.mark.parametrize("alpha", [0.0, 0.15, 1.0])
def test_the_factorised_integer_product_is_the_float_product_of_dequantized_numbers(alpha: float) -> None:
    x, weight, spec = gaussian()[:40], torch.randn(64, 1024), QuantSpec(8, symmetric=True)
    column = x.abs().amax(0).clamp(min=1e-5).pow(1 - alpha)
    codes = affine.quantize(weight * column, spec)
    packed = PackedWeight(bitpack.pack(codes.codes, 8), codes.scale, None, spec, 1024, 64)
    act = ActivationSpec(8, True)
    runtime = kernels.prepare(packed, dtype=torch.float32, activation=act)
    for step in (None, alpha):  # tight, and the paper's
        inputs = producers.cross_quant(x, column, act, alpha=step)
        got = kernels.linear_int(inputs, runtime).double()
        restored = activation.dequantize(inputs, torch.float64) * column  # the quantized x itself
        want = restored @ (affine.dequantize(codes, torch.float64) / column.double()).t()
        assert off(got, want) <= 1e-5
        assert off(restored, x.double()) < 0.1
    exact, _ = JointRange(1024, 8, alpha).codes(x)
    inputs = producers.cross_quant(x, column, act, alpha=alpha)
    assert float((inputs.codes != exact).float().mean()) < 1e-3  # the published codes, up to ties


@pytest.mark.must_hold("crossquant", 6)
def test_sixteen_bits_change_nothing() -> None:
    before = logits(outliers(tiny()))
    model = outliers(tiny())
    run(model, bits=16, activation_bits=16)
    assert torch.equal(logits(model), before)


@pytest.mark.must_hold("crossquant", 6)
@pytest.mark.parametrize("fold", [True, False])
def test_moving_the_factors_alone_changes_nothing(fold: bool) -> None:
    model = outliers(tiny())
    before = logits(model)
    config = hfq.CrossQuantConfig(**COMMON)
    data = normalise(ids(), samples=8, seqlen=24, batch_size=4)
    plan = config.plan(model)
    found = pairs.discover(plan, config.one_call(model, data))
    moved = 0
    for step in walk(plan, data):
        groups = divided.groups_of(step, lambda name: 8, 0.15)
        divided.measure(step, groups)
        divided.divide(step, groups, found, fold=fold)
        moved += sum(bool(group.division.into) for group in groups)
        assert all(group.division.vector.max() > 2 * group.division.vector.min() for group in groups)
    assert moved == (8 if fold else 0) and off(logits(model), before) < 1e-5


@pytest.mark.must_hold("crossquant", 7)
def test_tight_steps_are_the_smaller_ones_and_nothing_is_clamped_on_the_calibration_data() -> None:
    x, act = gaussian(), ActivationSpec(8, True)
    for alpha in (0.0, 0.15, 0.6):
        column = x.abs().amax(0).clamp(min=1e-5).pow(1 - alpha)
        tight, paper = (producers.cross_quant(x[:60], column, act, alpha=a) for a in (None, alpha))
        assert (tight.scale <= paper.scale * (1 + 1e-5)).all()
    for options in ({}, {"token_scale": "paper"}):
        report = run(outliers(tiny()), **options)
        assert {row.extra["clamped"] for row in report.packed} == {0}
    report = run(outliers(tiny()), token_scale="paper", percentile=90.0)  # ranges that do not hold the data
    assert max(row.extra["clamped"] for row in report.packed) > 0


@pytest.mark.must_hold("crossquant", 8)
def test_static_tokens_stand_alone_and_dynamic_ones_do_not() -> None:
    tokens = ids(3, 12, seed=9)

    def apart(model: Any) -> tuple[float, float]:
        whole = logits(model, tokens)
        alone = logits(model, tokens[1:2])
        with torch.no_grad():
            state, steps = None, []
            for t in range(12):
                out = model(tokens[:1, t : t + 1], past_key_values=state, use_cache=True)
                state = out.past_key_values
                steps.append(out.logits)
        return off(alone, whole[1:2]), off(torch.cat(steps, 1), whole[:1])

    for options in ({}, {"fold": False}, {"bits": 4, "group_size": 16, "activation_bits": 4}):
        model = outliers(tiny())
        run(model, **options)
        # A step of rounding where a float sum was taken in another order.
        assert max(apart(model)) < 2e-2
        plain = [m for m in model.modules() if isinstance(m, PackedModule)]
        x = torch.randn(40, 64) * 3
        y = plain[0](x)
        torch.testing.assert_close(plain[0](x[7:8]), y[7:8], rtol=1e-6, atol=1e-6)
    model = outliers(tiny())
    run(model, mode="dynamic", activation_bits=4)
    assert min(apart(model)) > 3e-2


@pytest.mark.must_hold("crossquant", 9)
def test_zeros_stay_zeros_and_everything_is_finite() -> None:
    x = gaussian()[:6]
    x[:, 5], x[2] = 0, 0
    for exponent in (0.0, 0.15, 1.0):
        for part in (JointRange(1024, 8, exponent), JointRange(1024, 8, exponent, torch.rand(1024) + 0.1)):
            for rows in (x, x[:1], x[2:3], x[:0]):
                y = part(rows)
                assert y.shape == rows.shape and torch.isfinite(y).all() and (y[rows == 0] == 0).all()
    for alpha in (None, 0.15):
        column = x.abs().amax(0).clamp(min=1e-5).pow(0.85)
        codes = producers.cross_quant(x, column, ActivationSpec(8, True), alpha=alpha)
        assert torch.isfinite(codes.scale).all() and (codes.codes[x == 0] == 0).all()
    model = tiny()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[4] = 0  # a channel that is always zero
        model.model.embed_tokens.weight[7] = 0  # a token that is zero
    tokens = ids()
    tokens[0, :5] = 7
    report = run(model, tokens)
    assert torch.isfinite(logits(model, tokens)).all() and torch.isfinite(logits(model, tokens[:1, :1])).all()
    assert all(row.error is not None and row.error < 0.1 for row in report.packed)


@pytest.mark.must_hold("crossquant", 10)
def test_perplexity_of_a_small_language_model(small_lm: Any) -> None:
    from hfq.evaluation.perplexity import perplexity

    windows, data = small_lm.windows(12), torch.tensor(small_lm.windows(24, part="train", seed=0))

    def measured(**options: Any) -> float:
        model = widen_channels(small_lm.make(), [5, 40, 77], 30.0)
        if options:
            common = {"calibration_samples": 24, "calibration_seqlen": 128, "progress": False}
            hfq.quantize(model, hfq.CrossQuantConfig(**common, **options), data)
        return perplexity(model, windows)

    exact = measured()
    eight, token = measured(alpha=0.15), measured(alpha=1.0)
    assert eight <= 1.01 * exact and eight <= token * 1.001, (exact, eight, token)
    grid = {"bits": 4, "group_size": 64, "activation_bits": 4}
    four, token = measured(alpha=0.15, **grid), measured(alpha=1.0, **grid)
    assert four - exact < 0.5 * (token - exact), (exact, four, token)


# Beyond the list


def test_factors_fold_into_norms_values_and_up_projections() -> None:
    model = outliers(tiny())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = run(model)
    row = report.rows["model.layers.1.mlp.down_proj"]
    assert row.extra["folded"] == "model.layers.1.mlp.up_proj" and row.extra["alpha"] == 0.15
    assert report.rows["model.layers.0.self_attn.q_proj"].extra["folded"] == "model.layers.0.input_layernorm"
    assert report.rows["model.layers.0.self_attn.o_proj"].extra["folded"] == "model.layers.0.self_attn.v_proj"
    assert all(module.online is None for module in model.modules() if isinstance(module, PackedModule))
    gain = model.model.layers[0].input_layernorm.weight.detach()
    ratio = gain / before["model.layers.0.input_layernorm.weight"]
    assert ratio[[3, 20]].max() < 0.2 * ratio.median()  # the large channels shrink
    shares = report.rows["model.layers.0.self_attn.q_proj"].extra
    assert shares["zero_share"] < 0.5 * shares["zero_share_per_token"]
    assert {choice.backend for m in model.modules() if isinstance(m, PackedModule)
            for choice in m.explain(8) if choice.chosen} == {"aten_int8"}  # fmt: skip


def test_where_nothing_can_take_the_factor_the_layers_divide() -> None:
    model = outliers(tiny())
    report = run(model, fold=False)
    parts = [m.online for m in model.modules() if isinstance(m, PackedModule)]
    assert len(parts) == 14 and all(isinstance(part, ChannelScale) for part in parts)
    assert all(row.extra["online"] and row.extra["folded"] is None for row in report.packed)
    assert all(row.bits == pytest.approx(8 + (16 / m.in_features) + 32 / m.out_features, rel=1e-6) for row, m in
               ((report.rows[name], m) for name, m in swap.packed_modules(model).items()))  # fmt: skip
    folded = outliers(tiny())
    run(folded)
    exact = logits(outliers(tiny()))
    assert off(logits(model), exact) < 0.03 and off(logits(folded), exact) < 0.03


def test_it_beats_steps_per_token_on_outliers() -> None:
    exact = logits(outliers(tiny()))
    errors = {}
    for alpha in (0.15, 1.0):
        model = outliers(tiny())
        run(model, alpha=alpha, activation_bits=4)
        errors[alpha] = off(logits(model), exact)
    assert errors[0.15] < 0.5 * errors[1.0], errors


def test_search_finds_the_exponent_with_the_least_error() -> None:
    exact = logits(outliers(tiny()))
    found, errors = set(), []
    for options in ({"alpha": 1.0, "alpha_search": True}, {"alpha": 1.0}):
        model = outliers(tiny())
        report = run(model, bits=4, group_size=16, activation_bits=4, **options)
        errors.append(off(logits(model), exact))
        found |= {row.extra["alpha"] for row in report.packed} if "alpha_search" in options else set()
    assert errors[0] < errors[1] and found <= {1.0, *divided.EXPONENTS} and min(found) < 0.6


@pytest.mark.parametrize("options", [
    {"solver": "gptq", "bits": 4, "group_size": 32}, {"group_scale": "int", "bits": 4, "group_size": 32},
    {"clip": "mse", "bits": 4, "group_size": 32}, {"mode": "dynamic"}, {"mode": "dynamic", "solver": "gptq"},
    {"token_scale": "paper"}, {"percentile": 99.9, "fold": False},
], ids=str)  # fmt: skip
def test_every_variant_saves_and_loads(options: dict[str, Any], tmp_path: Any) -> None:
    model = outliers(tiny())
    report = run(model, **options)
    exact = logits(outliers(tiny()))
    assert off(logits(model), exact) < 0.3 and len(report.packed) == 14
    assert all(row.asked["activation_bits"] == 8 for row in report.packed)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert swap.describe(loaded) == swap.describe(model)


def test_group_scales_of_whole_numbers_need_one_sum_and_gptq_beats_rounding() -> None:
    exact = logits(outliers(tiny()))
    errors = {}
    for name, options in {"int": {"group_scale": "int"}, "float": {}, "gptq": {"solver": "gptq"}}.items():
        model = outliers(tiny())
        run(model, bits=4, group_size=16, **options)
        errors[name] = off(logits(model), exact)
        runtime = model.model.layers[0].mlp.up_proj.operand("weight")
        assert ("row_scale" in runtime.tensors) == (name == "int")
    assert errors["int"] < 1.5 * errors["float"] and errors["gptq"] < errors["float"], errors


def test_the_solver_sees_divided_inputs() -> None:
    """With factors folded or online, the second moments, and so the codes, are those of the divided inputs."""
    models = []
    for fold in (True, False):
        model = outliers(tiny(num_key_value_heads=4))
        run(model, solver="gptq", bits=4, fold=fold, activation_bits=8)
        models.append(logits(model))
    exact = logits(outliers(tiny(num_key_value_heads=4)))
    assert off(models[0], exact) < 0.2 and off(models[0], models[1]) < 0.5 * off(models[0], exact) + 0.05


def test_padding_does_not_count() -> None:
    model = tiny()
    with torch.no_grad():
        model.model.embed_tokens.weight[0] *= 500
    tokens = ids()
    tokens[tokens == 0] = 1
    mask = torch.ones_like(tokens)
    tokens[:, :6], mask[:, :6] = 0, 0
    data = [{"input_ids": t[None], "attention_mask": m[None]} for t, m in zip(tokens, mask, strict=True)]
    report = run(model, data)
    clean = run(tiny(), ids()).rows["model.layers.0.mlp.up_proj"].extra["zero_share_per_token"]
    assert report.rows["model.layers.0.mlp.up_proj"].extra["zero_share_per_token"] == pytest.approx(clean, abs=0.02)
    x = torch.randn(2, 3, 8)
    x[0, 0] = 1e6
    keep = torch.ones(2, 3, dtype=torch.bool)
    keep[0, 0] = False
    part = JointRange(8, 8, 0.0)
    with only_rows(keep):
        inside = part(x)
    assert (inside - x)[keep].abs().max() < 0.02 < (part(x) - x)[keep].abs().max()


def test_statistics_of_columns() -> None:
    rows = torch.randn(400, 6)
    seen = ColumnMaxima(samples=10)
    for part in rows.split(100):
        seen.update(part)
    assert torch.equal(seen.reduce(), rows.abs().amax(0)) and torch.cat(seen.kept).shape == (40, 6)
    near = ColumnMaxima(percentile=90.0)
    near.update(rows)
    assert (near.reduce() < rows.abs().amax(0)).all() and (near.reduce() > rows.abs().median(0).values).all()
    assert ColumnMaxima().reduce() is None and Rounding(8).reduce() == {}
    with pytest.raises(DataError, match="NaN"):
        seen.update(rows * float("nan"))
    count = Rounding(4, torch.full((6,), 2.0))
    count.update(rows)
    found = count.reduce()
    codes = activation.quantize(rows, ActivationSpec(4, True)).codes
    assert found["zero_share"] == pytest.approx(float((codes == 0).float().mean()), abs=1e-6) and not found["clamped"]


def test_experts_are_quantized_per_token_and_the_report_says_so() -> None:
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(
        hidden_size=64, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )).eval()  # fmt: skip
    exact = logits(model)
    report = run(model)
    bank = next(row for row in report.packed if row.kind == "experts")
    assert "without column factors" in bank.reason and bank.asked["activation_bits"] == 8
    assert 0 < off(logits(model), exact) < 0.05


def test_overrides_and_layers_that_stay() -> None:
    model = outliers(tiny())
    report = run(model, overrides={"*.o_proj": {"activation_bits": 16}, "*.down_proj": {"activation_bits": 4}},
                 modules_to_not_convert=["*.k_proj"])  # fmt: skip
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    assert attention.o_proj.activation is None and mlp.down_proj.activation.bits == 4
    assert isinstance(attention.k_proj, nn.Linear) and report.rows["model.layers.0.self_attn.k_proj"].status == "float"
    assert off(logits(model), logits(outliers(tiny()))) < 0.15


@pytest.mark.parametrize("options, words", [
    ({"alpha": 1.5}, "alpha"), ({"alpha": -0.1}, "alpha"), ({"mode": "both"}, "mode"),
    ({"percentile": 10.0}, "percentile"),
    ({"mode": "dynamic", "alpha_search": True}, "alpha_search"), ({"activation_bits": 1}, "activation_bits"),
    ({"solver": "gptq", "group_scale": "int"}, "group_scale"), ({"clip": "percentile"}, "clip"),
])  # fmt: skip
def test_wrong_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        hfq.CrossQuantConfig(**options)


def test_defaults_are_the_papers() -> None:
    config = hfq.CrossQuantConfig()
    assert (config.alpha, config.bits, config.activation_bits, config.symmetric) == (0.15, 8, 8, True)
    assert config.mode == "static" and config.needs_calibration
    assert not hfq.CrossQuantConfig(mode="dynamic").needs_calibration
    report = run(tiny(), mode="dynamic")
    assert any("mode='dynamic'" in note for note in report.notes)
    with pytest.raises(DataError):
        hfq.quantize(tiny(), hfq.CrossQuantConfig())


def test_joint_ranges_refuse_what_makes_no_sense() -> None:
    for wrong in ({"bits": 1}, {"bits": 9}, {"exponent": 1.1}, {"columns": torch.ones(7)}, {"columns": torch.zeros(8)}):
        with pytest.raises(QuantizationError):
            JointRange(**{"n": 8, "bits": 8, "exponent": 0.5, **wrong})
    model = outliers(tiny())
    run(model, token_scale="paper")
    manifest = swap.describe(model)
    entry = manifest["layers"]["model.layers.0.mlp.up_proj"]["online"]
    for field, value in (("bits", 12), ("exponent", "x"), ("stored", 1), ("size", 3)):
        kept = entry[field]
        entry[field] = value
        with pytest.raises(CheckpointError, match="up_proj"):
            swap.build_empty(tiny(), manifest)
        entry[field] = kept
    model.model.layers[0].mlp.up_proj.online.columns.data[3] = 0
    with pytest.raises(CheckpointError, match="online"):
        swap.check(model)
    x = torch.randn(4, 8, requires_grad=True)
    JointRange(8, 8, 0.5)(x).sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0
