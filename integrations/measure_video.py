"""Run pipelines that draw clips, and say what the clips show; for the tables and the example."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfq.evaluation.generation import frechet, psnr
from hfq.integrations import inputs_video as inputs
from hfq.integrations import measure_diffusion

__all__ = ["draw", "numbers", "strip"]

REAL = 300  # held-out clips that drawn ones are compared with


@torch.no_grad()
def draw(pipe: Any, asked: Sequence[str], *, seed: int = 0, batch_size: int = 25, **options: Any) -> Tensor:
    """Clips without colours, float32 ``[N, 1, T, H, W]`` in [0, 1], one for each prompt.

    Every clip has a random generator of its own, so that it does not depend on the batch it is drawn in.
    """
    found = []
    for start in range(0, len(asked), batch_size):
        part = list(asked[start : start + batch_size])
        random = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        frames = pipe(part, generator=random, output_type="pt", **options).frames
        found.append(torch.as_tensor(frames).float().cpu().mean(2, keepdim=True).transpose(1, 2))
    return torch.cat(found).clamp(0, 1)


def numbers(video: Tensor, asked: Sequence[str], reference: Tensor | None = None) -> dict[str, float]:
    """Quality of drawn clips.

    * ``digits``: share of frames in which the judge of ``examples/diffusion`` sees the digit that was asked for;
    * ``motion``: share of clips whose ink moves at least four pixels in the direction asked for, and less across;
    * ``fid``: Frechet distance of the judge's features of the frames to those of held-out clips;
    * ``psnr``: to the float model's clips of the same seeds, if they are given.
    """
    drawn, wanted = _seen(video), measure_diffusion.targets(asked)
    assert wanted is not None
    right = drawn.logits.argmax(-1).view(len(video), -1) == wanted[:, None]
    way = torch.tensor([inputs.DIRECTIONS[inputs.direction_of(text)] for text in asked], dtype=torch.float32)
    moved = inputs.travelled(video)
    along, across = (moved * way).sum(1), (moved * way.flip(1).abs()).sum(1).abs()
    real = (inputs.clips(REAL, torch.Generator().manual_seed(1), split="test")[0] + 1) / 2
    row = {"digits": _share(right), "motion": _share((along >= 4) & (across < along)),
           "fid": frechet(drawn.features, _seen(real).features)}
    if reference is not None:
        row["psnr"] = float(psnr(video.transpose(1, 2).flatten(0, 1), reference.transpose(1, 2).flatten(0, 1)).mean())
    return row


def _seen(video: Tensor) -> Any:
    return measure_diffusion.seen(inputs.centred(video.transpose(1, 2).flatten(0, 1)))


def _share(right: Tensor) -> float:
    return round(float(right.double().mean()), 4)


def strip(video: Tensor, asked: Sequence[str], path: Path) -> Path:
    """Clips ``[N, 1, T, H, W]`` one below the other, frames from left to right, one pixel a pixel."""
    from PIL import Image

    lines = [torch.cat(list(clip[0]), 1) for clip in video]
    gap = torch.ones(2, lines[0].shape[1])
    whole = torch.cat([part for line in lines for part in (line, gap)][:-1])
    Image.fromarray((255 * whole).round().to(torch.uint8).numpy()).save(path)
    return path
