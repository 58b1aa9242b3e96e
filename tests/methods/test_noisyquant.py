"""NoisyQuant: what its specification says must hold, on numbers, layers and tiny vision transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from vision_toys import untrained

import hfq
from hfq.calibration import dither
from hfq.formats import ActivationSpec, QuantSpec, activation, affine
from hfq.formats.twin import TwinSpec
from hfq.layers import swap
from hfq.layers.packed import PackedModule
from hfq.layers.shift import ChannelShift
from hfq.rounding import nearest

OPTIONS: dict[str, Any] = {"progress": False, "calibration_batch_size": 8, "calibration_samples": 16, "coarse": 8,
                           "clip_search_steps": 40, "noise_steps": 24, "mean_steps": 8, "search_rows": 256}
IMAGES = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(5))
GRID = ActivationSpec(6, True, "tensor", dynamic=False)


def make(kind: str = "vit", **more: Any) -> Any:
    return untrained(kind, blocks=1, initializer_range=0.2, **more)


def logits(model: Any, images: torch.Tensor = IMAGES[:4]) -> torch.Tensor:
    with torch.no_grad():
        return model(images).logits


def quantized(
    kind: str = "vit", arguments: dict[str, Any] | None = None, model: Any = None, **options: Any
) -> tuple[Any, Any]:
    model = make(kind, **(arguments or {})) if model is None else model
    return model, hfq.quantize(model, hfq.NoisyQuantConfig(**{**OPTIONS, **options}), IMAGES)


def layer(bits: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = nn.functional.gelu(2 * torch.randn(400, 40))
    weight, bias = torch.randn(12, 40), torch.randn(12)
    return x, affine.dequantize(nearest.solve(weight, QuantSpec(bits, symmetric=True))), bias


@pytest.mark.must_hold("noisyquant", 1)
def test_the_bias_takes_the_vector_out() -> None:
    x, weight, bias = layer()
    params = (torch.tensor([0.1]), None)
    noise = (0.1 * (2 * torch.rand(40) - 1)).half().float()
    q = activation.fake(x + noise, GRID, params)
    first = nn.functional.linear(q - noise, weight, bias)
    second = nn.functional.linear(q, weight, bias - weight @ noise)
    assert (first - second).norm() <= 1e-5 * first.norm()
    # The packed layer is that second form.
    float_layer = nn.Sequential(nn.Linear(40, 12))
    with torch.no_grad():
        float_layer[0].weight.copy_(weight)
        float_layer[0].bias.copy_(bias - weight @ noise)
    codes = nearest.solve(weight, QuantSpec(6, symmetric=True))
    swap.swap(float_layer, "0", codes, online=ChannelShift(noise), activation=GRID, activation_params=params)
    exact = nn.functional.linear(q, affine.dequantize(codes), bias - weight @ noise)
    with torch.no_grad():
        assert (float_layer(x) - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.must_hold("noisyquant", 2)
def test_without_rounding_any_vector_changes_nothing() -> None:
    model = make()
    wanted = logits(model)
    block = model.vit.layers[0]
    noise = 0.3 * (2 * torch.rand(32) - 1)
    with torch.no_grad():
        block.layernorm_after.bias += noise
        block.mlp.fc1.bias -= block.mlp.fc1.weight @ noise
    assert (logits(model) - wanted).abs().max() < 1e-3
    model, report = quantized(bits=16, activation_bits=16)
    assert (logits(model) - wanted).abs().max() < 1e-3 and not report.packed


@pytest.mark.must_hold("noisyquant", 3)
@pytest.mark.parametrize("base", ["linear", "twin"])
def test_no_layer_ends_worse_than_its_base_quantizer(base: str) -> None:
    model, report = quantized("swin", base=base, bits=4, activation_bits=4)
    rows = [row for row in report.packed if "after" in row.extra]
    assert len(rows) == 13 and all(row.extra["after"] <= row.extra["before"] for row in rows)
    assert sum(row.extra["after"] < row.extra["before"] for row in rows) > 6
    assert sum(row.extra["after"] / row.extra["before"] for row in rows) < 0.99 * len(rows)
    assert any(isinstance(m.activation, TwinSpec) for m in model.modules() if isinstance(m, PackedModule)) == (
        base == "twin")  # fmt: skip


@pytest.mark.must_hold("noisyquant", 3)
def test_the_figures_are_those_of_the_output() -> None:
    x, weight, bias = layer()
    product = dither.Product(x, [weight])
    params = dither.search_scale(product, GRID, steps=60, coarse=0)
    found = dither.search_noise(product, GRID, params, dither.draw(40, torch.Generator().manual_seed(0)),
                                noise_steps=30, mean_steps=10, coarse=0)
    wanted = nn.functional.linear(x, weight, bias)

    def error(noise: torch.Tensor) -> float:
        y = nn.functional.linear(activation.fake(x + noise, GRID, params) - noise, weight, bias)
        return float((y - wanted).square().sum(1).mean())

    assert found.before == pytest.approx(error(torch.zeros(40)), rel=1e-3)
    assert found.after == pytest.approx(error(found.noise), rel=1e-3) and found.after < found.before
    # The searched range beats the whole one, and refinement comes near to trying everything.
    whole = product.error(lambda part: activation.fake(part, GRID, (x.abs().max().reshape(1) / 31, None)))
    assert found.before <= whole
    refined = dither.search_scale(product, GRID, steps=60, coarse=10)
    assert product.error(lambda part: activation.fake(part, GRID, refined)) <= 1.05 * found.before


def expected_change(x: float, n: float, b: float) -> float:
    """Expected change of the squared error of a number at distance ``x`` from the middle of a bin of width ``2 b`` when
    uniform noise of size ``n`` is added before coding and taken out after; ``x <= n <= 2 b - x``."""
    return n**2 / 3 - n * b + 2 * b * x - b / n * x**2


@pytest.mark.must_hold("noisyquant", 4)
def test_the_closed_form() -> None:
    b, u = 0.5, torch.linspace(-1, 1, 200_002, dtype=torch.float64)[1:-1]  # every part of the range equally often
    for n in (0.3, 0.5, 0.75, 0.9):
        for x in (0.0, 0.1, 0.25, 0.4):
            if not x <= n <= 2 * b - x:
                continue
            value = b + x  # codes are whole numbers, the middle of a bin lies at one half
            base = (round(value) - value) ** 2 if x else b**2
            change = float((((value + n * u).round() - n * u - value) ** 2).mean()) - base
            expected = expected_change(x, n, b)
            assert abs(change - expected) < 1e-3 * b**2
    for n in (0.4, 0.75):
        edge = n - (n**3 / (3 * b)) ** 0.5
        signs = [expected_change(edge + d, n, b) for d in (-1e-3, 1e-3)]
        assert signs[0] < 0 < signs[1]


@pytest.mark.must_hold("noisyquant", 5)
def test_spikes_between_codes_and_on_codes() -> None:
    step, width = 0.1, 64
    params, u = (torch.tensor([step]), None), dither.draw(width, torch.Generator().manual_seed(1))
    whole = torch.randint(-20, 20, (300, width)).float()
    eye = [torch.eye(width)]
    between = dither.search_noise(dither.Product((whole + 0.499) * step, eye), GRID, params, u, search_mean=False)
    assert 2.7 < between.before / between.after < 6 and 0.4 < between.size < 1.1
    on = dither.search_noise(dither.Product(whole * step, eye), GRID, params, u)
    assert on.size == 0 and not bool(on.noise.any())


@pytest.mark.must_hold("noisyquant", 6)
def test_one_vector_for_all_and_another_for_another_seed(tmp_path: Path) -> None:
    model, _ = quantized(fold=False)
    parts = {name: m.online for name, m in model.named_modules()
             if isinstance(getattr(m, "online", None), ChannelShift)}  # fmt: skip
    assert len(parts) >= 4
    for part in parts.values():
        x = torch.randn(3, 5, part.n)
        added = part(x) - x
        assert torch.allclose(added, added[:1, :1].expand_as(added), atol=1e-5)
        assert torch.equal(part(x)[1:2, :2], part(x[1:2, :2])) and torch.equal(part(x), part(x))
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    for name, part in parts.items():
        assert torch.equal(loaded.get_submodule(name).online.shift, part.shift)
    assert torch.equal(logits(loaded), logits(model))
    torch.testing.assert_close(logits(model, IMAGES[:1]), logits(model)[:1], rtol=1e-5, atol=1e-5)  # float parts differ
    same, other = quantized(fold=False)[0], quantized(fold=False, seed=7)[0]
    shared = [name for name in parts if getattr(other.get_submodule(name), "online", None) is not None]
    assert shared and all(torch.equal(same.get_submodule(name).online.shift, parts[name].shift) for name in parts)
    for name in shared:
        found = other.get_submodule(name).online.shift
        assert found.shape == parts[name].shift.shape and not torch.equal(found, parts[name].shift)


@pytest.mark.must_hold("noisyquant", 7)
def test_folded_into_a_norm_or_added() -> None:
    (folded, report), (added, other) = quantized("swin"), quantized("swin", fold=False)
    norms = {row.extra["folded"] for row in report.packed if "folded" in row.extra}
    assert len(norms) >= 3 and not any("folded" in row.extra for row in other.packed)
    assert (logits(folded) - logits(added)).abs().max() <= 1e-6 * logits(added).abs().max() + 1e-6


@pytest.mark.must_hold("noisyquant", 8)
def test_layers_without_a_bias_gain_one(tmp_path: Path) -> None:
    model, _ = quantized("swin", {"qkv_bias": False})
    linears = {name: m for name, m in model.named_modules() if name.endswith(("q_proj", "reduction"))}
    gained = [name for name, m in linears.items() if m.bias is not None]
    assert len(gained) >= 2 and all(make("swin", qkv_bias=False).get_submodule(name).bias is None for name in gained)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    for name in gained:
        assert torch.equal(loaded.get_submodule(name).bias, model.get_submodule(name).bias)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.must_hold("noisyquant", 9)
def test_a_channel_of_zeros() -> None:
    x, weight, _ = layer()
    x[:, 7] = 0
    product = dither.Product(x, [weight])
    params = dither.search_scale(product, GRID, steps=50)
    found = dither.search_noise(product, GRID, params, dither.draw(40, torch.Generator().manual_seed(0)),
                                noise_steps=20, mean_steps=0)
    q = activation.fake(x + found.noise, GRID, params) - found.noise
    assert bool(torch.isfinite(q).all()) and float(q[:, 7].abs().max()) <= 0.5 * float(params[0]) + 1e-6


@pytest.mark.must_hold("noisyquant", 10)
def test_codes_at_the_ends_are_counted_and_not_doubled() -> None:
    _, report = quantized("swin", bits=4, activation_bits=4)
    rows = [row.extra for row in report.packed if "clipped" in row.extra]
    assert rows and all(extra["clipped"] <= 2 * extra["clipped_before"] + 1e-9 for extra in rows)
    # A grid that ends where the numbers pile up: the best vector would push half of them over.
    x = torch.full((200, 16), 3.05)
    x[0] = -3.1
    params = (torch.tensor([0.1]), None)
    found = dither.search_noise(dither.Product(x, [torch.eye(16)]), GRID, params, torch.ones(16), mean_steps=0)
    assert found.clipped <= 2 * found.clipped_before


def test_better_than_its_base_quantizer_in_the_model() -> None:
    unseen, errors = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(9)), [0.0, 0.0]
    for seed in range(3):  # a single random model may gain or lose
        wanted = logits(make(seed=seed), unseen)
        for noise in (False, True):
            model, _ = quantized(bits=8, activation_bits=4, noise=noise, attention=False, model=make(seed=seed))
            errors[noise] += float((logits(model, unseen) - wanted).norm() / wanted.norm())
    assert errors[1] < 0.9 * errors[0], errors


def test_the_public_draw_is_another_one() -> None:
    generator = torch.Generator().manual_seed(0)
    assert float(dither.draw(9999, generator).abs().max()) <= 1
    drawn = dither.draw(9999, generator, "repo")
    assert float(drawn.mean()) == pytest.approx(-1, abs=0.1) and float(drawn.std()) == pytest.approx(2, abs=0.1)
