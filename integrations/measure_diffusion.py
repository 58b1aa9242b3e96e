"""Run pipelines that draw, and ask the judge what they drew; for the tables, the command line and the examples."""

from __future__ import annotations

import hashlib
import importlib.util
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
from hfq.evaluation.generation import Drawn, frechet, generation, psnr
from hfq.integrations import inputs_diffusion as inputs
from hfq.integrations.drawing import draw

__all__ = [
    "conditions", "denoiser", "draw", "general", "inception", "is_pipeline", "judge", "load", "numbers", "resolve",
    "sampling", "seen", "sheet", "targets",
]  # fmt: skip

REAL = 2000  # held-out pictures that drawn ones are compared with
INCEPTION = "6726825d"  # start of the hash of torch-fidelity's weights


def is_pipeline(name: str | os.PathLike[str]) -> bool:
    """Whether a demo name, folder or Hub id is that of a pipeline of diffusers."""
    if importlib.util.find_spec("diffusers") is None or str(name) in ("judge", "vae"):
        return False
    if str(name) in inputs.RECIPES or os.path.exists(name):
        return not os.path.exists(name) or os.path.isfile(os.path.join(name, "model_index.json"))
    from diffusers import DiffusionPipeline

    try:
        return "_class_name" in DiffusionPipeline.load_config(str(name))
    except (OSError, ValueError):
        return False  # loading the model says what is wrong


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


def conditions(pipe: Any, split: str, count: int, source: str = "demo") -> list[Any]:
    """What ``pipe`` is asked for: prompts, class labels, or ``None`` for each picture of an unconditional pipeline.

    Args:
        split: "train" or "test".
        source: "demo", or a text file with one prompt a line; every second is for tests.

    Raises:
        DataError: there is no such file, or it holds fewer than two prompts.
    """
    accepted = inspect.signature(type(pipe).__call__).parameters
    if "prompt" in accepted:
        found = inputs.demo_prompts(split) if source == "demo" else _prompts_of(Path(source))[split == "test" :: 2]
        return [found[i % len(found)] for i in range(count)]
    return [i % 10 for i in range(count)] if "class_labels" in accepted else [None] * count


def _prompts_of(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a file of prompts: {error}") from error
    if len(lines) < 2:
        raise DataError(f"{path} holds {len(lines)} prompts: two are the least, every second is for tests")
    return lines


def targets(asked: Sequence[Any]) -> Tensor | None:
    """The digits that were asked for, int64 ``[N]``; ``None`` where nothing was asked."""
    if any(one is None for one in asked):
        return None
    return torch.tensor([inputs.digit_of(one) if isinstance(one, str) else int(one) for one in asked])


def sheet(pictures: Tensor, asked: Sequence[Any], path: Path, columns: int = 10) -> Path:
    """Pictures ``[N, C, H, W]`` in lines of ``columns``, each in the order of its digits, one pixel a pixel."""
    from PIL import Image

    lines = []
    for start in range(0, len(pictures), columns):
        part, digits = pictures[start : start + columns], targets(asked[start : start + columns])
        lines.append(torch.cat(list(part if digits is None else part[digits.argsort()]), 2))
    whole = _bytes(torch.cat(lines, 1))
    Image.fromarray((whole[0] if len(whole) == 1 else whole.permute(1, 2, 0)).numpy()).save(path)
    return path


def numbers(pictures: Tensor, asked: Sequence[Any], reference: Tensor | None = None, *, by_judge: bool = True
            ) -> dict[str, float]:
    """Quality of drawn pictures, with keys of :data:`hfq.integrations.results.COLUMNS`.

    Args:
        asked: see :func:`conditions`.
        reference: the float model's pictures of the same seeds.
        by_judge: the pictures are digits: everything is measured; otherwise the PSNR alone.
    """
    if not by_judge:
        return {} if reference is None else {"psnr": float(psnr(pictures, reference).mean())}
    wanted = targets(asked)
    real, _ = inputs.demo_pictures("test", REAL, size=pictures.shape[-1], styled=wanted is not None)
    found = generation(seen(pictures), seen(real).features, inputs.NONE if wanted is None else wanted,
                       None if reference is None else seen(reference))
    row = {"fid": found.fid, "kid": found.kid, "digits": found.accuracy, "psnr": found.psnr,
           "feature_distance": found.feature_distance}
    if (network := inception()) is not None:
        row["inception_fid"] = frechet(*(general(part, network) for part in (pictures, real)))
    return {key: value for key, value in row.items() if value is not None}


@lru_cache(maxsize=2)
def judge(folder: str | Path | None = None) -> Any:
    """The classifier of digits, in evaluation mode."""
    from transformers import AutoModelForImageClassification

    return AutoModelForImageClassification.from_pretrained(folder or inputs.demo_pipeline("judge")).eval()


@torch.no_grad()
def seen(pictures: Tensor, model: Any = None) -> Drawn:
    """What the judge (or another such classifier) sees in ``pictures [N, C, S, S]`` in [0, 1], without colours.

    Raises:
        DataError: pictures of another form.
    """
    model = judge() if model is None else model
    if pictures.ndim != 4 or pictures.shape[1] not in (1, 3):
        raise DataError(f"pictures of shape {tuple(pictures.shape)}: [N, 1 or 3, S, S] in [0, 1] is needed")
    logits, maps = [], []
    for part in pictures.mean(1, keepdim=True).split(256):
        sized = F.interpolate(part, (inputs.SIZE, inputs.SIZE), mode="bilinear", align_corners=False)
        answer = model(2 * sized.clamp(0, 1) - 1, output_hidden_states=True)
        logits.append(answer.logits)
        maps.append(answer.hidden_states)
    levels = [torch.cat(level) for level in zip(*maps, strict=True)]
    return Drawn(pictures, torch.cat(logits), levels, levels[-1].mean((2, 3)))


def inception() -> Any:
    """The network that published distances are measured with, if torch-fidelity and its weights are at hand.

    The weights are those that torch-fidelity keeps in the cache of ``torch.hub``; nothing is downloaded.

    Raises:
        DataError: the file of weights is damaged.
    """
    weights = Path(torch.hub.get_dir()) / "checkpoints" / f"weights-inception-2015-12-05-{INCEPTION}.pth"
    if importlib.util.find_spec("torch_fidelity") is None or not weights.is_file():
        return None
    if not hashlib.sha256(weights.read_bytes()).hexdigest().startswith(INCEPTION):
        raise DataError(f"{weights} is not the file that its name says: remove it")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(weights))


@torch.no_grad()
def general(pictures: Tensor, network: Any) -> Tensor:
    """Features ``[N, 2048]`` of ``pictures [N, 1 or 3, S, S]`` in [0, 1] in the network of :func:`inception`."""
    return torch.cat([network(_bytes(part.expand(-1, 3, -1, -1)))[0] for part in pictures.split(32)])


def _bytes(pictures: Tensor) -> Tensor:
    return (255 * pictures.clamp(0, 1)).round().to(torch.uint8)
