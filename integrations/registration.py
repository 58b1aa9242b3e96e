"""Tells transformers, diffusers and peft about hfq. Imported by the import hook when one of them is imported.

Imports only base classes: the engine, the kernels and the model classes come with the first use.
"""

from __future__ import annotations

import importlib
import importlib.util

__all__ = [
    "install_environment", "register_configs", "register_diffusers", "register_models", "register_peft",
    "register_transformers",
]  # fmt: skip


def register_transformers() -> None:
    """Enter ``"hfq"`` in transformers' tables of configs and quantizers. Idempotent."""
    from transformers.quantizers import auto

    from hfq.config import QUANT_METHOD, HfqConfig
    from hfq.integrations.transformers import HfqHfQuantizer

    # Direct entries: the decorators refuse a name that exists, which a reloaded hfq would meet.
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[str(QUANT_METHOD)] = HfqConfig
    auto.AUTO_QUANTIZER_MAPPING[str(QUANT_METHOD)] = HfqHfQuantizer
    if HfqConfig not in auto.LOADING_ATTRIBUTES_CONFIG_TYPES:
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (HfqConfig,)


def register_diffusers() -> None:
    """Enter ``"hfq"`` in diffusers' two dictionaries. Idempotent."""
    from diffusers.quantizers import auto

    from hfq.config import QUANT_METHOD, HfqConfig
    from hfq.integrations.diffusers import HfqDiffusersQuantizer

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[str(QUANT_METHOD)] = HfqConfig
    auto.AUTO_QUANTIZER_MAPPING[str(QUANT_METHOD)] = HfqDiffusersQuantizer


def register_peft() -> None:
    """Teach peft the packed layers, where this version of hfq has the adapters."""
    if importlib.util.find_spec("hfq.integrations.peft") is not None:
        importlib.import_module("hfq.integrations.peft").register()


def register_configs() -> None:
    """Let ``AutoConfig`` know the models of ``hfq.integrations.models``. Idempotent."""
    from hfq.integrations.models import repvgg_config

    repvgg_config.register_config()


def register_models() -> None:
    """Let the automatic classes know the models of ``hfq.integrations.models``. Idempotent."""
    from hfq.integrations.models import repvgg

    repvgg.register_model()


def install_environment() -> None:
    """Give ``hfq.api`` what it needs from the libraries: placement, tokenizers, data sets, progress bars."""
    from hfq import api
    from hfq.integrations import environment

    if api.environment().attach is None:
        api.install(environment.make())
