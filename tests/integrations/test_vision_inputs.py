"""The demo images and models, folders of images, the exact rescalings, the tables and the pictures of image models."""

from __future__ import annotations

import copy
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
import transformers
from typer.testing import CliRunner

from hfq.errors import ConfigError, DataError, QuantizationError
from hfq.evaluation.rescale import spread_convolutions, spread_norms
from hfq.integrations import bench_rows, bench_vision, inputs_vision
from hfq.integrations.cli.app import app
from hfq.integrations.models import repvgg
from hfq.methods import METHODS

PIL = pytest.importorskip("PIL.Image")
TRAIN = Path(__file__).parents[2] / "examples" / "vit" / "train.py"
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def tiny(kind: str):
    torch.manual_seed(0)
    if kind == "vit":
        config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16,
                                        intermediate_size=32, patch_size=8, num_labels=2)
        return transformers.ViTForImageClassification(config).eval()
    config = transformers.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2],
                                     window_size=4, num_labels=2)
    return transformers.SwinForImageClassification(config).eval()


def logits(model):
    with torch.no_grad():
        return model(IMAGES).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny ViT with its image processor, and ten images of two classes."""
    root = tmp_path_factory.mktemp("vision")
    model = tiny("vit")
    model.config.id2label, model.config.label2id = {0: "dark", 1: "light, bright"}, {"dark": 0, "light, bright": 1}
    model.save_pretrained(root / "float")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(root / "float")
    for name, low in (("dark", 0), ("light", 128)):
        (root / "images" / name).mkdir(parents=True)
        for i in range(10):
            pixels = numpy.random.default_rng(i).integers(low, low + 127, (20, 20 + i, 3), numpy.uint8)
            PIL.fromarray(pixels).save(root / "images" / name / f"{i}.png")
    return root


def run(*args: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "250", "NO_COLOR": "1"})
    assert result.exit_code == status, f"{result.output}{result.stderr}\n{result.exception!r}"
    return result.output + result.stderr


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_spread_norms_keeps_the_function_and_widens_channels(kind):
    model = tiny(kind)
    block = next(m for m in model.modules() if hasattr(m, "layernorm_before"))
    with torch.no_grad():
        block.layernorm_before.bias.normal_()
    before, gain = logits(model), block.layernorm_before.weight.clone()
    assert torch.allclose(logits(spread_norms(model)), before, rtol=1e-5, atol=1e-6)
    ratio = block.layernorm_before.weight / gain
    assert ratio.max() >= 4 and ratio.min() == 1 and torch.equal(ratio.log2(), ratio.log2().round())


def test_spread_convolutions_keeps_the_function_and_widens_channels():
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 1], layer_type="basic",
                                       num_labels=2)
    model = transformers.ResNetForImageClassification(config).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.bias.data.normal_(std=0.1)
    before, norm = logits(model), model.resnet.encoder.stages[0].layers[0].layer[0].normalization
    gain = norm.weight.clone()
    assert torch.allclose(logits(spread_convolutions(model)), before, rtol=1e-5, atol=1e-5)
    ratio = norm.weight / gain
    assert ratio.max() >= 4 and ratio.min() == 1 and torch.equal(ratio.log2(), ratio.log2().round())
    with pytest.raises(QuantizationError, match="no block"):
        spread_convolutions(torch.nn.Linear(2, 2))


def test_unbalance_keeps_the_function_and_makes_the_centre_large():
    torch.manual_seed(0)
    model = repvgg.RepVGGForImageClassification(repvgg.RepVGGConfig(hidden_sizes=[4, 4, 6], depths=[2, 2],
                                                                    strides=[1, 2, 2], num_labels=2))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    model.eval()
    before = logits(model)
    plain = copy.deepcopy(model)
    plain.reparameterize()
    repvgg.unbalance(model, 64.0)
    assert torch.allclose(logits(model), before, rtol=1e-4, atol=1e-4) and model.config.hidden_sizes == [5, 5, 7]
    model.reparameterize()
    assert torch.allclose(logits(model), before, rtol=1e-3, atol=1e-3)
    weight, old = model.stages[0][1].conv.weight, plain.stages[0][1].conv.weight
    largest, others = weight.abs().amax((1, 2, 3)), old.abs().amax((1, 2, 3))
    assert (largest[:4] / others > 30).all() and (weight[:, :, 1, 1].abs().amax(1) == largest).all()


def test_demo_images():
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    images = inputs_vision.demo_images("test")
    counts = torch.tensor(images.labels).bincount(minlength=16)
    assert len(images) == 1440 and counts[:10].sum() == 1080 and (counts[10:] == 60).all()
    assert images.items[0].shape == (32, 32, 3) and images.items[0].dtype == numpy.uint8
    few = inputs_vision.demo_images("test", 48)
    assert len(few) == 48 and len(set(few.labels)) >= 12
    one, other = (inputs_vision.demo_images("train", 8, seed) for seed in (0, 1))
    assert not numpy.array_equal(one.items[0], other.items[0])
    pixels = few.pixels(inputs_vision.processor())
    assert pixels.shape == (48, 3, 32, 32) and -1 <= pixels.min() < -0.5 and 0.5 < pixels.max() <= 1
    with pytest.raises(DataError, match="no demo model 'vgg'"):
        inputs_vision.model_folder("vgg")


def test_recipes_have_a_hash_and_build(monkeypatch, tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    recipe = inputs_vision.RECIPES["resnet"]
    assert replace(recipe, steps=recipe.steps + 1).digest() != recipe.digest()
    monkeypatch.setenv("HFQ_CACHE", str(tmp_path))
    assert recipe.digest() in inputs_vision.model_folder("resnet").name
    spec = importlib.util.spec_from_file_location("vit_train", TRAIN)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for name, one in inputs_vision.RECIPES.items():
        model = script.build(one).eval()
        with torch.no_grad():
            assert model(torch.zeros(2, 3, 32, 32)).logits.shape == (2, 16), name
        assert model.config.id2label[10] == "brick"
    small = replace(recipe, batch=4, options={**recipe.options, "hidden_sizes": [8, 8, 8], "embedding_size": 8})
    model = script.build(small)
    assert script.fit(model, small, 2) > 0 and not model.training


def test_folders_of_images(folder, tmp_path):
    images = inputs_vision.open_images(folder / "images", "test")
    assert images.names == ("dark", "light") and list(images.labels) == [0, 0, 1, 1]
    train = inputs_vision.open_images(folder / "images", "train", 6, seed=0)
    assert len(train) == 6 and set(train.labels) == {0, 1}
    assert inputs_vision.labels_for(images, transformers.AutoModelForImageClassification.from_pretrained(
        folder / "float")).tolist() == [0, 0, 1, 1]
    (tmp_path / "only").mkdir()
    PIL.new("RGB", (8, 8)).save(tmp_path / "only" / "a.png")
    with pytest.raises(DataError, match="one class"):
        inputs_vision.open_images(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "b.png").write_text("not an image")
    with pytest.raises(DataError, match=r"b\.png cannot be read"):
        inputs_vision.open_images(tmp_path)
    with pytest.raises(DataError, match="no image"):
        inputs_vision.open_images(tmp_path / "only")


def test_the_command_line_on_images(folder, tmp_path):
    out, data = tmp_path / "packed", folder / "images"
    run("quantize", folder / "float", "-m", "rtn", "-b", 8, "-g", -1, "-d", data, "--samples", 8, "-o", out, "--set",
        "activation_bits=8")
    shown = run("eval", out, "--data", data, "--reference", folder / "float", "--save", "--plots")
    assert "top-1" in shown and "same class as float" in shown
    kept = json.loads((out / "hfq_results.json").read_text())
    assert kept["rows"][1]["agreement"] >= 0.5 and kept["rows"][1]["kl"] < 0.1 and kept["rows"][1]["this"]
    run("card", out)
    card = (out / "README.md").read_text()
    for name in ("bits", "histograms"):
        assert f"plots/{name}.png" in card and (out / "plots" / f"{name}.png").stat().st_size > 5000
    assert "pipeline_tag: image-classification" in card and "top-1" in card
    pipeline = transformers.pipeline("image-classification", model=str(out))
    assert {answer["label"] for answer in pipeline(str(data / "dark" / "0.png"))} <= {"dark", "light, bright"}


def test_rows_are_measured_in_children(folder, tmp_path, monkeypatch):
    model, output = str(folder / "float"), tmp_path / "rows.json"
    options = {"bits": 8, "activation_bits": 8, "calibration_samples": 8}
    cases = [bench_vision._case(model, "round to nearest", "W8A8", "rtn", options)]
    assert not cases[0].rescaled
    rows = bench_vision.run(cases, str(folder / "images"), None, output)
    assert rows[0]["agreement"] >= 0.5 and rows[0]["bits_per_weight"] > 8 and "quantize_seconds" in rows[0]
    monkeypatch.setattr(bench_vision.bench_rows, "_measured", None)
    assert bench_vision.run(cases, str(folder / "images"), None, output) == rows
    assert "W8A8" in bench_vision.pivot(rows) and "round to nearest" in bench_rows.table(rows, bench_vision.PROTOCOL)


@pytest.mark.parametrize("table", bench_vision.TABLES)
def test_tables_have_rows_with_valid_options(table):
    import hfq

    names = set()
    for model in ("vit", "repvgg"):
        for case in bench_vision.cases(model, [table]):
            assert case.name not in names and case.name.startswith(f"{model}: ")
            names.add(case.name)
            if case.method:
                assert METHODS[case.method].available
                hfq.HfqConfig(method=case.method, **case.options)
    with pytest.raises(ConfigError, match="are the tables"):
        bench_vision.cases("vit", ["nope"])
