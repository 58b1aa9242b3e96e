"""What a packed model needs before it is trained with adapters."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import peft
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import other
from torch import nn

from hfq.errors import ConfigError
from hfq.layers.swap import packed_modules

__all__ = ["prepare_for_training", "register"]


def prepare_for_training(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None
) -> Any:
    """Freeze the base, switch gradient checkpointing on and let gradients reach the first block.

    For transformers and diffusers models, before or after an adapter was added. Nothing is cast: packed layers take
    every dtype, and scales must keep theirs.

    Args:
        gradient_checkpointing_kwargs: of ``torch.utils.checkpoint``; default ``{"use_reentrant": False}``.

    Returns:
        The model, for chaining.

    Raises:
        ConfigError: the model has no packed layer, has adapters of which none takes gradients, or cannot checkpoint.
    """
    if not isinstance(model, nn.Module) or not packed_modules(model):
        raise ConfigError(f"{type(model).__name__} has no packed layers: quantize it first, or use "
                          "peft.prepare_model_for_kbit_training")
    adapters = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    if not adapters:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    elif not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("the adapters of this model are frozen, as its base is: load them with is_trainable=True, or "
                          "activate one with set_adapter")
    if use_gradient_checkpointing:
        _checkpoint(model, dict(gradient_checkpointing_kwargs or {"use_reentrant": False}))
    return model


def _checkpoint(model: Any, options: dict[str, Any]) -> None:
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        diffusers_way = getattr(model, "enable_gradient_checkpointing", None)
        if diffusers_way is None:
            raise ConfigError(f"{type(model).__name__} knows no gradient checkpointing: "
                              "use_gradient_checkpointing=False")
        diffusers_way()
        return
    enable(gradient_checkpointing_kwargs=options)
    # The first block's input comes from a frozen table: a re-entrant checkpoint would see no gradient to compute.
    if options.get("use_reentrant", True):
        model.enable_input_require_grads()


def register() -> None:
    """Let ``peft.prepare_model_for_kbit_training`` do this for models with packed layers. Idempotent.

    As it is, it would cast their scales to float32 and let no gradient into a checkpointed first block.
    """
    before = other.prepare_model_for_kbit_training
    if hasattr(before, "_hfq"):
        return

    @functools.wraps(before)
    def after(
        model: Any, use_gradient_checkpointing: bool = True,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **kwargs: Any,
    ) -> Any:
        if isinstance(model, nn.Module) and packed_modules(model):
            return prepare_for_training(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)
        return before(model, use_gradient_checkpointing, gradient_checkpointing_kwargs, **kwargs)

    after._hfq = True  # type: ignore[attr-defined]
    for place in (other, peft.utils, peft):
        place.prepare_model_for_kbit_training = after
