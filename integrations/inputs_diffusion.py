"""Pictures of digits with prompts, and the small diffusion pipelines that are trained on them.

* scikit-learn's 1,797 handwritten digits, drawn bold, thin, tilted or small on 32 x 32 pixels; a prompt says how:
  "a small bold tilted nine". Every fifth digit is held out, and so are two of the twelve ways to draw each digit.
* The pipelines of :data:`RECIPES` are trained by ``examples/diffusion/train.py`` in minutes and cached under a name
  that holds a hash of the recipe. ``judge`` is the classifier that says which digit a picture shows, if any.

Nothing is downloaded (extra ``vision``). With a network every function that takes a pipeline takes a Hub id as well.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hfq.errors import DataError
from hfq.integrations import demo_models
from hfq.integrations.inputs_vision import digits, warped

__all__ = [
    "CLASSES",
    "RECIPES",
    "Recipe",
    "demo_pictures",
    "demo_pipeline",
    "demo_prompts",
    "digit_of",
    "model_folder",
    "prompt",
    "spoilt",
    "views",
]  # fmt: skip

SIZE = 32
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WEIGHTS = ("", "bold", "thin")
NONE = 10  # the judge's class for what is no digit
CLASSES = (*WORDS, "none")
STYLES = 12  # small or not, three weights, tilted or not
DATA_VERSION = 1  # part of the hash of every recipe: raise it when pictures or prompts change
_SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "diffusion" / "train.py"


@dataclass(frozen=True)
class Recipe:
    """What a demo model is and how it is trained.

    Attributes:
        options: of the configuration class of the trained model.
        needs: recipes whose models this one is made from.
        sampling: keyword arguments with which the pipeline is run when nothing else is said.
    """

    options: dict[str, Any]
    steps: int
    batch: int = 64
    lr: float = 2e-3
    muon_lr: float = 0.02
    needs: tuple[str, ...] = ()
    sampling: dict[str, Any] = field(default_factory=dict)

    def digest(self) -> str:
        """Eight hexadecimal digits that change with the recipe, with those it needs, and with the pictures."""
        return demo_models.digest(asdict(self), [RECIPES[name].digest() for name in self.needs], DATA_VERSION, SIZE)


RECIPES: dict[str, Recipe] = {
    "judge": Recipe({
        "num_channels": 1, "embedding_size": 32, "hidden_sizes": [32, 64, 128], "depths": [1, 1, 1],
        "layer_type": "basic",
    }, steps=800),
    "vae": Recipe({
        "block_out_channels": [16, 32, 64], "layers_per_block": 1, "norm_num_groups": 8, "latent_channels": 4,
        "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3,
        "sample_size": SIZE,
    }, steps=500, batch=32),
    "unet": Recipe({
        "sample_size": 16, "in_channels": 1, "out_channels": 1, "layers_per_block": 1,
        "block_out_channels": [32, 64, 64], "norm_num_groups": 16, "attention_head_dim": 16,
        "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    }, steps=1500, batch=32, sampling={"num_inference_steps": 20}),
    "text": Recipe({
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
        "block_out_channels": [64, 128], "norm_num_groups": 16, "attention_head_dim": 4, "cross_attention_dim": 64,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    }, steps=2400, batch=32, needs=("vae",), sampling={"num_inference_steps": 20, "guidance_scale": 3.0}),
    "dit": Recipe({
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "patch_size": 2, "num_layers": 6,
        "num_attention_heads": 4, "attention_head_dim": 32, "num_embeds_ada_norm": 1000,
    }, steps=1800, batch=48, needs=("vae",), sampling={"num_inference_steps": 20, "guidance_scale": 3.0}),
    # The UNet of "text" taught to make its own five guided steps in one.
    "turbo": Recipe({
        "teacher_steps": 20, "guidance_scale": 3.0, "trajectories": 640,
    }, steps=800, batch=32, lr=5e-4, muon_lr=0.005, needs=("text",),
        sampling={"num_inference_steps": 4, "guidance_scale": 1.0}),
}  # fmt: skip


def prompt(digit: int, style: int = 0) -> str:
    """The words for a digit drawn in one of :data:`STYLES` ways, such as ``"a small bold tilted nine"``."""
    words = ("small" if style >= 6 else "", WEIGHTS[style % 3], "tilted" if style % 6 >= 3 else "")
    return " ".join(word for word in ("a", *words, WORDS[digit]) if word)


def digit_of(text: str) -> int:
    """The digit that a prompt names.

    Raises:
        DataError: it names none.
    """
    found = next((WORDS.index(word) for word in text.lower().split() if word in WORDS), None)
    if found is None:
        raise DataError(f"prompt {text!r} names no digit: one of {', '.join(WORDS)} is expected")
    return found


def held_out(digit: Tensor | int, style: Tensor | int) -> Any:
    """Whether no picture of ``digit`` in ``style`` is trained on: two of twelve, in every style some digit is."""
    return (digit + style) % 6 == 0


def demo_prompts(split: str = "test", count: int | None = None, seed: int = 0) -> list[str]:
    """Prompts that name each digit equally often.

    Args:
        split: "train": the 100 prompts of the training; "test": the 20 that are held out.
        count: so many, in a cycle; default each once.
        seed: of their order.

    Raises:
        DataError: another split is asked.
    """
    found = [prompt(digit, style) for digit, style in styles_of_prompts(split, seed)]
    return [found[i % len(found)] for i in range(len(found) if count is None else count)]


def styles_of_prompts(split: str, seed: int = 0) -> list[tuple[int, int]]:
    """Digit and style of each prompt of a split, every digit equally often; see :func:`demo_prompts`."""
    if split not in ("train", "test"):
        raise DataError(f"split {split!r}: 'train' and 'test' are there")
    generator = torch.Generator().manual_seed(seed)
    found = []
    orders = [[s for s in torch.randperm(STYLES, generator=generator).tolist() if held_out(d, s) == (split == "test")]
              for d in range(10)]
    for row in range(len(orders[0])):
        for digit in torch.randperm(10, generator=generator).tolist():
            found.append((digit, orders[digit][row]))
    return found


def views(
    count: int, generator: torch.Generator, *, split: str = "train", size: int = SIZE, styled: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """New pictures of digits.

    Args:
        split: "train" draws from four fifths of the digits and of the styles, "test" from the digits of the last
            fifth in every style.
        size: of the pictures in pixels.
        styled: in all styles; otherwise upright digits of one size and weight.

    Returns:
        Pictures float32 ``[N, 1, size, size]`` in [-1, 1], digits int64 ``[N]`` and styles int64 ``[N]``.
    """
    images, targets, style = chosen(count, generator, split=split, styled=styled)
    return drawn(images, style, generator, size), targets, style


def chosen(
    count: int, generator: torch.Generator, *, split: str = "train", styled: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Digits ``[N, 8, 8]`` in [0, 1] of a split, their classes and styles, as :func:`views` draws them."""
    images, targets = digits()
    kept = torch.tensor([i for i in range(len(targets)) if (i % 5 == 0) == (split == "test")])
    rows = kept[torch.randint(len(kept), (count,), generator=generator)]
    style = torch.randint(STYLES, (count,), generator=generator) if styled else torch.zeros(count, dtype=torch.long)
    if styled and split == "train":
        style = torch.where(held_out(targets[rows], style), (style + 1) % STYLES, style)
    return images[rows], targets[rows], style


def drawn(images: Tensor, style: Tensor, generator: torch.Generator, size: int = SIZE) -> Tensor:
    """Digits ``[N, 8, 8]`` in [0, 1] drawn in their styles: ``[N, 1, size, size]`` in [-1, 1]."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(images), generator=generator)

    tilted, small = style % 6 >= 3, style >= 6
    angle = torch.where(tilted, uniform(0.45, 0.6), uniform(-0.08, 0.08))
    scale = torch.where(small, uniform(0.5, 0.58), uniform(0.85, 0.95))
    ink = inked(images, angle, scale, uniform(-0.06, 0.06), uniform(-0.06, 0.06), style % 3)
    return 2 * F.interpolate(ink, (size, size), mode="area") - 1


def inked(images: Tensor, angle: Tensor, scale: Tensor, right: Tensor, down: Tensor, weight: Tensor) -> Tensor:
    """Digits ``[N, 8, 8]`` turned, scaled and moved (see ``inputs_vision.warped``) in the weights ``[N]`` of
    :data:`WEIGHTS`: ``[N, 1, SIZE, SIZE]`` in [0, 1]."""
    ink = warped(images, angle, scale, right, down, SIZE)
    thick, fine = (1.7 * F.avg_pool2d(ink, 3, 1, 1)).clamp(0, 1), (2.2 * (ink - 0.5)).clamp(0, 1)
    weight = weight.view(-1, 1, 1, 1)
    return torch.where(weight == 1, thick, torch.where(weight == 2, fine, ink))


def spoilt(pictures: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures made of ``pictures [N, 1, S, S]`` of digits ``targets [N]`` that show none.

    One digit out of another, halves of two, exchanged quarters, clouds.
    """
    count, _, size, _ = pictures.shape
    other = torch.empty_like(pictures)
    order = targets.argsort()
    other[order] = pictures[order.roll(count // 2)]  # half the order away is another digit
    both = (pictures - other).abs() - 1
    quarters = pictures.roll((size // 2, size // 2), (2, 3))
    halves = torch.cat([other[:, :, size // 2 :], pictures[:, :, : size // 2]], 2)
    clouds = F.interpolate(torch.randn(count, 1, 6, 6, generator=generator), (size, size), mode="bicubic").clamp(-1, 1)
    kind = torch.randint(4, (count,), generator=generator)
    return torch.stack([both, quarters, halves, clouds])[kind, torch.arange(count)]


def demo_pictures(split: str = "test", count: int = 1000, seed: int = 0, *, size: int = SIZE, styled: bool = True
                  ) -> tuple[Tensor, Tensor]:
    """Real pictures float32 ``[N, 1, size, size]`` in [0, 1] to compare drawn ones with, and their digits ``[N]``."""
    pictures, targets, _ = views(count, torch.Generator().manual_seed(seed + 1), split=split, size=size, styled=styled)
    return (pictures + 1) / 2, targets


def model_folder(name: str) -> Path:
    """Where the trained model of a recipe lies in the cache, or would lie."""
    return demo_models.folder_of("diffusion", name, RECIPES)


def demo_pipeline(name: str) -> Path:
    """Folder of a demo pipeline (or of ``judge`` and ``vae``), trained on the first call where the script is at hand.

    Raises:
        DataError: there is no recipe of that name, or the model is not trained yet and the script is not here.
    """
    return demo_models.trained_by(_SCRIPT, name, model_folder(name))
