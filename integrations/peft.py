"""LoRA on packed layers: every ``LoraConfig`` knows them, so adapters are loaded and saved as on float models.

What is saved is an ordinary adapter. It cannot be merged: the sum of codes and a product of floats has no codes.
"""

from __future__ import annotations

import functools
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import layer as lora
from torch import nn

from hfq.errors import ConfigError, QuantizationError
from hfq.layers.conv import QConv2d
from hfq.layers.linear import PackedMatrix

__all__ = ["PackedConv2dLora", "PackedLinearLora", "register"]

# Other starting points subtract their product from the weight, which packed layers do not have.
_STARTS = (True, False, "gaussian", "orthogonal")


class _Packed:
    """What adapters of packed layers of all kinds refuse."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        if config.init_lora_weights not in _STARTS:
            raise ConfigError(f"init_lora_weights={config.init_lora_weights!r} changes the weight that it starts from, "
                              f"and a packed layer has none: one of {_STARTS} is allowed")
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)  # type: ignore[misc]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise QuantizationError("an adapter cannot be merged into packed weights: keep it beside them, or merge it "
                                "into the float model and quantize that")

    def unmerge(self) -> None:
        raise QuantizationError("nothing was merged: packed weights take no adapter in")


class PackedLinearLora(_Packed, lora.Linear):
    """An adapter beside a packed linear layer (or transformers' ``Conv1D``)."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features


class PackedConv2dLora(_Packed, lora.Conv2d):
    """An adapter beside a packed convolution."""

    _float: tuple[nn.Conv2d, ...] = ()

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_channels, module.out_channels

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        # The matrices of an adapter are made of the class of its base layer: for this moment, a float convolution.
        base: Any = super().get_base_layer()
        self._float = (nn.Conv2d(base.in_channels, base.out_channels, base.kernel_size, base.stride, base.padding,
                                 groups=base.groups, bias=base.bias is not None, device=base.device,
                                 dtype=base.compute_dtype),)  # fmt: skip
        try:
            super().update_layer(*args, **kwargs)
        finally:
            self._float = ()

    def get_base_layer(self) -> nn.Module:
        return self._float[0] if self._float else super().get_base_layer()


def register() -> None:
    """Make every ``LoraConfig``, also one that is read from disk, know the packed layers. Idempotent."""
    before = LoraConfig.__post_init__
    if hasattr(before, "_hfq"):
        return

    @functools.wraps(before)
    def after(self: LoraConfig) -> None:
        before(self)
        self._register_custom_module({PackedMatrix: PackedLinearLora, QConv2d: PackedConv2dLora})

    after._hfq = True  # type: ignore[attr-defined]
    LoraConfig.__post_init__ = after  # type: ignore[method-assign]
