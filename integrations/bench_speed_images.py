"""``hfq bench speed vit:384x6``: image models against their own float form, in turns in one process.

What a model was calibrated on does not change its speed, so images are random, and weights may be: a shape such as
``vit:384x6`` (width x blocks) is a model of that size; ``unet:128x2`` is one denoising step. Quality is measured
elsewhere.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hfq.errors import ConfigError
from hfq.evaluation.latency import call_speeds, op_shares
from hfq.integrations import measure
from hfq.integrations.bench_speed import check_rows, forms, row_of

__all__ = ["ROWS", "is_shape", "measured", "model_of"]

_STATIC = {"activation_bits": 8, "group_size": -1, "symmetric": True, "observer": "minmax"}
ROWS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "w8": ("weights of 8 bits", "rtn", {"bits": 8, "group_size": -1, "symmetric": True}),
    "w4": ("weights of 4 bits, groups of 64", "rtn", {"bits": 4, "group_size": 64}),
    "w8a8": ("weights and inputs of 8 bits", "rtn", {"bits": 8, **_STATIC, "attention": False}),
    "w4a8": ("weights of 4, inputs of 8 bits", "rtn", {"bits": 4, **_STATIC, "attention": False}),
    "w8a8-attention": ("weights, inputs and attention products of 8 bits", "rtn", {"bits": 8, **_STATIC}),
}
_SAMPLES = 4


def _vit(width: int, blocks: int) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(
        hidden_size=width, num_hidden_layers=blocks, num_attention_heads=max(1, width // 64),
        intermediate_size=4 * width, image_size=224, patch_size=16,
    ))


def _swin(width: int, blocks: int) -> Any:
    from transformers import SwinConfig, SwinForImageClassification

    return SwinForImageClassification(SwinConfig(
        image_size=224, patch_size=4, embed_dim=width // 4, depths=[2, 2, blocks],
        num_heads=[width // 128, width // 64, width // 32], window_size=7,
    ))


def _resnet(width: int, blocks: int) -> Any:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(
        embedding_size=width // 4, hidden_sizes=[width // 4, width // 2, width], depths=[blocks] * 3,
        layer_type="basic",
    ))


def _unet(width: int, blocks: int) -> Any:
    if importlib.util.find_spec("diffusers") is None:
        raise ConfigError("unet:... is a model of diffusers: pip install 'hfq[diffusers]'")
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, block_out_channels=(width, 2 * width, 2 * width),
        layers_per_block=blocks, down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )


_FAMILIES: dict[str, tuple[Callable[[int, int], Any], int]] = {
    "vit": (_vit, 224), "swin": (_swin, 224), "resnet": (_resnet, 128), "unet": (_unet, 32),
}  # fmt: skip
_SHAPE = re.compile(rf"({'|'.join(_FAMILIES)}):(\d+)x(\d+)")


def is_shape(name: str) -> bool:
    """Whether ``name`` asks for a model of random weights."""
    return _SHAPE.fullmatch(name) is not None


def model_of(name: str) -> tuple[Any, int]:
    """A model in evaluation mode and the side of its images: ``"vit:384x6"``, a demo name, a folder or a Hub id.

    Raises:
        ConfigError: a width that 128 does not divide, or no block.
    """
    shape = _SHAPE.fullmatch(name)
    if shape is None:
        model = measure.load_model(name, dtype=torch.float32)
        return model, int(getattr(model.config, "image_size", 32))
    build, side = _FAMILIES[shape[1]]
    width, blocks = int(shape[2]), int(shape[3])
    if not width or width % 128 or not blocks:
        raise ConfigError(f"{name}: the width must be a multiple of 128, with at least one block")
    torch.manual_seed(0)
    return build(width, blocks).eval(), side


def measured(name: str, rows: Sequence[str], *, batch: int = 16, rounds: int = 5,
             say: Callable[[str], Any] = lambda text: None) -> list[dict[str, Any]]:
    """One forward of ``batch`` images, of the float model and of every row.

    Args:
        rows: keys of :data:`ROWS`.

    Returns:
        Rows with the keys of :data:`hfq.integrations.results.COLUMNS`; ratios are to the float model.

    Raises:
        ConfigError: an unknown row.
    """
    check_rows(rows, ROWS)
    model, side = model_of(name)
    images = torch.randn(max(batch, _SAMPLES), 3, side, side, generator=torch.Generator().manual_seed(0))
    feed = _step if name.startswith("unet:") else _pixels
    models = forms(model, rows, ROWS, [feed(images[:_SAMPLES])], {"calibration_samples": _SAMPLES}, say)
    say("measure")
    given = feed(images[:batch])
    calls = {title: lambda m=m: m(**given) for title, m in models.items()}
    found = call_speeds(calls, rounds=rounds)
    return [
        row_of(title, each, batch) | {"seconds_per_call": found[title][0], "speed_ratio": found[title][1],
                                      "shares": op_shares(calls[title])}
        for title, each in models.items()
    ]  # fmt: skip


def _pixels(images: torch.Tensor) -> dict[str, Any]:
    return {"pixel_values": images}


def _step(images: torch.Tensor) -> dict[str, Any]:
    return {"sample": images, "timestep": torch.tensor(500)}
