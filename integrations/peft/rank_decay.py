"""The tuner HFQ_RANK_DECAY: a low-rank helper beside a rounded weight, which is trained away.

What a layer computes with is :mod:`hfq.training.helped`'s. The helper is never merged; at rank 0 the packed layer
computes what the layer computes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import nn

from hfq.errors import ConfigError, QuantizationError
from hfq.formats import Codes, QuantSpec
from hfq.integrations.peft.registry import peft_type
from hfq.integrations.peft.tuner import WeightTuner, WeightTunerConfig, WeightTunerLayer
from hfq.layers import substitute
from hfq.rounding.learned_step import weight_codes
from hfq.training import helped
from hfq.training.decay import Decay, factorise

__all__ = ["RankDecayConfig", "RankDecayLayer", "RankDecayModel", "decay_step"]


@dataclass
class RankDecayConfig(WeightTunerConfig):
    """Config of a helper that is decayed to rank 0.

    Args:
        phase_steps: optimiser steps of one phase; ``log2(r) + 1`` phases with the default ``shrink``.
        shrink, schedule, warmup_steps: share that fades in a phase, "cosine" or "linear", steps before the first one.
        train_base: a copy of the weight is trained (and saved with the adapter); else the helper and the grid alone.
        init: "quant_error_svd", the error of rounding.
        step: optimiser steps done; kept by :func:`decay_step`.
    """

    phase_steps: int | None = None
    shrink: float = 0.5
    schedule: str = "cosine"
    warmup_steps: int = 0
    train_base: bool = True
    init: str = "quant_error_svd"
    step: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("HFQ_RANK_DECAY")
        if type(self.phase_steps) is not int:
            raise ConfigError(f"phase_steps={self.phase_steps!r}: the number of optimiser steps of one phase is needed")
        if self.init != "quant_error_svd":
            raise ConfigError(f"init={self.init!r}: 'quant_error_svd' is the one start there is")
        self.decay(self.r)

    def decay(self, r: int) -> Decay:
        assert self.phase_steps is not None
        return Decay(r, self.phase_steps, self.shrink, self.schedule, self.warmup_steps)

    def spec(self, bits: int) -> QuantSpec:
        zero = "int" if self.symmetric else "float"
        return QuantSpec(bits, self.group_size, self.symmetric, zero, "float32")  # type: ignore[arg-type]


class RankDecayLayer(WeightTunerLayer):
    """``L`` ``[rows, r]``, ``R`` ``[r, columns]``, the latent weight, its grid, the factors ``[r]``; all float32."""

    adapter_layer_names = ("hfq_rank_decay_L", "hfq_rank_decay_R", "hfq_rank_decay_scale", "hfq_rank_decay_zero",
                           "hfq_rank_decay_weight")  # fmt: skip
    other_param_names = ("grids", "configs", "decays", "hfq_rank_decay_factors", "hfq_rank_decay_step")

    def __init__(self, base_layer: nn.Module, adapter_name: str, where: str) -> None:
        super().__init__(base_layer, adapter_name, where)
        self.configs: dict[str, RankDecayConfig] = {}
        self.decays: dict[str, Decay] = {}
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        for name in self.other_param_names[3:]:
            setattr(self, name, BufferDict({}, persistent=True))

    def update_layer(self, adapter_name: str, r: int, config: RankDecayConfig) -> None:
        base = self.get_base_layer()
        if substitute.spec_of(base) is not None:
            raise ConfigError(f"{self.where} is packed: the error of its rounding, from which the helper starts, is "
                              "lost. Use the float model")
        decay, spec = config.decay(self._limit(r)), config.spec_for(base, self.where)
        weight = substitute.matrix(base)
        self.grids[adapter_name], self.configs[adapter_name], self.decays[adapter_name] = spec, config, decay
        if config.train_base:
            self._put("hfq_rank_decay_weight", adapter_name, weight)
        error = torch.zeros_like(weight)
        if spec is not None:
            scale, zero = helped.first_grid(weight, spec)
            self._put("hfq_rank_decay_scale", adapter_name, scale)
            if zero is not None:
                self._put("hfq_rank_decay_zero", adapter_name, zero)
            error = weight - helped.effective(weight, (scale, zero), spec)
        if decay.rank_at(config.step):
            left, right = factorise(error, decay.rank)
            self._put("hfq_rank_decay_L", adapter_name, left)
            self._put("hfq_rank_decay_R", adapter_name, right)
        self.hfq_rank_decay_factors[adapter_name] = decay.factors(config.step).to(weight.device)
        self.hfq_rank_decay_step[adapter_name] = torch.tensor([config.step])
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    # The weight

    def _latent(self, name: str) -> torch.Tensor:
        held = self.hfq_rank_decay_weight
        return held[name] if name in held else substitute.matrix(self.get_base_layer())

    def _grid(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        zero = self.hfq_rank_decay_zero.get(name)
        return self.hfq_rank_decay_scale[name], zero

    def change(self, adapter: str) -> torch.Tensor | None:
        """``(gamma o L) R``, what is added to the rounded weight; nothing at rank 0."""
        if adapter not in self.hfq_rank_decay_L:
            return None
        return (self.hfq_rank_decay_L[adapter] * self.hfq_rank_decay_factors[adapter]) @ self.hfq_rank_decay_R[adapter]

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The helper in the layout of the float layer's weight (the change of the latent weight is not in it)."""
        change = self.change(adapter)
        base = self.get_base_layer()
        return torch.zeros_like(base.weight) if change is None else substitute.as_weight(base, change)  # type: ignore

    def effective(self, names: list[str]) -> torch.Tensor:
        """``Q(W) + (gamma o L) R`` of one adapter."""
        name = self._one(names)
        spec = self.grids[name]
        grid = None if spec is None else self._grid(name)
        return helped.effective(self._latent(name), grid, spec, self.change(name))

    def codes(self, names: list[str]) -> Codes | torch.Tensor:
        name = self._one(names)
        left = self.rank(name)
        if left:
            raise QuantizationError(
                f"{self.where}: adapter {name!r} is at rank {left}. Its helper is added after rounding and has no "
                f"codes: rounding the sum gives another weight. Train on to step {self.decays[name].steps} (rank 0), "
                "then merge")
        latent, spec = self._latent(name), self.grids[name]
        return latent.detach() if spec is None else weight_codes(latent, *self._grid(name), spec)

    def _one(self, names: list[str]) -> str:
        if len(names) > 1:
            raise ConfigError(f"{self.where}: {names} are active together; every rank-decay adapter has a weight of "
                              "its own, so one at a time")
        return names[0]

    # The schedule

    def rank(self, name: str) -> int:
        """Components that are left."""
        return self.decays[name].rank_at(int(self.hfq_rank_decay_step[name]))

    @torch.no_grad()
    def advance(self, name: str, step: int) -> int:
        """Bring the helper to an optimiser step; the rank there.

        The factors depend on the step alone. Where a phase ends in between, what is left is factorised anew; the step
        is saved with the adapter, so a run that goes on does not do it twice.
        """
        decay, held = self.decays[name], self.hfq_rank_decay_step[name]
        now, then = decay.phase(int(held)), decay.phase(step)
        if then < now:
            raise ConfigError(f"{self.where}: step {step} lies before step {int(held)}, and what was cut off since is "
                              "gone")
        left, right = self.hfq_rank_decay_L, self.hfq_rank_decay_R
        if not decay.rank_at(step):
            for part in (left, right):
                if name in part:
                    del part[name]
        else:
            helped.cross(left[name], right[name], decay, now, then)
        self.hfq_rank_decay_factors[name].copy_(decay.factors(step))
        held.fill_(step)
        self.configs[name].step = step
        return decay.rank_at(step)


class RankDecayModel(WeightTuner):
    """The tuner of :class:`RankDecayConfig`."""

    prefix = "hfq_rank_decay_"
    tuner_layer_cls = RankDecayLayer


def decay_step(model: nn.Module, step: int) -> int:
    """Bring the active rank-decay adapters of a model to an optimiser step, before it; the largest rank left.

    Raises:
        ConfigError: the model has no such adapter, or was further already.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, RankDecayLayer)]
    if not layers:
        raise ConfigError("the model has no HFQ_RANK_DECAY adapter")
    return max(layer.advance(name, step) for layer in layers for name in layer.known(layer.active_adapters))
