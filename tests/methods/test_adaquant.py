"""AdaQuant: what its specification says must hold, on layers and on tiny networks of convolutions and attention."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import hfq
from hfq import graph
from hfq.allocation import program
from hfq.calibration import gradients
from hfq.errors import ConfigError
from hfq.formats import QuantSpec, activation, affine
from hfq.graph import rectified, trace
from hfq.layers import attention, swap
from hfq.reconstruction import layerwise, renormalise, sites
from hfq.reconstruction.layerwise import Course
from hfq.reconstruction.static import input_grid
from hfq.training import biases

IMAGES = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(5))
OPTIONS: dict[str, Any] = {"progress": False, "calibration_batch_size": 16, "steps": 25, "batch_size": 16,
                           "attention_steps": 5}
EMBEDDER = "resnet.embedder.embedder.convolution"


def resnet(seed: int = 0) -> Any:
    """A ResNet whose normalisations know their data, with gains and biases that differ."""
    torch.manual_seed(seed)
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], layer_type="basic", num_labels=5))  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
            module.momentum = None
    model.train()
    with torch.no_grad():
        model(IMAGES)
    return model.eval()


def vit(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8,
        num_labels=5, initializer_range=0.1)).eval()  # fmt: skip


def logits(model: Any, images: torch.Tensor = IMAGES[:4]) -> torch.Tensor:
    with torch.no_grad():
        return model(images).logits


def quantized(model: Any, bits: int = 4, **options: Any) -> Any:
    config = hfq.AdaQuantConfig(**{"bits": bits, "activation_bits": bits, **OPTIONS, **options})
    return hfq.quantize(model, config, IMAGES)


def codes_of(model: Any) -> dict[str, tuple[torch.Tensor, ...]]:
    return {name: tuple(t.clone() for key, t in layer.state_dict().items() if "qweight" in key or "zero_point" in key)
            for name, layer in swap.packed_modules(model).items()}


def same(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, y) for n in a for x, y in zip(a[n], b[n], strict=True))


@pytest.mark.must_hold("adaquant", 1)
@pytest.mark.parametrize("make", [resnet, vit])
def test_sixteen_bits_change_nothing(make: Any) -> None:
    model = make()
    wanted = logits(model)
    quantized(model, 16)
    assert (logits(model) - wanted).abs().max() < 1e-4 and not swap.packed_modules(model)


def layer_case(width: int = 128, count: int = 1000) -> tuple[Any, list[torch.Tensor], list[torch.Tensor]]:
    torch.manual_seed(0)
    module = nn.Linear(width, width)
    site = SimpleNamespace(name="here", kind="linear", module=module, weight=module.weight, in_features=width,
                           out_features=width)
    inputs = [torch.randn(count, width).relu()]
    with torch.no_grad():
        return site, inputs, [module(x) for x in inputs]


@pytest.mark.must_hold("adaquant", 2)
@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_no_layer_gets_worse(mode: str) -> None:
    report = quantized(resnet(), mode=mode)
    rows = [row.extra for row in report.packed]
    assert len(rows) == 8 and all(row["layer_error"] <= row["layer_error_before"] for row in rows)
    assert sum(row["layer_error"] < 0.9 * row["layer_error_before"] for row in rows) >= 6


@pytest.mark.must_hold("adaquant", 2)
def test_learning_that_does_not_help_is_thrown_away() -> None:
    site, inputs, targets = layer_case(16, 100)
    course = Course(steps=20, lr_weight=1.0, lr_range=1.0, lr_input=0.9, holdout=0.0)
    found = layerwise.fit(site, QuantSpec(4), 4, inputs, targets, course)
    start = layerwise.fit(site, QuantSpec(4), 4, inputs, targets, Course(steps=0))
    assert found.after == found.before == start.after and torch.equal(found.codes.codes, start.codes.codes)
    assert float(found.params[0]) == float(start.params[0])


@pytest.mark.must_hold("adaquant", 3)
def test_errors_of_a_layer_fall() -> None:
    site, inputs, targets = layer_case()
    for bits, factor in ((8, 10.0), (4, 1 / 0.95)):
        found = layerwise.fit(site, QuantSpec(bits, scale_dtype="float32"), bits, inputs, targets, Course())
        assert found.after * factor < found.before, (bits, found.before, found.after)
        x = activation.fake(inputs[0], found.grid, found.params)
        y = nn.functional.linear(x, affine.dequantize(found.codes), found.bias)
        assert float((y - targets[0]).detach().square().mean()) == pytest.approx(found.after, rel=1e-3)


def test_rates_in_units_of_what_they_move() -> None:
    """A layer whose inputs are a hundred times smaller learns the same; with absolute rates it does not."""
    assert hfq.AdaQuantConfig(lr_mode="absolute", lr_bias=0.5).rates == {
        "lr_weight": 1e-5, "lr_bias": 0.5, "lr_range": 1e-3, "lr_input": 1e-1}  # fmt: skip
    assert set(hfq.AdaQuantConfig().rates.values()) == {1e-3}
    site, inputs, _ = layer_case(32, 200)
    del site.module._parameters["bias"]
    site.module.bias = None
    gains = {}
    for relative, scale in itertools.product((True, False), (1.0, 1 / 128)):
        given = [scale * x for x in inputs]
        with torch.no_grad():
            targets = [site.module(x) for x in given]
        course = Course(50, lr_weight=1e-3, lr_range=1e-3, lr_input=1e-2, relative=relative, holdout=0.0)
        found = layerwise.fit(site, QuantSpec(4, scale_dtype="float32"), 4, given, targets, course)
        gains[relative, scale] = found.after / found.before
    assert gains[True, 1.0] == pytest.approx(gains[True, 1 / 128], rel=0.05) and gains[True, 1.0] < 0.9
    assert abs(gains[False, 1.0] - gains[False, 1 / 128]) > 0.05


def test_what_passes_a_relu_is_what_counts() -> None:
    model = resnet()
    plan = graph.read(model)
    from hfq.transforms.fold import fold_batch_norms

    fold_batch_norms(plan, lambda: logits(model))
    behind = rectified.before_relu(plan, trace.record(plan, lambda: model(IMAGES[:1])))
    assert EMBEDDER in behind and all(name.endswith("layer.0.convolution") for name in behind - {EMBEDDER})
    assert len(behind) == 4
    site, inputs, _ = layer_case(32, 300)
    with torch.no_grad():  # few numbers pass
        site.module.bias.sub_(0.5)
        targets = [site.module(x) for x in inputs]
    plain = layerwise.fit(site, QuantSpec(3), 4, inputs, targets, Course(steps=200))
    aware = layerwise.fit(site, QuantSpec(3), 4, inputs, targets, Course(steps=200), relu=True)

    def passed(found: Any) -> float:
        x = activation.fake(inputs[0], found.grid, found.params)
        y = nn.functional.linear(x, affine.dequantize(found.codes), found.bias)
        return float((y.relu() - targets[0].relu()).detach().square().mean())

    assert passed(aware) < passed(plain)


@pytest.mark.must_hold("adaquant", 4)
def test_statistics_change_scales_and_biases_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = resnet(), {}
    insert, tune, absorb = renormalise.insert, renormalise.tune, renormalise.absorb

    def watched(step: Any, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen[f"before {name}"] = logits(model), codes_of(model)
            result = step(*args, **kwargs)
            seen[f"after {name}"] = logits(model), codes_of(model)
            return result
        return call

    for name, step in (("insert", insert), ("tune", tune), ("absorb", absorb)):
        monkeypatch.setattr(renormalise, name, watched(step, name))
    wanted = logits(resnet(), IMAGES)
    quantized(model, 3, steps=0)
    assert (seen["before insert"][0] - seen["after insert"][0]).abs().max() < 1e-5
    assert (seen["before tune"][0] - seen["after tune"][0]).abs().max() > 1e-3
    assert (seen["before absorb"][0] - seen["after absorb"][0]).abs().max() < 1e-4
    assert same(seen["before insert"][1], seen["after absorb"][1]) and len(seen["after absorb"][1]) == 8
    plain = resnet()
    quantized(plain, 3, steps=0, statistics="off")
    assert (logits(model, IMAGES) - wanted).norm() < (logits(plain, IMAGES) - wanted).norm()


def test_statistics_that_make_predictions_worse_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain, tune = resnet(), resnet(), renormalise.tune

    def shifted(given: Any, inserted: Any, batches: Any, passes: int) -> None:
        tune(given, inserted, batches, passes)
        for norm in inserted.norms.values():
            norm.norm.running_mean += 3

    helped = quantized(resnet(), 3, steps=0).totals["statistics"]
    assert helped["kept"] and helped["after"] < helped["before"]
    monkeypatch.setattr(renormalise, "tune", shifted)
    told = quantized(model, 3, steps=0).totals["statistics"]
    quantized(plain, 3, steps=0, statistics="off")
    assert not told["kept"] and told["after"] > told["before"] == helped["before"]
    assert torch.equal(logits(model), logits(plain))


def test_statistics_of_a_model_without_a_head() -> None:
    model, plain = resnet().resnet, resnet().resnet
    assert "statistics" not in quantized(model, 3, steps=0).totals
    quantized(plain, 3, steps=0, statistics="off")
    codes, before = codes_of(model), codes_of(plain)
    assert same(codes, before) and len(codes) == 8
    assert not torch.equal(model(IMAGES).pooler_output, plain(IMAGES).pooler_output)


def test_statistics_of_layers_without_a_norm() -> None:
    model = vit()
    quantized(model, 3, statistics="all", steps=0, statistics_momentum=None)
    plain = vit()
    quantized(plain, 3, steps=0)
    assert same(codes_of(model), codes_of(plain))
    assert not torch.equal(model.vit.layers[0].mlp.fc1.bias, plain.vit.layers[0].mlp.fc1.bias)
    assert torch.isfinite(logits(model)).all()


@pytest.mark.must_hold("adaquant", 5)
def test_parallel_layers_do_not_know_each_other() -> None:
    model, other = resnet(), resnet()
    quantized(model, statistics="off")
    first, last = EMBEDDER, "resnet.encoder.stages.1.layers.1.layer.1.convolution"
    quantized(other, 3, statistics="off", overrides={last: {"bits": 4, "activation_bits": 4}})
    a, b = (m.get_submodule(last).state_dict() for m in (model, other))
    assert all(torch.equal(a[key], b[key]) for key in a) and a.keys() == b.keys()
    assert other.get_submodule(first).spec.bits == 8  # reads the images


@pytest.mark.must_hold("adaquant", 5)
def test_behind_a_float_prefix_both_modes_are_one() -> None:
    last = "resnet.encoder.stages.1.layers.1.layer.1.convolution"
    names = [s.name for s in graph.read(resnet()).sites if s.name != last]
    states = []
    for mode in ("parallel", "sequential"):
        model = resnet()
        quantized(model, mode=mode, statistics="off", modules_to_not_convert=names)
        states.append(model.get_submodule(last).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_in_order_layers_mend_what_was_lost_before_them() -> None:
    wanted = logits(resnet(), IMAGES)
    distances = []
    for mode in ("parallel", "sequential"):
        model = resnet()
        quantized(model, 3, mode=mode, steps=80, statistics="off")
        distances.append(float((logits(model, IMAGES) - wanted).norm()))
    assert distances[1] < distances[0]


@pytest.mark.must_hold("adaquant", 6)
def test_the_program_is_exact() -> None:
    draw = random.Random(0)
    for _ in range(6):
        names = [f"layer{i}" for i in range(6)]
        losses = {n: {8: 0.0, 6: draw.random(), 4: 1 + draw.random()} for n in names}
        size = {n: {b: draw.randint(1, 9) * float(b) for b in (8, 6, 4)} for n in names}
        size = {n: {b: row[4] / 4 * b for b in row} for n, row in size.items()}
        least = sum(row[4] for row in size.values())
        before = math.inf
        for factor in (1.0, 1.3, 1.6, 2.0):
            chosen = program.allocate(losses, {"size": size}, {"size": factor * least})
            assert set(chosen) == set(names)
            assert sum(size[n][b] for n, b in chosen.items()) <= factor * least * (1 + 1e-9)
            value = sum(losses[n][b] for n, b in chosen.items())
            brute = min(
                sum(losses[n][b] for n, b in zip(names, picked, strict=True))
                for picked in itertools.product((8, 6, 4), repeat=6)
                if sum(size[n][b] for n, b in zip(names, picked, strict=True)) <= factor * least * (1 + 1e-9))
            assert value == pytest.approx(brute) and value <= before + 1e-12
            before = value
    with pytest.raises(ConfigError, match=f"{least:.6g}"):
        program.allocate(losses, {"size": size}, {"size": 0.5 * least})


@pytest.mark.must_hold("adaquant", 6)
def test_widths_within_a_budget() -> None:
    model = resnet()
    report = quantized(model, target_size=0.19, target_operations=0.9, widths=[8, 6, 4])
    bits = report.totals["layer_bits"]
    sizes = {name: layer.weight.numel() for name, layer in swap.packed_modules(model).items()}
    assert set(bits) == set(sizes) and bits[EMBEDDER] == 8 and len(set(bits.values())) > 1
    assert sum(sizes[n] * bits[n] for n in bits) <= 0.19 * 32 * sum(sizes.values())
    for name, layer in swap.packed_modules(model).items():
        assert layer.spec.bits == layer.activation.bits == bits[name]
    for row in report.totals["width_losses"].values():
        assert row[8] == 0 and row[4] >= 1e-6
    with pytest.raises(ConfigError, match="least possible cost"):
        quantized(resnet(), target_size=0.05, steps=0)
    loose = quantized(resnet(), max_loss=1e3, steps=0)
    tight = quantized(resnet(), max_loss=0.0, steps=0)
    assert set(loose.totals["layer_bits"].values()) == {4, 8} and set(tight.totals["layer_bits"].values()) == {8}


def test_chosen_widths_beat_one_width_of_the_same_size() -> None:
    """Layers that matter more than others of their size: the program finds them."""
    def model_of() -> Any:
        model = resnet()
        with torch.no_grad():  # one stage carries the signal, the other hardly counts
            for name, module in model.named_modules():
                if isinstance(module, nn.BatchNorm2d) and "stages.1.layers.1" in name:
                    module.weight.mul_(0.05)
                    module.bias.mul_(0.05)
        return model

    wanted = logits(model_of(), IMAGES)
    distances = []
    for options in ({"bits": 3, "overrides": {EMBEDDER: {"bits": 8}}},
                    {"target_size": 3 / 32, "widths": [4, 3, 2], "overrides": {EMBEDDER: {"bits": 8}}}):
        model = model_of()
        numel = {s.name: s.numel for s in graph.read(model).sites}
        if "target_size" in options:
            free = sum(n for name, n in numel.items() if name != EMBEDDER)
            options["target_size"] = (3 * free + 8 * numel[EMBEDDER]) / (32 * sum(numel.values()))
        bits = options.pop("bits", 4)
        quantized(model, bits, **{"activation_bits": 16, **options}, statistics="off")
        distances.append(float((logits(model, IMAGES) - wanted).norm()))
    assert distances[1] < distances[0]


@pytest.mark.must_hold("adaquant", 7, 8)
def test_ranges_hold_zero_and_rows_of_zeros_stay() -> None:
    site, inputs, _ = layer_case(16, 100)
    with torch.no_grad():
        site.weight[3] = 0
    course = Course(steps=60, lr_weight=1e-2, lr_range=0.1, lr_input=0.1)
    for bits, given in ((4, inputs), (2, inputs), (4, [torch.zeros_like(inputs[0])]), (4, [inputs[0] * 0 + 0.3])):
        with torch.no_grad():
            wanted = [site.module(x) for x in given]
        found = layerwise.fit(site, QuantSpec(bits), bits, given, wanted, course)
        scale, zero = found.params
        assert float(scale) * found.grid.max_code >= 1e-6 * (1 - 1e-5) and torch.isfinite(scale).all()
        assert float(activation.fake(torch.zeros(1), found.grid, found.params)) == 0
        assert bool((found.codes.scale * found.codes.spec.max_code >= 1e-6).all())
        again = affine.encode(torch.zeros(16, 16), found.codes.scale, found.codes.zero_point, found.codes.spec)
        assert float(affine.decode(again, found.codes.scale, found.codes.zero_point, found.codes.spec).abs().max()) == 0
        assert float(affine.dequantize(found.codes)[3].abs().max()) == 0
        assert torch.isfinite(found.codes.scale).all() and math.isfinite(found.after)


def test_the_first_range_is_a_mean() -> None:
    x = torch.zeros(4, 8)
    x[:, 0] = torch.tensor([1.0, 2, 3, 10])
    x[:, 1] = -1
    scale, zero = layerwise.mean_range([x[:2], x[2:]], input_grid(4))
    assert float(scale) == pytest.approx(5 / 15) and float(zero) == 3
    assert float(layerwise.mean_range([x], input_grid(4), extreme=True)[0]) == pytest.approx(11 / 15)


def test_biases_follow_the_prediction() -> None:
    model = resnet()
    batches = [{"pixel_values": part} for part in IMAGES.split(16)]
    wanted = gradients.predictions(model, batches)
    quantized(model, 3, steps=0, statistics="off")
    before, codes = gradients.divergence(model, batches, wanted), codes_of(model)
    curve = biases.tune(model, batches, wanted, steps=40, lr=1.0, batch_size=16)
    assert len(curve) == 40 and gradients.divergence(model, batches, wanted) < 0.8 * before
    assert same(codes, codes_of(model))


@pytest.mark.must_hold("adaquant", 9)
@pytest.mark.parametrize("make", [resnet, vit])
def test_saved_models_load_bit_exactly(make: Any, child: Any, tmp_path: Path) -> None:
    model = make()
    quantized(model, steps=5, target_size=0.2, bias_steps=2)
    model.save_pretrained(tmp_path)
    torch.save(IMAGES[:4], tmp_path / "images.pt")
    found = child("""
import torch
from transformers import AutoModelForImageClassification as Auto
torch.set_num_threads(int(sys.argv[2]))
with torch.no_grad():
    out["logits"] = Auto.from_pretrained(sys.argv[1])(torch.load(sys.argv[1] + "/images.pt")).logits.tolist()
""", tmp_path, torch.get_num_threads())
    assert torch.equal(torch.tensor(found["logits"]), logits(model))


@pytest.mark.parametrize("options", [{}, {"mode": "sequential"}, {"target_size": 0.2}])
def test_killed_runs_go_on(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = resnet()
    quantized(whole, **options)
    own, seen = layerwise.fit, []

    def stop(*args: Any, **kwargs: Any) -> Any:
        if len(seen) == 5:
            raise KeyboardInterrupt
        seen.append(args[0].name)
        return own(*args, **kwargs)

    monkeypatch.setattr(sites.layerwise, "fit", stop)
    with pytest.raises(KeyboardInterrupt):
        quantized(resnet(), work_dir=tmp_path, **options)
    monkeypatch.setattr(sites.layerwise, "fit", lambda *a, **k: seen.append(a[0].name) or own(*a, **k))
    model = resnet()
    report = quantized(model, work_dir=tmp_path, **options)
    assert len(seen) == (15 if "target_size" in options else 8) and len(report.packed) == 8
    a, b = model.state_dict(), whole.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_attention_and_wrong_options() -> None:
    model = vit()
    report = quantized(model, 3)
    assert len(attention.parts(model)) == 2 and len(report.packed) == 12
    assert all(part.formats["query"].bits == 3 for part in attention.parts(model).values())
    narrow = quantized(resnet(), 2, steps=0)
    assert any("below 3" in note for note in narrow.notes)
    for wrong in ({"widths": [9]}, {"widths": []}, {"target_size": 0.1, "max_loss": 1.0}, {"mode": "both"}):
        with pytest.raises(ConfigError):
            hfq.AdaQuantConfig(**wrong)
