"""Rank decay inside a ``Trainer``.

A module of its own: ``import transformers.trainer`` imports PEFT half-way, which is when the tuners are registered, and
has no ``TrainerCallback`` yet.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from hfq.integrations.peft.rank_decay import decay_step

__all__ = ["RankDecayCallback"]


class RankDecayCallback(TrainerCallback):
    """Calls :func:`~hfq.integrations.peft.decay_step` at every step of a ``Trainer``."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        decay_step(model, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        decay_step(model, state.global_step)
