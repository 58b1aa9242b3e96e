"""Adapters: LoRA of every kind on packed layers, and two tuners of its own for training through a quantizer.

PEFT learns of them when it is imported (:mod:`hfq._autoload`), so an adapter loads by every route without
``import hfq``.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = [
    "QALoraConfig", "QALoraModel", "RankDecayCallback", "RankDecayConfig", "RankDecayModel", "decay_step",
    "learning_groups", "prepare_for_training", "register",
]  # fmt: skip

_HOMES = {
    "QALoraConfig": "qalora", "QALoraModel": "qalora", "learning_groups": "qalora", "RankDecayConfig": "rank_decay",
    "RankDecayModel": "rank_decay", "RankDecayCallback": "callback", "decay_step": "rank_decay",
    "prepare_for_training": "preparation",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register() -> None:
    """Make PEFT know packed layers and the tuners, also when an adapter is read from disk. Idempotent."""
    from hfq.integrations.peft import lora, preparation, qalora, rank_decay, registry, targets

    lora.register()
    targets.register()
    preparation.register()
    registry.add("hfq_qalora", qalora.QALoraConfig, qalora.QALoraModel)
    registry.add("hfq_rank_decay", rank_decay.RankDecayConfig, rank_decay.RankDecayModel)


# Registers, whichever of the two is imported first: the modules here need a PEFT that has run to its end.
import peft  # noqa: E402, F401
