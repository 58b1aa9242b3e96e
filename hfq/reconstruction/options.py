"""What is learned in a block, site by site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from hfq.errors import ConfigError

__all__ = ["Options", "Place"]

Place = Literal["matrix", "vector", "off"]


@dataclass(frozen=True)
class Options:
    """What is learned in a block.

    Attributes:
        norm: after norms: "matrix" (a full matrix that runs online), "vector" (merged into the gain), "off".
        value: values → output projection: "matrix" a head, "vector", "off".
        query: queries ↔ keys: "matrix", "vector", "off".
        rotary: "safe" keeps the function under rotary embeddings (2 x 2 blocks that commute, one value a pair); "free"
            ignores them: what is learned is then no equivalent of the model.
        product: up → down and other matrix → matrix pairs: "vector" or "off".
        gate: up ↔ gate through the activation: "vector" or "off".
        shift: also learn a shift of what norms and values give.
        start_shift: where shifts start: "middle" of the range for norms with a bias, zero for others; or "zero".
        alpha: exponent of the starting scales; ``None`` starts them at one.
        heads: how channels of heads that share keys and values are joined for the start: "max", "mean" or "first".
        factor: damping of entries off the diagonal (the stability factor).
        clip: learn the range of every weight group, from ``sigmoid(clip_start)``.
        stored: dtype in which an online matrix is stored.
    """

    norm: Place = "vector"
    value: Place = "matrix"
    query: Place = "off"
    rotary: Literal["safe", "free"] = "safe"
    product: Place = "off"
    gate: Place = "off"
    shift: bool = True
    start_shift: Literal["middle", "zero"] = "middle"
    alpha: float | None = 0.5
    heads: Literal["max", "mean", "first"] = "max"
    factor: float = 1e-2
    clip: bool = True
    clip_start: float = 4.0
    stored: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        for name in ("product", "gate"):
            if getattr(self, name) == "matrix":
                raise ConfigError(f"{name}='matrix': an elementwise function lies between, only scales pass it")
