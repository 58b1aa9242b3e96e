"""RepQuant: what its specification says must hold, on toys in float64 and on tiny vision transformers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from vision_toys import toy, uneven

import hfq
from hfq import graph
from hfq.calibration import ranges
from hfq.errors import ConfigError, QuantizationError
from hfq.formats import bitpack, log
from hfq.formats.log import LogSpec
from hfq.graph import pairs
from hfq.graph.links import Pair
from hfq.layers import attention
from hfq.layers.packed import PackedModule
from hfq.reconstruction.channels import channel_error, learn_bounds, refit
from hfq.transforms import reparameterize

OPTIONS: dict[str, Any] = {"progress": False, "calibration_batch_size": 8, "clip_steps": 20}
IMAGES = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def logits(model: Any, images: torch.Tensor = IMAGES[:4]) -> torch.Tensor:
    with torch.no_grad():
        return model(images).logits


def proven(model: Any) -> list[Pair]:
    return list(pairs.discover(graph.read(model), lambda: model(IMAGES[:2])).proven("norm"))


@pytest.mark.must_hold("repquant", 1)
def test_the_fold_changes_nothing_without_rounding() -> None:
    norm, linear, pair, x = toy()
    with torch.no_grad():
        before = linear(norm(x))
        grid = reparameterize.common_grid(*ranges.fit_channels(norm(x), 4), 4)
        reparameterize.fold(pair, grid.ratio, grid.shift)
        assert (linear(norm(x)) - before).abs().max() < 1e-10 and not torch.equal(norm(x), x)
    for kind in ("vit", "swin"):
        model = uneven(kind)
        wanted, found = logits(model), proven(model)
        assert len(found) == 4
        for pair in found:
            scale = torch.exp(torch.randn(pair.classes))
            reparameterize.fold(pair, scale, torch.randn(pair.classes))
        assert (logits(model) - wanted).abs().max() < 1e-4


def codes_before_and_after(fractional: bool) -> tuple[torch.Tensor, torch.Tensor]:
    norm, _, pair, x = toy()
    with torch.no_grad():
        y, top = norm(x), 15
        scale, zero = ranges.fit_channels(y, 4)
        grid = reparameterize.common_grid(scale, zero, 4)
        before = ((y / grid.channels).round() + grid.zeros).clamp(0, top)
        middle = float(grid.zeros.mean()) if fractional else grid.zero_point
        reparameterize.fold(pair, grid.ratio, grid.scale * (grid.zeros - middle))
        after = ((norm(x) / grid.scale).round() + middle).clamp(0, top)
    return before, after


@pytest.mark.must_hold("repquant", 2)
def test_codes_are_the_same_element_by_element() -> None:
    before, after = codes_before_and_after(fractional=False)
    assert float((before != after).double().mean()) < 1e-5 and len(before.unique()) == 16


@pytest.mark.must_hold("repquant", 3)
def test_a_mean_zero_point_that_is_not_rounded_breaks_the_codes() -> None:
    before, after = codes_before_and_after(fractional=True)
    assert float((before != after).double().mean()) > 0.1
    inside = after[(after > 0) & (after < 15)]
    assert not torch.equal(inside, inside.round())


@pytest.mark.must_hold("repquant", 4)
def test_ratios_have_mean_one() -> None:
    for floor in (0.0, 1e-2):
        scale, zero = torch.exp(3 * torch.randn(200)).double(), torch.randint(-90, 90, (200,)).double()
        grid = reparameterize.common_grid(scale, zero, 4, floor=floor)
        assert abs(float(grid.ratio.mean()) - 1) < 1e-6 and bool((grid.ratio > 0).all())
        assert 0 <= grid.zero_point <= 15


@pytest.mark.must_hold("repquant", 5)
@pytest.mark.parametrize("symmetric", [False, True])
def test_learned_bounds(symmetric: bool) -> None:
    rows = torch.rand(100_000, 6) * torch.linspace(1, 5, 6) - 2
    rows[3, 2] = 100 * rows[:, 2].abs().max()
    weights = [torch.randn(9, 6), torch.randn(4, 6)]
    scale, zero = ranges.fit_channels(rows, 4, symmetric=symmetric)
    found = learn_bounds(rows, weights, scale, zero, 4, steps=40, batch=512, symmetric=symmetric,
                         generator=torch.Generator().manual_seed(0))
    gram = sum(w.t() @ w for w in weights)
    assert found.before == pytest.approx(float(channel_error(rows, gram, scale.float(), zero.float(), 4)), rel=1e-5)
    assert found.after == pytest.approx(
        float(channel_error(rows, gram, found.scale.float(), found.zero_point.float(), 4)), rel=1e-5)
    assert found.after <= found.before
    high = (15 - found.zero_point) * found.scale
    assert float(high[2]) < 0.1 * float(rows[:, 2].max())  # one number does not rule the channel
    if not symmetric:
        others = [0, 1, 3, 4, 5]
        reach = (found.scale * 15)[others] / (rows.amax(0) - rows.amin(0))[others]
        assert float(reach.min()) > 0.9


@pytest.mark.must_hold("repquant", 5)
def test_learning_that_does_not_help_is_thrown_away() -> None:
    rows, weights = torch.randn(300, 6), [torch.randn(5, 6)]
    scale, zero = ranges.fit_channels(rows, 4)
    found = learn_bounds(rows, weights, scale, zero, 4, steps=3, lr=1.0, start=0.3)
    assert found.after <= found.before
    tails = torch.distributions.Laplace(0.0, 1.0).sample((3000, 6))
    wide = ranges.fit_channels(tails, 3)
    learned = learn_bounds(tails, weights, *wide, 3, steps=150, lr=3e-2, batch=1024)
    assert learned.after < 0.95 * learned.before  # percentiles are too wide for three bits
    none = learn_bounds(rows, weights, scale, zero, 4, steps=0, start=0.1)
    assert torch.equal(none.scale, scale) and torch.equal(none.zero_point, zero)


@pytest.mark.must_hold("repquant", 6)
def test_powers_of_the_root_are_shifts() -> None:
    spec = LogSpec(8, "sqrt2", "none")
    for q, value in enumerate(log.table(spec, torch.float64).tolist()):
        assert abs(2.0 ** -math.ceil(q / 2) * (1 + (math.sqrt(2) - 1) * (q % 2)) - value) <= 1e-12
    a = torch.softmax(4 * torch.randn(64, 50, dtype=torch.float64), -1).flatten().sort().values
    spec = LogSpec(4)
    found = log.decode(log.encode(a, a.max(), spec), a.max(), spec, torch.float64)
    inside = a >= a.max() * 2.0**-7
    assert float(((found - a).abs() / a)[inside].max()) <= 2**0.25 - 1 + 1e-9
    assert bool((found.diff() >= 0).all())


@pytest.mark.must_hold("repquant", 7)
def test_softmax_codes_fit_their_bits_and_zero_is_zero() -> None:
    a = torch.softmax(6 * torch.randn(8, 40), -1)
    a[0, 0] = 0.0
    for bits in (3, 4):
        spec = LogSpec(bits, "sqrt2", "reserve")
        codes = log.encode(a, a.max(), spec)
        packed = bitpack.pack(codes, bits)
        assert packed.shape[1] == bitpack.packed_bytes(40, bits)
        assert torch.equal(bitpack.unpack(packed, bits, 40), codes)
        assert float(log.decode(codes, a.max(), spec)[0, 0]) == 0.0
    assert not LogSpec(4, zero="repo").storable
    with pytest.raises(ConfigError, match="log_zero"):
        hfq.RepQuantConfig(log_zero="repo")


@pytest.mark.must_hold("repquant", 8)
def test_reconstruction_lowers_the_error_of_outputs() -> None:
    from hfq.calibration.walk import walk
    from hfq.formats import QuantSpec, activation, affine
    from hfq.rounding import gptq, nearest

    plan = graph.read(uneven())
    step = next(walk(plan, [{"pixel_values": IMAGES}]))
    rows = torch.cat([step.hidden(i).reshape(-1, 32) for i in range(len(step))])
    spec = activation.ActivationSpec(4, granularity="tensor", dynamic=False)
    params = ranges.fit(rows, spec)
    coded = activation.fake(rows, spec, params)
    weight = plan.blocks[0].sites[0].weight.detach()
    for bits in (3, 4):
        grid = QuantSpec(bits)
        near = nearest.solve(weight, grid, clip="mse")
        solved, _ = gptq.solve(weight, 2 / len(rows) * coded.t() @ coded, grid, clip="mse")
        errors = [float((coded @ (affine.dequantize(codes) - weight).t()).square().mean()) for codes in (solved, near)]
        assert errors[0] < errors[1]
    fitted = refit(weight, rows, coded, 1e-3)
    assert (coded @ fitted.t() - rows @ weight.t()).norm() < (coded @ weight.t() - rows @ weight.t()).norm()


@pytest.mark.must_hold("repquant", 8)
def test_in_the_model_too() -> None:
    errors = {}
    for how in ("nearest", "gptq"):
        model = uneven(seed=1)
        wanted = logits(model)
        hfq.quantize(model, hfq.RepQuantConfig(bits=3, activation_bits=8, reconstruction=how, **OPTIONS), IMAGES)
        errors[how] = float((logits(model) - wanted).norm())
    assert errors["gptq"] < errors["nearest"]


@pytest.mark.must_hold("repquant", 9)
def test_sixteen_bits() -> None:
    model = uneven()
    wanted = logits(model)
    report = hfq.quantize(model, hfq.RepQuantConfig(bits=16, activation_bits=16, **OPTIONS), IMAGES)
    assert (logits(model) - wanted).abs().max() < 1e-3 and not report.packed and not attention.parts(model)


@pytest.mark.must_hold("repquant", 10)
def test_a_constant_channel() -> None:
    norm, linear, pair, x = toy()
    with torch.no_grad():
        norm.weight[3], norm.bias[3] = 0.0, 7.5
        before, y = linear(norm(x)), norm(x)
        grid = reparameterize.common_grid(*ranges.fit_channels(y, 4), 4)
        assert float(grid.channels[3]) == pytest.approx(1e-2 * grid.scale, rel=0.05)
        reparameterize.fold(pair, grid.ratio, grid.shift)
        assert bool(torch.isfinite(norm.weight).all() & torch.isfinite(linear.weight).all())
        assert (linear(norm(x)) - before).abs().max() < 1e-9
        code = ((norm(x)[:, 3] / grid.scale).round() + grid.zero_point).clamp(0, 15)
        value = (code - grid.zero_point) * grid.scale
        given = (value - grid.shift[3]) * grid.ratio[3]
        assert (given - 7.5).abs().max() <= 0.5 * grid.channels[3] + 1e-9


@pytest.mark.must_hold("repquant", 11)
@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_saved_folded_and_not_folded_twice(kind: str, tmp_path: Path) -> None:
    start, model = uneven(kind, qkv_bias=False), uneven(kind, qkv_bias=False)
    report = hfq.quantize(model, hfq.RepQuantConfig(**OPTIONS), IMAGES)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    folded = {row.extra["reparameterized"] for row in report.packed if "reparameterized" in row.extra}
    assert len(folded) == (4 if kind == "vit" else 5)  # with the norm of the patch merging
    for name in folded:
        assert not torch.allclose(loaded.get_submodule(name).weight, start.get_submodule(name).weight, rtol=1e-2)
        assert reparameterize.is_folded(model.get_submodule(name))
    queries = [m for n, m in loaded.named_modules() if n.endswith("q_proj")]
    assert all(isinstance(m, PackedModule) and m.bias is not None for m in queries)  # biases that took the shift
    twice = uneven(kind)
    for pair in proven(twice)[:1]:
        reparameterize.fold(pair, torch.ones(pair.classes))
        with pytest.raises(QuantizationError, match="folded before"):
            reparameterize.fold(pair, torch.ones(pair.classes))
    with pytest.raises(ConfigError, match="already quantized"):
        hfq.quantize(loaded, hfq.RepQuantConfig(**OPTIONS), IMAGES)


def test_windows_that_need_padding_are_not_shifted() -> None:
    model = uneven("swin", window=3)
    wanted = logits(model)
    report = hfq.quantize(model, hfq.RepQuantConfig(bits=8, activation_bits=8, **OPTIONS), IMAGES)
    rows = {row.module: row.extra for row in report.packed}
    first = "swin.encoder.layers.0.blocks.0"
    assert rows[f"{first}.attention.q_proj"]["shifted"] is False and rows[f"{first}.mlp.fc1"]["shifted"] is True
    assert any("padding" in note for note in report.notes)
    assert (logits(model) - wanted).norm() < 0.05 * wanted.norm()


def test_the_order_of_the_paper() -> None:
    errors = []
    for options in ({"reparameterize": False, "reconstruction": "nearest"}, {"reconstruction": "nearest"}, {}):
        total = 0.0
        for seed in (0, 1):
            model = uneven(seed=seed)
            wanted = logits(model)
            hfq.quantize(model, hfq.RepQuantConfig(**{**OPTIONS, **options}), IMAGES)
            total += float((logits(model) - wanted).norm() / wanted.norm())
        errors.append(total)
    assert errors[0] > errors[1] > errors[2], errors


def test_a_language_model_keeps_its_products_and_scales_without_shift() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=64,
                                      num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32)
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.randint(0, 64, (8, 12))
    report = hfq.quantize(model, hfq.RepQuantConfig(ridge=1e-2, **OPTIONS), ids)
    rows = {row.module: row for row in report.packed}
    assert rows["model.layers.0.self_attn.q_proj"].extra["shifted"] is False
    assert rows["model.layers.0.mlp.down_proj"].extra.get("reparameterized") is None
    assert not attention.parts(model) and any("causal" in note for note in report.notes)
