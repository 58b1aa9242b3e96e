"""Run pipelines that draw, and ask the judge what they drew; for the tables, the command line and the examples."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hfq.errors import DataError
from hfq.integrations import inputs_diffusion as inputs

__all__ = ["conditions", "denoiser", "draw", "judge", "judged", "load", "sampling", "targets"]


def load(name: str | os.PathLike[str], **options: Any) -> Any:
    """The pipeline of a demo name, a folder or a Hub id, without its progress bar.

    Args:
        options: passed to ``DiffusionPipeline.from_pretrained``.
    """
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(resolve(name), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def resolve(name: str | os.PathLike[str]) -> str:
    """Folder of a demo name; anything else as it is."""
    demo = str(name) in inputs.RECIPES and not os.path.exists(name)
    return str(inputs.demo_pipeline(str(name)) if demo else name)


def sampling(name: str | os.PathLike[str]) -> dict[str, Any]:
    """Keyword arguments with which a demo pipeline is run when nothing else is said; none for others."""
    return dict(inputs.RECIPES[str(name)].sampling) if str(name) in inputs.RECIPES else {}


def denoiser(pipe: Any) -> str:
    """Name of the component that predicts the noise: "unet" or "transformer".

    Raises:
        DataError: the pipeline has neither.
    """
    found = next((name for name in ("unet", "transformer") if getattr(pipe, name, None) is not None), None)
    if found is None:
        raise DataError(f"{type(pipe).__name__} has neither a unet nor a transformer: nothing to quantize")
    return found


def conditions(pipe: Any, split: str, count: int) -> list[Any]:
    """What ``pipe`` is asked for: prompts, class labels, or ``None`` for each picture of an unconditional pipeline."""
    accepted = inspect.signature(type(pipe).__call__).parameters
    if "prompt" in accepted:
        return list(inputs.demo_prompts(split, count))
    return [i % 10 for i in range(count)] if "class_labels" in accepted else [None] * count


def targets(asked: Sequence[Any]) -> Tensor | None:
    """The digits that were asked for, int64 ``[N]``; ``None`` where nothing was asked."""
    if any(one is None for one in asked):
        return None
    return torch.tensor([inputs.digit_of(one) if isinstance(one, str) else int(one) for one in asked])


@torch.no_grad()
def draw(pipe: Any, asked: Sequence[Any], *, seed: int = 0, batch_size: int = 50, **options: Any) -> Tensor:
    """Pictures float32 ``[N, 1, H, W]`` in [0, 1], one for each of ``asked``.

    Every picture has a random generator of its own, so that it does not depend on the batch it is drawn in.

    Args:
        asked: see :func:`conditions`.
        options: passed to the pipeline, such as ``num_inference_steps`` and ``guidance_scale``.
    """
    found = []
    for start in range(0, len(asked), batch_size):
        part = list(asked[start : start + batch_size])
        random = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        if part[0] is None:
            given: dict[str, Any] = {"batch_size": len(part)}
        else:
            given = {"prompt" if isinstance(part[0], str) else "class_labels": part}
        images = pipe(**given, generator=random, output_type="pt", **options).images
        found.append(torch.as_tensor(images).float().cpu())
    pictures = torch.cat(found)
    if pictures.shape[-1] in (1, 3):  # some pipelines give arrays with the channels last whatever is asked
        pictures = pictures.permute(0, 3, 1, 2)
    return pictures.mean(1, keepdim=True)


@lru_cache(maxsize=2)
def judge(folder: str | Path | None = None) -> Any:
    """The classifier of digits, in evaluation mode."""
    from transformers import AutoModelForImageClassification

    return AutoModelForImageClassification.from_pretrained(folder or inputs.demo_pipeline("judge")).eval()


@torch.no_grad()
def judged(pictures: Tensor, model: Any = None) -> tuple[Tensor, list[Tensor]]:
    """Logits ``[N, 11]`` of ``pictures [N, 1, S, S]`` in [0, 1], and the judge's maps from coarse to its last features.

    The last of the maps is ``[N, D]``: the features in which sets of pictures are compared.
    """
    model = judge() if model is None else model
    if pictures.ndim != 4 or pictures.shape[1] != 1:
        raise DataError(f"pictures of shape {tuple(pictures.shape)}: [N, 1, S, S] in [0, 1] is needed")
    logits, maps = [], []
    for part in pictures.split(256):
        sized = F.interpolate(part, (inputs.SIZE, inputs.SIZE), mode="bilinear", align_corners=False)
        answer = model(2 * sized.clamp(0, 1) - 1, output_hidden_states=True)
        logits.append(answer.logits)
        maps.append([*answer.hidden_states[1:], answer.hidden_states[-1].mean((2, 3))])
    return torch.cat(logits), [torch.cat(level) for level in zip(*maps, strict=True)]
