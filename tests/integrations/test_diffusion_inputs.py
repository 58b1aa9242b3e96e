"""Pictures of digits with prompts, and the script that trains pipelines on them, at a size that takes seconds."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

from hfq.errors import DataError
from hfq.integrations import inputs_diffusion as inputs
from hfq.integrations import measure_diffusion

SCRIPT = Path(__file__).parents[2] / "examples" / "diffusion" / "train.py"
SMALL = {
    "judge": {"embedding_size": 8, "hidden_sizes": [8, 8, 12]},
    "vae": {"block_out_channels": [8, 8, 8], "norm_num_groups": 4},
    "unet": {"block_out_channels": [8, 8, 8], "norm_num_groups": 4, "attention_head_dim": 4},
    "text": {"block_out_channels": [8, 8], "norm_num_groups": 4, "attention_head_dim": 2},
    "dit": {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8},
    "turbo": {"trajectories": 20},
}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("diffusion_train", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained(script, tmp_path_factory):
    """``trained(name)``: folder of a demo pipeline of a few channels after two steps."""
    patch = pytest.MonkeyPatch()
    patch.setenv("HFQ_CACHE", str(tmp_path_factory.mktemp("cache")))
    small = {name: replace(recipe, steps=2, batch=10, options={**recipe.options, **SMALL[name]})
             for name, recipe in inputs.RECIPES.items()}
    patch.setattr(inputs, "RECIPES", small)
    patch.setattr(script, "TARGET", {"judge": 0.0, "pipeline": 0.0})
    patch.setattr(script, "DRAWN", 4)
    patch.setattr(script, "POOL", 20)
    yield script.trained
    patch.undo()


def test_prompts_name_every_digit_and_hold_some_out():
    train, test = inputs.demo_prompts("train"), inputs.demo_prompts("test")
    assert len(set(train)) == 100 and len(set(test)) == 20 and not set(train) & set(test)
    for prompts in (train, test, inputs.demo_prompts("test", 50)):
        counts = torch.tensor([inputs.digit_of(one) for one in prompts]).bincount()
        assert counts.tolist() == [len(prompts) // 10] * 10
    assert inputs.prompt(9, 10) == "a small bold tilted nine" and inputs.prompt(7) == "a seven"
    with pytest.raises(DataError, match="names no digit"):
        inputs.digit_of("a cat")
    with pytest.raises(DataError, match="'train' and 'test'"):
        inputs.demo_prompts("validation")


def test_pictures_look_like_their_prompts():
    random = torch.Generator().manual_seed(0)
    images = inputs.digits()[0][:1].expand(inputs.STYLES, -1, -1)
    ink = (inputs.drawn(images, torch.arange(inputs.STYLES), random) + 1).mean((1, 2, 3))
    plain, bold, thin = ink[:3]
    assert thin < plain < bold and (ink[6:] < 0.7 * ink[:6]).all()
    pictures, digits, styles = inputs.views(400, random)
    assert pictures.shape == (400, 1, 32, 32) and pictures.min() == -1 and 0.9 < pictures.max() <= 1
    assert not inputs.held_out(digits, styles).any() and len(styles.unique()) == inputs.STYLES
    real, answers = inputs.demo_pictures("test", 30, size=16, styled=False)
    assert real.shape == (30, 1, 16, 16) and real.min() >= 0 and len(answers) == 30
    assert torch.equal(real, inputs.demo_pictures("test", 30, size=16, styled=False)[0])


def test_spoilt_pictures_show_two_digits_or_none():
    digits = torch.arange(10).repeat_interleave(8)
    pictures = digits.float().view(-1, 1, 1, 1).expand(-1, 1, 4, 4) / 5 - 1
    spoilt = inputs.spoilt(pictures, digits, torch.Generator().manual_seed(0))
    whole = (spoilt.flatten(1) == pictures.flatten(1)).all(1)
    exchanged = whole.float().mean()  # quarters of a flat picture exchanged are the same picture
    assert exchanged < 0.4 and spoilt.min() >= -1 and spoilt.max() <= 1


def test_the_tokenizer_has_a_token_for_each_word(script):
    words = script.tokenizer()
    for digit in range(10):
        for style in range(inputs.STYLES):
            text = inputs.prompt(digit, style)
            ids = words(text, padding="max_length", max_length=script.LENGTH).input_ids
            assert len(ids) == script.LENGTH and ids[0] == words.bos_token_id
            assert ids.index(words.eos_token_id) == len(text.split()) + 1
            assert words.decode(ids, skip_special_tokens=True) == text
    assert words.unk_token_id not in words("Zebra!").input_ids[1:-1]  # other words are letters, as in CLIP


@pytest.mark.parametrize("name", ["unet", "text", "dit", "turbo"])
def test_pipelines_are_trained_saved_and_run(trained, name):
    from diffusers import DiffusionPipeline

    folder = trained(name)
    assert folder == inputs.model_folder(name) == inputs.demo_pipeline(name)
    assert "recognised" in (folder / "training.json").read_text()
    pipe = measure_diffusion.load(name)
    assert type(DiffusionPipeline.from_pretrained(folder)) is type(pipe)
    asked = measure_diffusion.conditions(pipe, "test", 10)
    one = measure_diffusion.draw(pipe, asked, num_inference_steps=2)
    assert one.shape == ((10, 1, 16, 16) if name == "unet" else (10, 3, 32, 32)) and one.min() >= 0 and one.max() <= 1
    parts = measure_diffusion.draw(pipe, asked, num_inference_steps=2, batch_size=4)
    assert torch.allclose(one, parts, atol=1e-4)
    assert not torch.allclose(one, measure_diffusion.draw(pipe, asked, seed=99, num_inference_steps=2), atol=1e-2)
    digits = measure_diffusion.targets(asked)
    assert digits is None if name == "unet" else digits.bincount().tolist() == [1] * 10
    seen = measure_diffusion.seen(one)
    assert seen.logits.shape == (10, 11) and seen.features.shape == (10, 12) and len(seen.maps) == 4
    found = measure_diffusion.numbers(one, asked, parts)
    assert found["psnr"] > 60 and found["feature_distance"] < 1e-3 and found["fid"] > 0 and 0 <= found["digits"] <= 1


def test_the_target_of_the_distillation_is_one_step_of_ddim(script, trained, monkeypatch):
    """A student that answers with the target goes in four steps where the teacher goes in twenty."""
    trained("text")
    recipe, answers = inputs.RECIPES["turbo"], {}

    def fit(modules, steppers, loss, steps):
        unet = modules[0]
        monkeypatch.setattr(script.F, "mse_loss", lambda found, wanted: answers.setdefault("wanted", wanted).sum())
        call = unet.forward

        def keep(here, times, encoder_hidden_states):
            answers.update(here=here, times=times)
            return call(here, times, encoder_hidden_states=encoder_hidden_states)

        monkeypatch.setattr(unet, "forward", keep)
        loss(0)
        return 0.0

    monkeypatch.setattr(script.demo_models, "fit", fit)
    pipe, _ = script.make_turbo(recipe, 1)
    path, _ = script.trajectories(measure_diffusion.load("text"), recipe, 4)
    pipe.scheduler.set_timesteps(4)
    assert answers["times"][:4].tolist() == pipe.scheduler.timesteps.tolist() == [999, 749, 499, 249]
    for i, time in enumerate(pipe.scheduler.timesteps):
        arrived = pipe.scheduler.step(answers["wanted"][i : i + 1], time, answers["here"][i : i + 1]).prev_sample
        assert (path[i + 1] - arrived).abs().flatten(1).amax(1).min() < 1e-3 * path.abs().max()


def test_guidance_and_negative_prompts(trained):
    trained("text")
    pipe = measure_diffusion.load("text")
    random = [torch.Generator().manual_seed(0) for _ in range(2)]
    options = {"num_inference_steps": 2, "guidance_scale": 2.0, "generator": random, "output_type": "pil"}
    images = pipe(["a seven", "a bold nine"], negative_prompt=["a one", "a one"], **options).images
    assert images[0].size == (32, 32) and len(images) == 2


def test_published_features_are_taken_where_their_weights_are(trained, monkeypatch, tmp_path):
    trained("judge")
    pictures, digits = inputs.demo_pictures("test", 20)
    assert "inception_fid" not in measure_diffusion.numbers(pictures, digits.tolist())
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = lambda name, features, path: (
        lambda images: (images[:, :, ::8, ::8].flatten(1).float() / 255,) if images.dtype == torch.uint8 else None)
    package = types.ModuleType("torch_fidelity")
    package.__spec__ = importlib.machinery.ModuleSpec("torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert measure_diffusion.inception() is None  # no weights, and none are downloaded
    weights = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    weights.parent.mkdir()
    weights.write_bytes(b"weights")
    with pytest.raises(DataError, match="not the file that its name says"):
        measure_diffusion.inception()
    monkeypatch.setattr(measure_diffusion, "INCEPTION", hashlib.sha256(b"weights").hexdigest()[:8])
    weights.rename(weights.with_name(f"weights-inception-2015-12-05-{measure_diffusion.INCEPTION}.pth"))
    assert measure_diffusion.numbers(pictures, digits.tolist())["inception_fid"] > 0


def test_a_model_that_misses_the_aim_is_kept_aside(script, trained, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "TARGET", {"judge": 1.1, "pipeline": 0.0})
    with pytest.raises(DataError, match=r"110 % are the aim.*\.rejected"):
        script.train("judge", tmp_path / "judge")
    assert not (tmp_path / "judge").exists()
    assert (inputs.model_folder("judge").with_suffix(".rejected") / "config.json").is_file()


def test_recipes(monkeypatch, tmp_path):
    text, vae = inputs.RECIPES["text"], inputs.RECIPES["vae"]
    before = text.digest()
    assert replace(text, steps=1).digest() != before
    monkeypatch.setitem(inputs.RECIPES, "vae", replace(vae, steps=1))
    assert text.digest() != before  # a pipeline is another one when its autoencoder is
    monkeypatch.setenv("HFQ_CACHE", str(tmp_path))
    monkeypatch.setattr(inputs, "_SCRIPT", tmp_path / "train.py")
    with pytest.raises(DataError, match=r"--models unet"):
        inputs.demo_pipeline("unet")
    with pytest.raises(DataError, match="no demo model 'sdxl'"):
        inputs.demo_pipeline("sdxl")
    with pytest.raises(DataError, match="neither a unet"):
        measure_diffusion.denoiser(object())
