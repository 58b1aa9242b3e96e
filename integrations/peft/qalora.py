"""The tuner HFQ_QALORA: a low-rank update that is added to the weight before the weight is rounded.

``Q(W + scaling B A)`` on a grid whose scale is learned: after training one packed weight is left, and the merge is
exact, because it is what the layer computed all along.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import nn

from hfq.errors import ConfigError, QuantizationError
from hfq.formats import Codes
from hfq.integrations.peft.registry import peft_type
from hfq.integrations.peft.tuner import WeightTuner, WeightTunerConfig, WeightTunerLayer
from hfq.layers import substitute
from hfq.layers.one_weight import OneWeight
from hfq.rounding import updated
from hfq.rounding.learned_step import weight_codes

__all__ = ["QALoraConfig", "QALoraLayer", "QALoraModel", "learning_groups"]


@dataclass
class QALoraConfig(WeightTunerConfig):
    """Config of a low-rank update before the quantizer.

    Args:
        lora_alpha: the update is ``lora_alpha / r * B A``; default ``r``.
        clip: how the ranges of float layers start, as of :func:`hfq.rounding.nearest.grid_of`.
        learn_scale: the scales are trained too; zero points never are.
    """

    lora_alpha: float | None = None
    clip: str = "none"
    learn_scale: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("HFQ_QALORA")
        from hfq.rounding import nearest  # loading a packed model imports this file, and needs no solver

        if self.clip not in nearest.CLIPS:
            raise ConfigError(f"clip={self.clip!r}: one of {list(nearest.CLIPS)}")


class QALoraLayer(WeightTunerLayer):
    """``A`` ``[r, columns]``, ``B`` ``[rows, r]``, scale and zero point ``[rows, groups]``, all float32.

    The base stays frozen: the integer codes of a packed layer, or a float weight.
    """

    adapter_layer_names = ("hfq_qalora_A", "hfq_qalora_B", "hfq_qalora_scale")
    other_param_names = ("grids", "scaling", "learned", "hfq_qalora_zero")

    def __init__(self, base_layer: nn.Module, adapter_name: str, where: str) -> None:
        super().__init__(base_layer, adapter_name, where)
        self.scaling: dict[str, float] = {}
        self.learned: dict[str, bool] = {}
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.hfq_qalora_zero = BufferDict({}, persistent=True)

    def update_layer(self, adapter_name: str, r: int, config: QALoraConfig) -> None:
        base = self.get_base_layer()
        r, spec = self._limit(r), config.spec_for(base, self.where)
        weight = substitute.matrix(base)
        down, up = updated.start(*weight.shape, r, weight.device)
        self.grids[adapter_name], self.learned[adapter_name] = spec, config.learn_scale
        self.scaling[adapter_name] = 1.0 if config.lora_alpha is None else config.lora_alpha / r
        self._put("hfq_qalora_A", adapter_name, down)
        self._put("hfq_qalora_B", adapter_name, up)
        if spec is not None:
            if isinstance(base, OneWeight):
                one = base.packed("weight")[0]
                scale, zero = one.scale, one.zero_point
            else:
                from hfq.rounding import nearest

                scale, zero = nearest.grid_of(weight, spec, clip=config.clip)
            self._put("hfq_qalora_scale", adapter_name, scale.float())
            if zero is not None:
                self.hfq_qalora_zero[adapter_name] = zero.detach().float()
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)
        for name, learned in self.learned.items():
            if not learned and name in self.hfq_qalora_scale:
                self.hfq_qalora_scale[name].requires_grad_(False)

    def change(self, adapter: str) -> torch.Tensor:
        """``scaling B A``, the change of the matrix ``[rows, columns]``."""
        return self.hfq_qalora_B[adapter] @ self.hfq_qalora_A[adapter] * self.scaling[adapter]

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The change in the layout of the float layer's weight."""
        base = self.get_base_layer()
        if isinstance(base, OneWeight):
            return base.slots["weight"].to_weight(self.change(adapter))
        return substitute.as_weight(base, self.change(adapter))

    def _sum(self, names: list[str]) -> torch.Tensor:
        grids = [self.grids[name] for name in names]
        if any(grid != grids[0] for grid in grids):
            raise QuantizationError(f"{self.where}: adapters on different grids (groups or bits) cannot be used or "
                                    f"merged together: {dict(zip(names, grids, strict=True))}")
        weight = substitute.matrix(self.get_base_layer())
        for name in names:
            weight = weight + self.change(name)
        return weight

    def effective(self, names: list[str]) -> torch.Tensor:
        """``Q(W + sum of the changes)``; of several adapters, the grid of the first."""
        weight, spec = self._sum(names), self.grids[names[0]]
        if spec is None:
            return weight
        return updated.rounded(weight, self.hfq_qalora_scale[names[0]], self._zero(names[0]), spec)

    @torch.no_grad()
    def codes(self, names: list[str]) -> Codes | torch.Tensor:
        weight, spec = self._sum(names), self.grids[names[0]]
        if spec is None:
            return weight
        return weight_codes(weight, self.hfq_qalora_scale[names[0]], self._zero(names[0]), spec)

    def _zero(self, name: str) -> torch.Tensor | None:
        return self.hfq_qalora_zero[name] if name in self.hfq_qalora_zero else None  # noqa: SIM401 - no get there


class QALoraModel(WeightTuner):
    """The tuner of :class:`QALoraConfig`."""

    prefix = "hfq_qalora_"
    tuner_layer_cls = QALoraLayer


def learning_groups(
    model: nn.Module, factor: float = 1 / 2500, scale_lr: float = 1e-6, weight_decay: float = 0.01
) -> list[dict[str, Any]]:
    """Groups for an optimiser of the Adam kind: the learning rate of a layer's update is ``factor * mean(scale)``
    (:func:`hfq.training.rates.by_scale`). Scales have no weight decay.

    Raises:
        ConfigError: no adapter of the model takes gradients.
    """
    found: list[tuple[str, list[torch.Tensor], torch.Tensor | None]] = []
    scales = []
    for name, layer in model.named_modules():
        if not isinstance(layer, QALoraLayer):
            continue
        for adapter in layer.known(layer.active_adapters):
            pair = [p for p in (layer.hfq_qalora_A[adapter], layer.hfq_qalora_B[adapter]) if p.requires_grad]
            scale = layer.hfq_qalora_scale.get(adapter)
            if pair:
                found.append((name, pair, scale))
            if scale is not None and scale.requires_grad:
                scales.append(scale)
    if not found:
        raise ConfigError("no HFQ_QALORA adapter of this model takes gradients: add one, or load it with "
                          "is_trainable=True")
    from hfq.training.rates import by_scale  # loading a packed model imports this file, and needs no training

    groups = by_scale(found, factor, weight_decay)
    return [*groups, *([{"params": scales, "lr": scale_lr, "weight_decay": 0.0, "layer": "scales"}] if scales else [])]
