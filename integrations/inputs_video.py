"""Clips of moving digits with prompts, and the small video diffusion pipeline that is trained on them.

* A digit of :mod:`hfq.integrations.inputs_diffusion` in one of three weights moves over 32 x 32 pixels in one of four
  directions; a prompt says so: "a bold nine moving left". Every fifth digit is held out, and so are two of the twelve
  ways in which each digit moves.
* The pipeline of :data:`RECIPES` is trained by ``examples/video/train.py`` in minutes and cached under a name that
  holds a hash of the recipe.

Nothing is downloaded (extra ``vision``).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from hfq.errors import DataError
from hfq.integrations import demo_models
from hfq.integrations.inputs_diffusion import SIZE, WEIGHTS, WORDS, Recipe, chosen, inked, styles_of_prompts

__all__ = [
    "DIRECTIONS", "FRAMES", "RECIPES", "centred", "clips", "demo_pipeline", "demo_prompts", "direction_of",
    "model_folder", "prompt", "travelled",
]  # fmt: skip

FRAMES = 9
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (right, down)
DATA_VERSION = 1  # part of the hash of every recipe: raise it when clips or prompts change
_SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "video" / "train.py"


@dataclass(frozen=True)
class _Recipe(Recipe):
    def digest(self) -> str:
        return demo_models.digest(asdict(self), [RECIPES[name].digest() for name in self.needs], DATA_VERSION, SIZE)


# Pixels, a patch of two in the autoencoder, two rows and columns and two frames a latent: 5 x 8 x 8 latents.
_AUTOENCODER = {
    "base_dim": 16, "z_dim": 8, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [True],
    "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_temporal": 2, "scale_factor_spatial": 4,
    "latents_mean": [0.0] * 8, "latents_std": [1.0] * 8,
}  # fmt: skip
RECIPES: dict[str, Recipe] = {
    "vae": _Recipe(_AUTOENCODER, steps=400, batch=6),
    "wan": _Recipe({
        "patch_size": [1, 2, 2], "num_attention_heads": 4, "attention_head_dim": 24, "in_channels": 8,
        "out_channels": 8, "text_dim": 64, "freq_dim": 64, "ffn_dim": 288, "num_layers": 3, "rope_max_seq_len": 32,
    }, steps=1800, batch=16, needs=("vae",), sampling={
        "num_inference_steps": 20, "guidance_scale": 3.0, "height": SIZE, "width": SIZE, "num_frames": FRAMES,
        "max_sequence_length": 8,
    }),
}  # fmt: skip


def prompt(digit: int, style: int = 0) -> str:
    """The words for a digit in one of the twelve ways, such as ``"a bold nine moving left"``."""
    words = ("a", WEIGHTS[style // 4], WORDS[digit], "moving", list(DIRECTIONS)[style % 4])
    return " ".join(word for word in words if word)


def direction_of(text: str) -> str:
    """The direction that a prompt names.

    Raises:
        DataError: it names none.
    """
    found = next((word for word in text.lower().split() if word in DIRECTIONS), None)
    if found is None:
        raise DataError(f"prompt {text!r} names no direction: one of {', '.join(DIRECTIONS)} is expected")
    return found


def demo_prompts(split: str = "test", count: int | None = None, seed: int = 0) -> list[str]:
    """Prompts that name each digit equally often; see :func:`hfq.integrations.inputs_diffusion.demo_prompts`."""
    found = [prompt(digit, style) for digit, style in styles_of_prompts(split, seed)]
    return [found[i % len(found)] for i in range(len(found) if count is None else count)]


def clips(count: int, generator: torch.Generator, *, split: str = "train") -> tuple[Tensor, Tensor, Tensor]:
    """New clips of digits that move in a straight line.

    Args:
        split: "train" or "test"; see :func:`hfq.integrations.inputs_diffusion.views`.

    Returns:
        Frames float32 ``[N, 1, FRAMES, SIZE, SIZE]`` in [-1, 1], digits int64 ``[N]`` and styles int64 ``[N]``.
    """
    images, digits, style = chosen(count, generator, split=split)

    def uniform(low: float, high: float, *more: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *more, generator=generator)

    angle, scale = uniform(-0.08, 0.08), uniform(0.5, 0.58)
    way = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float32)[style % 4]  # [N, 2]
    length = uniform(0.6, 0.8, 1)  # of the whole way, in halves of the picture
    across = uniform(-0.25, 0.25, 1) * way.flip(1).abs()
    time = torch.linspace(-0.5, 0.5, FRAMES).view(1, -1, 1)
    place = (way * length)[:, None] * time + across[:, None]  # [N, FRAMES, 2]
    frames = place.flatten(0, 1) / -scale.repeat_interleave(FRAMES)[:, None]
    each = [t.repeat_interleave(FRAMES, 0) for t in (images, angle, scale, style // 4)]
    ink = inked(each[0], each[1], each[2], frames[:, 0], frames[:, 1], each[3])
    return 2 * ink.unflatten(0, (count, FRAMES)).transpose(1, 2) - 1, digits, style


def _centre(frames: Tensor) -> Tensor:
    """Centre of the ink of ``frames [N, 1, H, W]`` in [0, 1], in pixels ``[N, 2]`` (right, down)."""
    size = frames.shape[-1]
    ink = frames[:, 0].clamp(min=0) ** 2 + 1e-6
    steps = torch.arange(size, dtype=frames.dtype)
    total = ink.sum((1, 2))
    return torch.stack([(ink.sum(1) * steps).sum(1) / total, (ink.sum(2) * steps).sum(1) / total], 1)


def centred(frames: Tensor) -> Tensor:
    """``frames [N, 1, H, W]`` in [0, 1] with the centre of the ink in the middle, as the judge knows digits."""
    shift = (frames.shape[-1] - 1) / 2 - _centre(frames)
    theta = torch.zeros(len(frames), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1
    theta[:, :, 2] = -2 * shift / frames.shape[-1]
    grid = F.affine_grid(theta, list(frames.shape), align_corners=False)
    return F.grid_sample(frames, grid, align_corners=False)


def travelled(video: Tensor) -> Tensor:
    """How far the ink of clips ``[N, 1, T, H, W]`` in [0, 1] moves from the first frame to the last, ``[N, 2]``."""
    return _centre(video[:, :, -1]) - _centre(video[:, :, 0])


def model_folder(name: str) -> Path:
    """Where the trained model of a recipe lies in the cache, or would lie."""
    return demo_models.folder_of("video", name, RECIPES)


def demo_pipeline(name: str = "wan") -> Path:
    """Folder of the demo pipeline (or of ``vae``), trained on the first call where the script is at hand.

    Raises:
        DataError: there is no recipe of that name, or the model is not trained yet and the script is not here.
    """
    return demo_models.trained_by(_SCRIPT, name, model_folder(name))
