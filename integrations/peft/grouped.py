"""Adapters that read the sum of each group of inputs (QA-LoRA), and so add one number to all weights of a group."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.variants import QALoraLinearVariant

from hfq.errors import ConfigError, QuantizationError
from hfq.layers.substitute import seen

__all__ = ["GroupedVariant", "delta", "offsets"]


class GroupedVariant(QALoraLinearVariant):
    """PEFT's own variant, with the input that the packed product sees, and with a merge.

    ``y = W x + scaling * B A (n * mean over each group of x)`` with ``n`` groups, as PEFT defines it.
    """

    @classmethod
    def of(cls, config: LoraConfig) -> GroupedVariant:
        if config.use_dora:
            raise ConfigError("use_qalora=True with use_dora=True: a norm of the whole row is no number of a group")
        if config.lora_bias:
            raise ConfigError("use_qalora=True with lora_bias=True is not implemented: use bias='lora_only'")
        return cls()

    def supports_lora_conversion(self) -> bool:
        return False  # what it adds lies behind the transform of the input, if the layer has one

    @staticmethod
    def forward(module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        size = module.qalora_group_size[active_adapter]
        left, right = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        # What is merged into zero points acts on the input after its transforms and its own quantization.
        x = module.lora_dropout[active_adapter](seen(module.get_base_layer(), x).to(left.dtype))
        groups = x.shape[-1] // size
        pooled = x.unflatten(-1, (groups, size)).mean(-1) * groups
        return result + pooled @ left.t() @ right.t() * module.scaling[active_adapter]


def _change(layer: Any, name: str) -> torch.Tensor:
    """What is added to every weight of a group, ``[rows, groups of the adapter]``."""
    product = layer.lora_B[name].weight.float() @ layer.lora_A[name].weight.float()
    return product * (layer.scaling[name] * product.shape[1] / layer.qalora_group_size[name])


def delta(layer: Any, name: str) -> torch.Tensor:
    """The change of the weight matrix ``[rows, columns]``."""
    return _change(layer, name).repeat_interleave(layer.qalora_group_size[name], dim=1)


@torch.no_grad()
def offsets(layer: Any, names: list[str], every: list[str]) -> torch.Tensor:
    """What adapters ``names`` add to each group of the base layer, ``[rows, groups]``.

    Raises:
        QuantizationError: ``every`` (all that will have been merged) differ in their groups, or a group of the base
            layer is no part of a group of the adapter.
    """
    base = layer.get_base_layer()
    where, slot = base.label or type(base).__name__, base.slots["weight"]
    sizes = {name: layer.qalora_group_size[name] for name in every}
    if len(set(sizes.values())) > 1:
        raise QuantizationError(f"{where}: adapters of different groups cannot be merged together: {sizes}")
    length, size = slot.spec.group_length(slot.columns), next(iter(sizes.values()))
    if slot.spec.group_size == 0 or size % length:
        raise QuantizationError(
            f"{where}: an adapter in groups of {size} does not go into zero points of groups of {length}: "
            f"use qalora_group_size={length} or a multiple of it")  # fmt: skip
    total: torch.Tensor = sum(_change(layer, name) for name in names)  # type: ignore[assignment]
    # The last group may be shorter than the others only where it is the only one: sizes divide the columns.
    return total.repeat_interleave(size // length, dim=1)
