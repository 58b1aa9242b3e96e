"""Sizes of a RepVGG, apart from its model: ``AutoConfig`` is told of them while the base classes of transformers are
still being imported."""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PretrainedConfig

from hfq.errors import ConfigError

__all__ = ["RepVGGConfig", "register_config"]


class RepVGGConfig(PretrainedConfig):
    """Sizes of a RepVGG.

    Args:
        num_channels: of the images.
        hidden_sizes: channels of the stem and of each stage.
        depths: blocks of each stage; the first one of a stage has ``strides`` of it.
        strides: of the stem, then of the first block of each stage.
        groups: of every convolution of 3 x 3 taps but the stem's.
        deploy: the branches are merged.
    """

    model_type = "hfq_repvgg"

    num_channels: int = 3
    hidden_sizes: list[int] | tuple[int, ...] = (48, 48, 96, 192, 1280)
    depths: list[int] | tuple[int, ...] = (2, 4, 14, 1)
    strides: list[int] | tuple[int, ...] = (2, 2, 2, 2, 2)
    groups: int = 1
    deploy: bool = False

    def __init__(
        self, num_channels: int = 3, hidden_sizes: Any = (48, 48, 96, 192, 1280), depths: Any = (2, 4, 14, 1),
        strides: Any = (2, 2, 2, 2, 2), groups: int = 1, deploy: bool = False, **kwargs: Any,
    ) -> None:
        self.num_channels, self.groups, self.deploy = num_channels, groups, deploy
        self.hidden_sizes, self.depths, self.strides = list(hidden_sizes), list(depths), list(strides)
        super().__init__(**kwargs)
        if len(self.hidden_sizes) != len(self.depths) + 1 or len(self.strides) != len(self.hidden_sizes):
            raise ConfigError(f"hidden_sizes={self.hidden_sizes} and strides={self.strides}: one number for the stem "
                              f"and one for each of the {len(self.depths)} stages are needed")


def register_config() -> None:
    """Make ``AutoConfig`` know the model. Idempotent."""
    from transformers.models.auto.configuration_auto import AutoConfig

    AutoConfig.register(RepVGGConfig.model_type, RepVGGConfig, exist_ok=True)
