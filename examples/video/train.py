"""Train a small video diffusion transformer on clips of moving digits, in minutes of one core.

    python examples/video/train.py                           # cached; also writes strip.png into the cache folder
    python examples/video/train.py --models wan --steps 100 --output out/trial

* ``vae``: an ``AutoencoderKLWan`` from nine frames of 32 x 32 pixels to 5 x 8 x 8 latents.
* ``wan``: a ``WanTransformer3DModel`` with a ``UMT5EncoderModel`` (trained with it) in a ``WanPipeline``:
  ``pipe("a bold nine moving left", num_frames=9, height=32, width=32, num_inference_steps=20, guidance_scale=3,
  max_sequence_length=8)``.

The clips are scikit-learn's handwritten digits, in motion (``hfq.integrations.inputs_video``). The judge of
``examples/diffusion`` says which digits the frames show; every clip must move where its prompt says.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hfq.integrations import demo_models, measure_video
from hfq.integrations import inputs_video as inputs
from hfq.integrations.inputs_diffusion import Recipe

# Shares of frames that show the digit that was asked for, and of clips that move where they should.
TARGET = {"digits": 0.55, "motion": 0.95}
DRAWN = 200  # clips that are judged
HELD_OUT = 100  # clips that the autoencoder is measured on
POOL = 3072  # clips whose latents are trained on
UNASKED = 0.1  # share of clips that are trained without their prompt
SHIFT = 3.0  # of the noise schedule, as Wan's
LENGTH = 8  # tokens of a prompt with its end
WIDTH = 64  # of the text encoder


def trained(name: str, output: Path | None = None, steps: int | None = None) -> Path:
    """Folder with the trained model or pipeline; trains on the first call, and first what it is made from."""
    for needed in inputs.RECIPES[name].needs:
        trained(needed)
    target = output or inputs.model_folder(name)
    return demo_models.made_once(target, f"video-{name}", lambda folder: train(name, folder, steps))


def train(name: str, folder: Path, steps: int | None = None) -> None:
    """Train, measure, save. A run with fewer steps than the recipe's is a trial: what it draws is not checked."""
    recipe = inputs.RECIPES[name]
    demo_models.train(
        name, folder, lambda count: MAKERS[name](recipe, count), lambda made: quality(name, made, folder), TARGET,
        steps=recipe.steps, trial=steps, rejected=inputs.model_folder(name).with_suffix(".rejected"),
    )  # fmt: skip


def quality(name: str, made: Any, folder: Path) -> dict[str, float]:
    """"psnr" of the autoencoder; shares of drawn clips that show the digit, and move in the direction, asked for."""
    if name == "vae":
        video = inputs.clips(HELD_OUT, torch.Generator().manual_seed(1), split="test")[0]
        with torch.no_grad():
            again = made(video.expand(-1, 3, -1, -1, -1)).sample.mean(1, keepdim=True)
        return {"psnr": round(float(-10 * ((again - video) / 2).square().mean().log10()), 2)}
    asked = inputs.demo_prompts("test", DRAWN)
    video = measure_video.draw(made, asked, **inputs.RECIPES[name].sampling)
    folder.mkdir(parents=True, exist_ok=True)
    measure_video.strip(video[:10], asked[:10], folder / "strip.png")
    return measure_video.numbers(video, asked)


def make_vae(recipe: Recipe, steps: int) -> tuple[Any, float]:
    """An autoencoder; mean and deviation of its latents are in its config, as those of the published one."""
    from diffusers import AutoencoderKLWan
    from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

    model, generator = AutoencoderKLWan(**recipe.options), torch.Generator().manual_seed(0)
    parts: list[Tensor] = []  # what the decoder gives for each latent frame: `decode` clamps it, which has no gradient
    handle = model.decoder.register_forward_hook(lambda module, args, output: parts.append(output))

    def loss(step: int) -> Tensor:
        video = inputs.clips(recipe.batch, generator)[0].expand(-1, 3, -1, -1, -1)
        posterior = model.encode(video).latent_dist
        parts.clear()
        model.decode(posterior.sample(generator))
        again, wanted = torch.cat(parts, 2), patchify(video, patch_size=recipe.options["patch_size"])
        return F.mse_loss(again, wanted) + 0.3 * F.l1_loss(again, wanted) + 2e-5 * posterior.kl().mean()

    value = demo_models.fit([model], demo_models.optimizers(model.named_parameters(), recipe.lr, recipe.muon_lr),
                            loss, steps)
    handle.remove()
    found = encoded(model, 256, generator)[0].transpose(0, 1).flatten(1)
    model.register_to_config(latents_mean=found.mean(1).tolist(), latents_std=found.std(1).tolist())
    return model, value


@torch.no_grad()
def encoded(vae: Any, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Latents ``[N, C, T, H, W]`` of new clips, as they come out of the autoencoder, their digits and styles."""
    video, digits, styles = inputs.clips(count, generator)
    latents = [vae.encode(part.expand(-1, 3, -1, -1, -1)).latent_dist.mean for part in video.split(128)]
    return torch.cat(latents), digits, styles


def make_wan(recipe: Recipe, steps: int) -> tuple[Any, float]:
    """The pipeline; the text encoder is trained with the transformer, to predict velocities at random times."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    vae = AutoencoderKLWan.from_pretrained(inputs.model_folder("vae"))
    words = tokenizer()
    encoder, model = text_encoder(words), WanTransformer3DModel(**recipe.options)
    schedule = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    generator = torch.Generator().manual_seed(7)
    latents, digits, styles = encoded(vae, POOL, generator)
    shape = (1, -1, 1, 1, 1)
    mean, deviation = (torch.tensor(getattr(vae.config, name)).view(shape) for name in ("latents_mean", "latents_std"))
    latents = (latents - mean) / deviation
    found = words([*(inputs.prompt(d, s) for d in range(10) for s in range(12)), ""], padding="max_length",
                  max_length=LENGTH, return_tensors="pt")

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(latents), (recipe.batch,), generator=generator)
        which = 12 * digits[rows] + styles[rows]
        which = torch.where(torch.rand(len(rows), generator=generator) < UNASKED, len(found.input_ids) - 1, which)
        mask = found.attention_mask[which]
        text = encoder(found.input_ids[which], mask).last_hidden_state * mask[..., None]
        # Times spread evenly over the batch: a mean over fewer random ones varies more.
        share = (torch.arange(len(rows)) + torch.rand((), generator=generator)) / len(rows)
        sigma = (SHIFT * share / (1 + (SHIFT - 1) * share)).view(-1, 1, 1, 1, 1)
        noise = torch.randn(latents[rows].shape, generator=generator)
        noisy = (1 - sigma) * latents[rows] + sigma * noise
        velocity = model(noisy, timestep=1000 * sigma.flatten(), encoder_hidden_states=text, return_dict=False)[0]
        return F.mse_loss(velocity, noise - latents[rows])

    named = [pair for module in (model, encoder) for pair in module.named_parameters()]
    value = demo_models.fit([model, encoder], demo_models.optimizers(named, recipe.lr, recipe.muon_lr), loss, steps)
    pipe = WanPipeline(words, encoder, vae, schedule, model)
    pipe.set_progress_bar_config(disable=True)
    return pipe, value


MAKERS: dict[str, Callable[[Recipe, int], tuple[Any, float]]] = {"vae": make_vae, "wan": make_wan}


def tokenizer() -> Any:
    """A tokenizer with one token for each word of the prompts, and T5's end of a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for text in inputs.demo_prompts("train") for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *words))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
                                   model_max_length=LENGTH)


def text_encoder(words: Any) -> Any:
    """An untrained text encoder of two layers for the tokenizer ``words``."""
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(UMT5Config(
        vocab_size=len(words), d_model=WIDTH, d_kv=16, d_ff=4 * WIDTH, num_layers=2, num_heads=4, dropout_rate=0.0,
        pad_token_id=words.pad_token_id, eos_token_id=words.eos_token_id, decoder_start_token_id=words.pad_token_id))


def main() -> int:
    def run(options: argparse.Namespace, names: list[str]) -> None:
        for name in names:
            print(trained(name, options.output, options.steps))

    return demo_models.script(demo_models.arguments(__doc__, inputs.RECIPES), run)


if __name__ == "__main__":
    raise SystemExit(main())
