"""Clips of moving digits, the script that trains the small video pipeline, and its table."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import hfq
from hfq.errors import ConfigError, DataError
from hfq.integrations import bench_rows, bench_video, measure_diffusion, measure_video
from hfq.integrations import inputs_video as inputs
from hfq.integrations.bench_tables import Case

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("sklearn")


@pytest.fixture
def judge(monkeypatch):
    """An untrained classifier in the place of the judge, and few real clips."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=11)).eval()
    monkeypatch.setattr(measure_diffusion, "judge", lambda folder=None: model)
    monkeypatch.setattr(measure_video, "REAL", 4)
    return model


def test_clips_move_as_the_prompt_says():
    video, digits, styles = inputs.clips(24, torch.Generator().manual_seed(0))
    assert video.shape == (24, 1, inputs.FRAMES, 32, 32) and -1 <= video.min() < video.max() <= 1
    moved = inputs.travelled((video + 1) / 2)
    for row, style, digit in zip(moved, styles.tolist(), digits.tolist(), strict=True):
        text = inputs.prompt(digit, style)
        way = torch.tensor(inputs.DIRECTIONS[inputs.direction_of(text)], dtype=torch.float32)
        assert float(row @ way) > 7 and float((row * way.flip(0).abs()).sum().abs()) < 2
        assert measure_diffusion.inputs.digit_of(text) == digit
    again = inputs.clips(24, torch.Generator().manual_seed(0))[0]
    assert torch.equal(again, video)
    frames = (video + 1).transpose(1, 2).flatten(0, 1) / 2
    middle = inputs._centre(inputs.centred(frames))
    assert (middle - 15.5).abs().max() < 0.5 < (inputs._centre(frames) - 15.5).abs().max()


def test_prompts():
    train, test = inputs.demo_prompts("train"), inputs.demo_prompts("test")
    assert len(train) == 100 and len(test) == 20 and not set(train) & set(test)
    seen = inputs.clips(200, torch.Generator().manual_seed(0))
    assert {inputs.prompt(d, s) for d, s in zip(seen[1].tolist(), seen[2].tolist(), strict=True)} <= set(train)
    assert inputs.prompt(9, 4) == "a bold nine moving left"
    with pytest.raises(DataError, match="names no direction"):
        inputs.direction_of("a nine")


def test_numbers_of_clips(judge):
    video, digits, styles = inputs.clips(6, torch.Generator().manual_seed(1), split="test")
    asked = [inputs.prompt(d, s) for d, s in zip(digits.tolist(), styles.tolist(), strict=True)]
    found = measure_video.numbers((video + 1) / 2, asked, (video + 1) / 2)
    assert found["motion"] == 1 and 0 <= found["digits"] <= 1 and found["psnr"] > 60
    still = measure_video.numbers((video[:, :, :1].expand_as(video) + 1) / 2, asked)
    assert still["motion"] == 0 and "psnr" not in still and still["fid"] >= 0


@pytest.fixture(scope="module")
def script() -> Any:
    path = Path(__file__).resolve().parents[2] / "examples" / "video" / "train.py"
    spec = importlib.util.spec_from_file_location("train_video", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_trains_a_pipeline(script, judge, monkeypatch, tmp_path):
    monkeypatch.setenv("HFQ_CACHE", str(tmp_path / "cache"))
    for name, value in (("POOL", 4), ("DRAWN", 2), ("HELD_OUT", 2)):
        monkeypatch.setattr(script, name, value)
    monkeypatch.setitem(inputs.RECIPES["wan"].sampling, "num_inference_steps", 2)
    vae = script.trained("vae", inputs.model_folder("vae"), steps=2)
    made = script.trained("wan", tmp_path / "wan", steps=1)
    assert json.loads((made / "training.json").read_text())["steps"] == 1 and (vae / "training.json").is_file()
    assert Image.open(made / "strip.png").size == (9 * 32, 2 * 32 + 2)
    pipe = diffusers.DiffusionPipeline.from_pretrained(made)
    pipe.set_progress_bar_config(disable=True)
    one = measure_video.draw(pipe, ["a nine moving up"], **inputs.RECIPES["wan"].sampling)
    assert one.shape == (1, 1, 9, 32, 32) and 0 <= one.min() <= one.max() <= 1
    monkeypatch.setattr(script, "MAKERS", {"wan": lambda recipe, steps: (pipe, 1.0)})
    with pytest.raises(DataError, match="another model than the recipe means"):
        script.train("wan", tmp_path / "again")


def test_rows_of_the_table():
    rows = bench_video.cases("wan", ["training"])
    assert len({case.name for case in rows}) == len(rows) == 11
    for case in rows[1:]:
        hfq.HfqConfig(method=case.method, **case.options)
    with pytest.raises(ConfigError, match="are the tables"):
        bench_video.cases("wan", ["nope"])
    with pytest.raises(ConfigError, match="clips of digits"):
        bench_video.run(rows, "prompts.txt", 1, Path("rows.json"))


def test_a_table_with_its_curves_and_pictures(zoo, judge, monkeypatch, tmp_path):
    zoo.text_to_video(tmp_path).save_pretrained(tmp_path / "float")
    recipe = inputs._Recipe({}, steps=1, sampling={**zoo.VIDEO, "num_inference_steps": 2})
    monkeypatch.setitem(inputs.RECIPES, "wan", recipe)
    monkeypatch.setattr(bench_video, "demo_pipeline", lambda name: tmp_path / "float")
    monkeypatch.setattr(bench_video, "RECORDING", {"steps": 2, "samples": 2})
    shared = {"count": 2, "pictures": str(tmp_path / "rows-pictures")}
    monkeypatch.setattr(bench_rows, "_measured", lambda case, file, module: bench_video.measure(case, shared))
    small = {"steps": 4, "calls_per_step": 1, "rank": 2, "bits": 4, "activation_bits": 4}
    cases = [Case("wan: float, –", model="wan"), Case("wan: QVGen, W4A4", "qvgen", small, model="wan"),
             Case("wan: LSQ training, W4A4", "qvgen", {**small, "rank": 0}, model="wan")]  # fmt: skip
    rows = bench_video.run(cases, "demo", 2, tmp_path / "rows.json")
    assert {path.name for path in tmp_path.glob("*.png")} == {"W4A4.png", "curves-W4A4.png"}
    assert len(rows[1]["curves"]["loss"]) == 4 and rows[1]["first_gradient"] > 0 and "psnr" in rows[2]
    text = bench_video.pivot(rows)
    assert "QVGen" in text and " dB; " in text and "motion" in bench_rows.table(rows, bench_video.PROTOCOL)
