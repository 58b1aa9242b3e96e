"""Train small diffusion pipelines on real digits in minutes, and the judge that says what they draw.

    python examples/diffusion/train.py                       # all, cached; about ten minutes of one core each
    python examples/diffusion/train.py --models text,dit
    python examples/diffusion/train.py --models text --steps 100 --output out/trial

* ``judge``: a small ResNet with eleven classes, ten digits and "none".
* ``vae``: an ``AutoencoderKL`` from 32 x 32 pixels to 8 x 8 x 4 latents.
* ``unet``: ``UNet2DModel`` in pixels (16 x 16), unconditional, in a ``DDIMPipeline``.
* ``text``: ``UNet2DConditionModel`` with cross-attention to a ``CLIPTextModel`` (both trained here) in a
  ``StableDiffusionPipeline``: ``pipe("a small bold tilted nine", num_inference_steps=20, guidance_scale=3)``.
* ``dit``: ``DiTTransformer2DModel`` with classes for digits, in a ``DiTPipeline``.
* ``turbo``: ``text`` distilled to four steps without guidance: ``pipe("a five", num_inference_steps=4,
  guidance_scale=1)``.

The pictures are scikit-learn's handwritten digits, redrawn (``hfq.integrations.inputs_diffusion``). Every pipeline must
draw digits that the judge recognises; the share is written beside the weights, and some of them are shown in
``samples.png``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hfq.integrations import demo_models, measure_diffusion
from hfq.integrations import inputs_diffusion as inputs

TARGET = {"judge": 0.97, "pipeline": 0.90}  # of held-out digits; of drawn ones
DRAWN = 500  # pictures that are judged
POOL = 16384  # pictures whose latents are trained on
UNASKED = 0.1  # share of pictures that are trained without their condition
NULL_CLASS = 1000  # DiTPipeline's own label for "no class"
LENGTH = 8  # tokens of a prompt with its first and last
WIDTH = 64  # of the text encoder


def trained(name: str, output: Path | None = None, steps: int | None = None) -> Path:
    """Folder with the trained model or pipeline; trains on the first call, and first what it is made from."""
    target = output or inputs.model_folder(name)
    for needed in (*inputs.RECIPES[name].needs, *(() if name in ("judge", "vae") else ("judge",))):
        trained(needed)
    return demo_models.made_once(target, f"diffusion-{name}", lambda folder: train(name, folder, steps))


def train(name: str, folder: Path, steps: int | None = None) -> None:
    """Train, measure, save. A run with fewer steps than the recipe's is a trial: what it draws is not checked."""
    recipe = inputs.RECIPES[name]
    demo_models.train(
        name, folder, lambda count: MAKERS[name](recipe, count), lambda made: quality(name, made, folder),
        {"recognised": TARGET.get(name, TARGET["pipeline"])}, steps=recipe.steps, trial=steps,
        rejected=inputs.model_folder(name).with_suffix(".rejected"),
    )  # fmt: skip


def quality(name: str, made: Any, folder: Path) -> dict[str, float]:
    """"recognised": share of held-out (judge) or drawn digits that are told right; "psnr" of the autoencoder.

    What a pipeline drew is shown in ``samples.png``.
    """
    if name == "vae":
        pictures, _ = inputs.demo_pictures("test", 500)
        with torch.no_grad():
            again = made(2 * pictures.expand(-1, 3, -1, -1) - 1).sample
        return {"psnr": round(float(-10 * ((again + 1) / 2 - pictures).square().mean().log10()), 2)}
    if name == "judge":
        pictures, digits = inputs.demo_pictures("test", 2000)
        none = (inputs.spoilt(2 * pictures - 1, digits, torch.Generator().manual_seed(1)) + 1) / 2
        refused = measure_diffusion.seen(none, made).logits.argmax(-1) == inputs.NONE
        found = measure_diffusion.seen(pictures, made).logits.argmax(-1)
        return {"recognised": share(found == digits), "refused": share(refused)}
    asked = measure_diffusion.conditions(made, "test", DRAWN)
    made.set_progress_bar_config(disable=True)
    pictures = measure_diffusion.draw(made, asked, **inputs.RECIPES[name].sampling)
    folder.mkdir(parents=True, exist_ok=True)
    measure_diffusion.sheet(pictures[:50], asked[:50], folder / "samples.png")
    wanted, found = measure_diffusion.targets(asked), measure_diffusion.seen(pictures).logits.argmax(-1)
    return {"recognised": share(found != inputs.NONE if wanted is None else found == wanted)}


def share(right: Tensor) -> float:
    return round(float(right.double().mean()), 4)


def make_judge(recipe: inputs.Recipe, steps: int) -> tuple[Any, float]:
    """A classifier that also sees pictures of no digit, coarser pictures and noise."""
    from transformers import ResNetConfig, ResNetForImageClassification

    names = dict(enumerate(inputs.CLASSES))
    model = ResNetForImageClassification(ResNetConfig(
        **recipe.options, id2label=names, label2id={name: i for i, name in names.items()}))
    generator = torch.Generator().manual_seed(0)

    def loss(step: int) -> Tensor:
        pictures, digits, _ = inputs.views(recipe.batch, generator)
        spoilt = inputs.spoilt(pictures, digits, generator)[: recipe.batch // 2]
        images = torch.cat([pictures, spoilt])
        coarse = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear", align_corners=False)
        random = torch.rand(2, len(images), 1, 1, 1, generator=generator)
        images = torch.where(random[0] < 0.4, coarse, images)
        images = images + 0.15 * random[1] * torch.randn(images.shape, generator=generator)
        labels = torch.cat([digits, torch.full((len(spoilt),), inputs.NONE)])
        return F.cross_entropy(model(images).logits, labels, label_smoothing=0.02)

    return model, demo_models.fit([model], demo_models.optimizers(model.named_parameters(), recipe.lr, recipe.muon_lr),
                                  loss, steps)


def make_vae(recipe: inputs.Recipe, steps: int) -> tuple[Any, float]:
    """An autoencoder whose latents have deviation 1 after ``scaling_factor``."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL(in_channels=3, out_channels=3, **recipe.options)
    generator = torch.Generator().manual_seed(0)

    def loss(step: int) -> Tensor:
        pictures = inputs.views(recipe.batch, generator)[0].expand(-1, 3, -1, -1)
        posterior = model.encode(pictures).latent_dist
        again = model.decode(posterior.sample(generator)).sample
        return F.mse_loss(again, pictures) + 0.3 * F.l1_loss(again, pictures) + 2e-5 * posterior.kl().mean()

    value = demo_models.fit([model], demo_models.optimizers(model.named_parameters(), recipe.lr, recipe.muon_lr),
                            loss, steps)
    with torch.no_grad():
        found = model.encode(inputs.views(500, generator)[0].expand(-1, 3, -1, -1)).latent_dist.mean
    model.register_to_config(scaling_factor=round(1 / float(found.std()), 4))
    return model, value


def make_unet(recipe: inputs.Recipe, steps: int) -> tuple[Any, float]:
    """The unconditional pipeline in pixels."""
    from diffusers import DDIMPipeline, UNet2DModel

    model, schedule = UNet2DModel(**recipe.options), scheduler(clip_sample=True)
    size = recipe.options["sample_size"]

    def draw(generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        return inputs.views(recipe.batch, generator, size=size, styled=False)[0], {}

    value = fit(recipe, steps, model, schedule, draw)
    return DDIMPipeline(model, schedule), value


def make_text(recipe: inputs.Recipe, steps: int) -> tuple[Any, float]:
    """The text-conditional pipeline in latents; the text encoder is trained with the UNet."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    words = tokenizer()
    encoder, model, schedule = text_encoder(words), UNet2DConditionModel(**recipe.options), scheduler()
    vae, latents, digits, styles = pool()
    ids = words([inputs.prompt(d, s) for d in range(10) for s in range(inputs.STYLES)] + [""],
                padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids

    def draw(generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        rows = torch.randint(len(latents), (recipe.batch,), generator=generator)
        which = unasked(inputs.STYLES * digits[rows] + styles[rows], len(ids) - 1, generator)
        return latents[rows], {"encoder_hidden_states": encoder(ids[which])[0]}

    value = fit(recipe, steps, model, schedule, draw, encoder)
    pipe = StableDiffusionPipeline(vae, encoder, words, model, schedule, safety_checker=None, feature_extractor=None,
                                   requires_safety_checker=False)
    return pipe, value


def make_dit(recipe: inputs.Recipe, steps: int) -> tuple[Any, float]:
    """The class-conditional transformer in latents."""
    from diffusers import DiTPipeline, DiTTransformer2DModel

    model, schedule = DiTTransformer2DModel(**recipe.options), scheduler()
    for module in model.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0  # every block would drop the class on its own; it is dropped once, below
    vae, latents, digits, _ = pool()

    def draw(generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        rows = torch.randint(len(latents), (recipe.batch,), generator=generator)
        return latents[rows], {"class_labels": unasked(digits[rows], NULL_CLASS, generator)}

    value = fit(recipe, steps, model, schedule, draw)
    return DiTPipeline(model, vae, schedule, id2label={i: word for i, word in enumerate(inputs.WORDS)}), value


def make_turbo(recipe: inputs.Recipe, steps: int) -> tuple[Any, float]:
    """A copy of the text-conditional pipeline whose UNet makes several guided steps of its teacher in one.

    The target is that of progressive distillation (Salimans & Ho 2022, arXiv 2202.00512, appendix G): the picture from
    which one step of DDIM arrives where the teacher's steps arrive.
    """
    pipe = measure_diffusion.load(inputs.model_folder("text"))
    jumps = recipe.sampling["num_inference_steps"]
    path, states = trajectories(pipe, recipe, jumps)
    alphas = torch.cat([torch.ones(1), pipe.scheduler.alphas_cumprod])  # the first is that of the end
    times = 1000 - 1000 // jumps * torch.arange(jumps + 1)
    keep, lose = alphas[times].sqrt().view(-1, 1, 1, 1), (1 - alphas[times]).sqrt().view(-1, 1, 1, 1)
    generator = torch.Generator().manual_seed(0)

    def loss(step: int) -> Tensor:
        rows = torch.randint(path.shape[1], (recipe.batch,), generator=generator)
        at = torch.arange(recipe.batch) % jumps
        here, ratio = path[at, rows], lose[at + 1] / lose[at]
        clean = (path[at + 1, rows] - ratio * here) / (keep[at + 1] - ratio * keep[at])
        wanted = keep[at] * (here - keep[at] * clean) / lose[at] - lose[at] * clean
        return F.mse_loss(pipe.unet(here, times[at] - 1, encoder_hidden_states=states[rows]).sample, wanted)

    steppers = demo_models.optimizers(pipe.unet.named_parameters(), recipe.lr, recipe.muon_lr)
    return pipe, demo_models.fit([pipe.unet], steppers, loss, steps)


@torch.no_grad()
def trajectories(pipe: Any, recipe: inputs.Recipe, jumps: int) -> tuple[Tensor, Tensor]:
    """Latents ``[jumps + 1, N, C, H, W]`` on the guided way of ``pipe`` from noise, and what it was asked for."""
    asked = inputs.demo_prompts("train", recipe.options["trajectories"], seed=1)
    words = pipe.tokenizer([*asked, ""], padding="max_length", return_tensors="pt").input_ids
    states = pipe.text_encoder(words)[0]
    states, empty = states[:-1], states[-1:].expand(len(asked), -1, -1)
    size, scale = pipe.unet.config.sample_size, recipe.options["guidance_scale"]
    latents = torch.randn(len(asked), 4, size, size, generator=torch.Generator().manual_seed(3))
    pipe.scheduler.set_timesteps(recipe.options["teacher_steps"])
    path = [latents]
    for i, time_ in enumerate(pipe.scheduler.timesteps, 1):
        with_prompt, without = (pipe.unet(latents, time_, encoder_hidden_states=s).sample for s in (states, empty))
        latents = pipe.scheduler.step(without + scale * (with_prompt - without), time_, latents).prev_sample
        if i % (recipe.options["teacher_steps"] // jumps) == 0:
            path.append(latents)
    return torch.stack(path), states


MAKERS: dict[str, Callable[[inputs.Recipe, int], tuple[Any, float]]] = {
    "judge": make_judge, "vae": make_vae, "unet": make_unet, "text": make_text, "dit": make_dit,
    "turbo": make_turbo,
}  # fmt: skip


def scheduler(clip_sample: bool = False) -> Any:
    """DDIM that predicts velocities, with a cosine of noise."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction",
                         clip_sample=clip_sample, timestep_spacing="trailing", steps_offset=1, set_alpha_to_one=True)


def fit(recipe: inputs.Recipe, steps: int, model: Any, schedule: Any,
        draw: Callable[[torch.Generator], tuple[Tensor, dict[str, Any]]], *others: Any) -> float:
    """Train ``model``, and ``others`` that make its conditions, to predict velocities at random times.

    Args:
        draw: gives clean pictures or latents ``[B, C, H, W]`` and the keyword arguments of the model.
    """
    generator = torch.Generator().manual_seed(0)
    named = [pair for module in (model, *others) for pair in module.named_parameters()]

    def loss(step: int) -> Tensor:
        clean, given = draw(generator)
        noise = torch.randn(clean.shape, generator=generator)
        # Times spread evenly over the batch: a mean over fewer random ones varies more.
        offset = torch.rand((), generator=generator)
        times = (1000 * (torch.arange(len(clean)) + offset) / len(clean)).long()
        noisy, wanted = schedule.add_noise(clean, noise, times), schedule.get_velocity(clean, noise, times)
        return F.mse_loss(model(noisy, timestep=times, **given).sample, wanted)

    return demo_models.fit([model, *others], demo_models.optimizers(named, recipe.lr, recipe.muon_lr), loss, steps)


def unasked(which: Tensor, null: int, generator: torch.Generator) -> Tensor:
    """``which`` with some replaced by ``null``, so that guidance has an unconditional half."""
    return torch.where(torch.rand(len(which), generator=generator) < UNASKED, null, which)


@torch.no_grad()
def pool() -> tuple[Any, Tensor, Tensor, Tensor]:
    """The autoencoder, scaled latents ``[POOL, 4, 8, 8]`` of training pictures, their digits and styles."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(inputs.model_folder("vae"))
    pictures, digits, styles = inputs.views(POOL, torch.Generator().manual_seed(7))
    latents = [vae.encode(part.expand(-1, 3, -1, -1)).latent_dist.mean for part in pictures.split(256)]
    return vae, torch.cat(latents) * vae.config.scaling_factor, digits, styles


def tokenizer() -> Any:
    """A CLIP tokenizer whose merges make one token of each word of the prompts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator(inputs.demo_prompts("train"), trainers.BpeTrainer(
        vocab_size=4096, min_frequency=1, end_of_word_suffix="</w>", show_progress=False))
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = dict.fromkeys([*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges),
                            "<|startoftext|>", "<|endoftext|>"])
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=LENGTH)


def text_encoder(words: Any) -> Any:
    """An untrained text encoder of two layers for the tokenizer ``words``."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=LENGTH, projection_dim=WIDTH, bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id))


def main() -> int:
    def run(options: argparse.Namespace, names: list[str]) -> None:
        for name in names:
            print(trained(name, options.output, options.steps))

    return demo_models.script(demo_models.arguments(__doc__, inputs.RECIPES), run)


if __name__ == "__main__":
    raise SystemExit(main())
